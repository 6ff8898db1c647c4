//! The container's description for runc, and what runc's log says when it could not start it.
//!
//! Namespaces, capabilities, masked paths and mounts are podman's defaults, except that there is
//! no system call filter and no network but the loopback interface. No OOM score and no resource
//! limits of the process are set: raising them needs a capability that a host may not give us.

use std::path::Path;

use pericarp_protocol::Limits;
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    run::{ENVIRONMENT, HOSTNAME},
};

const CAPABILITIES: [&str; 11] = [
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
/// Microseconds over which a CPU limit is reckoned, as inside the virtual machine.
const PERIOD_US: u64 = 100_000;

/// The OCI runtime configuration.
pub(crate) fn config(
    command: &[String],
    limits: Limits,
    root: &Path,
    read_only: bool,
    id: &str,
) -> Value {
    let env: Vec<String> = ENVIRONMENT
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    let mut resources = json!({});
    if let Some(milli) = limits.milli_cpus {
        let quota = u64::from(milli) * PERIOD_US / 1000;
        resources["cpu"] = json!({"quota": quota, "period": PERIOD_US});
    }
    if let Some(bytes) = limits.memory {
        resources["memory"] = json!({"limit": bytes});
    }
    json!({
        "ociVersion": "1.0.2",
        "hostname": HOSTNAME,
        "root": {"path": root, "readonly": read_only},
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "env": env,
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
        },
        "mounts": mounts(root, read_only),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": format!("/{id}"),
            "resources": resources,
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
                "/sys/firmware", "/sys/fs/selinux", "/sys/dev/block",
            ],
            "readonlyPaths": [
                "/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger",
            ],
        },
    })
}

fn mounts(root: &Path, read_only: bool) -> Vec<Value> {
    let all: [(&str, &str, &str, &[&str]); 8] = [
        ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        (
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
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
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        (
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        (
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        ("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
        ("/run", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755"]),
    ];
    all.into_iter()
        .filter(|(at, ..)| {
            // As in the virtual machine: a read-only root without these goes without.
            let optional = matches!(*at, "/tmp" | "/run");
            !(optional && read_only && !root.join(at.trim_start_matches('/')).is_dir())
        })
        .map(|(at, kind, source, options)| {
            json!({"destination": at, "type": kind, "source": source, "options": options})
        })
        .collect()
}

/// Why the container was not started, if runc's log says so. A command that ran and failed leaves
/// nothing there.
pub(crate) fn start_failure(log: &str) -> Option<Failure> {
    let message = log.lines().find_map(|line| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let message = entry["msg"].as_str()?.strip_prefix("runc run failed: ")?;
        Some(pericarp_protocol::frame::printable(message))
    })?;
    let reason = message
        .strip_prefix("unable to start container process: ")
        .unwrap_or(&message);
    Some(if !reason.starts_with("exec: ") {
        Failure::Runc(message)
    } else if reason.contains("not found") || reason.contains("no such file") {
        Failure::NotFound(reason.to_owned())
    } else {
        Failure::NotExecutable(reason.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_the_description_and_absent_without() {
        let limits = Limits {
            milli_cpus: Some(500),
            memory: Some(64 << 20),
        };
        let config = config(&["sh".into()], limits, Path::new("/r"), true, "x");
        assert_eq!(
            config["linux"]["resources"]["cpu"],
            json!({"quota": 50000, "period": 100000})
        );
        assert_eq!(
            config["linux"]["resources"]["memory"],
            json!({"limit": 64 << 20})
        );
        assert_eq!(config["root"], json!({"path": "/r", "readonly": true}));
        // `/r` does not exist, so a read-only root has no place for them.
        let places: Vec<&str> = config["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|m| m["destination"].as_str())
            .collect();
        assert!(places.contains(&"/proc") && !places.contains(&"/tmp"));
        let config = super::config(&[], Limits::default(), Path::new("/r"), false, "x");
        assert_eq!(config["linux"]["resources"], json!({}));
        assert_eq!(config["mounts"].as_array().unwrap().len(), 8);
    }

    #[test]
    fn runcs_own_failures_are_told_from_the_commands() {
        let line = |text: &str| json!({"level": "error", "msg": text}).to_string();
        let prefix = "runc run failed: unable to start container process: ";
        for (text, code) in [
            (
                format!("{prefix}exec: \"nope\": executable file not found in $PATH"),
                127,
            ),
            (
                format!("{prefix}exec: \"/nope\": stat /nope: no such file or directory"),
                127,
            ),
            (format!("{prefix}exec: \"/etc\": permission denied"), 126),
            (format!("{prefix}error during container init"), 125),
            ("runc run failed: cannot set memory limit".to_owned(), 125),
        ] {
            assert_eq!(
                start_failure(&line(&text)).unwrap().exit_code(),
                code,
                "{text}"
            );
        }
        assert!(start_failure("").is_none());
        assert!(start_failure(&line("some warning")).is_none());
    }
}
