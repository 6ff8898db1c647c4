//! The sidecars of a machine: `pericarp-block` for all of its disks, `pericarp-fs` for all of its
//! shares, `pericarp-net` for all of its network cards, `pericarp-vsock` for the way to its agent.
//!
//! Started before the machine, all of them at once, and waited for before it is; ended after it. Their
//! error output is kept for the message if one dies.

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use pericarp_hypervisor::{Confinement, Process};

use crate::{PodError, assets::program_directory};

/// What serves disks.
pub const BLOCK: &str = "pericarp-block";
/// What serves directories.
pub const FS: &str = "pericarp-fs";
/// What serves network cards.
pub const NET: &str = "pericarp-net";
const VSOCK: &str = "pericarp-vsock";
/// Descriptors per queue of a network card.
pub const CARD_QUEUE_SIZE: u16 = 1024;
/// How long one may take to listen.
const START_LIMIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(2);
/// How long one may take to drain and end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What a disk or share may do in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests; none is no limit.
    pub iops: Option<u64>,
    /// Bytes, read and written; none is no limit.
    pub bandwidth: Option<u64>,
}

impl Limits {
    fn argument(self) -> String {
        let key = |name: &str, value: Option<u64>| {
            value.map_or_else(String::new, |value| format!(",{name}={value}"))
        };
        key("iops", self.iops) + &key("bandwidth", self.bandwidth)
    }
}

/// One disk.
#[derive(Debug, Clone)]
pub struct Device {
    /// Also its serial, by which the guest finds it.
    pub id: String,
    /// Where it is served.
    pub socket: PathBuf,
    /// An image, or a block device.
    pub file: PathBuf,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Virtqueues that carry requests.
    pub queues: u16,
    /// What it may do in a second.
    pub limits: Limits,
}

impl Device {
    fn argument(&self) -> String {
        format!(
            "id={id},socket={socket},file={file},read-only={read_only},num-queues={queues},serial={id}{limits}",
            id = self.id,
            socket = quoted(&self.socket),
            file = quoted(&self.file),
            read_only = on_or_off(self.read_only),
            queues = self.queues,
            limits = self.limits.argument(),
        )
    }
}

/// What a guest may do with a directory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Reading,
    /// All of it.
    Writing,
    /// Reading, and nobody changes it meanwhile: below a container's writable layer it is asked for
    /// once, and passed on as a plain container's runtime mounts it, which is without what is
    /// mounted below it and with its access control lists.
    Root,
    /// All of it, and of what is mounted below it later; it is a shared mount.
    Pod {
        /// What the guest may keep: `never`, `auto` or `always` (`pericarp-fs --cache`).
        cache: &'static str,
    },
}

/// One directory of the host.
#[derive(Debug, Clone)]
pub struct Share {
    /// Also its tag, by which the guest mounts it.
    pub id: String,
    /// Where it is served.
    pub socket: PathBuf,
    /// Of the host.
    pub directory: PathBuf,
    /// What the guest may do with it.
    pub access: Access,
    /// Virtqueues that carry requests.
    pub queues: u16,
    /// What it may do in a second.
    pub limits: Limits,
}

impl Share {
    fn argument(&self) -> String {
        let (cache, more) = match self.access {
            Access::Reading | Access::Writing => ("auto", ""),
            Access::Pod { cache } => (cache, ",posix-acl=on,later-mounts=on"),
            Access::Root => ("always", ",posix-acl=on,submounts=off"),
        };
        format!(
            "id={id},socket={socket},dir={directory},tag={id},read-only={read_only},cache={cache},\
             num-queues={queues},xattr=on{more}{limits}",
            id = self.id,
            socket = quoted(&self.socket),
            directory = quoted(&self.directory),
            read_only = on_or_off(!matches!(self.access, Access::Writing | Access::Pod { .. })),
            queues = self.queues,
            limits = self.limits.argument(),
        )
    }
}

/// One network card.
#[derive(Debug)]
pub struct Card {
    /// Of the device in the machine.
    pub id: String,
    /// Where it is served.
    pub socket: PathBuf,
    /// The guest's address.
    pub mac: [u8; 6],
    /// Bytes of a packet without its Ethernet header.
    pub mtu: u32,
    /// The open queues of its tap, one for each pair of virtqueues.
    pub queues: Vec<OwnedFd>,
}

impl Card {
    /// The same card, with descriptors of its own.
    ///
    /// # Errors
    ///
    /// There are no more descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let queues: std::io::Result<_> = self.queues.iter().map(OwnedFd::try_clone).collect();
        Ok(Self {
            id: self.id.clone(),
            socket: self.socket.clone(),
            mac: self.mac,
            mtu: self.mtu,
            queues: queues?,
        })
    }

    fn argument(&self) -> String {
        let queues = self.queues.iter().map(|fd| fd.as_raw_fd().to_string());
        let queues: Vec<String> = queues.collect();
        format!(
            "id={id},socket={socket},tap-fds={queues},queue-size={CARD_QUEUE_SIZE},mtu={mtu}",
            id = self.id,
            socket = quoted(&self.socket),
            queues = queues.join(":"),
            mtu = self.mtu,
        )
    }
}

/// Within the list of a device a comma is written twice.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn on_or_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Asked again and again by whoever waits: an error ends the wait, and what was waited for.
pub type Check<'a, E> = &'a mut dyn FnMut() -> Result<(), E>;

/// A running sidecar. It may take a moment until it listens: [`Sidecar::listening`].
#[derive(Debug)]
pub struct Sidecar {
    name: &'static str,
    process: Process,
    /// Where it is to listen.
    sockets: Vec<PathBuf>,
    begun: Instant,
}

impl Sidecar {
    /// Starts the block backend for these disks. It answers at `control`.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn block(devices: &[Device], control: &Path) -> Result<Self, PodError> {
        let mut command = program(BLOCK);
        command.arg("--control-path").arg(control);
        for device in devices {
            command.arg("--device").arg(device.argument());
        }
        let sockets = devices.iter().map(|d| d.socket.clone()).collect();
        Self::start(BLOCK, command, Vec::new(), sockets)
    }

    /// Starts a block backend for one disk, whose file is a path of the descriptor that it inherits.
    /// It answers at `control`.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn block_with(device: &Device, file: OwnedFd, control: &Path) -> Result<Self, PodError> {
        let mut command = program(BLOCK);
        command.arg("--device").arg(device.argument());
        command.arg("--control-path").arg(control);
        Self::start(BLOCK, command, vec![file], vec![device.socket.clone()])
    }

    /// Starts the file backend for these shares. It goes on with what a predecessor has left in
    /// `state`, and leaves there what a successor needs. It answers at `control`.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn fs(shares: &[Share], state: Option<OwnedFd>, control: &Path) -> Result<Self, PodError> {
        let mut command = program(FS);
        command.arg("--control-path").arg(control);
        for share in shares {
            command.arg("--device").arg(share.argument());
        }
        if let Some(state) = &state {
            let path = format!("/proc/self/fd/{}", state.as_raw_fd());
            command.arg("--state-file").arg(path);
        }
        let inherited = state.into_iter().collect();
        let sockets = shares.iter().map(|share| share.socket.clone()).collect();
        Self::start(FS, command, inherited, sockets)
    }

    /// Starts the network backend for these cards. The queues are the backend's alone then, as far as
    /// we go. It answers at `control`.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn net(cards: Vec<Card>, control: &Path) -> Result<Self, PodError> {
        let mut command = program(NET);
        command.arg("--control-path").arg(control);
        for card in &cards {
            command.arg("--device").arg(card.argument());
        }
        let sockets = cards.iter().map(|card| card.socket.clone()).collect();
        let queues = cards.into_iter().flat_map(|card| card.queues).collect();
        Self::start(NET, command, queues, sockets)
    }

    /// Starts the vsock device.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn vsock(socket: &Path, guest_cid: u32, host_side: &Path) -> Result<Self, PodError> {
        let mut command = program(VSOCK);
        command
            .arg("--socket-path")
            .arg(socket)
            .args(["--guest-cid", &guest_cid.to_string()])
            .arg("--uds-path")
            .arg(host_side);
        let sockets = vec![socket.to_owned(), host_side.to_owned()];
        Self::start(VSOCK, command, Vec::new(), sockets)
    }

    fn start(
        name: &'static str,
        mut command: Command,
        inherited: Vec<OwnedFd>,
        sockets: Vec<PathBuf>,
    ) -> Result<Self, PodError> {
        command.stdout(Stdio::null());
        let begun = Instant::now();
        let confinement = Confinement::default();
        let process = Process::spawn_with(name, command, confinement, inherited);
        let process = process.map_err(|source| PodError::Program {
            program: name.into(),
            source,
            cure: "it belongs beside pericarp: `cargo build` makes both",
        })?;
        Ok(Self {
            name,
            process,
            sockets,
            begun,
        })
    }

    /// Waits until it listens at all of its sockets. Start all that are to be there first: they get
    /// ready side by side.
    ///
    /// # Errors
    ///
    /// [`PodError`], or what `check` says.
    pub fn listening<E: From<PodError>>(&mut self, check: Check<'_, E>) -> Result<(), E> {
        while !listen(&self.sockets) {
            check()?;
            if let Some(failure) = self.death() {
                return Err(failure.into());
            }
            if self.begun.elapsed() > START_LIMIT {
                let words = self.process.last_words(1).concat();
                let said = format!(
                    "{}: did not listen within {} s: {words}",
                    self.name,
                    START_LIMIT.as_secs()
                );
                return Err(PodError::Silent(said).into());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn of(name: &'static str, process: Process) -> Self {
        Self {
            name,
            process,
            sockets: Vec::new(),
            begun: Instant::now(),
        }
    }

    /// Its program.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Becomes readable when it has ended.
    #[must_use]
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        self.process.exit_fd()
    }

    /// What to report if it has ended, which it never should by itself.
    pub fn death(&mut self) -> Option<PodError> {
        self.how_it_ended().map(PodError::Sidecar)
    }

    /// The same without the sentence around it.
    pub fn how_it_ended(&mut self) -> Option<String> {
        self.process.exited()?;
        Some(format!("{}: {}", self.name, self.process.describe_end()))
    }

    /// Ends it in an orderly way.
    pub fn end(mut self) {
        self.process.end(END_LIMIT);
    }
}

fn program(name: &str) -> Command {
    match program_directory().map(|directory| directory.join(name)) {
        Some(path) if path.exists() => Command::new(path),
        // Beside a program that was installed on its own there may be one in the path.
        _ => Command::new(name),
    }
}

/// Whether somebody listens at all of these. A file is there a moment before that, and who connects
/// then is refused. Not tried by connecting: that would be taken for a front end.
fn listen(sockets: &[PathBuf]) -> bool {
    // The table is long on a node with many pods, and not read before it can have them.
    if !sockets.iter().all(|socket| socket.exists()) {
        return false;
    }
    match std::fs::read_to_string("/proc/net/unix") {
        Ok(table) => sockets.iter().all(|socket| listed(&table, socket)),
        Err(_) => true,
    }
}

/// The same by the kernel's table: number, references, protocol, flags, type,
/// state, inode and path of each socket.
fn listed(table: &str, socket: &Path) -> bool {
    // `__SO_ACCEPTCON` (linux/net.h).
    const ACCEPTS: &str = "00010000";
    table.lines().any(|line| {
        let mut fields = line.splitn(8, ' ').filter(|field| !field.is_empty());
        fields.nth(3) == Some(ACCEPTS) && line.ends_with(&format!(" {}", socket.display()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_device_is_written_as_the_backend_reads_it() {
        let device = Device {
            id: "disk1".into(),
            socket: "/run/x/disk1.sock".into(),
            file: "/images/a,b.img".into(),
            read_only: true,
            queues: 2,
            limits: Limits::default(),
        };
        assert_eq!(
            device.argument(),
            "id=disk1,socket=/run/x/disk1.sock,file=/images/a,,b.img,read-only=on,num-queues=2,\
             serial=disk1"
        );
        let limited = Device {
            limits: Limits {
                iops: Some(500),
                bandwidth: Some(1 << 20),
            },
            ..device
        };
        let argument = limited.argument();
        assert!(
            argument.ends_with(",serial=disk1,iops=500,bandwidth=1048576"),
            "{argument}"
        );
    }

    #[test]
    fn a_share_is_written_as_the_backend_reads_it() {
        let share = Share {
            id: "volume1".into(),
            socket: "/run/x/volume1.sock".into(),
            directory: "/srv/a,b=c".into(),
            access: Access::Writing,
            queues: 4,
            limits: Limits::default(),
        };
        assert_eq!(
            share.argument(),
            "id=volume1,socket=/run/x/volume1.sock,dir=/srv/a,,b=c,tag=volume1,read-only=off,\
             cache=auto,num-queues=4,xattr=on"
        );
        let root = Share {
            access: Access::Root,
            ..share
        };
        assert!(
            root.argument().ends_with(
                ",read-only=on,cache=always,num-queues=4,xattr=on,posix-acl=on,submounts=off"
            ),
            "{}",
            root.argument()
        );
        let pod = Share {
            access: Access::Pod { cache: "auto" },
            ..root
        };
        let limited = Share {
            limits: Limits {
                iops: Some(7),
                bandwidth: None,
            },
            ..pod.clone()
        };
        let argument = limited.argument();
        assert!(argument.ends_with(",later-mounts=on,iops=7"), "{argument}");
        assert!(pod.argument().contains(",read-only=off,cache=auto,"));
        assert!(
            pod.argument()
                .ends_with(",xattr=on,posix-acl=on,later-mounts=on")
        );
    }

    #[test]
    fn a_card_is_written_as_the_backend_reads_it() {
        let queue = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let card = Card {
            id: "eth0".into(),
            socket: "/run/x/eth0.sock".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1400,
            queues: vec![queue(), queue()],
        };
        let numbers: Vec<_> = card.queues.iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(
            card.argument(),
            format!(
                "id=eth0,socket=/run/x/eth0.sock,tap-fds={}:{},queue-size=1024,mtu=1400",
                numbers[0], numbers[1]
            )
        );
    }

    #[test]
    fn a_socket_listens_only_once_it_does() {
        let path = std::env::temp_dir().join(format!("pericarp-listens-{}", std::process::id()));
        assert!(!listen(std::slice::from_ref(&path)));
        std::fs::write(&path, "").unwrap();
        assert!(
            !listen(std::slice::from_ref(&path)),
            "a file is no listener"
        );
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(listen(std::slice::from_ref(&path)));
        drop(listener);
        assert!(!listen(std::slice::from_ref(&path)));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_bound_socket_that_does_not_listen_yet_is_none() {
        let line = |flags| {
            format!(
                "Num RefCount Protocol Flags Type St Inode Path\n0000000000000000: 00000002 00000000 {flags} 0001 01 4711 /run/a b.sock"
            )
        };
        let path = Path::new("/run/a b.sock");
        assert!(listed(&line("00010000"), path));
        assert!(!listed(&line("00000000"), path));
        assert!(!listed(&line("00010000"), Path::new("/run/b.sock")));
    }
}
