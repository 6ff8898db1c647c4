//! `pericarp stop`: asks the command of a run to end, and ends it if it does not.

use std::{
    ffi::OsString,
    thread,
    time::{Duration, Instant},
};

use pericarp_api::host::Guest;
use pericarp_pod::process::Name;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    commands::{Refusal, find, reader::Grammar},
    failure::Failure,
    guest::calls,
    input::problem::Problem,
    registry::{self, CONTAINER, Entry},
};

const HELP: &str = "\
Ends runs: sends the command the stop signal of its image (SIGTERM unless it says
otherwise), and SIGKILL when it has not ended after a while.

Usage: pericarp stop [OPTIONS] NAME...

Options:
  -t, --time SECONDS  how long the command may take (default: 10)
  -h, --help          show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp stop",
    help: HELP,
    flags: &[],
    options: &[('t', "time", false)],
    ends_at_operand: false,
};

/// How long a run may take to end in good order once its command has.
const CLEANUP: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if given.operands.is_empty() {
        return Err(GRAMMAR.missing("NAME", "at least one run has to be named"));
    }
    let patience = match given.value("time") {
        None => 10,
        Some(text) => text.parse::<u32>().map_err(|_| {
            let rule = "is not a number of seconds";
            Problem::new("--time", text.to_owned(), rule, "write one, such as 30")
        })?,
    };
    let entries: Vec<Entry> = given
        .operands
        .iter()
        .map(|name| find(name))
        .collect::<Result<_, _>>()?;
    for entry in entries {
        end(&entry, Duration::from_secs(patience.into()))?;
        println!("{}", entry.record.name);
    }
    Ok(0)
}

/// Ends a run, politely first. One that is over is no error.
pub(crate) fn end(entry: &Entry, patience: Duration) -> Result<(), Failure> {
    if !entry.alive {
        return Ok(());
    }
    if entry.is_running() && entry.record.runtime == "vm" {
        let guest = Guest::new(entry.guest_socket());
        let name = Name {
            container: CONTAINER.into(),
            process: String::new(),
        };
        let number = match entry.record.stop_signal {
            0 => libc::SIGTERM as u8,
            number => number,
        };
        // A guest that cannot be asked is ended below.
        if calls::signal(&guest, &name, number, false).is_ok() {
            if is_over_within(entry, patience)? {
                return Ok(());
            }
            if calls::signal(&guest, &name, libc::SIGKILL as u8, false).is_ok()
                && is_over_within(entry, CLEANUP)?
            {
                return Ok(());
            }
        }
    } else {
        terminate(entry, Signal::TERM);
        if is_over_within(entry, patience)? {
            return Ok(());
        }
    }
    // Its machine and sidecars end with it.
    terminate(entry, Signal::KILL);
    if is_over_within(entry, CLEANUP)? {
        return Ok(());
    }
    Err(Failure::Setup(format!(
        "the run '{}' does not end",
        entry.record.name
    )))
}

/// Signals the process that runs it. Its number may have been used again, so the run is looked at
/// once more with the process held.
fn terminate(entry: &Entry, signal: Signal) {
    let held = i32::try_from(entry.record.pid)
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    if let Some(process) = held
        && is_alive(entry).unwrap_or(false)
    {
        let _ = pidfd_send_signal(process, signal);
    }
}

fn is_alive(entry: &Entry) -> Result<bool, Failure> {
    Ok(registry::all()?
        .iter()
        .any(|now| now.record.id == entry.record.id && now.alive))
}

fn is_over_within(entry: &Entry, limit: Duration) -> Result<bool, Failure> {
    let end = Instant::now() + limit;
    loop {
        if !is_alive(entry)? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        thread::sleep(PAUSE);
    }
}
