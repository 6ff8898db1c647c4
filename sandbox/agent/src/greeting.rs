//! The first and the last thing the host hears of this program.
//!
//! `main` greets the host when it can be asked; the connection is kept for the last words, which
//! come from whoever finds that this program cannot go on.

use std::{
    fs::File,
    io::{self, Write},
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use pericarp_api::{HELLO_PORT, HOST_CID, Hello, hello};

use crate::{
    boot::{self, uptime_ms},
    error::AgentError,
    vsock,
};

/// The driver needs a moment after its module has been loaded.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);
/// Time for the last words to leave the machine.
const LINGER: Duration = Duration::from_millis(200);

static HOST: OnceLock<File> = OnceLock::new();

/// Tells the host that it can ask.
pub(crate) fn send(kernel_ms: u32) -> Result<(), AgentError> {
    let mut attempt = 0;
    let connection = loop {
        attempt += 1;
        match vsock::connect(HOST_CID, HELLO_PORT) {
            Ok(connection) => break connection,
            Err(error) if attempt == TRIES => return Err(AgentError::NoHost(error)),
            Err(_) => thread::sleep(PAUSE),
        }
    };
    let mut connection = File::from(connection);
    let hello = Hello {
        kernel_ms,
        agent_ms: uptime_ms(),
    };
    hello.write(&mut connection).map_err(AgentError::NoHost)?;
    let _ = HOST.set(connection);
    Ok(())
}

/// A panic anywhere is the end of the machine, and is said.
pub(crate) fn speak_at_panic() {
    panic::set_hook(Box::new(|info| die(&info.to_string())));
}

/// Says one line to the host and to the console, and switches off.
pub(crate) fn die(why: &str) -> ! {
    static DYING: AtomicBool = AtomicBool::new(false);
    if DYING.swap(true, Ordering::SeqCst) {
        // What follows from the first failure need not be told, and must not end this program
        // before it has been told.
        loop {
            thread::park();
        }
    }
    let line = hello::printable(why);
    say(&line);
    if let Some(mut host) = HOST.get() {
        let _ = writeln!(host, "{line}");
        thread::sleep(LINGER);
    }
    boot::power_off()
}

/// Says one line to the console, if there is one.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "pericarp-agent: {line}");
}
