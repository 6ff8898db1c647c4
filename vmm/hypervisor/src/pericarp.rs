//! The driver of our own monitor, `pericarp-vmm`: on KVM, with nothing between the guest and the
//! backends. Called through [`Hypervisor`]. The monitor confines itself.

use std::{
    io,
    os::unix::{fs::DirBuilderExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use crate::{
    console::Console,
    machine::{Hypervisor, Machine, MachineError},
    process::{Confinement, Process},
    remote::{Control, Remote},
    spec::MachineSpec,
};

const PROGRAM: &str = "pericarp-vmm";
/// What the kernel must know of this machine: its console; and not to test its ciphers first.
const PARAMETERS: &str = "console=ttyS0 cryptomgr.notests";
/// How long it may take to make the machine: as long as a backend may take to answer, and the
/// kernel to be unpacked the first time.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);
/// How often it is looked whether the machine runs.
const LOOK: Duration = Duration::from_millis(2);
/// The monitor counts memory in these.
const GRAIN: u64 = 2 << 20;

/// The driver.
#[derive(Debug, Clone, Copy)]
pub struct Pericarp {
    set_up_limit: Duration,
}

impl Default for Pericarp {
    fn default() -> Self {
        Self {
            set_up_limit: SET_UP_LIMIT,
        }
    }
}

impl Hypervisor for Pericarp {
    fn name(&self) -> &'static str {
        PROGRAM
    }

    fn boot_timeout(&self) -> Duration {
        Duration::from_secs(20)
    }

    fn finds_shares_again(&self) -> bool {
        true
    }

    fn start(&self, spec: &MachineSpec) -> Result<Machine, MachineError> {
        spec.check()?;
        let host = |what: &str| {
            let what = what.to_owned();
            move |source| MachineError::Host { what, source }
        };
        let place = Place::new().map_err(host("no directory for the control socket"))?;
        let control = place.0.join("control");
        let mut command = Command::new(program());
        command
            .args(arguments(spec))
            .arg("--control-path")
            .arg(&control)
            .stdout(Stdio::piped())
            .current_dir("/");
        let confinement = Confinement::default();
        let mut process = Process::spawn(PROGRAM, command, confinement).map_err(|source| {
            MachineError::Start {
                program: PROGRAM.into(),
                source,
            }
        })?;
        let Some(output) = process.take_stdout() else {
            return Err(host("the console")(io::ErrorKind::BrokenPipe.into()));
        };
        let console =
            Console::follow(&spec.console, output).map_err(host("the console cannot be kept"))?;
        let remote = self.wait_for(&mut process, &control)?;
        Ok(Machine {
            process,
            console,
            remote: Remote::Pericarp(remote),
        })
    }
}

impl Pericarp {
    /// Waits until the guest runs.
    fn wait_for(&self, process: &mut Process, control: &Path) -> Result<Control, MachineError> {
        let end = Instant::now() + self.set_up_limit;
        let mut remote: Option<Control> = None;
        loop {
            if remote.is_none() {
                remote = UnixStream::connect(control).ok().map(Control::new);
            }
            let left = end.saturating_duration_since(Instant::now());
            let state = remote.as_mut().map(|remote| remote.ask("status", left));
            match (state, remote.take()) {
                (Some(Ok(status)), Some(ready)) if status["state"] == "running" => {
                    return Ok(ready);
                }
                // Not yet, or an end, which is seen below.
                (_, kept) => remote = kept,
            }
            if process.exited().is_some() {
                return Err(MachineError::SetUp {
                    program: PROGRAM.into(),
                    end: process.describe_end(),
                });
            }
            if left.is_zero() {
                process.kill();
                return Err(MachineError::SetUpTimeout(self.set_up_limit));
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Beside this program, as the sidecars are, else by name.
fn program() -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| {
        let directory = own.parent()?;
        // Tests are a directory further down.
        [directory.join(PROGRAM), directory.join("..").join(PROGRAM)]
            .into_iter()
            .find(|path| path.is_file())
    });
    beside.unwrap_or_else(|| PROGRAM.into())
}

fn text(path: &Path) -> String {
    // Checked to be text by `MachineSpec::check`. A comma in a value is written twice.
    path.to_string_lossy().replace(',', ",,")
}

fn arguments(spec: &MachineSpec) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| args.extend([format!("--{name}"), value]);
    option("kernel", spec.kernel.to_string_lossy().into_owned());
    option("initramfs", spec.initramfs.to_string_lossy().into_owned());
    option(
        "cmdline",
        format!("{PARAMETERS} {}", spec.cmdline)
            .trim_end()
            .to_owned(),
    );
    option("cpus", spec.cpus.to_string());
    option("memory", spec.memory.next_multiple_of(GRAIN).to_string());
    option("serial", "stdio".into());
    for disk in &spec.disks {
        option(
            "disk",
            format!(
                "id={},socket={},queues={},queue-size={}",
                disk.id,
                text(&disk.socket),
                disk.num_queues,
                disk.queue_size
            ),
        );
    }
    for share in &spec.shares {
        option(
            "fs",
            format!(
                "id={},socket={},tag={},queues={},queue-size={}",
                share.id,
                text(&share.socket),
                share.tag,
                share.num_queues,
                share.queue_size
            ),
        );
    }
    for card in &spec.cards {
        option(
            "net",
            format!(
                "id={},socket={},mac={},queues={},queue-size={}",
                card.id,
                text(&card.socket),
                card.mac_text(),
                card.queue_pairs,
                card.queue_size
            ),
        );
    }
    if let Some(vsock) = &spec.vsock {
        option(
            "vsock",
            format!(
                "id={},socket={},cid={}",
                vsock.id,
                text(&vsock.socket),
                vsock.guest_cid
            ),
        );
    }
    args.push("--no-reboot".into());
    args
}

/// A directory that is ours alone, removed with what is in it once the connection is made.
struct Place(PathBuf);

impl Place {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("pericarp-vmm-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::sample;

    #[test]
    fn the_command_line_describes_the_machine() {
        let args = arguments(&sample());
        let has = |name: &str, value: &str| {
            args.windows(2)
                .any(|pair| pair[0] == name && pair[1] == value)
        };
        let wanted = "id=root,socket=/run/x/root,,1.sock,queues=2,queue-size=128";
        assert!(has("--disk", wanted), "{args:?}");
        let wanted =
            "id=eth0,socket=/run/x/eth,,0.sock,mac=02:00:00:00:00:0a,queues=2,queue-size=256";
        assert!(has("--net", wanted), "{args:?}");
        assert!(has("--cpus", "2") && has("--memory", "268435456"));
        assert!(has("--cmdline", "console=ttyS0 cryptomgr.notests panic=-1"));
        assert!(args.iter().any(|arg| arg == "--no-reboot"));
        assert!(args.iter().any(|arg| arg.contains("tag=share.1")));
    }

    #[test]
    fn a_directory_is_ours_and_goes() {
        use std::os::unix::fs::PermissionsExt;
        let place = Place::new().unwrap();
        let path = place.0.clone();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_ne!(Place::new().unwrap().0, path);
        drop(place);
        assert!(!path.exists());
    }
}
