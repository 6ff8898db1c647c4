//! A place where KVM is backed by hardware, for tests of what needs it. Where this
//! machine is none, that is a virtual machine with an emulated CPU that has AMD's
//! virtualization: slow, but its `/dev/kvm` is a real one. It sees the files of
//! this machine, read-only, at the same paths; `/tmp`, `/run`, `/var/tmp` and `/var/cache` are
//! its own, and [`OUT`] is a directory of this machine's.
//!
//! Used by `tests/lab.rs` and by the program `pericarp-lab`, which
//! `cargo xtask lab` starts. What does not come from a manual:
//! - it has one CPU. With two on a thread each, QEMU 7.2 may translate a page while the other
//!   CPU writes to it, and a kernel that patches itself, as KVM has it do whenever a virtual
//!   machine comes or goes, sooner or later dies of an `int3` that is no longer there. With
//!   two on one thread the guest's own guests get no time while the other CPU waits for
//!   them;
//! - a virtual machine in it is translated twice, and runs ten times slower than
//!   one beside it.

mod clock;
mod pulse;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_hypervisor::HostFacts;
use thiserror::Error;

use crate::bounded::{Deadline, poll};
use crate::guest::{Assets, MARK, exit_code, pack};
use crate::parts::{Part, missing};
use crate::process::{Process, command};
use crate::scratch::Scratch;
use pulse::Pulse;

/// Where a command in the lab finds the directory that it may leave files in.
pub const OUT: &str = "/run/lab";

/// Set in it.
const MADE: &str = "PERICARP_LAB";
/// How long the servers of files may take to listen.
const STEP: Duration = Duration::from_secs(10);
/// How often somebody looks at what it wrote.
const LOOK: Duration = Duration::from_millis(50);
/// Lines of the console that are kept for whoever asks why.
const SHOWN: usize = 30;

/// Why a command was not run to its end.
#[derive(Debug, Error)]
pub enum LabError {
    /// A part is not installed.
    #[error("{0}")]
    Missing(String),
    /// Something could not be prepared.
    #[error("the lab cannot be prepared: {0}")]
    Prepare(#[from] io::Error),
    /// The machine ended before the command did.
    #[error("the lab {epitaph} before the command was done; its last lines:\n{console}")]
    Died {
        /// How.
        epitaph: String,
        /// What it wrote.
        console: String,
    },
    /// It took too long.
    #[error("the command was not done within {} s; the lab's last lines:\n{console}", limit.as_secs())]
    TimedOut {
        /// How long it was given.
        limit: Duration,
        /// What it wrote.
        console: String,
    },
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its exit code.
    pub code: i32,
    /// What it wrote, and the kernel's messages between.
    pub output: String,
}

/// A command to run.
#[derive(Debug)]
pub struct Lab {
    /// Run by `/bin/sh` in `directory`.
    pub script: String,
    /// A directory of this machine.
    pub directory: PathBuf,
    /// Variables it has besides PATH and HOME.
    pub variables: Vec<(String, String)>,
    /// What is [`OUT`] to it.
    pub out: Option<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// All of it must be over by then.
    pub limit: Duration,
    /// What it writes goes to our stdout at once.
    pub live: bool,
}

impl Lab {
    /// Its memory: `pericarp run` asks for a host of 2 GiB. QEMU takes half a GiB more, for
    /// what it has translated.
    pub const MEMORY_MIB: u32 = 2560;

    /// A script in the current directory, with five minutes for all.
    pub fn new(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            directory: std::env::current_dir().unwrap_or_else(|_| "/".into()),
            variables: Vec::new(),
            out: None,
            cpus: 1,
            limit: Duration::from_secs(300),
            live: false,
        }
    }

    /// True where no lab has to be made: this machine is one.
    pub fn is_here() -> bool {
        let facts = HostFacts::probe();
        facts.kvm_device.is_ok() && facts.cpu_flag.is_some()
    }

    /// True in a laboratory that [`run`](Self::run) made, where all may be changed.
    pub fn is_made() -> bool {
        std::env::var_os(MADE).is_some()
    }

    /// What is missing to make one, and how to get it.
    pub fn lacks() -> Option<String> {
        missing(&[Part::QemuSystem, Part::Busybox, Part::PERICARP_FS]).or_else(|| {
            let made = "the lab's kernel is missing (make it: cargo xtask setup)";
            Assets::find().is_none().then(|| made.to_owned())
        })
    }

    /// Runs the command: here, if this machine has what it needs.
    ///
    /// # Errors
    /// When it does not come to its end.
    pub fn run(&self) -> Result<Report, LabError> {
        if Self::is_here() {
            return self.run_here();
        }
        if let Some(what) = Self::lacks() {
            return Err(LabError::Missing(what));
        }
        let assets = Assets::find().ok_or_else(|| LabError::Missing("no assets".to_owned()))?;
        let scratch = Scratch::new();
        let out = self.out.clone().unwrap_or_else(|| scratch.path("out"));
        fs::create_dir_all(&out)?;
        let mut files = serve(&scratch, &out, self.limit)?;
        let image = initramfs(&scratch, &assets, &self.script_of_init())?;
        let log = scratch.path("console");
        let mut qemu = emulator(&assets, &image, &scratch, self.cpus, &log);
        let mut process = Process::start(&mut qemu, self.limit + STEP)?;
        let mut shown = 0;
        let mut pulse = Pulse::of(&scratch.path("monitor"));
        // Several count on several of ours: that is what they are for.
        let mut held = self.cpus > 1;
        let deadline = Deadline::after(self.limit);
        while process.ended().is_none() && !deadline.passed() {
            std::thread::sleep(LOOK);
            held = held || clock::hold(process.pid());
            let written = fs::metadata(&log).map_or(0, |log| log.len());
            pulse.feel(written as usize);
            if self.live {
                shown = show(&log, shown);
            }
        }
        let ended = process.ended();
        let epitaph = process.epitaph();
        process.kill();
        files.kill();
        if self.live {
            show(&log, shown);
        }
        let console = String::from_utf8_lossy(&fs::read(&log)?).replace('\r', "");
        if let Some(code) = exit_code(&console).and_then(|code| code.trim().parse().ok()) {
            let output = console.rsplit_once(MARK).map_or("", |(output, _)| output);
            let output = output.to_owned();
            return Ok(Report { code, output });
        }
        let said = [console, process.output().last(SHOWN)].concat();
        let lines: Vec<&str> = said.lines().collect();
        let console = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
        Err(match ended {
            Some(_) => LabError::Died { epitaph, console },
            None => LabError::TimedOut {
                limit: self.limit,
                console,
            },
        })
    }

    fn run_here(&self) -> Result<Report, LabError> {
        let mut shell = command(Path::new("/bin/sh"));
        shell
            .arg("-c")
            .arg(&self.script)
            .current_dir(&self.directory);
        shell.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let mut process = Process::start(&mut shell, self.limit + STEP)?;
        let ended = process.wait(self.limit);
        process.kill();
        let output = process.output().lines().join("\n");
        if self.live {
            println!("{output}");
        }
        match ended {
            Some(status) => Ok(Report {
                code: status.code().unwrap_or(128),
                output,
            }),
            None => Err(LabError::TimedOut {
                limit: self.limit,
                console: output,
            }),
        }
    }

    /// What the lab's shell reads: where it is, what it has, what it does.
    fn script_of_init(&self) -> String {
        let variables: String = self
            .variables
            .iter()
            .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
            .collect();
        let directory = quoted(&self.directory.to_string_lossy());
        format!(
            "export {MADE}=1\n{variables}cd {directory} || exit 125\n{}\n",
            self.script
        )
    }
}

/// A word for a shell.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Passes on what the console has since `from`; where it ends.
fn show(log: &Path, from: usize) -> usize {
    use std::io::Write;
    let bytes = fs::read(log).unwrap_or_default();
    // Whole lines: another lab may write beside this one.
    let whole = bytes.iter().rposition(|byte| *byte == b'\n');
    let end = whole.map_or(0, |at| at + 1);
    if let Some(new) = bytes.get(from..end) {
        let text = String::from_utf8_lossy(new).replace('\r', "");
        let text = text.split(MARK).next().unwrap_or_default();
        let mut stdout = io::stdout();
        let _ = stdout.write_all(text.as_bytes());
        let _ = stdout.flush();
        return end;
    }
    from
}

/// Shows the lab this machine's files and a directory it may write to.
fn serve(scratch: &Scratch, out: &Path, limit: Duration) -> Result<Process, LabError> {
    let program = Part::PERICARP_FS.find();
    let program = program.ok_or_else(|| LabError::Missing("no pericarp-fs".to_owned()))?;
    let (host, back) = (scratch.path("host.sock"), scratch.path("out.sock"));
    let doubled = |path: &Path| path.to_string_lossy().replace(',', ",,");
    let mut server = command(&program);
    server
        .arg("--device")
        .arg(format!(
            "id=host,socket={},dir=/,tag=host,read-only=on",
            doubled(&host)
        ))
        .arg("--device")
        .arg(format!(
            "id=out,socket={},dir={},tag=out",
            doubled(&back),
            doubled(out)
        ));
    let mut process = Process::start(&mut server, limit + 2 * STEP)?;
    let there = poll(STEP, || {
        let gone = process.ended().is_some();
        (gone || (host.exists() && back.exists())).then_some(!gone)
    });
    if there == Some(true) {
        return Ok(process);
    }
    let (epitaph, words) = (process.epitaph(), process.output().last(SHOWN));
    process.kill();
    let said = format!("pericarp-fs {epitaph}: {words}");
    Err(LabError::Prepare(io::Error::other(said)))
}

fn emulator(assets: &Assets, image: &Path, scratch: &Scratch, cpus: u32, log: &Path) -> Command {
    let program = Part::QemuSystem.find().unwrap_or_default();
    let mut qemu = command(&program);
    qemu.args(["-machine", "q35,memory-backend=mem"])
        .args(["-name", "laboratory,debug-threads=on"])
        .args([
            "-m",
            &format!("{}M", Lab::MEMORY_MIB),
            "-smp",
            &cpus.to_string(),
        ])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=mem,share=on,size={}M",
            Lab::MEMORY_MIB
        ))
        .args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-serial", &format!("file:{}", log.display())]);
    let monitor = scratch.path("monitor");
    qemu.arg("-chardev").arg(format!(
        "socket,id=monitor,path={},server=on,wait=off",
        monitor.display()
    ));
    qemu.args(["-mon", "chardev=monitor,mode=control"]);
    for tag in ["host", "out"] {
        let socket = scratch.path(&format!("{tag}.sock"));
        qemu.arg("-chardev")
            .arg(format!("socket,id={tag},path={}", socket.display()))
            .arg("-device")
            .arg(format!(
                "vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"
            ));
    }
    qemu.arg("-kernel").arg(assets.plain_kernel());
    qemu.arg("-initrd").arg(image);
    qemu.arg("-append")
        .arg("console=ttyS0 no_timer_check cryptomgr.notests quiet panic=-1");
    qemu
}

/// Its first process: modules, the host's files as its root, the script. That root is the top of its
/// mounts, not one by chroot: else who joins these mounts would be in the initramfs, and no container
/// could exchange its root.
fn initramfs(scratch: &Scratch, assets: &Assets, script: &str) -> io::Result<PathBuf> {
    let root = scratch.path("root");
    for dir in ["bin", "dev", "proc", "sys", "host", "modules"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = Part::Busybox.find().unwrap_or_default();
    fs::copy(busybox, root.join("bin/busybox"))?;
    let mut loads = String::new();
    for module in assets.listed("order-lab")? {
        let name = module.file_name().unwrap_or_default();
        fs::copy(&module, root.join("modules").join(name))?;
        loads += &format!("insmod /modules/{}\n", name.to_string_lossy());
    }
    fs::write(root.join("script"), script)?;
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t devtmpfs dev /dev\n\
         mount -t cgroup2 none /sys/fs/cgroup\n\
         mkdir /dev/pts\n\
         mount -t devpts devpts /dev/pts\n\
         exec >/dev/console 2>&1 </dev/null\n\
         stty -onlcr </dev/console\n\
         {loads}\
         mount -t virtiofs -o ro host /host\n\
         for dir in proc sys dev; do mount -o move /$dir /host/$dir; done\n\
         for dir in tmp run var/tmp var/cache dev/shm; do\n\
             mkdir -p /host/$dir 2>/dev/null\n\
             mount -t tmpfs -o mode=1777 tmpfs /host/$dir\n\
         done\n\
         mkdir /host{OUT}\n\
         mount -t virtiofs out /host{OUT}\n\
         cp /script /last /bin/busybox /host/run\n\
         export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TMPDIR=/tmp\n\
         exec /bin/busybox switch_root /host /run/busybox sh /run/last\n"
    );
    let last = format!(
        "/bin/sh /run/script >/dev/console 2>&1 </dev/null\n\
         echo {MARK} $? >/dev/console\n\
         sync\n\
         /run/busybox poweroff -f\n"
    );
    fs::write(root.join("last"), last)?;
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    pack(scratch, &root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn a_script_begins_where_and_with_what_it_is_told() {
        let mut lab = Lab::new("true");
        lab.directory = "/some where".into();
        lab.variables.push(("NAME".into(), "a b".into()));
        let want = "export PERICARP_LAB=1\nexport NAME='a b'\ncd '/some where' || exit 125\ntrue\n";
        assert_eq!(lab.script_of_init(), want);
    }
}
