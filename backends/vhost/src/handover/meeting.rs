//! Where the sessions of the old process come together when a new one asks.
//!
//! Each device's thread watches [`Meeting::summons`] between two messages. When
//! it is readable the thread brings its queues to rest, leaves its state here
//! and sleeps until it is told to go on or to go. What changes devices from
//! other threads goes through [`Meeting::quietly`], and nothing of it is lost.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::state::Parcel;
use super::{HandOverError, monotonic};

/// Between two looks at whether the other side still waits or lives.
pub(crate) const LOOK: Duration = Duration::from_millis(20);

/// What becomes of a session that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Its queues are its own again.
    Stay,
    /// Another process has them.
    Leave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Quiet,
    /// A device comes or goes.
    Changing,
    /// A new process is there; sessions go on.
    Talking,
    Gathering,
    /// Another process has all of it.
    Gone,
    /// The program ends before another has it.
    Closed,
}

#[derive(Debug)]
struct Hall {
    phase: Phase,
    /// Counts gatherings: whoever sleeps through the end of one must not be
    /// taken for somebody of the next.
    round: u64,
    /// The places of all devices, in the order in which these came.
    expected: Vec<u16>,
    arrived: HashMap<u16, Parcel>,
    failed: Option<HandOverError>,
}

#[derive(Debug)]
struct Inner {
    summons: OwnedFd,
    hall: Mutex<Hall>,
    moved: Condvar,
}

/// The meeting of all devices of a process.
#[derive(Debug, Clone)]
pub struct Meeting(Arc<Inner>);

impl Meeting {
    /// For this many devices to begin with. Before confinement.
    ///
    /// # Errors
    /// The kernel's refusal to make an eventfd.
    pub fn new(devices: usize) -> std::io::Result<Self> {
        // The first look at this clock asks the kernel where the vDSO is, which
        // a confined process may not.
        let _ = monotonic();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(Inner {
            summons: eventfd(0, flags)?,
            hall: Mutex::new(Hall {
                phase: Phase::Quiet,
                round: 0,
                expected: (0..devices).filter_map(|n| n.try_into().ok()).collect(),
                arrived: HashMap::new(),
                failed: None,
            }),
            moved: Condvar::new(),
        })))
    }

    /// The program ends: from here on nobody takes over. True when another
    /// process has all of it already.
    pub fn close(&self) -> bool {
        let mut hall = self.hall();
        if hall.phase != Phase::Gone {
            hall.phase = Phase::Closed;
        }
        self.0.moved.notify_all();
        hall.phase == Phase::Gone
    }

    /// Does what changes a device, unless its state is on its way to another
    /// process, which would not see it: `None` then. It must not wait.
    pub fn quietly<T>(&self, change: impl FnOnce() -> T) -> Option<T> {
        let hall = self.hall();
        let going = matches!(hall.phase, Phase::Gathering | Phase::Gone);
        (!going).then(change)
    }

    /// Whether sessions are waited for.
    pub(crate) fn is_gathering(&self) -> bool {
        self.hall().phase == Phase::Gathering
    }

    /// Readable while sessions are to come.
    pub(crate) fn summons(&self) -> BorrowedFd<'_> {
        self.0.summons.as_fd()
    }

    /// A session came, or could not. Sleeps until it is decided.
    pub(crate) fn arrive(&self, device: u16, parcel: Result<Parcel, HandOverError>) -> Verdict {
        let mut hall = self.hall();
        if hall.phase == Phase::Gathering {
            match parcel {
                Ok(parcel) => {
                    hall.arrived.insert(device, parcel);
                }
                Err(error) => hall.failed = Some(error),
            }
            self.0.moved.notify_all();
        }
        let wait = |hall| self.0.moved.wait(hall);
        let round = hall.round;
        while hall.phase == Phase::Gathering && hall.round == round {
            hall = wait(hall).unwrap_or_else(PoisonError::into_inner);
        }
        if hall.phase == Phase::Gone {
            Verdict::Leave
        } else {
            Verdict::Stay
        }
    }

    /// One new process at a time.
    pub(super) fn open(&self) -> Result<Round<'_>, HandOverError> {
        let mut hall = self.hall();
        hall.be_quiet()?;
        hall.phase = Phase::Talking;
        Ok(Round(self))
    }

    /// A device comes or goes: nobody takes over meanwhile.
    pub(crate) fn change(&self) -> Result<Changing<'_>, HandOverError> {
        let mut hall = self.hall();
        hall.be_quiet()?;
        hall.phase = Phase::Changing;
        Ok(Changing(self))
    }

    /// A device has come to this place.
    pub(crate) fn expect(&self, device: u16) {
        self.hall().expected.push(device);
    }

    /// The device in this place has gone.
    pub(crate) fn forget(&self, device: u16) {
        self.hall().expected.retain(|place| *place != device);
    }

    fn hall(&self) -> MutexGuard<'_, Hall> {
        self.0.hall.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hall {
    /// An error while something goes on that must not be disturbed.
    fn be_quiet(&self) -> Result<(), HandOverError> {
        let text = match self.phase {
            Phase::Quiet => return Ok(()),
            Phase::Changing => "a device is being added or removed: ask again in a moment",
            Phase::Talking | Phase::Gathering => "a hand-over goes on already: wait for its end",
            Phase::Gone => "another program has taken over: ask that one",
            Phase::Closed => return Err(HandOverError::Ending),
        };
        Err(HandOverError::Refused(text.to_owned()))
    }
}

/// A device comes or goes.
#[derive(Debug)]
pub(crate) struct Changing<'a>(&'a Meeting);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut hall = self.0.hall();
        // The program may have been told to end meanwhile.
        if hall.phase == Phase::Changing {
            hall.phase = Phase::Quiet;
        }
    }
}

/// The talk with one new process. Everybody stays unless it is said otherwise.
pub(super) struct Round<'a>(&'a Meeting);

impl Round<'_> {
    /// Has every device come to rest. `alive` is asked now and then, and ends
    /// the wait with its error.
    pub(super) fn gather(
        &self,
        limit: Duration,
        alive: impl Fn() -> Result<(), HandOverError>,
    ) -> Result<Vec<Parcel>, HandOverError> {
        let inner = &self.0.0;
        let end = Instant::now() + limit;
        let mut hall = self.0.hall();
        if hall.phase == Phase::Closed {
            return Err(HandOverError::Ending);
        }
        hall.phase = Phase::Gathering;
        hall.round += 1;
        rustix::io::write(&inner.summons, &1u64.to_ne_bytes())?;
        loop {
            if let Some(error) = hall.failed.take() {
                return Err(error);
            }
            let Hall {
                expected, arrived, ..
            } = &mut *hall;
            if expected.iter().all(|place| arrived.contains_key(place)) {
                return Ok(expected.iter().filter_map(|p| arrived.remove(p)).collect());
            }
            alive()?;
            if Instant::now() > end {
                let late: Vec<String> = expected
                    .iter()
                    .filter(|place| !arrived.contains_key(place))
                    .map(u16::to_string)
                    .collect();
                return Err(HandOverError::Busy(late.join(", "), limit));
            }
            let waited = inner.moved.wait_timeout(hall, LOOK);
            (hall, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The other process has it once `tell` has told it so. Whoever ends this
    /// program meanwhile comes before that or after.
    ///
    /// # Errors
    /// Those of `tell`; everybody stays then.
    pub(super) fn leave(
        self,
        tell: impl FnOnce() -> Result<(), HandOverError>,
    ) -> Result<(), HandOverError> {
        let mut hall = self.0.hall();
        if hall.phase != Phase::Gathering {
            return Err(HandOverError::Ending);
        }
        tell()?;
        hall.phase = Phase::Gone;
        Ok(())
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut hall = self.0.hall();
        if hall.phase != Phase::Gone {
            if hall.phase != Phase::Closed {
                hall.phase = Phase::Quiet;
            }
            // Nobody is called any more before anybody goes on.
            let _ = rustix::io::read(&self.0.0.summons, &mut [0; 8]);
        }
        hall.failed = None;
        hall.arrived.clear();
        self.0.0.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_come_and_the_verdict_is_one() {
        for leave in [false, true] {
            let meeting = Meeting::new(3).unwrap();
            let sessions: Vec<_> = (0..3)
                .map(|device| {
                    let meeting = meeting.clone();
                    std::thread::spawn(move || {
                        while rustix::io::read(meeting.summons(), &mut [0; 8]).is_err() {
                            std::thread::yield_now();
                        }
                        // The others have to see it, too.
                        rustix::io::write(meeting.summons(), &1u64.to_ne_bytes()).unwrap();
                        meeting.arrive(device, Ok(Parcel::idle(&[])))
                    })
                })
                .collect();
            let round = meeting.open().unwrap();
            assert!(meeting.open().is_err(), "one at a time");
            let limit = Duration::from_secs(10);
            assert_eq!(round.gather(limit, || Ok(())).unwrap().len(), 3);
            let want = if leave {
                assert_eq!(meeting.quietly(|| ()), None, "all are on their way");
                round.leave(|| Ok(())).unwrap();
                Verdict::Leave
            } else {
                drop(round);
                Verdict::Stay
            };
            assert_eq!(meeting.quietly(|| ()).is_none(), leave);
            assert_eq!(meeting.close(), leave);
            for session in sessions {
                assert_eq!(session.join().unwrap(), want);
            }
        }
    }

    #[test]
    fn a_gathering_ends_by_time_by_death_and_by_failure() {
        let meeting = Meeting::new(1).unwrap();
        let round = meeting.open().unwrap();
        let short = Duration::from_millis(1);
        let late = round.gather(short, || Ok(())).unwrap_err();
        assert!(matches!(&late, HandOverError::Busy(who, _) if who == "0"));
        let gone = round.gather(Duration::from_secs(10), || Err(HandOverError::Gone));
        assert!(matches!(gone, Err(HandOverError::Gone)));
        drop(round);
        // Who comes late stays.
        let verdict = meeting.arrive(0, Ok(Parcel::idle(&[])));
        assert_eq!(verdict, Verdict::Stay);
        assert!(rustix::io::read(meeting.summons(), &mut [0; 8]).is_err());
        let round = meeting.open().unwrap();
        let other = meeting.clone();
        let session = std::thread::spawn(move || {
            while rustix::io::read(other.summons(), &mut [0; 8]).is_err() {
                std::thread::yield_now();
            }
            other.arrive(0, Err(HandOverError::Descriptors))
        });
        let failed = round.gather(Duration::from_secs(10), || Ok(()));
        assert!(matches!(failed, Err(HandOverError::Descriptors)));
        drop(round);
        assert_eq!(session.join().unwrap(), Verdict::Stay);
    }

    #[test]
    fn devices_come_and_go_between_hand_overs() {
        let meeting = Meeting::new(2).unwrap();
        let round = meeting.open().unwrap();
        assert!(meeting.change().is_err(), "somebody takes over");
        drop(round);
        let change = meeting.change().unwrap();
        assert!(meeting.open().is_err(), "a device comes");
        meeting.forget(0);
        meeting.expect(7);
        meeting.expect(0);
        drop(change);
        // In the order in which they came, not that of their places.
        let round = meeting.open().unwrap();
        std::thread::scope(|scope| {
            for device in [0, 1, 7] {
                let meeting = &meeting;
                scope.spawn(move || {
                    let mut parcel = Parcel::idle(&[]);
                    parcel.state.limits = Some([device, 0, 0, 0]);
                    while rustix::io::read(meeting.summons(), &mut [0; 8]).is_err() {
                        std::thread::yield_now();
                    }
                    rustix::io::write(meeting.summons(), &1u64.to_ne_bytes()).unwrap();
                    meeting.arrive(device as u16, Ok(parcel));
                });
            }
            let parcels = round.gather(Duration::from_secs(10), || Ok(())).unwrap();
            let order: Vec<_> = parcels.iter().map(|p| p.state.limits.unwrap()[0]).collect();
            assert_eq!(order, [1, 7, 0]);
            round.leave(|| Ok(())).unwrap();
        });
        assert!(meeting.change().is_err(), "it is over");
    }

    #[test]
    fn whoever_ends_the_program_comes_first_or_last() {
        // Nothing is told before all are there, nor once the program ends.
        let meeting = Meeting::new(0).unwrap();
        let round = meeting.open().unwrap();
        let told = std::cell::Cell::new(false);
        let tell = || {
            told.set(true);
            Ok(())
        };
        assert!(matches!(round.leave(tell), Err(HandOverError::Ending)));
        let round = meeting.open().unwrap();
        round.gather(Duration::ZERO, || Ok(())).unwrap();
        assert!(!meeting.close());
        assert!(matches!(round.leave(tell), Err(HandOverError::Ending)));
        assert!(!told.get());
        assert!(matches!(meeting.open(), Err(HandOverError::Ending)));
        assert!(rustix::io::read(meeting.summons(), &mut [0; 8]).is_err());
        // One that could not be told has nothing.
        let meeting = Meeting::new(0).unwrap();
        let round = meeting.open().unwrap();
        round.gather(Duration::ZERO, || Ok(())).unwrap();
        let failed = round.leave(|| Err(HandOverError::Gone));
        assert!(matches!(failed, Err(HandOverError::Gone)));
        assert!(meeting.quietly(|| ()).is_some() && !meeting.close());
    }
}
