//! Rules about the host itself: its kernel, what it virtualizes with, its memory, and the programs
//! and files that machines are made of.

use std::{fs, path::Path};

use pericarp_hypervisor::{Driver, HostFacts, Wanted, select};
use pericarp_pod::{Assets, assets};

use crate::check::{Finding, State};

/// The oldest kernel whose io_uring has all that the sidecars use; Debian 12's.
const LEAST_KERNEL: (u32, u32) = (6, 1);
/// A pod without limits, MiB, and what its processes take beside it.
const LEAST_MEMORY: u64 = 2048 + 64;
const MIRRED: &str = "CONFIG_NET_ACT_MIRRED";
const SIDECARS: [&str; 5] = [
    "containerd-shim-pericarp-v2",
    "pericarp-block",
    "pericarp-fs",
    "pericarp-net",
    "pericarp-vsock",
];

pub(crate) fn all() -> Vec<Finding> {
    let choice = select(Wanted::Auto, &HostFacts::probe());
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let text = |path: &str| fs::read_to_string(path).ok();
    vec![
        kernel(&release),
        io_uring(text("/proc/sys/kernel/io_uring_disabled").as_deref()),
        landlock(text("/sys/kernel/security/lsm").as_deref()),
        virtualization(choice.driver, &choice.to_string()),
        memory(&text("/proc/meminfo").unwrap_or_default()),
        tun(Path::new("/dev/net/tun").exists()),
        traffic(text(&format!("/boot/config-{release}")).as_deref()),
        groups(&text("/proc/self/mountinfo").unwrap_or_default()),
        programs(choice.driver),
        guest(),
    ]
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || {
        numbers
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    let state = match (number(), number()) >= LEAST_KERNEL {
        true => State::Good,
        false => State::Missing,
    };
    let (major, minor) = LEAST_KERNEL;
    let rule = format!("the sidecars need Linux {major}.{minor} or a later one");
    let cure = "start the node with a newer kernel";
    Finding::new("kernel", state, release, &rule, cure)
}

/// `disabled` is the kernel parameter; kernels before 6.6 have none.
fn io_uring(disabled: Option<&str>) -> Finding {
    let (state, found) = match disabled.map(str::trim) {
        None | Some("0") => (State::Good, "for everybody".to_owned()),
        Some("1") => (State::Degraded, "for a group and for root alone".to_owned()),
        Some(other) => (State::Degraded, format!("switched off ({other})")),
    };
    let rule = "without io_uring the sidecars use threads and plain calls, which are slower";
    let cure = "sysctl kernel.io_uring_disabled=0";
    Finding::new("io_uring", state, found, rule, cure)
}

fn landlock(modules: Option<&str>) -> Finding {
    let (state, found) = match modules {
        None => (State::Unknown, "securityfs is not mounted".to_owned()),
        Some(list) if list.trim().split(',').any(|one| one == "landlock") => (
            State::Good,
            "among the kernel's security modules".to_owned(),
        ),
        Some(list) => (State::Degraded, format!("not among {}", list.trim())),
    };
    let rule = "Landlock is one of the walls around a sidecar; the others stand without it";
    let cure = match state {
        State::Unknown => "mount -t securityfs securityfs /sys/kernel/security",
        _ => "add landlock to the kernel's parameter lsm=",
    };
    Finding::new("landlock", state, found, rule, cure)
}

fn virtualization(driver: Driver, why: &str) -> Finding {
    let state = match driver {
        Driver::Pericarp => State::Good,
        Driver::Qemu(_) => State::Degraded,
    };
    let rule = "machines run on KVM where a CPU has it, else on an emulated CPU, ten times slower";
    let cure = "take a node with hardware virtualization, or a virtual one with nested \
                virtualization";
    Finding::new("virtualization", state, why, rule, cure)
}

fn memory(meminfo: &str) -> Finding {
    let kib = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (total, free) = (kib("MemTotal:"), kib("MemAvailable:"));
    let mib = |kib: Option<u64>| kib.unwrap_or(0) / 1024;
    let state = match (mib(total) >= LEAST_MEMORY, mib(free) >= LEAST_MEMORY) {
        (true, true) => State::Good,
        (true, false) => State::Degraded,
        (false, _) => State::Missing,
    };
    let found = format!("{} MiB, {} of them free", mib(total), mib(free));
    let rule = format!("a pod without limits takes up to {LEAST_MEMORY} MiB");
    let cure = "free some, or set limits and 'sizing = \"aks-ga\"' in the profile";
    Finding::new("memory", state, found, &rule, cure)
}

fn tun(there: bool) -> Finding {
    let (state, found) = match there {
        true => (State::Good, "/dev/net/tun is there"),
        false => (State::Missing, "/dev/net/tun is not there"),
    };
    let rule = "a pod's network card is a tap";
    Finding::new("tun", state, found, rule, "modprobe tun")
}

/// `config` is the kernel's own, where it can be read.
fn traffic(config: Option<&str>) -> Finding {
    let (state, found) = match config {
        None => (
            State::Unknown,
            "the kernel's configuration is not in /boot".to_owned(),
        ),
        Some(text) => {
            let line = text.lines().find(|line| line.starts_with(MIRRED));
            match line {
                Some(line) => (State::Good, line.to_owned()),
                None => (State::Missing, format!("{MIRRED} is not set")),
            }
        }
    };
    let rule = "packets go between a pod's interface and its card by the action mirred of tc";
    Finding::new("tc mirred", state, found, rule, "take a kernel that has it")
}

fn groups(mountinfo: &str) -> Finding {
    let has = |kind: &str| {
        mountinfo
            .lines()
            .any(|line| line.contains(&format!(" - {kind} ")))
    };
    let (state, found) = match (has("cgroup"), has("cgroup2")) {
        (false, true) => (State::Good, "version 2"),
        (true, true) => (State::Good, "version 1 with 2 beside it"),
        (true, false) => (State::Good, "version 1"),
        (false, false) => (State::Missing, "none is mounted"),
    };
    let rule = "a pod's processes are counted and limited in a control group";
    let cure = "mount -t cgroup2 cgroup2 /sys/fs/cgroup";
    Finding::new("control groups", state, found, rule, cure)
}

fn programs(driver: Driver) -> Finding {
    let directory = assets::program_directory();
    let beside = |name: &&str| {
        let place = directory.as_ref().map(|directory| directory.join(name));
        place.is_some_and(|place| place.is_file())
    };
    let mut missing: Vec<&str> = SIDECARS.into_iter().filter(|name| !beside(name)).collect();
    match driver {
        Driver::Pericarp if !beside(&"pericarp-vmm") => missing.push("pericarp-vmm"),
        Driver::Qemu(_) if !in_path("qemu-system-x86_64") => missing.push("qemu-system-x86_64"),
        _ => {}
    }
    let (state, found) = match missing.is_empty() {
        true => (State::Good, "all are there".to_owned()),
        false => (State::Missing, format!("{} missing", missing.join(", "))),
    };
    let rule = "a pod is made of these: ours beside pericarp, QEMU in the search path";
    let cure = "`cargo build --workspace` makes ours; QEMU is the package qemu-system-x86";
    Finding::new("programs", state, found, rule, cure)
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

fn guest() -> Finding {
    let opened = assets::place::find(None).map(|(place, _)| Assets::open(&place));
    let (state, found) = match opened {
        Some(Ok(assets)) => (State::Good, assets.directory.display().to_string()),
        Some(Err(error)) => (State::Missing, error.to_string()),
        None => (State::Missing, "no place for them".to_owned()),
    };
    let rule = "a machine boots a kernel, its modules and an agent";
    Finding::new("guest", state, found, rule, assets::CURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_their_numbers() {
        for (release, state) in [
            ("6.1.0-57-amd64", State::Good),
            ("6.12.3", State::Good),
            ("10.0-rc1", State::Good),
            ("5.19.17", State::Missing),
            ("6.0.9", State::Missing),
            ("", State::Missing),
        ] {
            assert_eq!(kernel(release).state, state, "{release}");
        }
    }

    #[test]
    fn what_is_switched_off_is_a_degraded_mode_with_its_cure() {
        assert_eq!(io_uring(None).state, State::Good);
        assert_eq!(io_uring(Some("0\n")).state, State::Good);
        let off = io_uring(Some("2\n"));
        assert_eq!(off.state, State::Degraded);
        assert!(off.cure.starts_with("sysctl "));
        assert_eq!(
            landlock(Some("lockdown,landlock,yama\n")).state,
            State::Good
        );
        assert_eq!(landlock(Some("lockdown,yama\n")).state, State::Degraded);
        assert_eq!(landlock(None).state, State::Unknown);
        assert_eq!(
            traffic(Some("CONFIG_NET_ACT_MIRRED=m\n")).state,
            State::Good
        );
        let unset = "# CONFIG_NET_ACT_MIRRED is not set\n";
        assert_eq!(traffic(Some(unset)).state, State::Missing);
    }

    #[test]
    fn memory_is_enough_for_one_pod_or_it_is_said() {
        let of = |total: u64, free: u64| {
            let text = format!(
                "MemTotal: {} kB\nMemAvailable: {} kB\n",
                total << 10,
                free << 10
            );
            memory(&text).state
        };
        assert_eq!(of(8192, 4096), State::Good);
        assert_eq!(of(8192, 1024), State::Degraded);
        assert_eq!(of(1024, 1000), State::Missing);
        assert_eq!(memory("").state, State::Missing);
    }

    #[test]
    fn groups_of_either_version_will_do() {
        let v1 = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let v2 = "34 30 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(groups(v2).found, "version 2");
        assert_eq!(
            groups(&[v1, v2].concat()).found,
            "version 1 with 2 beside it"
        );
        assert_eq!(groups("").state, State::Missing);
    }
}
