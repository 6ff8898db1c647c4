//! What this machine has of the programs a test needs. Tests ask with
//! [`have`] before anything else and return when the answer is no: the skip is
//! loud, and a panic where skipping is forbidden (`PERICARP_REQUIRE_ALL=1`).

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A program that a test starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Debian's User-mode Linux kernel.
    UserModeLinux,
    /// The peer that validates the block suites.
    QemuStorageDaemon,
    /// The full machine emulator.
    QemuSystem,
    /// The load generator with data verification.
    Fio,
    /// Makes file systems.
    MkfsExt4,
    /// Makes file systems of another kind.
    MkfsXfs,
    /// Prints and changes file attributes; `chattr +i` makes a file read-only to root.
    Chattr,
    /// The plain container runtime.
    Runc,
    /// The container runtime inside the guest.
    Crun,
    /// Makes read-only file systems of images.
    MkfsErofs,
    /// Reads ACPI tables.
    Iasl,
    /// Connects anything with anything, vsock among it.
    Socat,
    /// One static binary with the usual tools.
    Busybox,
    /// Counts system calls.
    Strace,
    /// Counts instructions.
    Valgrind,
    /// What POSIX says of names, modes and errors, case by case.
    Pjdfstest,
    /// Random reads, writes, maps and cuts of one file, each compared.
    Fsx,
    /// All kinds of file calls, at random and many at a time.
    StressNg,
    /// The peer that the file server is compared with.
    Virtiofsd,
    /// Makes network interfaces.
    Ip,
    /// Makes the networks of pods.
    Cni,
    /// Passes ports on for these.
    Iptables,
    /// Shows all rules there are, whoever made them.
    Nft,
    /// Sends through a network what it can carry.
    Iperf3,
    /// What Kubernetes' nodes run pods with, by way of CRI.
    Containerd,
    /// Its client for what CRI has no calls for.
    Ctr,
    /// Kubernetes' command line.
    Kubectl,
    /// Starts a program in namespaces of its own.
    Unshare,
    /// Starts a program in those of another.
    Nsenter,
    /// A program of this workspace, by name.
    Ours(&'static str),
}

impl Part {
    /// Our block backend.
    pub const PERICARP_BLOCK: Part = Part::Ours("pericarp-block");
    /// Our file system backend.
    pub const PERICARP_FS: Part = Part::Ours("pericarp-fs");
    /// Our network backend.
    pub const PERICARP_NET: Part = Part::Ours("pericarp-net");
    /// Our vsock backend.
    pub const PERICARP_VSOCK: Part = Part::Ours("pericarp-vsock");
    /// The oracle in this package.
    pub const REFERENCE_BLOCK: Part = Part::Ours("pericarp-reference-block");

    /// The program's file name.
    pub fn program(self) -> &'static str {
        match self {
            Part::UserModeLinux => "linux.uml",
            Part::QemuStorageDaemon => "qemu-storage-daemon",
            Part::QemuSystem => "qemu-system-x86_64",
            Part::Fio => "fio",
            Part::MkfsExt4 => "mkfs.ext4",
            Part::MkfsXfs => "mkfs.xfs",
            Part::Chattr => "chattr",
            Part::Runc => "runc",
            Part::Crun => "crun",
            Part::MkfsErofs => "mkfs.erofs",
            Part::Iasl => "iasl",
            Part::Socat => "socat",
            Part::Busybox => "busybox",
            Part::Strace => "strace",
            Part::Valgrind => "valgrind",
            Part::Pjdfstest => "pjdfstest",
            Part::Fsx => "fsx",
            Part::StressNg => "stress-ng",
            Part::Virtiofsd => "virtiofsd",
            Part::Ip => "ip",
            Part::Cni => "/usr/lib/cni/ptp",
            Part::Iptables => "iptables",
            Part::Nft => "nft",
            Part::Iperf3 => "iperf3",
            Part::Containerd => "containerd",
            Part::Ctr => "ctr",
            Part::Kubectl => "kubectl",
            Part::Unshare => "unshare",
            Part::Nsenter => "nsenter",
            Part::Ours(name) => name,
        }
    }

    /// What to do when it is missing.
    fn cure(self) -> String {
        let package = match self {
            Part::UserModeLinux => "user-mode-linux",
            Part::QemuStorageDaemon => "qemu-system-common",
            Part::QemuSystem => "qemu-system-x86",
            Part::Fio => "fio",
            Part::MkfsExt4 | Part::Chattr => "e2fsprogs",
            Part::MkfsXfs => "xfsprogs",
            Part::Runc => "runc",
            Part::Crun => "crun",
            Part::MkfsErofs => "erofs-utils",
            Part::Iasl => "acpica-tools",
            Part::Socat => "socat",
            Part::Busybox => "busybox-static",
            Part::Strace => "strace",
            Part::Valgrind => "valgrind",
            Part::StressNg => "stress-ng",
            Part::Ip => "iproute2",
            Part::Cni => "containernetworking-plugins",
            Part::Iptables => "iptables",
            Part::Nft => "nftables",
            Part::Iperf3 => "iperf3",
            Part::Containerd | Part::Ctr => "containerd",
            Part::Kubectl => "kubernetes-client",
            Part::Unshare | Part::Nsenter => "util-linux",
            Part::Pjdfstest | Part::Fsx | Part::Virtiofsd => {
                return "make it: cargo xtask setup".into();
            }
            Part::Ours(
                "pericarp-reference-block" | "pericarp-reference-net" | "pericarp-writer",
            ) => {
                return build("pericarp-tests");
            }
            Part::Ours("null-fs") => return build("pericarp-benches"),
            Part::Ours(name) => return build(name),
        };
        format!("install: apt package {package}")
    }

    /// Where it is, if it is anywhere.
    pub fn find(self) -> Option<PathBuf> {
        match self {
            Part::Ours(name) => Some(beside_us().join(name)).filter(|path| path.is_file()),
            // `cargo xtask setup` builds these, into the build directory's `tools`.
            Part::Pjdfstest | Part::Fsx | Part::Virtiofsd => [
                beside_us().join("../tools/bin"),
                Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin"),
            ]
            .into_iter()
            .map(|dir| dir.join(self.program()))
            .find(|path| path.is_file())
            .or_else(|| search_path(self.program())),
            part => search_path(part.program()),
        }
    }
}

fn build(package: &str) -> String {
    format!("build: cargo build -p {package}")
}

/// The directory of our own programs: that of the running executable, one up
/// for a test executable.
pub fn beside_us() -> PathBuf {
    let exe = env::current_exe().unwrap_or_default();
    let dir = exe.parent().unwrap_or(Path::new("."));
    if dir.ends_with("deps") {
        dir.parent().unwrap_or(dir).to_owned()
    } else {
        dir.to_owned()
    }
}

/// Looks `program` up in PATH, and in the system directories a plain user's
/// PATH leaves out.
pub fn search_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// True when every part is there. Otherwise says which is missing and how to
/// get it, straight to stderr so that the test harness does not swallow it.
///
/// # Panics
/// When a part is missing and `PERICARP_REQUIRE_ALL=1` forbids to skip.
pub fn have(test: &str, parts: &[Part]) -> bool {
    missing(parts).is_none_or(|why| skip(test, &why))
}

/// The first part that is not there, and how to get it.
pub fn missing(parts: &[Part]) -> Option<String> {
    let part = parts.iter().find(|part| part.find().is_none())?;
    Some(format!("{} missing ({})", part.program(), part.cure()))
}

/// Reports that `test` does not run; always false.
///
/// # Panics
/// When `PERICARP_REQUIRE_ALL=1` forbids to skip.
pub fn skip(test: &str, why: &str) -> bool {
    let line = format!("SKIPPED {test}: {why}\n");
    assert!(
        env::var_os("PERICARP_REQUIRE_ALL").is_none_or(|value| value != "1"),
        "{line}"
    );
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
    false
}

/// As [`skip`], for what a kernel has or has not and no package can bring:
/// never a failure, but as loud.
pub fn absent(test: &str, what: &str) -> bool {
    let line = format!("SKIPPED {test}: {what}\n");
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_path() {
        assert!(search_path("sh").is_some());
        assert!(search_path("no-such-program-anywhere").is_none());
    }

    #[test]
    fn our_programs_are_not_in_deps() {
        assert!(!beside_us().ends_with("deps"));
    }
}
