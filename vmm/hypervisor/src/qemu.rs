//! The QEMU driver: a q35 machine whose devices are vhost-user backends.
//!
//! Works wherever QEMU is installed, with KVM or with an emulated CPU. Called through
//! [`Hypervisor`]. The machine has no firmware devices beyond what the boot needs, no network, no
//! monitor; QEMU itself runs without capabilities, in an empty network namespace (where the caller
//! may make one) and behind its own system call filter.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    console::Console,
    machine::{Hypervisor, Machine, MachineError},
    process::{Confinement, Process},
    select::Accelerator,
    spec::MachineSpec,
};

const PROGRAM: &str = "qemu-system-x86_64";
/// What the kernel must know of this machine. It would count the timer's ticks in a busy loop to
/// find out how they arrive, and panic when the host runs something else just then; they do arrive.
const PARAMETERS: &str = "console=ttyS0 no_timer_check";
/// QEMU connects its channels while it reads its options.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// The driver.
#[derive(Debug, Clone, Copy)]
pub struct Qemu {
    accelerator: Accelerator,
}

impl Qemu {
    /// A driver that provides the guest's CPU this way.
    #[must_use]
    pub fn new(accelerator: Accelerator) -> Self {
        Self { accelerator }
    }

    /// The command line for a checked machine.
    fn arguments(self, spec: &MachineSpec) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| {
            args.push(format!("-{name}"));
            args.push(value);
        };
        let mib = spec.memory >> 20;
        option("name", "pericarp".into());
        option(
            "machine",
            "q35,memory-backend=mem,sata=off,smbus=off,usb=off,vmport=off,graphics=off".into(),
        );
        match self.accelerator {
            Accelerator::Kvm => {
                option("accel", "kvm".into());
                option("cpu", "host".into());
            }
            Accelerator::Tcg => {
                // One thread runs all CPUs in turn. With one each, QEMU 7.2 may translate
                // a page while another CPU writes to it and keep the stale code: a kernel that
                // patches itself as it boots then dies of an `int3` that is no longer there.
                option("accel", "tcg,thread=single".into());
                option("cpu", "max".into());
            }
        }
        // Guest memory is shared with the backends, which map it from this descriptor.
        option(
            "object",
            format!("memory-backend-memfd,id=mem,share=on,size={mib}M"),
        );
        option("m", format!("{mib}M"));
        option("smp", spec.cpus.to_string());
        option("kernel", path_text(&spec.kernel));
        option("initrd", path_text(&spec.initramfs));
        option(
            "append",
            format!("{PARAMETERS} {}", spec.cmdline)
                .trim_end()
                .to_owned(),
        );
        // The console is QEMU's standard output: this program reads it, bounded.
        option("chardev", "stdio,id=console,signal=off".into());
        option("serial", "chardev:console".into());
        if !spec.channels.is_empty() {
            option("device", "virtio-serial-pci,id=channels,max_ports=8".into());
        }
        for (index, name) in spec.channels.iter().enumerate() {
            let socket = quoted(&channel_socket(spec, index));
            option("chardev", format!("socket,id=channel{index},path={socket}"));
            option(
                "device",
                format!(
                    "virtserialport,bus=channels.0,nr={},chardev=channel{index},name={name}",
                    index + 1
                ),
            );
        }
        for (index, disk) in spec.disks.iter().enumerate() {
            // Without `reconnect`: nothing restarts a backend yet, so its death ends the run, and
            // a guest that waits for a backend that never returns would hide that.
            option(
                "chardev",
                format!("socket,id=disk{index},path={}", quoted(&disk.socket)),
            );
            option(
                "device",
                format!(
                    "vhost-user-blk-pci,id={},chardev=disk{index},num-queues={},queue-size={}",
                    disk.id, disk.num_queues, disk.queue_size
                ),
            );
        }
        if let Some(vsock) = &spec.vsock {
            // The context id is the backend's to tell.
            option(
                "chardev",
                format!("socket,id=vsock0,path={}", quoted(&vsock.socket)),
            );
            option(
                "device",
                format!("vhost-user-vsock-pci,id={},chardev=vsock0", vsock.id),
            );
        }
        // q35 can only add devices to ports that were there at the start.
        for slot in 1..=spec.spare_slots {
            option(
                "device",
                format!("pcie-root-port,id=spare{slot},bus=pcie.0,chassis={slot},slot={slot}"),
            );
        }
        option(
            "sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
        );
        for flag in ["nodefaults", "no-user-config", "no-reboot"] {
            args.push(format!("-{flag}"));
        }
        for (name, value) in [("display", "none"), ("monitor", "none")] {
            args.push(format!("-{name}"));
            args.push(value.into());
        }
        args
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn boot_timeout(&self) -> Duration {
        Duration::from_secs(match self.accelerator {
            Accelerator::Kvm => 20,
            Accelerator::Tcg => 60,
        })
    }

    fn start(&self, spec: &MachineSpec) -> Result<Machine, MachineError> {
        spec.check()?;
        let mut listeners = Listeners::default();
        for index in 0..spec.channels.len() {
            listeners.bind(channel_socket(spec, index))?;
        }
        let mut command = Command::new(PROGRAM);
        command
            .args(self.arguments(spec))
            .stdout(Stdio::piped())
            .current_dir("/");
        let confinement = Confinement {
            drop_capabilities: true,
            private_network: true,
            ..Confinement::default()
        };
        let mut process = Process::spawn(PROGRAM, command, confinement).map_err(|source| {
            MachineError::Start {
                program: PROGRAM.into(),
                source,
            }
        })?;
        let host = |what: &str| {
            let what = what.to_owned();
            move |source| MachineError::Host { what, source }
        };
        let Some(output) = process.take_stdout() else {
            return Err(host("the console")(io::ErrorKind::BrokenPipe.into()));
        };
        let console =
            Console::follow(&spec.console, output).map_err(host("the console cannot be kept"))?;
        let mut channels = Vec::new();
        let end = Instant::now() + CONNECT_LIMIT;
        for (name, (listener, _)) in spec.channels.iter().zip(&listeners.bound) {
            channels.push((name.clone(), accept(listener, &mut process, end)?));
        }
        Ok(Machine {
            process,
            console,
            channels,
            sockets: listeners.release(),
        })
    }
}

/// Sockets that are removed again unless the machine takes them over.
#[derive(Default)]
struct Listeners {
    bound: Vec<(UnixListener, PathBuf)>,
}

impl Listeners {
    fn bind(&mut self, path: PathBuf) -> Result<(), MachineError> {
        let listener = UnixListener::bind(&path).map_err(|source| MachineError::Host {
            what: format!("no socket can be made at '{}'", path.display()),
            source,
        })?;
        self.bound.push((listener, path));
        Ok(())
    }

    fn release(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.bound)
            .into_iter()
            .map(|(_, path)| path)
            .collect()
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for (_, path) in &self.bound {
            // Made by us a moment ago, in a directory of our own.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Waits for QEMU on `listener`, but not for one that has ended.
fn accept(
    listener: &UnixListener,
    process: &mut Process,
    end: Instant,
) -> Result<UnixStream, MachineError> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let exit_fd = process.exit_fd();
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&exit_fd, PollFlags::IN),
        ];
        let ready = poll(&mut fds, Some(&timeout));
        let (connected, ended) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        match ready {
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) if connected => {
                let (stream, _) = listener.accept().map_err(|source| MachineError::Host {
                    what: "the channel to the guest".into(),
                    source,
                })?;
                return Ok(stream);
            }
            Ok(_) if !ended && !left.is_zero() => {}
            _ => {
                if !ended {
                    process.kill();
                }
                process.exited();
                return Err(MachineError::SetUp {
                    program: PROGRAM.into(),
                    end: process.describe_end(),
                });
            }
        }
    }
}

fn channel_socket(spec: &MachineSpec, index: usize) -> PathBuf {
    spec.run_dir.join(format!("channel-{index}"))
}

fn path_text(path: &Path) -> String {
    // Checked to be text by `MachineSpec::check`.
    path.to_string_lossy().into_owned()
}

/// A path within a list of options, where a comma is written twice.
fn quoted(path: &Path) -> String {
    path_text(path).replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::sample;

    fn has(args: &[String], name: &str, value: &str) -> bool {
        args.windows(2)
            .any(|pair| pair[0] == name && pair[1] == value)
    }

    #[test]
    fn the_command_line_describes_the_machine() {
        let args = Qemu::new(Accelerator::Tcg).arguments(&sample());
        assert!(has(&args, "-smp", "2") && has(&args, "-m", "256M"));
        assert!(has(
            &args,
            "-object",
            "memory-backend-memfd,id=mem,share=on,size=256M"
        ));
        assert!(has(
            &args,
            "-append",
            "console=ttyS0 no_timer_check panic=-1"
        ));
        assert!(has(
            &args,
            "-chardev",
            "socket,id=disk0,path=/run/x/root,,1.sock"
        ));
        assert!(has(
            &args,
            "-device",
            "vhost-user-blk-pci,id=root,chardev=disk0,num-queues=2,queue-size=128"
        ));
        assert!(has(
            &args,
            "-device",
            "virtserialport,bus=channels.0,nr=1,chardev=channel0,name=pericarp.control"
        ));
        assert!(has(
            &args,
            "-chardev",
            "socket,id=vsock0,path=/run/x/vsock.sock"
        ));
        assert!(has(
            &args,
            "-device",
            "vhost-user-vsock-pci,id=vsock,chardev=vsock0"
        ));
        assert_eq!(
            args.iter()
                .filter(|arg| arg.starts_with("pcie-root-port"))
                .count(),
            2
        );
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(args.iter().any(|arg| arg == flag), "{flag}");
        }
    }

    #[test]
    fn what_a_machine_has_no_use_for_is_left_out() {
        let spec = MachineSpec {
            disks: vec![],
            vsock: None,
            channels: vec![],
            spare_slots: 0,
            ..sample()
        };
        let args = Qemu::new(Accelerator::Tcg).arguments(&spec);
        assert!(!args.iter().any(|arg| arg == "-device"), "{args:?}");
    }

    #[test]
    fn kvm_and_emulation_differ_in_the_cpu_only() {
        let kvm = Qemu::new(Accelerator::Kvm).arguments(&sample());
        let tcg = Qemu::new(Accelerator::Tcg).arguments(&sample());
        assert!(has(&kvm, "-accel", "kvm") && has(&kvm, "-cpu", "host"));
        assert!(has(&tcg, "-accel", "tcg,thread=single") && has(&tcg, "-cpu", "max"));
        assert_eq!(kvm.iter().zip(&tcg).filter(|(a, b)| a != b).count(), 2);
    }
}
