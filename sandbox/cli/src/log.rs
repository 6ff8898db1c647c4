//! What a detached run's command has said, kept for `pericarp logs`.
//!
//! One line per line of output: time, stream, `F` for a full line or `P` for a part of one, and
//! the text. This is the form that Kubernetes' runtimes and podman write. The size is bounded: at
//! [`MAX_SIZE`] the file becomes `log.old`, in the place of an earlier one.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

/// Bytes after which a file is put aside; twice this is all that is kept.
const MAX_SIZE: u64 = 16 << 20;
/// A longer line is written in parts.
const MAX_LINE: usize = 16 * 1024;

/// The log of one run.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    size: u64,
    max_size: u64,
}

impl Log {
    /// Begins a log in a run's directory and returns the ends for the two outputs.
    pub(crate) fn create(directory: &Path) -> io::Result<(Stream, Stream)> {
        Self::create_bounded(directory, MAX_SIZE)
    }

    fn create_bounded(directory: &Path, max_size: u64) -> io::Result<(Stream, Stream)> {
        let path = current(directory);
        let log = Self {
            file: File::create_new(&path)?,
            path,
            size: 0,
            max_size,
        };
        let log = Arc::new(Mutex::new(log));
        let stream = |name| Stream {
            name,
            log: Arc::clone(&log),
            line: Vec::new(),
        };
        Ok((stream("stdout"), stream("stderr")))
    }

    fn write(&mut self, stream: &str, kind: char, text: &[u8]) -> io::Result<()> {
        let time = humantime::format_rfc3339_nanos(SystemTime::now());
        let mut line = format!("{time} {stream} {kind} ").into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.size + line.len() as u64 > self.max_size && self.size > 0 {
            fs::rename(&self.path, old(self.path.parent().unwrap_or(Path::new(""))))?;
            self.file = File::create_new(&self.path)?;
            self.size = 0;
        }
        self.size += line.len() as u64;
        self.file.write_all(&line)
    }
}

/// One output's way into the log. Ends an unfinished line when dropped.
#[derive(Debug)]
pub(crate) struct Stream {
    name: &'static str,
    log: Arc<Mutex<Log>>,
    line: Vec<u8>,
}

impl Stream {
    fn put(&self, kind: char, text: &[u8]) -> io::Result<()> {
        // A log is whole between any two lines.
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.write(self.name, kind, text)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            for part in text.chunks(MAX_LINE) {
                if self.line.len() + part.len() > MAX_LINE {
                    self.put('P', &self.line)?;
                    self.line.clear();
                }
                self.line.extend_from_slice(part);
            }
            if ends {
                self.put('F', &self.line)?;
                self.line.clear();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A line goes out when it is whole.
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            // Nobody is left to be told of a full disk.
            let _ = self.put('P', &self.line);
        }
    }
}

/// The file that is being written.
pub(crate) fn current(directory: &Path) -> PathBuf {
    directory.join("log")
}

/// The one before it.
fn old(directory: &Path) -> PathBuf {
    directory.join("log.old")
}

/// One entry of a log, as read back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) time: String,
    pub(crate) is_stderr: bool,
    /// Ends with a line end unless it is a part.
    pub(crate) text: Vec<u8>,
}

impl Line {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let time = String::from_utf8(fields.next()?.to_owned()).ok()?;
        let is_stderr = fields.next()? == b"stderr";
        let is_full = fields.next()? == b"F";
        let mut text = fields.next()?.to_owned();
        if is_full {
            text.push(b'\n');
        }
        Some(Self {
            time,
            is_stderr,
            text,
        })
    }
}

/// Reads a log from its oldest entry on, and goes on where it stopped.
#[derive(Debug)]
pub(crate) struct Reader {
    directory: PathBuf,
    file: Option<BufReader<File>>,
    /// Of an entry whose end is not written yet.
    begun: Vec<u8>,
    old_is_read: bool,
}

impl Reader {
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            file: File::open(old(directory)).ok().map(BufReader::new),
            begun: Vec::new(),
            old_is_read: false,
        }
    }

    /// The next entry; None when there is none yet.
    pub(crate) fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(file) = &mut self.file {
                file.read_until(b'\n', &mut self.begun)?;
                if self.begun.ends_with(b"\n") {
                    self.begun.pop();
                    let line = Line::parse(&self.begun);
                    self.begun.clear();
                    match line {
                        Some(line) => return Ok(Some(line)),
                        None => continue,
                    }
                }
            }
            if !self.follow()? {
                return Ok(None);
            }
        }
    }

    /// Goes on to the file that is written now. False when that is the one being read.
    fn follow(&mut self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let next = match File::open(current(&self.directory)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if let Some(file) = &self.file
            && self.old_is_read
            && file.get_ref().metadata()?.ino() == next.metadata()?.ino()
        {
            return Ok(false);
        }
        self.old_is_read = true;
        self.file = Some(BufReader::new(next));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pericarp-log-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn texts(reader: &mut Reader) -> Vec<String> {
        std::iter::from_fn(|| reader.next().unwrap())
            .map(|line| {
                let text = String::from_utf8(line.text).unwrap();
                format!("{}{text}", if line.is_stderr { "!" } else { "" })
            })
            .collect()
    }

    #[test]
    fn lines_come_back_with_their_stream_as_they_are_written() {
        let dir = scratch("lines");
        let (mut out, mut err) = Log::create(&dir).unwrap();
        out.write_all(b"one\ntw").unwrap();
        err.write_all(b"oops\n").unwrap();
        let mut reader = Reader::new(&dir);
        assert_eq!(texts(&mut reader), ["one\n", "!oops\n"]);
        out.write_all(b"o\n\n").unwrap();
        assert_eq!(texts(&mut reader), ["two\n", "\n"]);
        out.write_all(&vec![b'x'; MAX_LINE + 1]).unwrap();
        drop(out);
        let parts = texts(&mut reader);
        assert_eq!(
            parts.iter().map(String::len).collect::<Vec<_>>(),
            [MAX_LINE, 1]
        );
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_flood_stays_within_its_bounds_and_the_end_is_there() {
        let dir = scratch("flood");
        let (mut out, _err) = Log::create_bounded(&dir, 10_000).unwrap();
        for number in 0..2000 {
            writeln!(out, "line {number}").unwrap();
        }
        for file in [current(&dir), old(&dir)] {
            assert!(fs::metadata(file).unwrap().len() <= 10_000);
        }
        let lines = texts(&mut Reader::new(&dir));
        assert_eq!(lines.last().unwrap(), "line 1999\n");
        assert!(lines.len() > 200 && lines.len() < 500, "{}", lines.len());
        fs::remove_dir_all(&dir).unwrap();
    }
}
