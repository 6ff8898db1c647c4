//! A process's streams as containerd gives them: paths of pipes, mostly.
//!
//! Opened before the process is made, so that containerd's ends open, too. An output is held open
//! for reading as well: it does not break while containerd is away. The input is held open for
//! writing until containerd closes it, since a client that leaves may come back.

use std::{fs::File, os::unix::fs::OpenOptionsExt};

use rustix::fs::OFlags;

use crate::error::{ShimError, during};

/// What containerd says of the streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// Empty: none.
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// The open streams.
pub(crate) struct Opened {
    pub(crate) stdin: Option<File>,
    /// Keeps the input from ending.
    pub(crate) stdin_keeper: Option<File>,
    /// None: nobody wants it.
    pub(crate) stdout: Option<File>,
    pub(crate) stderr: Option<File>,
}

impl Stdio {
    pub(crate) fn open(&self) -> Result<Opened, ShimError> {
        let (mut stdin, mut stdin_keeper) = (None, None);
        if !self.stdin.is_empty() {
            let path = place(&self.stdin)?;
            let open = |write: bool| {
                File::options()
                    .read(!write)
                    .write(write)
                    .custom_flags(OFlags::NONBLOCK.bits() as i32)
                    .open(path)
                    .map_err(during(format!("stdin '{path}'")))
            };
            // A pipe opens for writing only where there is a reader.
            stdin = Some(open(false)?);
            stdin_keeper = Some(open(true)?);
        }
        Ok(Opened {
            stdin,
            stdin_keeper,
            stdout: output(&self.stdout)?,
            stderr: output(&self.stderr)?,
        })
    }
}

fn output(address: &str) -> Result<Option<File>, ShimError> {
    if address.is_empty() {
        return Ok(None);
    }
    let path = place(address)?;
    let mut options = File::options();
    match address.strip_prefix("file://") {
        Some(_) => options.append(true).create(true),
        None => options.read(true).write(true),
    };
    let file = options
        .open(path)
        .map_err(during(format!("output '{path}'")))?;
    Ok(Some(file))
}

/// The path of a stream; of the kinds that have a name of their own, only files are known.
fn place(address: &str) -> Result<&str, ShimError> {
    match address.split_once("://") {
        None => Ok(address),
        Some(("fifo" | "file", path)) => Ok(path),
        Some((kind, _)) => Err(ShimError::Unimplemented(format!(
            "'{address}': streams of the kind {kind} are not there; use a pipe"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Read, Write},
        path::{Path, PathBuf},
    };

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    fn pipe(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        mknodat(CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        path.display().to_string()
    }

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn an_input_ends_when_all_have_closed_it() {
        let directory = directory("stdio-input");
        let stdio = Stdio {
            stdin: pipe(&directory, "in"),
            ..Stdio::default()
        };
        let mut opened = stdio.open().unwrap();
        let mut client = File::options().write(true).open(&stdio.stdin).unwrap();
        client.write_all(b"abc").unwrap();
        drop(client);
        let mut stdin = opened.stdin.take().unwrap();
        let mut buffer = [0; 8];
        assert_eq!(stdin.read(&mut buffer).unwrap(), 3);
        let error = stdin.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(opened.stdin_keeper.take());
        assert_eq!(stdin.read(&mut buffer).unwrap(), 0);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn an_output_outlives_its_reader_and_ends_with_us() {
        let directory = directory("stdio-output");
        let stdio = Stdio {
            stdout: pipe(&directory, "out"),
            ..Stdio::default()
        };
        let opened = stdio.open().unwrap();
        drop(File::open(&stdio.stdout).unwrap());
        let mut output = opened.stdout.as_ref().unwrap();
        output.write_all(b"for whoever comes").unwrap();
        let mut reader = File::open(&stdio.stdout).unwrap();
        drop(opened);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "for whoever comes");
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn other_kinds_are_refused() {
        let stdio = Stdio {
            stdout: "binary:///bin/logger".into(),
            ..Stdio::default()
        };
        let error = stdio.open().err().unwrap().to_string();
        assert!(error.contains("of the kind binary"), "{error}");
    }
}
