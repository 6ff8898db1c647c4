//! podman's defaults, as data.
//!
//! Used by `runtime`. Taken from podman 4.3 of Debian 12 (containers-common 0.50 and its
//! `specgen/generate`).

use serde_json::{Value, json};

use super::Cgroups;

pub(super) const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Hidden from the container.
pub(super) const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/fs/selinux",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
];

/// Not to be changed by the container.
pub(super) const READ_ONLY: [&str; 6] = [
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Destination, type, source, options.
type Mount = (
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

const ALWAYS: [Mount; 6] = [
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    (
        "/dev",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    (
        "/sys",
        "sysfs",
        "sysfs",
        &["nosuid", "noexec", "nodev", "ro"],
    ),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    (
        "/dev/mqueue",
        "mqueue",
        "mqueue",
        &["nosuid", "noexec", "nodev"],
    ),
    (
        "/dev/shm",
        "tmpfs",
        "shm",
        &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    ),
];

/// Needs a namespace of its own, or the container would see everybody's.
const CGROUP: Mount = (
    "/sys/fs/cgroup",
    "cgroup",
    "cgroup",
    &["rprivate", "nosuid", "noexec", "nodev", "relatime", "ro"],
);

/// Where a container with a read-only root may write (podman's `--read-only-tmpfs`). What the
/// image has there is copied into them.
const WRITABLE: [Mount; 3] = [
    ("/run", "tmpfs", "tmpfs", TMPFS),
    ("/tmp", "tmpfs", "tmpfs", TMPFS),
    ("/var/tmp", "tmpfs", "tmpfs", TMPFS),
];
const TMPFS: &[&str] = &["rw", "rprivate", "nosuid", "nodev", "tmpcopyup"];

pub(super) fn mounts(cgroups: Cgroups, read_only: bool) -> Vec<Value> {
    let cgroup = (cgroups == Cgroups::V2).then_some(CGROUP);
    let writable = if read_only { &WRITABLE[..] } else { &[] };
    ALWAYS
        .into_iter()
        .chain(cgroup)
        .chain(writable.iter().copied())
        .map(|(at, kind, source, options)| {
            json!({"destination": at, "type": kind, "source": source, "options": options})
        })
        .collect()
}
