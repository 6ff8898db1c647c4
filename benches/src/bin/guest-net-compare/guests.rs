//! The guests, by the machine they run on and by who carries their packets; each has an
//! iperf3 server behind a card on the tap of the network that its starter is in.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use pericarp_benches::{Outcome, cpu};
use pericarp_tests::bounded::poll;
use pericarp_tests::guest::{Assets, emulated, initramfs};
use pericarp_tests::network::{GUEST, GUEST_MAC, TAP, dotted, mac};
use pericarp_tests::parts::{Part, beside_us};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;

/// A guest's whole life.
const LIFE: Duration = Duration::from_secs(1800);
/// How long a backend may take to listen.
const STEP: Duration = Duration::from_secs(20);
const MEMORY: &str = "512M";
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests";
/// Entries of a ring: what QEMU has when nothing is said.
const ENTRIES: u16 = 256;

/// What a guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rig {
    /// A CPU that QEMU emulates.
    Emulated,
    /// KVM.
    Kvm,
    /// User-mode Linux.
    Uml,
}

impl Rig {
    /// As the command line and the raw numbers have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Emulated => "tcg",
            Self::Kvm => "kvm",
            Self::Uml => "uml",
        }
    }
}

/// Who carries a guest's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// `pericarp-net` behind QEMU.
    QemuNet,
    /// QEMU itself.
    QemuTap,
    /// `pericarp-net` behind `pericarp-vmm`.
    VmmNet,
    /// `pericarp-net` behind User-mode Linux.
    UmlNet,
    /// User-mode Linux itself, with its best driver.
    UmlVector,
    /// The same with its first.
    UmlTuntap,
}

/// All of them by their names; the first of a rig is what the others are compared with.
pub(crate) const TARGETS: [(Rig, Target, &str); 8] = [
    (Rig::Kvm, Target::QemuTap, "qemu-tap"),
    (Rig::Kvm, Target::QemuNet, "qemu-net"),
    (Rig::Kvm, Target::VmmNet, "vmm-net"),
    (Rig::Emulated, Target::QemuTap, "qemu-tap"),
    (Rig::Emulated, Target::QemuNet, "qemu-net"),
    (Rig::Uml, Target::UmlVector, "uml-vector"),
    (Rig::Uml, Target::UmlTuntap, "uml-tuntap"),
    (Rig::Uml, Target::UmlNet, "uml-net"),
];

impl Target {
    fn has_backend(self) -> bool {
        matches!(self, Self::QemuNet | Self::VmmNet | Self::UmlNet)
    }

    fn is_uml(self) -> bool {
        matches!(self, Self::UmlNet | Self::UmlVector | Self::UmlTuntap)
    }
}

/// CPU times by what they are for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spent {
    /// `pericarp-net`.
    pub(crate) backend: Duration,
    /// Threads of the monitor that are no virtual CPUs. User-mode Linux has none.
    pub(crate) monitor: Duration,
    /// Virtual CPUs; all of User-mode Linux.
    pub(crate) guest: Duration,
}

impl Spent {
    /// What was spent since then.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            backend: self.backend.saturating_sub(before.backend),
            monitor: self.monitor.saturating_sub(before.monitor),
            guest: self.guest.saturating_sub(before.guest),
        }
    }
}

/// What guests are made of.
pub(crate) struct Ground {
    assets: Assets,
    image: PathBuf,
    scratch: Scratch,
}

impl Ground {
    /// Packs the root of a machine's guest.
    pub(crate) fn make() -> Outcome<Self> {
        let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
        let scratch = Scratch::new();
        let (modules, loads) = assets.network()?;
        let mut tools: Vec<&str> = modules.iter().map(String::as_str).collect();
        tools.push("iperf3");
        let image = initramfs(&scratch, &assets, &tools, &(loads + &script("eth0")))?;
        Ok(Self {
            assets,
            image,
            scratch,
        })
    }
}

/// What a guest does, with a card of this name.
fn script(card: &str) -> String {
    let guest = dotted(GUEST);
    format!(
        "ip link set lo up\n\
         ip link set {card} up\n\
         ip addr add {guest}/24 dev {card}\n\
         iperf3 -s\n"
    )
}

/// A guest.
pub(crate) struct Guest {
    // Ends before the backend does.
    monitor: Process,
    backend: Option<Process>,
    target: Target,
    scratch: Scratch,
}

impl Guest {
    /// Boots one in this thread's network.
    pub(crate) fn start(rig: Rig, target: Target, ground: &Ground) -> Outcome<Self> {
        let scratch = Scratch::new();
        let (socket, address) = (scratch.path("net"), mac(GUEST_MAC));
        let mut backend = None;
        if target.has_backend() {
            let mut net = command(&beside_us().join("pericarp-net"));
            net.args(["--tap", TAP, "--workers", "1"])
                .args(["--mac", &address, "--socket-path"])
                .arg(&socket);
            let mut net = Process::start(&mut net, LIFE)?;
            let there = poll(STEP, || {
                let gone = net.ended().is_some();
                (gone || socket.exists()).then_some(!gone)
            });
            if there != Some(true) {
                return Err(net.output().last(5).into());
            }
            backend = Some(net);
        }
        let shown = socket.display();
        let monitor = match target {
            Target::QemuNet | Target::QemuTap => {
                let mut qemu = qemu(rig, ground)?;
                let device = format!("virtio-net-pci,netdev=net,mac={address}");
                // Without KVM and with message interrupts QEMU 7.2 dies of this device.
                let plain = rig == Rig::Emulated && target == Target::QemuNet;
                let vectors = if plain { ",vectors=0" } else { "" };
                if target == Target::QemuNet {
                    qemu.arg("-chardev")
                        .arg(format!("socket,id=net,path={shown}"))
                        .args(["-netdev", "vhost-user,id=net,chardev=net"]);
                } else {
                    qemu.arg("-netdev").arg(format!(
                        "tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"
                    ));
                }
                qemu.arg("-device").arg(device + vectors);
                Process::start(&mut qemu, LIFE)?
            }
            Target::VmmNet => {
                let mut vmm = command(&beside_us().join("pericarp-vmm"));
                vmm.args(["--memory", MEMORY, "--cmdline", PARAMETERS])
                    .arg("--kernel-cache")
                    .arg(ground.scratch.path("kernels"))
                    .arg("--net")
                    .arg(format!(
                        "id=n,socket={shown},mac={address},queue-size={ENTRIES}"
                    ))
                    .arg("--kernel")
                    .arg(ground.assets.kernel())
                    .arg("--initramfs")
                    .arg(&ground.image);
                Process::start(&mut vmm, LIFE)?
            }
            Target::UmlNet | Target::UmlVector | Target::UmlTuntap => {
                let own = match target {
                    Target::UmlVector => Some(format!(
                        "vec0:transport=tap,ifname={TAP},mac={address},depth=128,gro=1"
                    )),
                    Target::UmlTuntap => Some(format!("eth0=tuntap,{TAP},{address},")),
                    _ => None,
                };
                let card = match target {
                    Target::UmlVector => "vec0",
                    _ => "eth0",
                };
                let mut machine = Machine::new(&[], &script(card));
                machine.limit = LIFE;
                machine.words.extend(own);
                if target == Target::UmlNet {
                    machine.cards.push(socket.clone());
                }
                machine.start(&scratch)?
            }
        };
        Ok(Self {
            monitor,
            backend,
            target,
            scratch,
        })
    }

    /// What has been spent on it so far.
    pub(crate) fn spent(&self) -> Outcome<Spent> {
        let (pid, backend) = (self.monitor.pid(), self.backend.as_ref());
        let backend = backend
            .map(|backend| cpu::time(backend.pid()))
            .transpose()?;
        let (guest, monitor) = match self.target.is_uml() {
            true => (cpu::family(pid)?, Duration::ZERO),
            false => cpu::split(pid, is_cpu)?,
        };
        Ok(Spent {
            backend: backend.unwrap_or_default(),
            monitor,
            guest,
        })
    }

    /// Whether it has ended, which it does not by itself.
    pub(crate) fn is_gone(&mut self) -> bool {
        let backend = self.backend.as_mut();
        self.monitor.ended().is_some() || backend.is_some_and(|net| net.ended().is_some())
    }

    /// What it said last.
    pub(crate) fn said(&self) -> String {
        // Where User-mode Linux's script writes.
        let script = fs::read_to_string(self.scratch.path("output")).unwrap_or_default();
        self.monitor.output().last(20) + "\n" + &script
    }
}

/// Whether a thread has this name because it is a virtual CPU: QEMU's, with
/// `debug-threads`, and ours.
fn is_cpu(name: &str) -> bool {
    name.ends_with("/TCG") || name.ends_with("/KVM") || name.starts_with("cpu-")
}

fn qemu(rig: Rig, ground: &Ground) -> Outcome<Command> {
    let mut qemu = match rig {
        Rig::Emulated => emulated(&ground.assets, &ground.image, ""),
        _ => {
            let mut qemu = command(&Part::QemuSystem.find().ok_or("QEMU is missing")?);
            qemu.args(["-machine", "q35,accel=kvm,memory-backend=mem"])
                .args(["-cpu", "host", "-m", MEMORY, "-nodefaults"])
                .arg("-object")
                .arg(format!(
                    "memory-backend-memfd,id=mem,share=on,size={MEMORY}"
                ))
                .args(["-no-reboot", "-display", "none", "-serial", "stdio"])
                .args(["-append", PARAMETERS, "-kernel"])
                .arg(ground.assets.kernel())
                .arg("-initrd")
                .arg(&ground.image);
            qemu
        }
    };
    qemu.args(["-name", "guest,debug-threads=on"]);
    Ok(qemu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_virtual_cpus_are_known() {
        for name in ["CPU 0/TCG", "ALL CPUs/TCG", "CPU 1/KVM", "cpu-0"] {
            assert!(is_cpu(name), "{name}");
        }
        for name in [
            "qemu-system-x86",
            "call_rcu",
            "worker",
            "vu-n",
            "IO iothread0",
        ] {
            assert!(!is_cpu(name), "{name}");
        }
    }

    #[test]
    fn every_rig_has_a_peer_to_be_compared_with() {
        for rig in [Rig::Emulated, Rig::Kvm, Rig::Uml] {
            let first = TARGETS.iter().find(|(of, ..)| *of == rig);
            assert!(first.is_some_and(|(_, target, _)| !target.has_backend()));
        }
    }
}
