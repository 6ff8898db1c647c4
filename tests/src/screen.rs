//! A pseudo-terminal with a program on it, and who looks at it and types. Called by the suites that
//! use a terminal as a person does: `pericarp_run` and `kube`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::bounded::poll;

/// How long something may take to be seen.
const LIMIT: Duration = Duration::from_secs(120);
/// How often what is typed again is typed.
const AGAIN: Duration = Duration::from_millis(500);

/// A terminal with a program on it. The program ends with it.
#[derive(Debug)]
pub struct Screen {
    master: File,
    slave: OwnedFd,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).expect("a terminal has a size");
}

impl Screen {
    /// Starts `command` on a new terminal of this size.
    ///
    /// # Panics
    /// When the kernel gives no terminal, or the program cannot be started.
    pub fn open(mut command: Command, columns: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("a terminal of ours");
        unlockpt(&master).expect("a terminal that can be used");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let slave: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().expect("a path"))
            .expect("its other end")
            .into();
        let master = File::from(master);
        // Before the program looks, as a terminal's is.
        set_size(&master, columns, rows);
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("the program can be started");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let screen = Self {
            slave,
            child,
            seen: Arc::clone(&seen),
            master,
        };
        let mut source = screen.master.try_clone().expect("a descriptor");
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.extend_from_slice(&buffer[..count]);
            }
        });
        screen
    }

    /// As a window does: the terminal knows, and its program is told. The test
    /// is no session leader, so the kernel does not tell it.
    ///
    /// # Panics
    /// When the program has ended.
    pub fn resize(&self, columns: u16, rows: u16) {
        set_size(&self.master, columns, rows);
        kill_process(Pid::from_child(&self.child), Signal::WINCH).expect("the program is there");
    }

    /// All that was to be seen so far.
    pub fn text(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits until this is to be seen.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&self, text: &str) {
        let seen = poll(LIMIT, || self.text().contains(text).then_some(()));
        assert!(seen.is_some(), "no {text:?} in {:?}", self.text());
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal does not take it.
    pub fn type_in(&mut self, text: &str) {
        let typed = self.master.write_all(text.as_bytes());
        typed.expect("a terminal takes what is typed");
    }

    /// Types a line until this comes of it.
    ///
    /// # Panics
    /// When it does not come.
    pub fn type_until(&mut self, line: &str, text: &str) {
        let come = poll(LIMIT, || {
            self.type_in(line);
            poll(AGAIN, || self.text().contains(text).then_some(()))
        });
        assert!(come.is_some(), "no {text:?} in {:?}", self.text());
    }

    /// Whether the terminal handles lines itself, as before and after a session.
    ///
    /// # Panics
    /// When the kernel does not say.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(self.slave.as_fd()).expect("a terminal has modes");
        modes.local_modes.contains(LocalModes::ICANON)
    }

    /// Waits for the program's end; its exit code, or -1 for a signal.
    ///
    /// # Panics
    /// When it does not end.
    pub fn code(&mut self) -> i32 {
        let ended = poll(LIMIT, || self.child.try_wait().ok().flatten());
        let status = ended.unwrap_or_else(|| panic!("no end: {:?}", self.text()));
        status.code().unwrap_or(-1)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
