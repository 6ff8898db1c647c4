//! A device's socket: one front end after another.
//!
//! An [`Endpoint`] is claimed while the program may still touch the file
//! system; a [`Server`] runs on its own thread after that. QEMU's conventions
//! for vhost-user programs are followed: a descriptor may be passed in place
//! of a path, and a connected one is served once.

use std::fs;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod fleet;
mod presence;

use log::{debug, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use thiserror::Error;

use crate::causes;
use crate::device::Device;
use crate::handover::{DeviceState, HandOverError, Meeting, Parcel, Unpacked, Verdict};
use crate::oversight::{MaybeOverseen, Oversight};
use crate::pool::{Handles, Pool};
use crate::records::CrashSafety;
use crate::session::{Moved, Over, Session};
pub use fleet::{Change, Fleet, FleetError};
use pericarp_control::{Stop, listen};
use presence::Presence;

/// How long a process that was killed may need to let go of its socket.
const DYING: Duration = Duration::from_secs(1);

/// Why a socket cannot be used. The text is what an operator reads.
#[derive(Debug, Error)]
pub enum EndpointError {
    /// Somebody answers on it.
    #[error("a live program listens on it: stop that program or choose another path")]
    Live,
    /// Something else has that name.
    #[error("it exists and is not a socket: remove it or choose another path")]
    NotASocket,
    /// Unix sockets have a limit of 107 bytes.
    #[error("it is {0} bytes long and a socket path may have 107: choose a shorter path")]
    TooLong(usize),
    /// The kernel's refusal.
    #[error("it cannot be bound ({0}): choose a path in a directory that exists and is writable")]
    Bind(io::Error),
    /// A passed descriptor that is no unix stream socket.
    #[error("it is not a unix stream socket: pass a listening or connected one")]
    BadDescriptor,
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket of ours at a path, removed at the end.
    Bound(UnixListener, PathBuf),
    /// A listening socket passed to us.
    Listening(UnixListener),
    /// A connected socket passed to us: one session, then the end.
    Connected(UnixStream),
}

impl Endpoint {
    /// Says whether `path` could be bound, without changing anything.
    ///
    /// # Errors
    /// [`EndpointError`] when it could not.
    pub fn check(path: &Path) -> Result<(), EndpointError> {
        let length = path.as_os_str().len();
        if length > 107 {
            return Err(EndpointError::TooLong(length));
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => Err(EndpointError::NotASocket),
            Ok(_) => {
                let begin = Instant::now();
                loop {
                    let stream = match UnixStream::connect(path) {
                        Ok(stream) => stream,
                        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
                        Err(e) => return Err(EndpointError::Bind(e)),
                    };
                    // Whoever was killed a moment ago hangs up in a moment.
                    let left = DYING.saturating_sub(begin.elapsed());
                    if left.is_zero() || !hangs_up(&stream, left) {
                        return Err(EndpointError::Live);
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                match fs::metadata(parent.unwrap_or(Path::new("."))) {
                    Ok(m) if m.is_dir() => Ok(()),
                    Ok(_) => Err(EndpointError::Bind(Errno::NOTDIR.into())),
                    Err(e) => Err(EndpointError::Bind(e)),
                }
            }
            Err(e) => Err(EndpointError::Bind(e)),
        }
    }

    /// Listens at `path`. A dead socket left there is replaced.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn bind(path: &Path) -> Result<Self, EndpointError> {
        Self::check(path)?;
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(EndpointError::Bind(e)),
            _ => {}
        }
        let listener = listen(path).map_err(EndpointError::Bind)?;
        let ready = listener.set_nonblocking(true).inspect_err(|_| {
            // Of no use to anybody.
            let _ = fs::remove_file(path);
        });
        ready.map_err(EndpointError::Bind)?;
        Ok(Self::Bound(listener, path.to_owned()))
    }

    /// As [`bind`](Self::bind), for a socket that only this user may connect
    /// to. The mode is there from the first moment; threads that make files
    /// meanwhile would feel it, too: call it before there are any.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn bind_private(path: &Path) -> Result<Self, EndpointError> {
        let before = umask(Mode::from_raw_mode(0o177));
        let bound = Self::bind(path);
        umask(before);
        bound
    }

    /// Takes the descriptor with this number, which the parent process passed
    /// and nothing else in this process uses.
    ///
    /// # Errors
    /// [`EndpointError::BadDescriptor`].
    #[expect(
        unsafe_code,
        reason = "a descriptor number becomes an owned descriptor"
    )]
    pub fn from_number(number: RawFd) -> Result<Self, EndpointError> {
        // SAFETY: F_GETFD touches no memory; it tells whether the number is an
        // open descriptor at all.
        if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(EndpointError::BadDescriptor);
        }
        // SAFETY: it is open, and by the promise of the command line it is the
        // socket handed to us; std's own three descriptors are excluded.
        Self::from_descriptor(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// The socket itself, for another process.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Bound(listener, _) | Self::Listening(listener) => listener.as_fd(),
            Self::Connected(stream) => stream.as_fd(),
        }
        .try_clone_to_owned()
    }

    /// Takes a socket that another process listened with so far. With a path,
    /// it is the one bound there, to be removed at the end.
    ///
    /// # Errors
    /// [`EndpointError::BadDescriptor`].
    pub fn inherited(fd: OwnedFd, path: Option<&Path>) -> Result<Self, EndpointError> {
        match (Self::from_descriptor(fd)?, path) {
            (Self::Listening(listener), Some(path)) => Ok(Self::Bound(listener, path.to_owned())),
            (_, Some(_)) => Err(EndpointError::BadDescriptor),
            (passed, None) => Ok(passed),
        }
    }

    /// Takes a passed descriptor, listening or connected.
    ///
    /// # Errors
    /// [`EndpointError::BadDescriptor`].
    pub fn from_descriptor(fd: OwnedFd) -> Result<Self, EndpointError> {
        use rustix::net::{AddressFamily, SocketType, sockopt};
        let bad = |_| EndpointError::BadDescriptor;
        let unix = sockopt::socket_domain(&fd).map_err(bad)? == AddressFamily::UNIX;
        if !unix || sockopt::socket_type(&fd).map_err(bad)? != SocketType::STREAM {
            return Err(EndpointError::BadDescriptor);
        }
        if sockopt::socket_acceptconn(&fd).map_err(bad)? {
            let listener = UnixListener::from(fd);
            listener
                .set_nonblocking(true)
                .map_err(EndpointError::Bind)?;
            return Ok(Self::Listening(listener));
        }
        Ok(Self::Connected(UnixStream::from(fd)))
    }

    /// The path to remove at the end, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Bound(_, path) => Some(path),
            Self::Listening(_) | Self::Connected(_) => None,
        }
    }
}

/// Waits for the other end to go away.
fn hangs_up(stream: &UnixStream, limit: Duration) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let limit = Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    poll(&mut fds, Some(&limit)).is_ok_and(|count| count > 0)
}

/// One device behind one socket.
#[derive(Debug)]
pub struct Server<D: Device> {
    endpoint: Endpoint,
    device: Arc<D>,
    device_id: u16,
    workers: Handles<D>,
    safety: CrashSafety,
    oversight: MaybeOverseen,
    meeting: Option<Meeting>,
    /// The front end that was there before this process was.
    moved: Option<(UnixStream, Moved)>,
    presence: Arc<Presence>,
}

impl<D: Device> Server<D> {
    /// Puts a device behind a socket. `device_id` tells the devices of this
    /// process apart.
    pub fn new(endpoint: Endpoint, device: Arc<D>, device_id: u16, pool: &Pool<D>) -> Self {
        Self {
            endpoint,
            device,
            device_id,
            workers: pool.handles(),
            safety: CrashSafety::default(),
            oversight: None,
            meeting: None,
            moved: None,
            presence: Arc::default(),
        }
    }

    /// Lets another process take this device over.
    pub fn hand_over_at(&mut self, meeting: &Meeting) {
        self.meeting = Some(meeting.clone());
    }

    /// The front end that another process has served so far.
    pub(crate) fn take_over(
        &mut self,
        state: DeviceState,
        fds: Vec<OwnedFd>,
        bags: Vec<Unpacked>,
    ) -> Result<(), HandOverError> {
        self.device.refresh();
        let unpacked = self.device.unpack(bags);
        unpacked.map_err(|why| HandOverError::Session(self.device_id, why))?;
        if let Some(oversight) = &self.oversight {
            oversight.set_all_limits(&state.limits());
        }
        let moved = Moved::unpack(&*self.device, state, fds);
        self.moved = moved.map_err(|e| HandOverError::Session(self.device_id, causes(&e)))?;
        Ok(())
    }

    /// Provides for a successor that goes on when this process is killed.
    pub fn keep_records(&mut self, safety: CrashSafety) {
        self.safety = safety;
    }

    /// Counts what the device does and holds it to its limits.
    #[must_use]
    pub fn overseen(mut self, oversight: Option<Arc<Oversight>>) -> Self {
        self.oversight = oversight;
        self
    }

    /// Serves on a thread of its own until `stop` is requested.
    ///
    /// # Errors
    /// The kernel's refusal to make a thread.
    pub fn start(self, stop: &Stop) -> io::Result<JoinHandle<()>> {
        let (thread, go) = self.start_when(stop.clone(), stop)?;
        let _ = go.send(());
        Ok(thread)
    }

    /// A thread that serves until `stop`, once it is told to, and ends when it
    /// never will be. A connected socket's end is that of `program`.
    fn start_when(
        self,
        stop: Stop,
        program: &Stop,
    ) -> io::Result<(JoinHandle<()>, SyncSender<()>)> {
        let program = program.clone();
        let (go, told) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("session-{}", self.device_id))
            .spawn(move || {
                if told.recv().is_ok() {
                    self.run(&stop, &program);
                }
            })?;
        Ok((thread, go))
    }

    fn run(mut self, stop: &Stop, program: &Stop) {
        let moved = self.moved.take();
        let mut over = moved.map(|(stream, moved)| self.serve(stream, Some(moved), stop));
        match &self.endpoint {
            Endpoint::Bound(listener, _) | Endpoint::Listening(listener) => {
                while over != Some(Over::Moved) {
                    over = match accept(listener, stop, self.meeting.as_ref()) {
                        Accepted::FrontEnd(stream) => Some(self.serve(stream, None, stop)),
                        Accepted::Summons => self.meet(),
                        Accepted::End => return,
                    };
                }
            }
            Endpoint::Connected(stream) => {
                let over = over.unwrap_or_else(|| match stream.try_clone() {
                    Ok(stream) => self.serve(stream, None, stop),
                    Err(e) => {
                        warn!("device {}: {e}", self.device_id);
                        Over::Ended
                    }
                });
                if over == Over::Ended && !self.presence.is_leaving() {
                    program.request();
                }
            }
        }
    }

    /// A new process asks while no front end is there.
    fn meet(&self) -> Option<Over> {
        let limits = self.oversight.as_ref().map(|o| o.all_limits());
        let limits = limits.unwrap_or_default();
        let meeting = self.meeting.as_ref()?;
        // What is known of a guest that may come back goes along.
        let packed = self.device.pack();
        let parcel = packed.map(|bags| Parcel::idle(&limits).with(bags));
        let parcel = parcel.map_err(|e| HandOverError::Session(self.device_id, e.to_string()));
        let verdict = meeting.arrive(self.device_id, parcel);
        (verdict == Verdict::Leave).then_some(Over::Moved)
    }

    fn serve(&self, stream: UnixStream, moved: Option<Moved>, stop: &Stop) -> Over {
        if !self.presence.arrive() {
            return Over::Ended;
        }
        let mut session = Session::new(
            stream,
            stop.clone(),
            &self.device,
            self.device_id,
            &self.workers,
            &self.safety,
            self.oversight.clone(),
        )
        .movable(self.meeting.as_ref());
        match moved {
            Some(moved) => session.adopt(moved),
            None => {
                info!("device {}: front end connected", self.device_id);
                session.begin();
            }
        }
        let over = session.run();
        self.presence.depart();
        if over == Over::Ended {
            info!("device {}: front end gone", self.device_id);
        }
        over
    }
}

/// What comes while no front end is there.
enum Accepted {
    FrontEnd(UnixStream),
    /// A new process wants the device.
    Summons,
    /// The program ends.
    End,
}

/// Waits for the next front end.
fn accept(listener: &UnixListener, stop: &Stop, meeting: Option<&Meeting>) -> Accepted {
    loop {
        let event = stop.event();
        let mut fds = vec![
            PollFd::new(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        fds.extend(meeting.map(|m| PollFd::from_borrowed_fd(m.summons(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) if fds[1].revents().contains(PollFlags::IN) => return Accepted::End,
            Ok(_) if fds.get(2).is_some_and(|m| !m.revents().is_empty()) => {
                return Accepted::Summons;
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => {
                warn!("waiting for a front end: {errno}");
                return Accepted::End;
            }
        }
        match listener.accept() {
            Ok((stream, _)) => {
                // Inherited from the listener on some systems, not on Linux;
                // reads are preceded by a poll either way.
                let _ = stream.set_nonblocking(false);
                return Accepted::FrontEnd(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => {
                // Out of descriptors, most likely: do not spin on it.
                debug!("accept: {e}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}
