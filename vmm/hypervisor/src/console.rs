//! The guest's serial console, read and kept within bounds.
//!
//! A driver hands the stream that carries the console to [`Console::follow`], which reads it to
//! its end on a thread of its own: a guest that floods its console is drained and can fill neither
//! memory nor disk. Nothing a guest prints here is trusted; it only ends up in messages.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use crate::ring::Ring;

/// How a panicking kernel introduces its last message.
const PANIC: &str = "Kernel panic - not syncing";

/// How much of the console is kept, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Bytes kept in memory.
    pub keep: usize,
    /// Also written to this file, which never grows beyond twice `keep`: when it would, it is
    /// cut back to the last `keep` bytes.
    pub file: Option<PathBuf>,
}

impl Default for ConsoleSpec {
    fn default() -> Self {
        Self {
            keep: 64 * 1024,
            file: None,
        }
    }
}

/// A console that is being followed. Clones see the same one.
#[derive(Debug, Clone)]
pub struct Console {
    ring: Arc<Mutex<Ring>>,
}

impl Console {
    /// Reads `source` to its end on a new thread.
    ///
    /// # Errors
    ///
    /// The log file cannot be created, or the thread not started.
    pub fn follow(spec: &ConsoleSpec, source: impl Read + Send + 'static) -> io::Result<Self> {
        let ring = Arc::new(Mutex::new(Ring::new(spec.keep)));
        let log = match &spec.file {
            Some(path) => Some(Log {
                file: File::create(path)?,
                size: 0,
                keep: spec.keep,
            }),
            None => None,
        };
        let shared = Arc::clone(&ring);
        thread::Builder::new()
            .name("console".into())
            .stack_size(64 * 1024)
            .spawn(move || drain(source, &shared, log))?;
        Ok(Self { ring })
    }

    /// The last `count` lines that are not blank.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        lock(&self.ring).last_lines(count)
    }

    /// The line with which the kernel announced its panic, if one is in what is kept.
    #[must_use]
    pub fn panic_line(&self) -> Option<String> {
        let lines = lock(&self.ring).lines();
        let line = lines.iter().rev().find(|line| line.contains(PANIC))?;
        line.find(PANIC).map(|at| line[at..].to_owned())
    }

    /// Bytes the guest has printed so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        lock(&self.ring).total()
    }
}

fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    // A ring is whole between any two pushes.
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drain(mut source: impl Read, ring: &Mutex<Ring>, mut log: Option<Log>) {
    let mut buffer = [0; 4096];
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        lock(ring).push(&buffer[..count]);
        if let Some(open) = &mut log
            && open.write(&buffer[..count], ring).is_err()
        {
            // A full disk must not stop the guest: go on in memory only.
            log = None;
        }
    }
}

struct Log {
    file: File,
    size: usize,
    keep: usize,
}

impl Log {
    fn write(&mut self, bytes: &[u8], ring: &Mutex<Ring>) -> io::Result<()> {
        if self.size + bytes.len() <= 2 * self.keep {
            self.size += bytes.len();
            return self.file.write_all(bytes);
        }
        let kept = lock(ring).contents();
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.size = kept.len();
        self.file.write_all(&kept)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn follow_all(spec: &ConsoleSpec, bytes: Vec<u8>) -> Console {
        let total = bytes.len() as u64;
        let console = Console::follow(spec, io::Cursor::new(bytes)).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while console.total() < total && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(console.total(), total);
        console
    }

    #[test]
    fn a_panic_is_recognised_with_its_reason() {
        let console = follow_all(
            &ConsoleSpec::default(),
            b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\n[    1.1] CPU: 0\r\n"
                .to_vec(),
        );
        assert_eq!(
            console.panic_line().as_deref(),
            Some("Kernel panic - not syncing: sysrq triggered crash")
        );
        assert_eq!(console.last_lines(1), ["[    1.1] CPU: 0"]);
    }

    #[test]
    fn a_flood_fills_neither_memory_nor_disk() {
        let path = std::env::temp_dir().join(format!("pericarp-console-{}", std::process::id()));
        let spec = ConsoleSpec {
            keep: 1000,
            file: Some(path.clone()),
        };
        let mut bytes = b"0123456789\n".repeat(100_000);
        bytes.extend_from_slice(b"the end\n");
        let console = follow_all(&spec, bytes);
        assert_eq!(console.last_lines(1), ["the end"]);
        assert!(console.panic_line().is_none());
        // The thread writes the file after the ring.
        let end = Instant::now() + Duration::from_secs(10);
        let mut log = Vec::new();
        while !log.ends_with(b"the end\n") && Instant::now() < end {
            log = std::fs::read(&path).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        assert!(
            log.ends_with(b"the end\n") && log.len() <= 2000,
            "{} bytes",
            log.len()
        );
    }
}
