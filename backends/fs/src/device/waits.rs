//! Requests that wait for a lock. Nobody sits in a system call for them: the
//! kernel would have to be interrupted there, and a guest that waits for what
//! never comes could use up all threads. One thread, which is there as long as
//! somebody waits, asks for each lock again and again: at once when a lock of
//! this directory is given up, else after a millisecond and ever less often, up
//! to every 50.
//!
//! How many wait is bounded, since each has a place in a virtqueue that whoever
//! gives a lock up needs, too.

use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::warn;
use pericarp_share::Errno;

/// The most that wait on one device, whatever the size of its queues.
const MOST: usize = 64;
/// Descriptors of a queue for each: as many again are left for others.
const EACH: usize = 8;
/// Numbers of requests to be interrupted that have not been seen: INTERRUPT has
/// a queue of its own and may overtake them.
const EARLY: usize = 64;

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Asks for the lock, without waiting.
pub(super) type Attempt = Box<dyn FnMut() -> Result<(), Errno> + Send>;
/// Tells whoever waits how it ended.
pub(super) type End = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// One that waits. Its ending is an errno, or 0 while it may go on.
struct Wait {
    attempt: Attempt,
    end: End,
    ending: Arc<AtomicI32>,
}

#[derive(Default)]
struct State {
    /// Not looked at by the thread yet.
    new: Vec<Wait>,
    /// All that wait, by the number of the request.
    endings: Vec<(u64, Arc<AtomicI32>)>,
    early: VecDeque<u64>,
    /// There is a thread.
    runs: bool,
    /// Something has changed since it looked.
    look: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    most: usize,
}

/// All that wait on a device.
pub(super) struct Waits(Arc<Shared>);

impl std::fmt::Debug for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waiting = self.0.lock().endings.len();
        f.debug_struct("Waits").field("waiting", &waiting).finish()
    }
}

impl Waits {
    pub(super) fn new(queue_size: u16) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            most: (usize::from(queue_size) / (2 * EACH)).clamp(1, MOST),
        }))
    }

    /// Asks until the lock is there, or somebody ends it.
    pub(super) fn add(&self, unique: u64, attempt: Attempt, end: End) {
        let mut state = self.0.lock();
        let early = state.early.iter().position(|number| *number == unique);
        if let Some(place) = early {
            state.early.remove(place);
            drop(state);
            return end(Err(Errno::INTR));
        }
        if state.endings.len() >= self.0.most {
            drop(state);
            return end(Err(Errno::NOLCK));
        }
        let ending = Arc::new(AtomicI32::new(0));
        state.endings.push((unique, Arc::clone(&ending)));
        state.new.push(Wait {
            attempt,
            end,
            ending,
        });
        state.look = true;
        let starts = !mem::replace(&mut state.runs, true);
        drop(state);
        self.0.changed.notify_one();
        if starts {
            let shared = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("locks".to_owned());
            if let Err(refusal) = thread.spawn(move || shared.run()) {
                warn!("no thread for locks: {refusal}");
                self.end_all(Errno::NOLCK);
                self.0.run();
            }
        }
    }

    /// A lock was given up.
    pub(super) fn look(&self) {
        let mut state = self.0.lock();
        if state.runs {
            state.look = true;
            drop(state);
            self.0.changed.notify_one();
        }
    }

    /// The guest wants no more of a request, which may be any, or is yet to come.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut state = self.0.lock();
        let mut found = false;
        for (_, ending) in state.endings.iter().filter(|(number, _)| *number == unique) {
            ending.store(Errno::INTR.raw_os_error(), Ordering::Release);
            found = true;
        }
        if !found {
            if state.early.len() == EARLY {
                state.early.pop_front();
            }
            state.early.push_back(unique);
            return;
        }
        state.look = true;
        drop(state);
        self.0.changed.notify_one();
    }

    /// Nobody is to wait any longer.
    pub(super) fn end_all(&self, errno: Errno) {
        let mut state = self.0.lock();
        state.early.clear();
        for (_, ending) in &state.endings {
            ending.store(errno.raw_os_error(), Ordering::Release);
        }
        state.look = true;
        drop(state);
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread, until nobody waits.
    fn run(&self) {
        let mut all: Vec<Wait> = Vec::new();
        let mut pause = FIRST_PAUSE;
        loop {
            let mut state = self.lock();
            if !state.look && !all.is_empty() {
                let waited = self.changed.wait_timeout(state, pause);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            pause = match mem::take(&mut state.look) {
                true => FIRST_PAUSE,
                false => (pause * 2).min(LONGEST_PAUSE),
            };
            all.append(&mut state.new);
            if all.is_empty() {
                state.runs = false;
                return;
            }
            drop(state);
            // In the order they came: who has waited longest is first.
            for mut wait in mem::take(&mut all) {
                let result = match wait.ending.load(Ordering::Acquire) {
                    0 => (wait.attempt)(),
                    errno => Err(Errno::from_raw_os_error(errno)),
                };
                if result == Err(Errno::AGAIN) {
                    all.push(wait);
                    continue;
                }
                let mut state = self.lock();
                let same = |(_, ending): &(u64, Arc<AtomicI32>)| Arc::ptr_eq(ending, &wait.ending);
                if let Some(place) = state.endings.iter().position(same) {
                    state.endings.swap_remove(place);
                }
                drop(state);
                (wait.end)(result);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// Waits until `free` says that the lock is.
    fn wait(waits: &Waits, unique: u64, free: &Arc<AtomicBool>) -> Receiver<Result<(), Errno>> {
        let (tell, told) = channel();
        let free = Arc::clone(free);
        let attempt = move || match free.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(Errno::AGAIN),
        };
        let end = move |result| tell.send(result).unwrap();
        waits.add(unique, Box::new(attempt), Box::new(end));
        told
    }

    #[test]
    fn a_lock_that_is_free_ends_the_wait_and_the_thread_with_it() {
        let waits = Waits::new(1024);
        for _ in 0..3 {
            let free = Arc::new(AtomicBool::new(false));
            let told = wait(&waits, 7, &free);
            assert!(told.try_recv().is_err());
            free.store(true, Ordering::SeqCst);
            // Nobody says so: it is found out.
            assert_eq!(told.recv(), Ok(Ok(())));
            while waits.0.lock().runs {
                std::thread::yield_now();
            }
        }
        assert!(waits.0.lock().endings.is_empty());
    }

    #[test]
    fn one_is_interrupted_and_then_all() {
        let waits = Waits::new(1024);
        let free = Arc::new(AtomicBool::new(false));
        let told: Vec<_> = (1..=5).map(|unique| wait(&waits, unique, &free)).collect();
        waits.interrupt(3);
        assert_eq!(told[2].recv(), Ok(Err(Errno::INTR)));
        assert_eq!(waits.0.lock().endings.len(), 4);
        waits.end_all(Errno::NOLCK);
        for index in [0, 1, 3, 4] {
            assert_eq!(told[index].recv(), Ok(Err(Errno::NOLCK)));
        }
        // What was ended leaves nothing that ends the next.
        let told = wait(&waits, 1, &free);
        free.store(true, Ordering::SeqCst);
        assert_eq!(told.recv(), Ok(Ok(())));
    }

    #[test]
    fn an_interrupt_may_come_first_and_as_many_are_remembered() {
        let waits = Waits::new(1024);
        let free = Arc::new(AtomicBool::new(false));
        for unique in 0..1000 {
            waits.interrupt(unique);
        }
        assert_eq!(waits.0.lock().early.len(), EARLY);
        assert_eq!(wait(&waits, 999, &free).recv(), Ok(Err(Errno::INTR)));
        let told = wait(&waits, 999, &free);
        waits.interrupt(999);
        assert_eq!(told.recv(), Ok(Err(Errno::INTR)));
    }

    #[test]
    fn as_many_wait_as_leave_room_in_the_queue() {
        for (size, most) in [(16, 1), (128, 8), (1024, 64), (32768, 64)] {
            let waits = Waits::new(size);
            let free = Arc::new(AtomicBool::new(false));
            let told: Vec<_> = (0..most + 3)
                .map(|unique| wait(&waits, unique, &free))
                .collect();
            let (inside, beyond) = told.split_at(most as usize);
            for told in beyond {
                assert_eq!(told.recv(), Ok(Err(Errno::NOLCK)), "{size}");
            }
            free.store(true, Ordering::SeqCst);
            for told in inside {
                assert_eq!(told.recv(), Ok(Ok(())), "{size}");
            }
        }
    }
}
