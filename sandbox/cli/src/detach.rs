//! `-d`: the run goes on without us.
//!
//! The process splits in two before it has threads or has created anything. The child, in a
//! session of its own, does what a run in the foreground does; this process waits until the
//! command runs, or until the child has failed, and says so.

// UNSAFETY: fork has no safe form; a caller with threads would be in trouble.
#![expect(unsafe_code)]

use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Read, Write},
};

use rustix::process::{WaitOptions, WaitStatus, waitpid};

use crate::failure::{Failure, during};

/// Which half goes on.
pub(crate) enum Half {
    /// The run itself. Tell the other when the command runs.
    Run(Ready),
    /// The command runs.
    Started,
    /// The run has failed, with this exit code, and has said why.
    Failed(i32),
}

/// The way to the waiting half.
pub(crate) struct Ready {
    pipe: PipeWriter,
}

impl Ready {
    /// The command runs: from here on nobody reads what this process says.
    pub(crate) fn tell(mut self) -> Result<(), Failure> {
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(during("/dev/null"))?;
        rustix::stdio::dup2_stdin(&null).map_err(during("standard input"))?;
        rustix::stdio::dup2_stdout(&null).map_err(during("standard output"))?;
        rustix::stdio::dup2_stderr(&null).map_err(during("the error output"))?;
        // One that has gone meanwhile needs no answer.
        let _ = self.pipe.write_all(b"1");
        Ok(())
    }
}

/// Splits the process. Call while it has one thread.
pub(crate) fn split() -> Result<Half, Failure> {
    let (reader, writer) = io::pipe().map_err(during("a pipe"))?;
    // SAFETY: the caller has one thread, so no lock is held by another, and both halves may go on
    // as they are.
    match unsafe { libc::fork() } {
        -1 => Err(during("a process of its own")(io::Error::last_os_error())),
        0 => {
            drop(reader);
            rustix::process::setsid().map_err(during("a session of its own"))?;
            Ok(Half::Run(Ready { pipe: writer }))
        }
        child => {
            drop(writer);
            wait(child, reader)
        }
    }
}

fn wait(child: i32, mut reader: PipeReader) -> Result<Half, Failure> {
    let mut byte = [0];
    loop {
        match reader.read(&mut byte) {
            Ok(1) => return Ok(Half::Started),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    let status = rustix::process::Pid::from_raw(child)
        .and_then(|pid| waitpid(Some(pid), WaitOptions::empty()).ok().flatten())
        .map(|(_, status)| status);
    let code = status.and_then(WaitStatus::exit_status);
    Ok(Half::Failed(code.unwrap_or(125)))
}
