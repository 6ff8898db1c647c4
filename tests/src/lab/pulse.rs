//! Keeps a laboratory going; [`Lab::run`](super::Lab::run) calls it all the time.
//!
//! QEMU 7.2 now and then forgets the time of a machine with an emulated CPU whose
//! kernel is in a virtual machine of its own: no interrupt is pending, the timer
//! that would end the inner machine's turn never fires, and all stands still with
//! one CPU busy. Told to stop the machine and to continue, it looks at its timers
//! again, and the laboratory goes on where it was.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A console that was silent for so long may belong to such a machine. To one that
/// is just slow it does no harm.
const SILENT: Duration = Duration::from_secs(45);

const ENTER: &str = "{\"execute\":\"qmp_capabilities\"}\n";
const AGAIN: &str = "{\"execute\":\"stop\"}\n{\"execute\":\"cont\"}\n";

/// The monitor of QEMU, and when its machine wrote something.
#[derive(Debug)]
pub(super) struct Pulse {
    socket: PathBuf,
    stream: Option<UnixStream>,
    written: usize,
    since: Instant,
    limit: Duration,
}

impl Pulse {
    /// One whose monitor is there, or will be.
    pub(super) fn of(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            stream: None,
            written: 0,
            since: Instant::now(),
            limit: SILENT,
        }
    }

    /// The console has so many bytes now.
    pub(super) fn feel(&mut self, written: usize) {
        if written != self.written {
            self.written = written;
            self.since = Instant::now();
        } else if self.since.elapsed() > self.limit {
            self.since = Instant::now();
            eprintln!(
                "lab: silent for {} s: stopped and continued",
                self.limit.as_secs()
            );
            // Without its monitor it is as it is: whoever waits has a limit.
            let _ = self.tell();
        }
    }

    fn tell(&mut self) -> std::io::Result<()> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let mut stream = UnixStream::connect(&self.socket)?;
                stream.set_nonblocking(true)?;
                stream.write_all(ENTER.as_bytes())?;
                none.insert(stream)
            }
        };
        // Answers and events are of no interest, but take room.
        let mut answers = [0; 4096];
        while stream.read(&mut answers).is_ok_and(|len| len > 0) {}
        stream.write_all(AGAIN.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn a_silent_machine_is_stopped_and_continued_and_another_is_left_alone() {
        let scratch = Scratch::new();
        let socket = scratch.path("monitor");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut pulse = Pulse::of(&socket);
        pulse.limit = Duration::from_millis(20);
        for written in 1..4 {
            std::thread::sleep(Duration::from_millis(25));
            pulse.feel(written);
        }
        assert!(pulse.stream.is_none());
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(25));
            pulse.feel(3);
        }
        drop(pulse);
        let (stream, _) = listener.accept().unwrap();
        let lines: Vec<_> = BufReader::new(stream).lines().map(Result::unwrap).collect();
        assert_eq!(lines.join("\n") + "\n", [ENTER, AGAIN, AGAIN].concat());
    }
}
