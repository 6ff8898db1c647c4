//! The devices of a running program, and how one comes and goes while the
//! others are served.
//!
//! `main` starts its devices here, once the program is confined; the control
//! socket's errands add and remove some. A device that leaves goes in this
//! order: its front end, its queues, its session thread with the socket, its
//! place in the workers' tables of files. Only then the place is free.

use std::io;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{Endpoint, Presence, Server};
use crate::device::Device;
use crate::handover::{Changing, HandOverError, Meeting};
use crate::oversight::{MaybeOverseen, Overseen};
use crate::pool::{Handles, Pool};
use crate::records::{CrashSafety, Reopener};
use pericarp_control::Stop;

/// The most devices, to begin with and later.
const MOST: u16 = 256;

/// How long a device may take to leave before the operator is told to ask again.
const LIMIT: Duration = Duration::from_secs(10);

/// Between two looks at whether a session has ended.
const LOOK: Duration = Duration::from_millis(1);

/// Descriptors of each queue in a worker's table: kick, call, error, fence.
const PER_QUEUE: usize = 4;

/// Why a device did not come or go. The text is what an operator reads.
#[derive(Debug, Error)]
pub enum FleetError {
    /// Another device has this name.
    #[error("used already: give each device its own")]
    Used,
    /// No device has this name.
    #[error("no device has this id")]
    Unknown,
    /// As many devices as there can be.
    #[error("{MOST} devices are there, the most of one process: start another")]
    TooMany,
    /// The workers' tables were made for less.
    #[error("its queues do not fit this process, which has room for {0} more: start another")]
    TooManyQueues(usize),
    /// A front end is connected.
    #[error("a front end is connected: end it first, or use force to drop it")]
    InUse,
    /// Its requests go on.
    #[error("its requests have not ended within {LIMIT:?}; it leaves when they have: ask again")]
    Lingers,
    /// Another process takes all devices over.
    #[error("{0}")]
    Busy(String),
    /// The program ends.
    #[error("the program is ending")]
    Ending,
    /// The kernel's refusal.
    #[error("the system refused it ({0})")]
    System(#[from] io::Error),
}

impl FleetError {
    /// True where the operator asked for what cannot be; false for a failure
    /// and for a bad moment.
    pub fn is_mistake(&self) -> bool {
        matches!(
            self,
            Self::Used | Self::Unknown | Self::TooMany | Self::TooManyQueues(_) | Self::InUse
        )
    }
}

/// One device that is served.
#[derive(Debug)]
struct Member<D: Device> {
    id: String,
    place: u16,
    device: Arc<D>,
    oversight: MaybeOverseen,
    presence: Arc<Presence>,
    stop: Stop,
    session: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner<D: Device> {
    workers: Handles<D>,
    /// Descriptors that each worker has room for.
    files: usize,
    program: Stop,
    meeting: Meeting,
    reopener: Mutex<Option<Arc<Reopener>>>,
    /// One change at a time.
    changing: Mutex<()>,
    /// In the order in which they came; none once the program ends.
    members: Mutex<Option<Vec<Member<D>>>>,
}

/// All devices of a program. Cloning shares them.
#[derive(Debug)]
pub struct Fleet<D: Device>(Arc<Inner<D>>);

impl<D: Device> Clone for Fleet<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D: Device> Fleet<D> {
    /// No device yet. `program` is what ends the program, and `meeting` where
    /// its devices come together for a new one.
    pub fn new(pool: &Pool<D>, meeting: &Meeting, program: &Stop) -> Self {
        Self(Arc::new(Inner {
            workers: pool.handles(),
            files: pool.files() as usize,
            program: program.clone(),
            meeting: meeting.clone(),
            reopener: Mutex::default(),
            changing: Mutex::default(),
            members: Mutex::new(Some(Vec::new())),
        }))
    }

    /// Lets front ends of devices that come later keep records of requests in
    /// flight.
    pub fn keep_records(&self, reopener: Option<Arc<Reopener>>) {
        *lock(&self.0.reopener) = reopener;
    }

    /// Serves the devices that the program has from the start.
    ///
    /// # Errors
    /// [`FleetError`].
    pub fn start(&self, servers: Vec<(&str, Server<D>)>) -> Result<(), FleetError> {
        for (id, server) in servers {
            let _ = self.start_when(id, server)?.send(());
        }
        Ok(())
    }

    /// Serves a device once its thread is told to, which ends when it never
    /// will be.
    pub(crate) fn start_when(
        &self,
        id: &str,
        server: Server<D>,
    ) -> Result<SyncSender<()>, FleetError> {
        let mut members = self.members();
        let members = members.as_mut().ok_or(FleetError::Ending)?;
        let place = server.device_id;
        let stop = Stop::of_a_part()?;
        let mut member = Member {
            id: id.to_owned(),
            place,
            device: Arc::clone(&server.device),
            oversight: server.oversight.clone(),
            presence: Arc::clone(&server.presence),
            stop: stop.clone(),
            session: None,
        };
        if server.moved.is_some() {
            member.presence.arrive();
        }
        let (session, go) = server.start_when(stop, &self.0.program)?;
        member.session = Some(session);
        members.push(member);
        Ok(go)
    }

    /// Begins a change. Nobody takes the program over meanwhile, and other
    /// changes wait.
    ///
    /// # Errors
    /// [`FleetError::Busy`] while another process takes over.
    pub fn change(&self) -> Result<Change<'_, D>, FleetError> {
        let turn = lock(&self.0.changing);
        let changing = self.0.meeting.change().map_err(|error| match error {
            HandOverError::Refused(text) => FleetError::Busy(text),
            other => FleetError::Busy(other.to_string()),
        })?;
        Ok(Change {
            _changing: changing,
            _turn: turn,
            fleet: self,
        })
    }

    /// The devices that are overseen.
    pub fn overseen(&self) -> Vec<Overseen> {
        self.find_all(|member| overseen(member))
    }

    /// The devices that are overseen, themselves included.
    pub fn devices(&self) -> Vec<(Overseen, Arc<D>)> {
        self.find_all(|member| Some((overseen(member)?, Arc::clone(&member.device))))
    }

    fn find_all<T>(&self, what: impl FnMut(&Member<D>) -> Option<T>) -> Vec<T> {
        self.members().iter().flatten().filter_map(what).collect()
    }

    /// Asks all sessions to end, and lets none come any more. Returns their
    /// threads.
    pub fn end(&self) -> Vec<JoinHandle<()>> {
        let members = self.members().take().unwrap_or_default();
        members
            .into_iter()
            .filter_map(|member| {
                member.stop.request();
                member.session
            })
            .collect()
    }

    fn members(&self) -> MutexGuard<'_, Option<Vec<Member<D>>>> {
        lock(&self.0.members)
    }
}

/// The right to change which devices there are.
#[derive(Debug)]
pub struct Change<'a, D: Device> {
    // The order of their end: nobody may begin while a hand-over still waits.
    _changing: Changing<'a>,
    _turn: MutexGuard<'a, ()>,
    fleet: &'a Fleet<D>,
}

impl<D: Device> Change<'_, D> {
    /// A free place for such a device.
    fn place(&self, id: &str, queues: u16, files: usize) -> Result<u16, FleetError> {
        let members = self.fleet.members();
        let members = members.as_ref().ok_or(FleetError::Ending)?;
        if members.iter().any(|member| member.id == id) {
            return Err(FleetError::Used);
        }
        let taken = |place: &u16| members.iter().any(|member| member.place == *place);
        let place = (0..MOST).find(|place| !taken(place));
        let place = place.ok_or(FleetError::TooMany)?;
        let needs = |queues: u16, files: usize| PER_QUEUE * usize::from(queues) + files;
        let used: usize = members
            .iter()
            .map(|m| needs(m.device.queue_count(), m.device.files().len()))
            .sum();
        let left = self.fleet.0.files.saturating_sub(used);
        if needs(queues, files) > left {
            let queues = left.saturating_sub(files) / PER_QUEUE;
            return Err(FleetError::TooManyQueues(queues));
        }
        Ok(place)
    }

    /// Serves another device from now on.
    ///
    /// # Errors
    /// [`FleetError`], with nothing changed.
    pub fn add(
        &self,
        id: &str,
        endpoint: Endpoint,
        device: Arc<D>,
        oversight: MaybeOverseen,
    ) -> Result<(), FleetError> {
        let inner = &self.fleet.0;
        let place = self.place(id, device.queue_count(), device.files().len())?;
        let server = Server {
            endpoint,
            device,
            device_id: place,
            workers: inner.workers.clone(),
            safety: CrashSafety {
                reopener: lock(&inner.reopener).clone(),
                file: None,
            },
            oversight,
            meeting: Some(inner.meeting.clone()),
            moved: None,
            presence: Arc::default(),
        };
        self.fleet.start(vec![(id, server)])?;
        inner.meeting.expect(place);
        Ok(())
    }

    /// Stops serving a device; with `force` its front end is dropped, once its
    /// requests have ended. When this returns without an error, nothing of it
    /// is left here.
    ///
    /// # Errors
    /// [`FleetError`]. After [`FleetError::Lingers`] the device leaves when it
    /// can, and is to be removed again.
    pub fn remove(&self, id: &str, force: bool) -> Result<(), FleetError> {
        let end = Instant::now() + LIMIT;
        let place = {
            let members = self.fleet.members();
            let mut members = members.as_ref().ok_or(FleetError::Ending)?.iter();
            let member = members.find(|member| member.id == id);
            let member = member.ok_or(FleetError::Unknown)?;
            if !member.presence.leave(force) {
                return Err(FleetError::InUse);
            }
            member.stop.request();
            member.place
        };
        while !self.has_ended(place)? {
            if Instant::now() > end {
                return Err(FleetError::Lingers);
            }
            std::thread::sleep(LOOK);
        }
        let inner = &self.fleet.0;
        if !inner.workers.forget(place, end) {
            return Err(FleetError::Lingers);
        }
        inner.meeting.forget(place);
        if let Some(members) = self.fleet.members().as_mut() {
            members.retain(|member| member.place != place);
        }
        Ok(())
    }

    /// Whether the session's thread is gone.
    fn has_ended(&self, place: u16) -> Result<bool, FleetError> {
        let mut members = self.fleet.members();
        let mut members = members.as_mut().ok_or(FleetError::Ending)?.iter_mut();
        let member = members.find(|member| member.place == place);
        let member = member.ok_or(FleetError::Unknown)?;
        if member.session.as_ref().is_some_and(|s| !s.is_finished()) {
            return Ok(false);
        }
        if let Some(session) = member.session.take() {
            // One that panicked has said so already.
            let _ = session.join();
        }
        Ok(true)
    }
}

fn overseen<D: Device>(member: &Member<D>) -> Option<Overseen> {
    Some(Overseen {
        id: member.id.clone(),
        oversight: member.oversight.clone()?,
        held: member.device.held(),
    })
}

/// A lock that says nothing of who panicked while they had it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
