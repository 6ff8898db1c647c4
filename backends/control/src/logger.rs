//! Log lines on stderr, at a bounded rate.
//!
//! The `main` of each sidecar starts it before anything else. A guest or front end can provoke some
//! of these lines, so that their number per second has a limit; what was left
//! out is counted and said.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Lines per second; more is a flood.
const LINES_PER_SECOND: u32 = 20;

/// Bytes of a line, which a pipe takes whole.
const MAX_LINE: usize = 4096;

struct Logger {
    program: &'static str,
    window: Mutex<Window>,
}

struct Window {
    start: Instant,
    lines: u32,
    dropped: u32,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // A panic while holding the lock leaves nothing half done.
        let mut window = self.window.lock().unwrap_or_else(|e| e.into_inner());
        let mut dropped = 0;
        if window.start.elapsed() >= Duration::from_secs(1) {
            dropped = window.dropped;
            *window = Window {
                start: Instant::now(),
                lines: 0,
                dropped: 0,
            };
        }
        if window.lines >= LINES_PER_SECOND {
            window.dropped += 1;
            return;
        }
        // A reader that stalls must not stall the thread that logs: a pipe
        // with room takes a line whole (PIPE_BUF).
        let stderr = std::io::stderr();
        let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
        let ready = poll(&mut room, Some(&Timespec::default()));
        if ready != Ok(1) || !room[0].revents().contains(PollFlags::OUT) {
            window.dropped += 1;
            return;
        }
        window.lines += 1;
        drop(window);
        let level = record.level().as_str().to_ascii_lowercase();
        let mut text = format!("{}: {level}: {}\n", self.program, record.args());
        if dropped > 0 {
            text.insert_str(0, &format!("{}: {dropped} lines left out\n", self.program));
        }
        // Nobody to tell if stderr is gone.
        text.truncate(text.floor_char_boundary(MAX_LINE));
        let _ = (&stderr).write_all(text.as_bytes());
    }

    fn flush(&self) {}
}

/// Sends the `log` crate's records to stderr, prefixed with the program's name.
pub fn start_logging(program: &'static str, level: LevelFilter) {
    let logger = Logger {
        program,
        window: Mutex::new(Window {
            start: Instant::now(),
            lines: 0,
            dropped: 0,
        }),
    };
    // Fails only if a logger is there already, which then does the job.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}
