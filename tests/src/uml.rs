//! User-mode Linux as a rig: Linux's own virtio drivers at native speed,
//! against a vhost-user socket, without KVM. One run boots, runs one shell
//! script as root with the disks as `/dev/vda`, `/dev/vdb` and so on, and ends.
//!
//! Used by `tests/uml.rs` and the demo. What does not come from a manual:
//! - the host's `/` is the root, read-only, through hostfs; `/proc` is the
//!   *host's* until it is mounted over, so a shell that re-executes
//!   `/proc/self/exe` for its built-ins (busybox) would start another UML;
//! - `virtio_blk` is a module, in the host's `/usr/lib/uml/modules`;
//! - guest memory is a file in TMPDIR, mapped shared, so it wants a tmpfs;
//! - it is many processes; killing the first leaves the others behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use thiserror::Error;

use crate::bounded::poll;
use crate::parts::{Part, search_path};
use crate::process::{Process, command};
use crate::scratch::Scratch;

/// Virtio's device numbers for a card, a block device and a file system.
const CARD: u32 = 1;
const BLOCK: u32 = 2;
const FILE_SYSTEM: u32 = 26;
/// Console lines shown with an error.
const SHOWN: usize = 15;

/// What to boot.
#[derive(Clone, Debug)]
pub struct Machine {
    /// vhost-user block sockets, in the order of `/dev/vd*`.
    pub disks: Vec<PathBuf>,
    /// vhost-user file system sockets, to be mounted by their tags.
    pub shares: Vec<PathBuf>,
    /// vhost-user network sockets; their driver is loaded.
    pub cards: Vec<PathBuf>,
    /// Words of the kernel's command line besides those that say all this.
    pub words: Vec<String>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Run by `/bin/sh -e` in a writable, empty directory.
    pub script: String,
    /// All of it must be over by then.
    pub limit: Duration,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The script's exit code.
    pub code: i32,
    /// What the script wrote to stdout and stderr.
    pub output: String,
    /// The last console lines.
    pub console: String,
}

/// Why there is no [`Report`].
#[derive(Debug, Error)]
pub enum UmlError {
    /// It could not be started.
    #[error("linux.uml cannot be started: {0}")]
    Start(#[from] std::io::Error),
    /// The guest kernel gave up.
    #[error("the guest kernel panicked: {line}\nlast console lines:\n{console}")]
    Panic {
        /// Its own words.
        line: String,
        /// What came around them.
        console: String,
    },
    /// It ended before the script did.
    #[error(
        "the guest died: it {epitaph} before the script was done\nlast console lines:\n{console}"
    )]
    Died {
        /// How.
        epitaph: String,
        /// What came before.
        console: String,
    },
    /// It took too long.
    #[error("the guest was not done within {} s; the script had written:\n{output}\nlast console lines:\n{console}", limit.as_secs())]
    TimedOut {
        /// How long it was given.
        limit: Duration,
        /// What the script had written.
        output: String,
        /// What the kernel had written.
        console: String,
    },
}

impl Machine {
    /// A machine of 512 MiB with two minutes to run `script`.
    pub fn new(disks: &[&Path], script: &str) -> Self {
        Machine {
            disks: disks.iter().map(|disk| disk.to_path_buf()).collect(),
            shares: Vec::new(),
            cards: Vec::new(),
            words: Vec::new(),
            memory_mib: 512,
            script: script.into(),
            limit: Duration::from_secs(120),
        }
    }

    /// Boots; who has the process sees to its end. The script has its own files below
    /// the scratch directory.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, scratch: &Scratch) -> Result<Process, UmlError> {
        fs::write(scratch.path("script"), &self.script)?;
        let init = scratch.path("init");
        fs::write(&init, first_process(scratch.dir(), !self.cards.is_empty()))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

        let mut command = kernel();
        command
            .arg(format!("mem={}M", self.memory_mib))
            .args(["rootfstype=hostfs", "rootflags=/", "ro"])
            .arg(format!("init={}", init.display()))
            .arg(format!("uml_dir={}/", scratch.dir().display()))
            .args(["con=null", "con0=null,fd:1", "panic=1"])
            .args(&self.words);
        for (devices, kind) in [
            (&self.disks, BLOCK),
            (&self.shares, FILE_SYSTEM),
            (&self.cards, CARD),
        ] {
            for socket in devices {
                command.arg(format!("virtio_uml.device={}:{kind}", socket.display()));
            }
        }
        command
            .env("TMPDIR", memory_dir(scratch.dir()))
            .env("HOME", scratch.dir());
        let life = self.limit + Duration::from_secs(5);
        Ok(Process::start(&mut command, life)?)
    }

    /// Boots, runs the script, powers off.
    ///
    /// # Errors
    /// When the machine does not get as far as the script's exit code.
    pub fn run(&self) -> Result<Report, UmlError> {
        let scratch = Scratch::new();
        let mut process = self.start(&scratch)?;
        let console = process.output().clone();
        let panic = || console.find("Kernel panic");
        let ended = poll(self.limit, || {
            (process.ended().is_some() || panic().is_some()).then_some(())
        });
        if panic().is_some() {
            // Let it finish its sentence.
            let _ = process.wait(Duration::from_millis(300));
        }
        let timed_out = ended.is_none();
        let epitaph = process.epitaph();
        process.kill();

        let output = fs::read(scratch.path("output")).unwrap_or_default();
        let output = String::from_utf8_lossy(&output).into_owned();
        let code = fs::read_to_string(scratch.path("code")).ok();
        let console = console.last(SHOWN);
        if let Some(code) = code.and_then(|code| code.trim().parse().ok()) {
            return Ok(Report {
                code,
                output,
                console,
            });
        }
        if let Some(line) = process.output().find("Kernel panic") {
            return Err(UmlError::Panic { line, console });
        }
        if timed_out {
            return Err(UmlError::TimedOut {
                limit: self.limit,
                output,
                console,
            });
        }
        Err(UmlError::Died { epitaph, console })
    }
}

/// The command that starts the kernel, without arguments. As root it gets a
/// process namespace of its own: UML's helper processes survive the kernel's
/// death, but not that of their namespace, however it comes.
pub fn kernel() -> Command {
    let program = Part::UserModeLinux
        .find()
        .unwrap_or_else(|| "linux.uml".into());
    match search_path("unshare") {
        Some(unshare) if rustix::process::geteuid().is_root() => {
            let mut command = command(&unshare);
            command
                .args(["--pid", "--fork", "--kill-child=KILL", "--"])
                .arg(program);
            command
        }
        _ => command(&program),
    }
}

/// A directory for the guest's memory.
fn memory_dir(otherwise: &Path) -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        shm.to_owned()
    } else {
        otherwise.to_owned()
    }
}

/// What loads the driver of a card, with all that it needs.
const CARDS: &str = "\
for module in net/core/failover drivers/net/net_failover drivers/net/virtio_net; do
    insmod \"/usr/lib/uml/modules/$(uname -r)/kernel/$module.ko\"
done
";

/// The guest's `init`: everything it needs, the script, then power off.
fn first_process(scratch: &Path, cards: bool) -> String {
    let scratch = scratch.display();
    let cards = if cards { CARDS } else { "" };
    format!(
        r#"#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /mnt
mkdir /mnt/host /mnt/work
mount -t hostfs host /mnt/host -o {scratch}
mount -t tmpfs tmp /tmp
insmod "/usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/virtio_blk.ko"
{cards}cd /mnt/work
sh -e /mnt/host/script >/mnt/host/output 2>&1
code=$?
sync
echo $code >/mnt/host/code.part && mv /mnt/host/code.part /mnt/host/code
echo o >/proc/sysrq-trigger
sleep 60
"#
    )
}
