//! `cargo xtask setup`: the Debian packages by name, then the guest kernel and
//! the guest's programs.
//!
//! `demo` and `test` call this first, and `bench` installs by it what it needs. When all is there it prints two lines
//! and changes nothing. It never installs a kernel or a boot entry on the host, and
//! masks the service of a package before it installs it: nothing is started. Where such a service is
//! already there, though not its program, it installs nothing (`apt`).

use std::process::{Command, Stdio};

use crate::apt;
use crate::assets;
use crate::command::{self, Failure, capture, find_program};
use crate::project::Project;

/// A program we call, the Debian 12 package it comes in, and what it is for.
struct Need {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

const NEEDS: &[Need] = &[
    Need {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        why: "runs the virtual machines",
    },
    Need {
        program: "qemu-storage-daemon",
        package: "qemu-system-common",
        why: "the peer our block backend is compared with",
    },
    Need {
        program: "linux.uml",
        package: "user-mode-linux",
        why: "runs Linux's own virtio drivers at native speed without KVM",
    },
    Need {
        program: "fio",
        package: "fio",
        why: "measures and verifies disk I/O",
    },
    Need {
        program: "runc",
        package: "runc",
        why: "the plain container the virtual machine is compared with",
    },
    Need {
        program: "crun",
        package: "crun",
        why: "starts the containers inside the virtual machines",
    },
    Need {
        program: "mkfs.erofs",
        package: "erofs-utils",
        why: "makes the read-only root disks of images",
    },
    Need {
        program: "mkfs.ext4",
        package: "e2fsprogs",
        why: "makes disk images",
    },
    Need {
        program: "mkfs.xfs",
        package: "xfsprogs",
        why: "makes disk images, in tests",
    },
    Need {
        program: "busybox",
        package: "busybox-static",
        why: "a user space in one file for test guests",
    },
    Need {
        program: "iasl",
        package: "acpica-tools",
        why: "reads the tables by which pericarp-vmm describes its machine",
    },
    Need {
        program: "ip",
        package: "iproute2",
        why: "makes the networks that network cards are tested in",
    },
    Need {
        program: "/usr/lib/cni/ptp",
        package: "containernetworking-plugins",
        why: "makes the networks of pods, in tests",
    },
    Need {
        program: "iptables",
        package: "iptables",
        why: "passes ports on for these plugins",
    },
    Need {
        program: "nft",
        package: "nftables",
        why: "shows whether they leave a rule, in tests",
    },
    Need {
        program: "iperf3",
        package: "iperf3",
        why: "measures what a guest's network carries",
    },
    Need {
        program: "setfacl",
        package: "acl",
        why: "sets access control lists, in a test",
    },
    Need {
        program: "containerd",
        package: "containerd",
        why: "runs pods in tests, in namespaces of its own",
    },
    Need {
        program: "kubectl",
        package: "kubernetes-client",
        why: "is the client of `pericarp node serve` in tests",
    },
    Need {
        program: "unshare",
        package: "util-linux",
        why: "makes these namespaces",
    },
    Need {
        program: "socat",
        package: "socat",
        why: "speaks vsock in a test guest",
    },
    Need {
        program: "mmdebstrap",
        package: "mmdebstrap",
        why: "builds the small Debian root the demo runs",
    },
    Need {
        program: "depmod",
        package: "kmod",
        why: "finds out which kernel modules need which",
    },
    Need {
        program: "xz",
        package: "xz-utils",
        why: "unpacks the guest's kernel modules",
    },
    Need {
        program: "cpio",
        package: "cpio",
        why: "reads back the initramfs we write, in a test",
    },
    Need {
        program: "umoci",
        package: "umoci",
        why: "the peer our unpacking of images is compared with, in a test",
    },
    Need {
        program: "zstd",
        package: "zstd",
        why: "packs image layers, in a test",
    },
    Need {
        program: "valgrind",
        package: "valgrind",
        why: "counts instructions, to see whether a commit is slower",
    },
    Need {
        program: "strace",
        package: "strace",
        why: "counts system calls, for the same",
    },
    Need {
        program: "stress-ng",
        package: "stress-ng",
        why: "makes all kinds of file calls in a guest, at random and many at a time",
    },
    Need {
        program: "git",
        package: "git",
        why: "has the commit that this one is compared with",
    },
    Need {
        program: "mount",
        package: "mount",
        why: "mounts a container's disk image",
    },
];

impl Need {
    /// Whether the program is on this machine, wherever it came from.
    fn is_met(&self) -> bool {
        let Some(file) = find_program(self.program) else {
            return false;
        };
        // Test guests hold nothing but this file, so a dynamically linked
        // busybox is as good as none.
        self.program != "busybox"
            || std::fs::read(file).is_ok_and(|program| {
                !program
                    .windows(b"/ld-linux".len())
                    .any(|window| window == b"/ld-linux")
            })
    }
}

/// Installs what is missing and prepares the guest.
pub(crate) fn run(project: &Project) -> Result<(), Failure> {
    install_missing(&NEEDS.iter().collect::<Vec<_>>())?;
    add_toolchain_parts()?;
    assets::prepare(project)
}

/// Installs what is missing of some programs.
pub(crate) fn install(programs: &[&str]) -> Result<(), Failure> {
    let wanted = |need: &&Need| programs.contains(&need.program);
    install_missing(&NEEDS.iter().filter(wanted).collect::<Vec<_>>())
}

/// Whether [`install`] can bring a program.
#[cfg(test)]
pub(crate) fn knows(program: &str) -> bool {
    NEEDS.iter().any(|need| need.program == program)
}

fn install_missing(needs: &[&'static Need]) -> Result<(), Failure> {
    let missing: Vec<&Need> = needs
        .iter()
        .copied()
        .filter(|need| !need.is_met())
        .collect();
    if missing.is_empty() {
        println!("setup: all {} programs are there", needs.len());
        return Ok(());
    }
    for need in &missing {
        println!("setup: needs {}: {}", need.package, need.why);
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    apt::install(&packages)?;
    match missing.iter().find(|need| !need.is_met()) {
        None => Ok(()),
        Some(need) => Err(format!(
            "package {} is installed and yet there is no usable {}; install that program by hand",
            need.package, need.program
        )
        .into()),
    }
}

/// A minimal Rust toolchain comes without the two parts `check` needs.
fn add_toolchain_parts() -> Result<(), Failure> {
    for (program, part) in [("rustfmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        let works = Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if works {
            continue;
        }
        if find_program("rustup").is_none() {
            return Err(format!(
                "the Rust toolchain has no {part} and there is no rustup to add it"
            )
            .into());
        }
        println!("setup: adds {part} to the Rust toolchain: cargo xtask check calls it");
        command::run(Command::new("rustup").args(["component", "add", part]))?;
    }
    Ok(())
}

/// Whether this process may install packages.
pub(crate) fn is_root() -> bool {
    capture(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_package_is_named_once_with_a_reason() {
        let packages: BTreeSet<_> = NEEDS.iter().map(|need| need.package).collect();
        assert_eq!(packages.len(), NEEDS.len());
        assert!(NEEDS.iter().all(|need| !need.why.is_empty()));
    }
}
