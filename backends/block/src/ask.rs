//! The operator's side of disks that come and go: `--add-device` and
//! `--remove-device`. `main` calls it in place of serving anything.
//!
//! File and socket are opened with the rights of whoever asks. What is wrong
//! with the input is found before anything is made, by the checks that a program
//! does at its start; if the running program refuses, the socket is removed
//! again.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pericarp_block::{Change, DeviceOptions, Disk, SocketOption, added, removed, start_logging};
use pericarp_confine::SocketFile;
use pericarp_control::{Failure, print};
use pericarp_vhost::Endpoint;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::PROGRAM;

/// How long the running program may take: it lets requests end for 10 s.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks the program behind this control socket.
pub(crate) fn ask(control: &Path, change: &Change) -> Result<(), Failure> {
    start_logging(PROGRAM, log::LevelFilter::Warn);
    match change {
        Change::Add(device) => add(control, device),
        Change::Remove { id, force } => {
            let stream = connect(control)?;
            let said = removed(id, *force).to_string();
            conclude(
                &format!("--remove-device {id}"),
                &exchange(&stream, &said, &[])?,
            )
        }
    }
}

fn add(control: &Path, device: &DeviceOptions) -> Result<(), Failure> {
    let mistake = |key: &str, path: &Path, rule: &dyn Display| {
        Failure::mistake(&format!("--add-device {key}"), path.display(), rule)
    };
    let disk = Disk::open(&device.disk).map_err(|e| mistake("file", &device.disk.file, &e))?;
    let SocketOption::Path(path) = &device.socket else {
        return Err(Failure::run_time("--add-device: no path for the socket"));
    };
    let failed = |e| Failure::run_time(format_args!("{}: {e}", path.display()));
    Endpoint::check(path).map_err(|e| mistake("socket", path, &e))?;
    let stream = connect(control)?;
    let endpoint = Endpoint::bind(path).map_err(|e| mistake("socket", path, &e))?;
    let ours = SocketFile::of_own(path).map_err(failed)?;
    let answer = offer(&stream, device, &disk, &endpoint, path);
    if !answer.as_ref().is_ok_and(|answer| agrees(&parsed(answer))) {
        ours.remove().map_err(failed)?;
    }
    conclude(&format!("--add-device id {}", device.id), &answer?)
}

fn offer(
    stream: &UnixStream,
    device: &DeviceOptions,
    disk: &Disk,
    endpoint: &Endpoint,
    path: &Path,
) -> Result<String, Failure> {
    let failed = |e| Failure::run_time(format_args!("{}: {e}", path.display()));
    let socket = endpoint.descriptor().map_err(failed)?;
    let mut by_name = OpenOptions::new();
    by_name
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
    let file = by_name.open(path).map_err(failed)?;
    let said = added(device, disk).to_string();
    let descriptors = [disk.descriptor(), socket.as_fd(), file.as_fd()];
    exchange(stream, &said, &descriptors)
}

fn connect(control: &Path) -> Result<UnixStream, Failure> {
    let limits = |stream: &UnixStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))
    };
    UnixStream::connect(control)
        .and_then(|stream| limits(&stream).map(|()| stream))
        .map_err(|e| {
            let rule = format!("nobody answers there ({e}): give that of a running program");
            Failure::mistake("--control-path", control.display(), rule)
        })
}

/// Sends a line with these descriptors and returns the one that is answered.
fn exchange(
    stream: &UnixStream,
    said: &str,
    descriptors: &[BorrowedFd<'_>],
) -> Result<String, Failure> {
    let failed = |e: std::io::Error| {
        Failure::run_time(format_args!("the running program does not answer: {e}"))
    };
    let line = format!("{said}\n");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    // They go with the first byte.
    let slices = [IoSlice::new(line.as_bytes())];
    let sent = sendmsg(stream, &slices, &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(|errno| failed(errno.into()))?;
    let mut rest = stream;
    rest.write_all(&line.as_bytes()[sent..]).map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .map_err(failed)?;
    Ok(answer)
}

/// An answer, or null for what is none.
fn parsed(answer: &str) -> Value {
    serde_json::from_str(answer).unwrap_or_default()
}

fn agrees(answer: &Value) -> bool {
    answer["ok"] == Value::Bool(true)
}

/// Shows the answer; a refusal becomes the program's own.
fn conclude(asked: &str, answer: &str) -> Result<(), Failure> {
    let said = parsed(answer);
    if !said.is_object() {
        return Err(Failure::run_time(
            "the running program ended, or is none of ours",
        ));
    }
    print(&format!("{}\n", answer.trim_end()))?;
    if agrees(&said) {
        return Ok(());
    }
    let error = said["error"].as_str().unwrap_or("refused");
    let line = format!("{asked}: {error}");
    Err(if said["mistake"] == Value::Bool(true) {
        Failure::input(line)
    } else {
        Failure::run_time(line)
    })
}
