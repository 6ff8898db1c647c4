//! The thread of a device: does what its [`super::Handle`] was told, watches the
//! connection, and dials again when it is lost. Started by [`crate::machine`], one for
//! each device; it ends with the device.
//!
//! What it guarantees, whatever the backend does: a reset is reported as done
//! only when the backend has given all rings back or is gone, and no virtual CPU
//! ever waits here.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::kind::{Kind, Offer};
use super::session::{Inflight, Session, SessionError};
use super::{Dial, Handle, Lifeline, Word};
use crate::event;
use crate::memory::Ram;
use crate::virtio::function::ConfigCall;
use crate::virtio::{Activation, Mirror};

/// The stack of the thread.
const STACK: usize = 128 * 1024;
/// The first pause between two attempts to reach a backend that has gone, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// A backend that was there for so long is dialled soon after it has gone.
const LASTING: Duration = Duration::from_secs(2);

/// A started device's thread, before its backend has answered.
#[derive(Debug)]
pub struct Started {
    /// The way to it.
    pub handle: Handle,
    /// What both halves of the device know.
    pub mirror: Arc<Mirror>,
    /// Where configuration changes are called.
    pub changed: ConfigCall,
    /// What the control socket is told.
    pub watch: Arc<Watch>,
    /// Ends when the device is removed.
    pub thread: JoinHandle<()>,
    offer: Receiver<Result<Offer, SessionError>>,
    shown: SyncSender<Vec<u8>>,
}

/// A device's thread as others see it.
#[derive(Debug, Default)]
pub struct Watch {
    connected: AtomicBool,
    reconnects: AtomicU64,
}

impl Watch {
    /// The backend is there.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// How often it came back.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    fn set(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    fn count(&self) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
    }
}

/// Starts the thread of device `name` over a connection to its backend.
///
/// # Errors
/// No thread, or no descriptors.
pub fn start(
    name: &str,
    kind: Kind,
    stream: UnixStream,
    dialer: Box<dyn Dial>,
    ram: Arc<Ram>,
) -> std::io::Result<Started> {
    let (words, inbox) = mpsc::channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    let bell = Arc::new(event::new()?);
    let lifeline = Arc::new(Lifeline::default());
    lifeline.hold(Some(stream.try_clone()?));
    let (mirror, changed) = (Arc::new(Mirror::default()), ConfigCall::default());
    let watch = Arc::new(Watch::default());
    let (offer_out, offer) = mpsc::sync_channel(1);
    let (shown, shown_in) = mpsc::sync_channel(1);
    let actor = Actor {
        name: name.to_owned(),
        kind,
        dialer,
        ram,
        inbox,
        waiting: Arc::clone(&waiting),
        bell: Arc::clone(&bell),
        lifeline: Arc::clone(&lifeline),
        mirror: Arc::clone(&mirror),
        changed: Arc::clone(&changed),
        watch: Arc::clone(&watch),
        session: None,
        active: None,
        inflight: None,
        shown: Vec::new(),
        lost: None,
        pause: FIRST_PAUSE,
        since: Instant::now(),
    };
    let thread = std::thread::Builder::new()
        .name(format!("vu-{name}").chars().take(15).collect())
        .stack_size(STACK)
        .spawn(move || actor.begin(stream, &offer_out, &shown_in))?;
    let handle = Handle {
        words,
        waiting,
        bell,
        lifeline,
    };
    Ok(Started {
        handle,
        mirror,
        changed,
        watch,
        thread,
        offer,
        shown,
    })
}

impl Started {
    /// What the backend offers; it has until `deadline` to say so.
    ///
    /// # Errors
    /// It says nothing in time, or nothing usable.
    pub fn offer(&self, deadline: Instant) -> Result<Offer, String> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.offer.recv_timeout(left) {
            Ok(Ok(offer)) => Ok(offer),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => {
                self.handle.lifeline.cut();
                Err("it accepted the connection and does not answer".to_owned())
            }
        }
    }

    /// Has the guest see this configuration, and the device begin.
    pub fn show(&self, config: Vec<u8>) {
        self.mirror.set_config(&config);
        let _ = self.shown.send(config);
    }
}

struct Actor {
    name: String,
    kind: Kind,
    dialer: Box<dyn Dial>,
    ram: Arc<Ram>,
    inbox: Receiver<Word>,
    waiting: Arc<AtomicUsize>,
    bell: Arc<EventFd>,
    lifeline: Arc<Lifeline>,
    mirror: Arc<Mirror>,
    changed: ConfigCall,
    watch: Arc<Watch>,
    session: Option<Session>,
    /// What the driver has set up, while it is ready.
    active: Option<Activation>,
    inflight: Option<Inflight>,
    /// The configuration that the guest was shown first.
    shown: Vec<u8>,
    /// Without a backend: when it is dialled next.
    lost: Option<Instant>,
    /// Before the attempt after that. Grows while attempts, or backends, do not last.
    pause: Duration,
    /// Since when the backend is there.
    since: Instant,
}

/// Whether the thread goes on.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Ends,
}

impl Actor {
    fn begin(
        mut self,
        stream: UnixStream,
        offer: &SyncSender<Result<Offer, SessionError>>,
        shown: &Receiver<Vec<u8>>,
    ) {
        let opened = Session::open(stream).and_then(|mut session| {
            let offer = session.offer(self.kind.config_size())?;
            Ok((session, offer))
        });
        let (session, made) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _ = offer.send(Err(error));
                return;
            }
        };
        if offer.send(Ok(made)).is_err() {
            return;
        }
        // Nobody shows it when it cannot be used.
        let Ok(config) = shown.recv() else {
            return;
        };
        self.shown = config;
        self.session = Some(session);
        self.watch.set(true);
        while self.turn() == Fate::GoesOn {}
        self.lifeline.hold(None);
        self.mirror.set_busy(false);
    }

    /// Waits for something and does it.
    fn turn(&mut self) -> Fate {
        let timeout = self.lost.map(timespec);
        let mut fds = vec![PollFd::from_borrowed_fd(
            event::borrow(&self.bell),
            PollFlags::IN,
        )];
        if let Some(session) = &self.session {
            fds.push(PollFd::new(session.stream(), PollFlags::RDHUP));
            if let Some(requests) = session.requests() {
                fds.push(PollFd::from_borrowed_fd(requests, PollFlags::IN));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Err(Errno::INTR) => return Fate::GoesOn,
            Err(errno) => {
                warn!("{}: its thread ends: {errno}", self.name);
                return Fate::Ends;
            }
            Ok(_) => {}
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            let _ = self.bell.read();
            if self.hear_words() == Fate::Ends {
                return Fate::Ends;
            }
        }
        if ready.get(2) == Some(&true) {
            self.hear_backend();
        }
        if ready.get(1) == Some(&true) && self.session.is_some() {
            self.lose("it is gone");
        }
        if self.lost.is_some_and(|when| when <= Instant::now()) {
            self.dial();
        }
        Fate::GoesOn
    }

    fn hear_words(&mut self) -> Fate {
        loop {
            let word = self.inbox.try_recv();
            if word.is_ok() {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
            }
            match word {
                Ok(Word::Activate(mut activation)) => {
                    activation.features &= !self.kind.features_of_ours();
                    self.active = Some(activation);
                    self.start(false);
                }
                Ok(Word::Reset) => self.reset(),
                Ok(Word::Call(ring, call)) => self.set_call(ring, &call),
                Ok(Word::WriteConfig(offset, data)) => {
                    let session = self.session.as_mut();
                    let written = session.map(|session| session.write_config(offset, &data));
                    // A guest's write that the backend does not take is the guest's affair.
                    if let Some(Err(error)) = written {
                        log::debug!("{}: {}", self.name, chain(&error));
                    }
                }
                Ok(Word::Remove) | Err(TryRecvError::Disconnected) => {
                    self.reset();
                    return Fate::Ends;
                }
                Err(TryRecvError::Empty) => return Fate::GoesOn,
            }
        }
    }

    /// Gives the rings to the backend that is there.
    fn start(&mut self, again: bool) {
        let (Some(session), Some(activation)) = (&mut self.session, &self.active) else {
            return;
        };
        self.mirror.set_busy(true);
        self.lifeline.set_rings(true);
        match session.start(activation, &self.ram, &mut self.inflight, again) {
            Ok(()) => self.mirror.set_broken(false),
            Err(error @ (SessionError::Other(_) | SessionError::Lacks(_))) => {
                warn!("{}: {}", self.name, chain(&error));
                self.mirror.set_broken(true);
                self.call_config();
                self.lose("it is another");
            }
            Err(error) => self.lose(&chain(&error)),
        }
    }

    /// Takes the rings back.
    fn reset(&mut self) {
        if let Some(activation) = self.active.take()
            && let Some(session) = &mut self.session
            && let Err(error) = session.stop(&activation)
        {
            self.lose(&chain(&error));
        }
        self.inflight = None;
        self.lifeline.set_rings(false);
        self.mirror.set_broken(false);
        self.mirror.set_busy(false);
    }

    fn set_call(&mut self, ring: u16, call: &Arc<EventFd>) {
        let Some(activation) = &mut self.active else {
            return;
        };
        let known = activation
            .rings
            .iter_mut()
            .find(|known| known.index == ring);
        let Some(known) = known else {
            return;
        };
        known.call = Arc::clone(call);
        let session = self.session.as_mut();
        if let Some(Err(error)) = session.map(|session| session.set_call(known)) {
            self.lose(&chain(&error));
        }
    }

    fn hear_backend(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        match session.hear() {
            Ok(false) => {}
            Ok(true) => self.refresh(),
            Err(error) => self.lose(&chain(&error)),
        }
    }

    /// Reads the configuration again and tells the driver if it is another.
    fn refresh(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        match session.config(self.kind.config_size()) {
            Ok(Some(config)) => {
                let config = self.kind.refresh(&self.shown, config);
                if self.mirror.set_config(&config) {
                    self.call_config();
                }
            }
            Ok(None) => {}
            Err(error) => self.lose(&chain(&error)),
        }
    }

    fn call_config(&self) {
        let call = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(call) = &*call {
            let _ = call.write(1);
        }
    }

    /// The backend is gone, or as good as gone.
    fn lose(&mut self, why: &str) {
        warn!("{}: its backend: {why}", self.name);
        self.session = None;
        self.lifeline.hold(None);
        self.watch.set(false);
        if self.since.elapsed() >= LASTING {
            self.pause = FIRST_PAUSE;
        }
        self.put_off();
    }

    /// Dials after the pause, and doubles it.
    fn put_off(&mut self) {
        self.lost = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Tries to reach it again.
    fn dial(&mut self) {
        self.put_off();
        let Ok(stream) = self.dialer.dial() else {
            return;
        };
        self.lifeline.hold(stream.try_clone().ok());
        match Session::open(stream) {
            Ok(session) => {
                info!("{}: its backend is back", self.name);
                self.session = Some(session);
                self.lost = None;
                self.since = Instant::now();
                self.watch.set(true);
                self.watch.count();
                self.refresh();
                self.start(true);
            }
            Err(error) => {
                log::debug!("{}: {}", self.name, chain(&error));
                self.lifeline.hold(None);
            }
        }
    }
}

/// From now until then.
fn timespec(when: Instant) -> Timespec {
    let left = when.saturating_duration_since(Instant::now());
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}

/// An error and what is behind it, in a line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        line.push_str(": ");
        line.push_str(&inner.to_string());
        source = inner.source();
    }
    line
}

#[cfg(test)]
mod tests;
