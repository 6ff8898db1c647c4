//! The programs that are attacked, each started as an operator would, and what lies
//! around it on the host: a secret, a victim, sockets, another process.

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::network::TAP;
use pericarp_tests::parts::beside_us;
use pericarp_tests::process::{Process, command};
use pericarp_tests::puppet::{Puppet, thread_named};
use pericarp_tests::scratch::Scratch;

/// After this long something hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// What is attacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Block,
    Net,
    Vsock,
    /// The file server with a directory that may be changed.
    Fs,
    /// The same with one that may not.
    FsReading,
    /// The monitor's own thread.
    Monitor,
    /// That of a virtual CPU.
    Cpu,
}

/// The host around a program.
pub(crate) struct Scene {
    scratch: Scratch,
    /// A file that nobody but the test may read.
    pub(crate) secret: PathBuf,
    /// One that may be lost, in a directory that the program has open and was not given:
    /// as if whoever started it had forgotten to close it.
    pub(crate) victim: PathBuf,
    /// A directory that the file server shares.
    pub(crate) tree: PathBuf,
    /// What others listen on.
    pub(crate) listener: PathBuf,
    pub(crate) abstract_name: String,
    pub(crate) port: u16,
    /// A process of the host's.
    pub(crate) other: u64,
    /// A file handle. It is none, which is looked at after the right to use any.
    pub(crate) handle: [u8; 136],
    /// Of the test itself, as `capset` takes them.
    pub(crate) capabilities: [u8; 24],
    _sockets: (UnixListener, UnixListener, TcpListener),
    _process: Process,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let scratch = Scratch::new();
        let secret = scratch.file("secret", b"the host's");
        for name in ["outside", "tree", "own", "kernels"] {
            fs::create_dir(scratch.path(name)).unwrap();
        }
        let tree = scratch.path("tree");
        fs::write(tree.join("file"), "shared").unwrap();
        fs::copy("/bin/true", tree.join("program")).unwrap();
        symlink(&secret, tree.join("link")).unwrap();
        symlink("../secret", tree.join("link-up")).unwrap();
        let listener = scratch.path("listener");
        let abstract_name = format!("pericarp-escape-{}", scratch.dir().display());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let sockets = (
            UnixListener::bind(&listener).unwrap(),
            UnixListener::bind_addr(&address).unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let port = sockets.2.local_addr().unwrap().port();
        let mut sleeper = command(Path::new("/bin/sleep"));
        let process = Process::start(sleeper.arg("600"), 10 * LIMIT).unwrap();
        let scene = Self {
            secret,
            victim: scratch.path("outside/victim"),
            tree,
            listener,
            abstract_name,
            port,
            other: process.pid().cast_unsigned().into(),
            handle: [0; 136],
            capabilities: capabilities(),
            _sockets: sockets,
            _process: process,
            scratch,
        };
        scene.renew();
        scene
    }

    /// Makes good what an attempt has done.
    pub(crate) fn renew(&self) {
        let new = self.victim.with_extension("new");
        let _ = fs::remove_file(&new).or_else(|_| fs::remove_dir(&new));
        let _ = fs::remove_file(self.tree.join("device"));
        fs::write(&self.victim, "the host's").unwrap();
        fs::write(self.tree.join("file"), "shared").unwrap();
    }

    /// A file beside what there is, for a program to read.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        self.scratch.file(name, bytes)
    }

    /// Starts the program and takes hold of a thread of it, once it is confined, or says that
    /// it is not.
    pub(crate) fn start(&self, target: Target, confined: bool) -> (Puppet, Process) {
        for name in ["socket", "guest"] {
            let _ = fs::remove_file(self.scratch.path("own").join(name));
        }
        // The directory is left open in the program.
        let mut shell = command(Path::new("/bin/sh"));
        shell
            .args(["-c", "exec 9<\"$0\"; exec \"$@\""])
            .arg(self.scratch.path("outside"));
        self.describe(target, &mut shell);
        shell.args(["--log-level", "info"]);
        if !confined {
            shell.arg("--no-confine");
        }
        let mut process = Process::start(&mut shell, 2 * LIMIT).unwrap();
        let said = match confined {
            true => "confined: ",
            false => "not confined, as asked",
        };
        let ready = poll(LIMIT, || {
            let ready = process.output().find(said).is_some();
            (ready || process.ended().is_some()).then_some(ready)
        });
        assert_eq!(ready, Some(true), "{}", process.output().last(20));
        let pid = process.pid();
        let thread = match target {
            Target::Cpu => poll(LIMIT, || thread_named(pid, "cpu-0")),
            _ => Some(pid),
        };
        let thread = thread.expect("a thread of a CPU");
        if confined && target == Target::Cpu {
            // It has its name before it gives up more than its process has.
            let narrowed = || filters(pid, thread) > filters(pid, pid);
            let narrowed = poll(LIMIT, || narrowed().then_some(()));
            assert!(narrowed.is_some(), "the thread of a CPU has no filter more");
        }
        let puppet = Puppet::take(pid, thread)
            .unwrap_or_else(|e| panic!("{target:?}: {e}: {}", process.output().last(20)));
        // In the order in which they are to go.
        (puppet, process)
    }

    fn describe(&self, target: Target, command: &mut Command) {
        let own = self.scratch.path("own");
        let program = match target {
            Target::Block => "pericarp-block",
            Target::Net => "pericarp-net",
            Target::Vsock => "pericarp-vsock",
            Target::Fs | Target::FsReading => "pericarp-fs",
            Target::Monitor | Target::Cpu => "pericarp-vmm",
        };
        command.arg(beside_us().join(program));
        if !matches!(target, Target::Monitor | Target::Cpu) {
            command.arg("--socket-path").arg(own.join("socket"));
        }
        match target {
            Target::Block => {
                let disk = self.scratch.sparse("disk", 1 << 20);
                command.arg("--blk-file").arg(disk);
            }
            Target::Net => {
                command.args(["--tap", TAP]);
            }
            Target::Vsock => {
                command.args(["--guest-cid", "3", "--uds-path"]);
                command.arg(own.join("guest"));
            }
            Target::Fs | Target::FsReading => {
                command
                    .args(["--tag", "tree", "--shared-dir"])
                    .arg(&self.tree);
                if target == Target::FsReading {
                    command.arg("--read-only");
                }
            }
            Target::Monitor | Target::Cpu => {
                let kernel = self.scratch.file("kernel", &sleeping_kernel());
                command.arg("--kernel").arg(kernel);
                command.args(["--memory", "64M", "--serial", "null"]);
                command
                    .arg("--kernel-cache")
                    .arg(self.scratch.path("kernels"));
                command.arg("--control-path").arg(own.join("socket"));
            }
        }
    }
}

/// How many filters a thread has.
fn filters(pid: i32, thread: i32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
    let status = status.unwrap_or_default();
    let count = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"));
    count
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or_default()
}

/// The test's own capabilities, as the two halves of `cap_user_data_t`.
fn capabilities() -> [u8; 24] {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    let own = u64::from_str_radix(line.unwrap().trim(), 16).unwrap();
    let mut bytes = [0; 24];
    for (half, place) in [(own as u32, 0), ((own >> 32) as u32, 12)] {
        bytes[place..place + 4].copy_from_slice(&half.to_ne_bytes());
        bytes[place + 4..place + 8].copy_from_slice(&half.to_ne_bytes());
    }
    bytes
}

/// A kernel with a PVH entry that does nothing: `hlt`, and back to it.
pub(crate) fn sleeping_kernel() -> Vec<u8> {
    const ADDRESS: u64 = 0x10_0000;
    const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    // XEN_ELFNOTE_PHYS32_ENTRY.
    let mut note = Vec::new();
    for number in [4_u32, 8, 18] {
        note.extend(number.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ADDRESS.to_le_bytes());
    // The headers: the file's, that of what is loaded, that of the note.
    let (code_at, note_at) = (0x1000_u64, 64 + 2 * 56_u64);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for number in [ADDRESS, 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for number in [64_u16, 56, 2, 64, 0, 0] {
        file.extend(number.to_le_bytes());
    }
    let loaded = (1_u32, 5_u32, code_at, ADDRESS, CODE.len() as u64);
    let noted = (4_u32, 4_u32, note_at, 0, note.len() as u64);
    for (kind, flags, offset, address, len) in [loaded, noted] {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        // The fields of a note are aligned to four bytes.
        for number in [offset, address, address, len, len, 4] {
            file.extend(number.to_le_bytes());
        }
    }
    file.extend(&note);
    file.resize(code_at as usize, 0);
    file.extend(CODE);
    file
}
