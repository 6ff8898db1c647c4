//! Waiting with an end. Every wait in the rigs goes through here, a socket time-out or, for the
//! front end of the crate `vhost`, which tries again after one, the lifetime of the process that
//! it waits for (`process`): a hung peer is a failed test and not a hung run.

use std::fs::File;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// A moment after which waiting is a failure.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Deadline(Instant::now() + limit)
    }

    /// What is left, zero when it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// True once it has passed.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Calls `ready` until it gives a value or `limit` is over. Starts fast and
/// backs off to a millisecond, so that short waits stay short.
pub fn poll<T>(limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Deadline::after(limit);
    let mut pause = Duration::from_micros(10);
    loop {
        if let Some(value) = ready() {
            return Some(value);
        }
        if deadline.passed() {
            return None;
        }
        sleep(pause.min(deadline.left()));
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

/// Held by a test that needs a CPU or much memory for itself. Works across
/// test executables, which cargo may run beside other builds of the same tree.
#[derive(Debug)]
pub struct Alone(#[expect(dead_code, reason = "the lock lives as long as the file")] File);

impl Alone {
    /// Waits for its turn, at most ten minutes: the tests before it are bounded.
    ///
    /// # Panics
    /// When the turn does not come.
    pub fn turn() -> Self {
        Alone(turn(FlockOperation::NonBlockingLockExclusive))
    }
}

/// Held by a test with one busy CPU, as a guest of User-mode Linux has: as many
/// of these run side by side as there are threads of tests, and none beside one
/// that is [`Alone`].
#[derive(Debug)]
pub struct OneCpu(#[expect(dead_code, reason = "the lock lives as long as the file")] File);

impl OneCpu {
    /// As [`Alone::turn`].
    ///
    /// # Panics
    /// When the turn does not come.
    pub fn turn() -> Self {
        OneCpu(turn(FlockOperation::NonBlockingLockShared))
    }
}

fn turn(lock: FlockOperation) -> File {
    let path = std::env::temp_dir().join("pericarp-tests-alone.lock");
    let file = File::create(&path).expect("the lock file can be created");
    let taken = poll(Duration::from_secs(600), || flock(&file, lock).ok());
    assert!(
        taken.is_some(),
        "{}: another test holds the lock too long",
        path.display()
    );
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_gives_up_and_says_so() {
        assert_eq!(poll(Duration::from_millis(5), || None::<()>), None);
        assert_eq!(poll(Duration::ZERO, || Some(1)), Some(1));
    }
}
