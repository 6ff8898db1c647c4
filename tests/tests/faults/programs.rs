//! The sidecars that are starved, each in a directory of its own with all that it can be
//! asked to make there: sockets, a file for requests in flight, one for its state.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::{Client, TAG};
use pericarp_tests::network::{Network, TAP};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::peer;

use super::OK;

/// What is asked of it may take so long.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
const DISK: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Block,
    Fs,
    Net,
    Vsock,
}

/// Keeps a program's surroundings, if it needs any.
pub(crate) struct Ground(#[expect(dead_code, reason = "it is left with this")] Option<Network>);

impl Program {
    pub(crate) fn part(self) -> Part {
        match self {
            Program::Block => Part::PERICARP_BLOCK,
            Program::Fs => Part::PERICARP_FS,
            Program::Net => Part::PERICARP_NET,
            Program::Vsock => Part::PERICARP_VSOCK,
        }
    }

    /// `None` where it cannot be started, which is said.
    pub(crate) fn ground(self, test: &str) -> Option<Ground> {
        let parts = [self.part()];
        match self {
            Program::Net => Network::here(test, &parts, 1).map(|network| Ground(Some(network))),
            _ => have(test, &parts).then_some(Ground(None)),
        }
    }

    pub(crate) fn path(self) -> PathBuf {
        self.part().find().unwrap()
    }

    /// Makes what is served.
    pub(crate) fn prepare(self, dir: &Path) {
        fs::create_dir(dir).unwrap();
        match self {
            Program::Block => fs::write(dir.join("disk"), [7; DISK]).unwrap(),
            Program::Fs => fs::create_dir(dir.join("tree")).unwrap(),
            Program::Net | Program::Vsock => {}
        }
    }

    /// All that it is told to make, it makes in `dir`.
    pub(crate) fn describe(self, dir: &Path, command: &mut Command) {
        command.arg("--socket-path").arg(self.socket(dir));
        if self != Program::Vsock {
            command.arg("--control-path").arg(dir.join("c"));
        }
        match self {
            Program::Block => {
                command.arg("--blk-file").arg(dir.join("disk"));
                command.arg("--inflight-file").arg(dir.join("inflight"));
            }
            Program::Fs => {
                command.arg("--shared-dir").arg(dir.join("tree"));
                command
                    .args(["--tag", TAG, "--state-file"])
                    .arg(dir.join("state"));
                command.arg("--inflight-file").arg(dir.join("inflight"));
            }
            Program::Net => {
                command.args(["--tap", TAP]);
            }
            Program::Vsock => {
                command
                    .args(["--guest-cid", "3", "--uds-path"])
                    .arg(dir.join("u"));
            }
        }
    }

    pub(crate) fn socket(self, dir: &Path) -> PathBuf {
        dir.join("s")
    }

    /// A front end comes, agrees with it and has it do something.
    pub(crate) fn answers(self, dir: &Path) -> Result<(), String> {
        self.answers_within(LIMIT, dir)
    }

    /// As [`Self::answers`], for a front end that waits no longer than this for each answer.
    pub(crate) fn answers_within(self, limit: Duration, dir: &Path) -> Result<(), String> {
        let socket = self.socket(dir);
        let queues = match self {
            Program::Block => 1,
            Program::Net => 3,
            Program::Fs | Program::Vsock => 2,
        };
        let setup = Setup {
            queues,
            limit,
            ..Setup::default()
        };
        match self {
            Program::Fs => {
                let mut guest = Client::connect(&socket, &setup).map_err(|e| e.to_string())?;
                guest.init().map_err(|e| e.to_string())?;
                guest.getattr(ROOT).map_err(|e| e.to_string())?;
            }
            Program::Block => {
                let driver = Driver::connect(&socket, &setup);
                let mut driver = driver.map_err(|e| e.to_string())?;
                let read = Op::Read {
                    sector: 0,
                    len: 4096,
                };
                let answer = driver.request(0, &read).map_err(|e| e.to_string())?;
                if answer.status != OK || answer.data != [7; 4096] {
                    return Err(format!("a read got status {}", answer.status));
                }
            }
            Program::Net | Program::Vsock => {
                let stream = peer::connect(&socket).map_err(|e| e.to_string())?;
                let timed = stream.set_read_timeout(Some(limit));
                timed.map_err(|e| e.to_string())?;
                Driver::over(stream, &setup).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

/// Names and sizes of all there is in a directory.
pub(crate) fn picture(dir: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        let len = entry.metadata().map_or(0, |found| match found.is_file() {
            true => found.len(),
            false => 0,
        });
        (name, len)
    });
    entries.collect()
}

/// What is wrong with how a program ended that could not start: with one line of its own,
/// after whatever it logged, and without a trace.
pub(crate) fn ending(
    program: Program,
    said: &str,
    code: Option<i32>,
    codes: &[i32],
) -> Vec<String> {
    let mut wrong = Vec::new();
    if !code.is_some_and(|code| codes.contains(&code)) {
        wrong.push(format!("code {code:?}"));
    }
    let name = format!("{}: ", program.part().program());
    let own: Vec<&str> = said.lines().collect();
    let logged = |line: &&&str| {
        let rest = line.strip_prefix(&name);
        rest.is_some_and(|rest| {
            ["warn: ", "error: "]
                .iter()
                .any(|level| rest.starts_with(level))
        })
    };
    let lines = own.iter().filter(|line| !logged(line)).count();
    if lines != 1 || !own.last().is_some_and(|line| line.starts_with(&name)) {
        wrong.push(format!("{lines} lines"));
    }
    wrong
}
