//! Which driver runs machines on this host, and why.
//!
//! Today there is one driver, QEMU, with or without KVM. A `/dev/kvm` alone does not count: some
//! hosts offer one that is emulated in software, on which stock kernels die in its instruction
//! emulator. So hardware support is asked for by its CPU flags. Called once at start; decides,
//! starts nothing.

use std::fmt;

use crate::{machine::Hypervisor, qemu::Qemu};

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
    /// QEMU with KVM, whatever the CPU flags say.
    QemuKvm,
    /// QEMU with an emulated CPU.
    QemuTcg,
}

impl Wanted {
    /// The names that [`Wanted::parse`] knows.
    pub const NAMES: [&str; 3] = ["auto", "qemu-kvm", "qemu-tcg"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
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

/// A driver, and why it was chosen. Prints as a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Real or emulated CPU.
    pub accelerator: Accelerator,
    reason: String,
}

impl Choice {
    /// The driver.
    #[must_use]
    pub fn hypervisor(&self) -> Box<dyn Hypervisor> {
        Box::new(Qemu::new(self.accelerator))
    }

    /// Name as the user would ask for it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.accelerator {
            Accelerator::Kvm => "qemu-kvm",
            Accelerator::Tcg => "qemu-tcg",
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.accelerator {
            Accelerator::Kvm => "QEMU with KVM",
            Accelerator::Tcg => "QEMU with an emulated CPU (TCG)",
        };
        write!(f, "{what}: {}", self.reason)
    }
}

/// Picks the driver for a host with these facts.
#[must_use]
pub fn select(wanted: Wanted, facts: &HostFacts) -> Choice {
    let (accelerator, reason) = match (wanted, &facts.kvm_device, facts.cpu_flag) {
        (Wanted::QemuKvm, _, _) => (Accelerator::Kvm, "as asked for".to_owned()),
        (Wanted::QemuTcg, _, _) => (Accelerator::Tcg, "as asked for".to_owned()),
        (Wanted::Auto, Ok(()), Some(flag)) => (
            Accelerator::Kvm,
            format!("/dev/kvm opens and the CPU has {flag}"),
        ),
        (Wanted::Auto, Ok(()), None) => (
            Accelerator::Tcg,
            "/dev/kvm opens, but the CPU shows neither vmx nor svm, so it is emulated in \
             software and counts as none"
                .to_owned(),
        ),
        (Wanted::Auto, Err(error), _) => (
            Accelerator::Tcg,
            format!("/dev/kvm cannot be used ({error})"),
        ),
    };
    Choice {
        accelerator,
        reason,
    }
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
                Accelerator::Kvm,
                "the CPU has svm",
            ),
            (
                Wanted::Auto,
                Ok(()),
                None,
                Accelerator::Tcg,
                "neither vmx nor svm",
            ),
            (
                Wanted::Auto,
                refused(),
                Some("vmx"),
                Accelerator::Tcg,
                "(Permission denied)",
            ),
            (
                Wanted::QemuTcg,
                Ok(()),
                Some("vmx"),
                Accelerator::Tcg,
                "as asked for",
            ),
            (
                Wanted::QemuKvm,
                Ok(()),
                None,
                Accelerator::Kvm,
                "as asked for",
            ),
        ];
        for (wanted, kvm_device, cpu_flag, accelerator, reason) in cases {
            let choice = select(
                wanted,
                &HostFacts {
                    kvm_device,
                    cpu_flag,
                },
            );
            assert_eq!(choice.accelerator, accelerator);
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
