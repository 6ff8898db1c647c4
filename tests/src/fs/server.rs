//! The program that serves a directory: ours, or a peer that proves the rig.
//!
//! The suite tests `pericarp-fs`, found beside the tests as all our programs
//! are. With `PERICARP_FS_PEER=/path/of/virtiofsd` every test runs against that
//! program instead: whoever changes a test can see that it asks for nothing
//! only we do. No run of the whole project needs it.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::process::{Signal, geteuid};
use serde_json::{Map, Value};

use super::client::{Client, Wrong};
use crate::bounded::poll;
use crate::frontend::Setup;
use crate::parts::{Part, absent, have, search_path, skip};
use crate::peer::{Footprint, connect};
use crate::process::{Process, command};
use crate::scratch::Scratch;

/// What guests mount.
pub const TAG: &str = "share";
/// How long a server may take to make its socket, and to end.
const STEP: Duration = Duration::from_secs(10);
/// The peer, where it is asked for.
const PEER: &str = "PERICARP_FS_PEER";

/// Which program serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `pericarp-fs`.
    Pericarp,
    /// `virtiofsd`: ends with its front end, and when it is sent nonsense.
    Virtiofsd(PathBuf),
}

impl Kind {
    /// The one this run is about.
    pub fn under_test() -> Self {
        match env::var_os(PEER) {
            Some(path) => Kind::Virtiofsd(path.into()),
            None => Kind::Pericarp,
        }
    }

    fn program(&self) -> PathBuf {
        let part = Part::Ours("pericarp-fs");
        match self {
            Kind::Pericarp => part.find().unwrap_or_else(|| part.program().into()),
            Kind::Virtiofsd(path) => path.clone(),
        }
    }

    /// True when it can be started here; says why not otherwise.
    fn usable(&self, test: &str) -> bool {
        match self {
            Kind::Pericarp => have(test, &[Part::Ours("pericarp-fs")]),
            Kind::Virtiofsd(path) if path.is_file() => true,
            Kind::Virtiofsd(path) => skip(test, &format!("{PEER}={}: no file", path.display())),
        }
    }
}

/// What a server is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Refuse changes.
    pub read_only: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// What guests may keep.
    pub cache: &'static str,
    /// Let O_DIRECT through.
    pub direct: bool,
    /// Whatever only ours knows, word for word; not for a peer.
    pub more: &'static [&'static str],
    /// Access control lists.
    pub lists: bool,
    /// Started by this user, whose the directory is, and not by root.
    pub user: Option<u32>,
    /// Keep what guests know for a successor, and say what is done again.
    pub state: bool,
    /// Keep requests in flight in a file, too.
    pub records: bool,
    /// Which engine does I/O; the best if empty.
    pub engine: &'static str,
    /// Descriptors that the process may have.
    pub descriptors: Option<u32>,
    /// What else to say, where both programs have the same words for it.
    pub extra: &'static [&'static str],
    /// The directory is a shared mount.
    pub shared: bool,
    /// Answer [`Server::held`] and on [`Server::control`].
    pub control: bool,
    /// The watchdog's patience.
    pub lifetime: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            read_only: false,
            xattr: true,
            cache: "never",
            direct: false,
            more: &[],
            lists: false,
            user: None,
            state: false,
            records: false,
            engine: "",
            descriptors: None,
            extra: &[],
            shared: false,
            control: false,
            lifetime: Duration::from_secs(120),
        }
    }
}

/// A running server over a directory of its own. Dropping it ends both.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    options: Options,
    process: Process,
    /// A front end was there.
    served: bool,
    _mount: Option<SharedMount>,
    /// Sockets, and whatever a test needs outside of the share.
    pub scratch: Scratch,
}

/// A directory that is a shared mount of itself, until this is dropped.
#[derive(Debug)]
struct SharedMount(PathBuf);

impl SharedMount {
    fn make(directory: PathBuf) -> Self {
        let mount = Self(directory);
        mount_bind(&mount.0, &mount.0).expect("a mount of the directory");
        mount_change(&mount.0, MountPropagationFlags::SHARED).expect("it is shared");
        mount
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        // What is mounted below it goes along.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

impl Server {
    /// A server for a test that needs `parts` besides; `None` is a skipped test,
    /// and says so. The tests change owners and make device nodes: they need root.
    ///
    /// # Panics
    /// When the server does not start, or skipping is forbidden.
    pub fn for_test(test: &str, parts: &[Part], options: Options) -> Option<Self> {
        Self::of(Kind::under_test(), test, parts, options)
    }

    /// The same with a certain program.
    ///
    /// # Panics
    /// As [`Server::for_test`].
    pub fn of(kind: Kind, test: &str, parts: &[Part], options: Options) -> Option<Self> {
        if !have(test, parts) || !kind.usable(test) {
            return None;
        }
        if !geteuid().is_root() {
            absent(test, "files of several users want root");
            return None;
        }
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("dir")).expect("a directory to share");
        if let Some(user) = options.user {
            // It makes its socket there.
            for path in [scratch.dir(), &scratch.path("dir")] {
                chown(path, Some(user), Some(user)).expect("a directory of the user's");
            }
        }
        let mount = options
            .shared
            .then(|| SharedMount::make(scratch.path("dir")));
        let process = start(&kind, &scratch, &options);
        Some(Server {
            kind,
            options,
            process,
            served: false,
            _mount: mount,
            scratch,
        })
    }

    /// What it was asked for.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The directory it shares.
    pub fn dir(&self) -> PathBuf {
        self.scratch.path("dir")
    }

    /// A path below it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("fs.sock")
    }

    /// Where it tells what it counted, if it was asked to.
    pub fn control(&self) -> PathBuf {
        self.scratch.path("control.sock")
    }

    /// A new session, agreed on as Linux does.
    ///
    /// # Errors
    /// When the server does not take part.
    pub fn client(&mut self) -> Result<Client, Wrong> {
        let mut client = self.connect(&Client::setup())?;
        client.init()?;
        Ok(client)
    }

    /// A new connection without INIT.
    ///
    /// # Errors
    /// When the server does not take part.
    pub fn connect(&mut self, setup: &Setup) -> Result<Client, Wrong> {
        self.revive();
        Client::connect(&self.socket(), setup)
    }

    /// The peer serves one front end and ends, sooner or later: another one is
    /// started for the next. Ours must stay, so it is left as it is.
    fn revive(&mut self) {
        if self.kind != Kind::Pericarp && std::mem::replace(&mut self.served, true) {
            self.process.wait(Duration::from_millis(300));
            self.restart();
            self.served = true;
        }
    }

    /// Another process in the place of this one.
    pub fn restart(&mut self) {
        self.process.kill();
        let _ = fs::remove_file(self.socket());
        self.process = start(&self.kind, &self.scratch, &self.options);
        self.served = false;
    }

    /// Kills it and has another one in its place, which may come before the dead
    /// process is gone.
    pub fn succeed(&mut self) {
        self.process.signal(Signal::KILL);
        let successor = start(&self.kind, &self.scratch, &self.options);
        drop(std::mem::replace(&mut self.process, successor));
    }

    /// Has a new process take over from this one, which is to end well.
    ///
    /// # Panics
    /// When it does not.
    pub fn hand_over(&mut self) {
        let successor = start_after(
            &self.kind,
            &self.scratch,
            &self.options,
            Some(&self.control()),
        );
        let mut before = std::mem::replace(&mut self.process, successor);
        let status = before.wait(STEP);
        before.kill();
        let (old, new) = (before.output().last(10), self.process.output().last(10));
        let code = status.and_then(|status| status.code());
        assert_eq!(
            code,
            Some(0),
            "the old one wrote:\n{old}\nthe new one:\n{new}"
        );
    }

    /// Whether it wrote a line with this in it.
    pub fn said(&self, text: &str) -> bool {
        self.process.output().find(text).is_some()
    }

    /// True for the program that this project makes.
    pub fn is_ours(&self) -> bool {
        self.kind == Kind::Pericarp
    }

    /// True while it runs.
    pub fn is_alive(&mut self) -> bool {
        self.process.ended().is_none()
    }

    /// How it ended, and its last words.
    pub fn epitaph(&mut self) -> String {
        let tail = self.process.output().last(10);
        format!("{}; it wrote:\n{tail}", self.process.epitaph())
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// What it holds now; `None` when it is gone.
    pub fn footprint(&self) -> Option<Footprint> {
        Footprint::of(self.process.pid())
    }

    /// What guests have of it, by name, as its control socket tells; `None` of a
    /// peer.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn held(&self) -> std::io::Result<Option<Map<String, Value>>> {
        if !self.is_ours() || !self.options.control {
            return Ok(None);
        }
        let mut stream = connect(&self.scratch.path("control.sock"))?;
        stream.write_all(b"{\"op\":\"stats\"}\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        Ok(answer["devices"][0]["held"].as_object().cloned())
    }

    /// Asks it to end and waits; `None` when it does not.
    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.process.signal(Signal::TERM);
        self.process.wait(STEP)
    }
}

fn start(kind: &Kind, scratch: &Scratch, options: &Options) -> Process {
    start_after(kind, scratch, options, None)
}

/// One that takes over from the program that answers at `predecessor`.
fn start_after(
    kind: &Kind,
    scratch: &Scratch,
    options: &Options,
    predecessor: Option<&Path>,
) -> Process {
    let socket = scratch.path("fs.sock");
    let mut program = kind.program();
    if options.user.is_some() {
        // Ours may be where that user has no way to.
        let copy = scratch.path("program");
        fs::copy(&program, &copy).expect("a copy of the program");
        program = copy;
    }
    let mut command = arguments(kind, &program, options);
    command.arg("--socket-path").arg(&socket);
    command.arg("--shared-dir").arg(scratch.path("dir"));
    command.arg("--tag").arg(TAG);
    if options.control && *kind == Kind::Pericarp {
        let control = scratch.path("control.sock");
        command.arg("--control-path").arg(control);
    }
    if let Some(path) = predecessor {
        command.arg("--take-over").arg(path);
    }
    if options.state {
        command.arg("--state-file").arg(scratch.path("state"));
    }
    if options.state || predecessor.is_some() {
        command.arg("--log-level=info");
    }
    if options.records {
        command.arg("--inflight-file").arg(scratch.path("records"));
    }
    if !options.engine.is_empty() {
        command.arg("--io-engine").arg(options.engine);
    }
    let mut process =
        Process::start(&mut command, options.lifetime).expect("the server can be executed");
    let there = poll(STEP, || {
        let gone = process.ended().is_some();
        (gone || is_listening(&socket)).then_some(!gone)
    });
    if there != Some(true) {
        let epitaph = process.epitaph();
        process.kill();
        panic!(
            "the server makes no socket: it {epitaph}; it wrote:\n{}",
            process.output().last(20)
        );
    }
    process
}

/// The file is there a moment before anybody listens; the kernel's table of
/// sockets knows, and asking it makes no connection that a server might count.
fn is_listening(socket: &Path) -> bool {
    const LISTENS: &str = "00010000";
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let name = socket.to_string_lossy();
    table
        .lines()
        .any(|line| line.ends_with(&*name) && line.split_whitespace().nth(3) == Some(LISTENS))
}

fn arguments(kind: &Kind, program: &Path, options: &Options) -> Command {
    let prlimit = search_path("prlimit");
    let mut command = match (kind, options.descriptors, prlimit) {
        (Kind::Pericarp, Some(most), Some(prlimit)) => {
            let mut command = command(&prlimit);
            command.arg(format!("--nofile={most}:{most}")).arg(program);
            command
        }
        _ => command(program),
    };
    command.arg(format!("--cache={}", options.cache));
    if options.xattr {
        command.arg("--xattr");
    }
    if let Some(most) = options.descriptors {
        command.arg(format!("--rlimit-nofile={most}"));
    }
    if options.direct {
        command.arg("--allow-direct-io");
    }
    command.args(options.extra);
    if options.lists {
        command.arg("--posix-acl");
    }
    if let Some(user) = options.user {
        command.uid(user).gid(user);
    }
    match kind {
        Kind::Pericarp => {
            if options.read_only {
                command.arg("--read-only");
            }
            command.args(options.more);
        }
        Kind::Virtiofsd(_) => {
            command.args(["--sandbox=chroot", "--killpriv-v2"]);
            if options.read_only {
                command.arg("--readonly");
            }
            match options.descriptors {
                Some(most) => command.arg(format!("--rlimit-nofile={most}")),
                // A file without a name stays what it is, as it does with ours.
                None => command.arg("--inode-file-handles=never"),
            };
        }
    }
    command
}
