//! Which driver runs machines on this host, and why.
//!
//! Where KVM is backed by hardware that is `pericarp-vmm`, else QEMU with an emulated CPU; QEMU with
//! KVM is for who asks. A `/dev/kvm` alone does not count: some
//! hosts offer one that is emulated in software, on which stock kernels die in its instruction
//! emulator. So hardware support is asked for by its CPU flags. Called once at start; decides,
//! starts nothing.

use std::fmt;

use crate::{machine::Hypervisor, pericarp::Pericarp, qemu::Qemu};

/// What this host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// `/dev/kvm` opens for reading and writing; else the reason why not.
    pub kvm_device: Result<(), String>,
    /// The CPU flag of hardware virtualization, if there is one.
    pub cpu_flag: Option<&'static str>,
}

impl HostFacts {
    /// Looks at this host.
    #[must_use]
    pub fn probe() -> Self {
        let opened = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            kvm_device: opened.map(drop).map_err(|error| error.to_string()),
            cpu_flag: virtualization_flag(&cpuinfo),
        }
    }
}

fn virtualization_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "flags").then_some(value)
    })?;
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "vmx" => Some("vmx"),
        "svm" => Some("svm"),
        _ => None,
    })
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wanted {
    /// The best this host has.
    #[default]
    Auto,
    /// Our own monitor, on KVM, whatever the CPU flags say.
    Pericarp,
    /// QEMU, with KVM where hardware backs it.
    Qemu,
    /// QEMU with KVM, whatever the CPU flags say.
    QemuKvm,
    /// QEMU with an emulated CPU.
    QemuTcg,
}

impl Wanted {
    /// The names that [`Wanted::parse`] knows.
    pub const NAMES: [&str; 5] = ["auto", "pericarp", "qemu", "qemu-kvm", "qemu-tcg"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "pericarp" => Some(Self::Pericarp),
            "qemu" => Some(Self::Qemu),
            "qemu-kvm" => Some(Self::QemuKvm),
            "qemu-tcg" => Some(Self::QemuTcg),
            _ => None,
        }
    }
}

/// How the guest's CPU is provided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By hardware, through KVM.
    Kvm,
    /// By translation in software.
    Tcg,
}

/// What runs machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// `pericarp-vmm`, on KVM.
    Pericarp,
    /// QEMU.
    Qemu(Accelerator),
}

/// A driver, and why it was chosen. Prints as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What runs the machine.
    pub driver: Driver,
    reason: String,
}

impl Choice {
    /// The driver.
    #[must_use]
    pub fn hypervisor(&self) -> Box<dyn Hypervisor> {
        match self.driver {
            Driver::Pericarp => Box::new(Pericarp::default()),
            Driver::Qemu(accelerator) => Box::new(Qemu::new(accelerator)),
        }
    }

    /// Name as the user would ask for it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.driver {
            Driver::Pericarp => "pericarp",
            Driver::Qemu(Accelerator::Kvm) => "qemu-kvm",
            Driver::Qemu(Accelerator::Tcg) => "qemu-tcg",
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.driver {
            Driver::Pericarp => "pericarp-vmm",
            Driver::Qemu(Accelerator::Kvm) => "QEMU with KVM",
            Driver::Qemu(Accelerator::Tcg) => "QEMU with an emulated CPU (TCG)",
        };
        write!(f, "{what}: {}", self.reason)
    }
}

/// Picks the driver for a host with these facts.
#[must_use]
pub fn select(wanted: Wanted, facts: &HostFacts) -> Choice {
    let (kvm, tcg) = (
        Driver::Qemu(Accelerator::Kvm),
        Driver::Qemu(Accelerator::Tcg),
    );
    let asked = || "as asked for".to_owned();
    let (driver, reason) = match (wanted, &facts.kvm_device, facts.cpu_flag) {
        (Wanted::Pericarp, _, _) => (Driver::Pericarp, asked()),
        (Wanted::QemuKvm, _, _) => (kvm, asked()),
        (Wanted::QemuTcg, _, _) => (tcg, asked()),
        (Wanted::Auto | Wanted::Qemu, Ok(()), Some(flag)) => (
            if wanted == Wanted::Auto {
                Driver::Pericarp
            } else {
                kvm
            },
            format!("/dev/kvm opens and the CPU has {flag}"),
        ),
        (Wanted::Auto | Wanted::Qemu, Ok(()), None) => (
            tcg,
            "/dev/kvm opens, but the CPU shows neither vmx nor svm, so it is emulated in \
             software and counts as none"
                .to_owned(),
        ),
        (Wanted::Auto | Wanted::Qemu, Err(error), _) => {
            (tcg, format!("/dev/kvm cannot be used ({error})"))
        }
    };
    Choice { driver, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kvm_with_hardware_behind_it_counts() {
        let refused = || Err("Permission denied".to_owned());
        let cases = [
            (
                Wanted::Auto,
                Ok(()),
                Some("svm"),
                Driver::Pericarp,
                "the CPU has svm",
            ),
            (
                Wanted::Qemu,
                Ok(()),
                Some("svm"),
                Driver::Qemu(Accelerator::Kvm),
                "the CPU has svm",
            ),
            (
                Wanted::Pericarp,
                refused(),
                None,
                Driver::Pericarp,
                "as asked for",
            ),
            (
                Wanted::Auto,
                Ok(()),
                None,
                Driver::Qemu(Accelerator::Tcg),
                "neither vmx nor svm",
            ),
            (
                Wanted::Auto,
                refused(),
                Some("vmx"),
                Driver::Qemu(Accelerator::Tcg),
                "(Permission denied)",
            ),
            (
                Wanted::QemuTcg,
                Ok(()),
                Some("vmx"),
                Driver::Qemu(Accelerator::Tcg),
                "as asked for",
            ),
            (
                Wanted::QemuKvm,
                Ok(()),
                None,
                Driver::Qemu(Accelerator::Kvm),
                "as asked for",
            ),
        ];
        for (wanted, kvm_device, cpu_flag, driver, reason) in cases {
            let choice = select(
                wanted,
                &HostFacts {
                    kvm_device,
                    cpu_flag,
                },
            );
            assert_eq!(choice.driver, driver);
            assert!(choice.to_string().contains(reason), "{choice}");
        }
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert_eq!(virtualization_flag("flags\t\t: fpu vmx sse\n"), Some("vmx"));
        assert_eq!(
            virtualization_flag("vmx flags\t: ept vmx\nflags\t\t: fpu svm_lock\n"),
            None
        );
        assert_eq!(virtualization_flag(""), None);
    }

    #[test]
    fn names_are_read_back() {
        for name in Wanted::NAMES {
            assert!(Wanted::parse(name).is_some());
        }
        assert_eq!(Wanted::parse("xen"), None);
    }
}
