//! The OCI runtime's description of one container, for runc on the host and crun in the guest.
//!
//! Called by `pericarp run` and `pericarp exec`. Namespaces, capabilities, masked paths, mounts
//! and the rule for devices are podman's defaults, with these differences: there is no system call
//! filter, no OOM score and no resource limits of the process (raising them needs a capability that
//! a host may not give us), and nothing is mounted over files in `/etc`.

mod defaults;

use std::path::Path;

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::{config::Process, user::User};
use defaults::{CAPABILITIES, MASKED, READ_ONLY, mounts};

/// Microseconds over which a CPU limit is reckoned.
const PERIOD_US: u64 = 100_000;

/// Whom the process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunAs<'a> {
    /// Looked up already.
    Numbers(&'a User),
    /// By whoever starts the runtime, who also sets `process.user`: `user[:group]` as in
    /// [`Process::user`].
    Later(&'a str),
}

/// Which control groups the runtime meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// One tree for each controller.
    V1,
    /// One tree: the container sees its own part of it.
    V2,
}

/// What network the container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// One of its own, with a loopback interface and nothing else.
    Own,
    /// That of whoever starts the runtime: the pod's, inside its virtual machine.
    Shared,
}

/// What the container is held to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub milli_cpus: Option<u32>,
    /// Bytes, swap included.
    pub memory: Option<u64>,
}

/// A directory that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Where whoever starts the runtime has it.
    pub source: &'a Path,
    /// Where the container sees it.
    pub destination: &'a str,
    /// Nothing in it may be changed, nor in what is mounted in it.
    pub read_only: bool,
}

/// A container to be described.
#[derive(Debug, Clone)]
pub struct Container<'a> {
    /// What it runs.
    pub process: &'a Process,
    /// As whom.
    pub run_as: RunAs<'a>,
    /// Where its root is; without, whoever starts the runtime sets it.
    pub root: Option<&'a Path>,
    /// Nothing in the root may be changed. `/run`, `/tmp` and `/var/tmp` get a tmpfs each.
    ///
    /// The runtime makes missing mount points first, so the root itself has to be writable for it.
    pub read_only: bool,
    /// What it sees besides; one that lies in another comes after it.
    pub binds: &'a [Bind<'a>],
    /// Its host name.
    pub hostname: &'a str,
    /// Its limits.
    pub limits: Limits,
    /// What the runtime meets.
    pub cgroups: Cgroups,
    /// Its control group; without, whoever starts the runtime sets it.
    pub cgroups_path: Option<&'a str>,
    /// Its network.
    pub network: Network,
}

/// A container's description that cannot be taken over from.
#[derive(Debug, Error)]
#[error("the container's description has no {0}; it was not made by this program")]
pub struct NoSuchPart(&'static str);

/// What a further process has of its own.
#[derive(Debug, Clone, Default)]
pub struct Exec<'a> {
    /// Program and arguments.
    pub args: &'a [String],
    /// Variables that are added to the container's, as [`crate::config::extra_env`] gives them.
    pub env: &'a [String],
    /// Absolute path; without, the container's.
    pub cwd: Option<&'a str>,
    /// `user[:group]`; without, the container's.
    pub user: Option<RunAs<'a>>,
    /// It has a terminal.
    pub terminal: bool,
}

/// The whole `config.json`.
#[must_use]
pub fn config(container: &Container<'_>) -> Value {
    let Container {
        process,
        cgroups,
        limits,
        ..
    } = container;
    let mut namespaces = vec!["pid", "ipc", "uts", "mount"];
    let mut sysctl = json!({});
    if container.network == Network::Own {
        namespaces.push("network");
        // Without it ping needs a capability that containers do not get.
        sysctl["net.ipv4.ping_group_range"] = json!("0 2147483647");
    }
    if *cgroups == Cgroups::V2 {
        namespaces.push("cgroup");
    }
    let namespaces: Vec<Value> = namespaces
        .into_iter()
        .map(|kind| json!({"type": kind}))
        .collect();
    let mut all_mounts = mounts(*cgroups, container.read_only);
    all_mounts.extend(container.binds.iter().map(bind_mount));
    let mut config = json!({
        "ociVersion": "1.0.2",
        "hostname": container.hostname,
        "root": {"readonly": container.read_only},
        "process": {
            "terminal": process.terminal,
            "args": process.args,
            "env": process.env,
            "cwd": process.cwd,
            "noNewPrivileges": false,
        },
        "mounts": all_mounts,
        "linux": {
            "namespaces": namespaces,
            "resources": resources(limits, *cgroups),
            "sysctl": sysctl,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    set_user(&mut config["process"], &container.run_as);
    if let Some(root) = container.root {
        config["root"]["path"] = json!(root);
    }
    if let Some(path) = container.cgroups_path {
        config["linux"]["cgroupsPath"] = json!(path);
    }
    config
}

fn bind_mount(bind: &Bind<'_>) -> Value {
    // `ro` does not reach the mounts below; `rro` does.
    let access: &[&str] = if bind.read_only {
        &["ro", "rro"]
    } else {
        &["rw"]
    };
    let options = [&["rbind", "rprivate", "nodev"], access].concat();
    json!({
        "destination": bind.destination,
        "type": "bind",
        "source": bind.source,
        "options": options,
    })
}

/// The process object of a further process in a container, from the container's own description:
/// its environment, directory and user where it has none of its own.
pub fn exec_process(config: &Value, exec: &Exec<'_>) -> Result<Value, NoSuchPart> {
    let own = config["process"].as_object().ok_or(NoSuchPart("process"))?;
    let part = |name| own.get(name).ok_or(NoSuchPart(name));
    let mut env: Vec<String> = part("env")?
        .as_array()
        .ok_or(NoSuchPart("env"))?
        .iter()
        .filter_map(|entry| entry.as_str().map(str::to_owned))
        .collect();
    if exec.terminal {
        merge_env(&mut env, "TERM=xterm", false);
    }
    for entry in exec.env {
        merge_env(&mut env, entry, true);
    }
    let mut process = Map::new();
    process.insert("terminal".into(), json!(exec.terminal));
    process.insert("args".into(), json!(exec.args));
    process.insert("env".into(), json!(env));
    let cwd = exec
        .cwd
        .map_or_else(|| part("cwd").cloned(), |cwd| Ok(json!(cwd)))?;
    process.insert("cwd".into(), cwd);
    process.insert("noNewPrivileges".into(), part("noNewPrivileges")?.clone());
    let mut process = Value::Object(process);
    match &exec.user {
        Some(run_as) => set_user(&mut process, run_as),
        None => {
            process["capabilities"] = part("capabilities")?.clone();
            // Absent where somebody else looks the container's user up.
            if let Some(user) = own.get("user") {
                process["user"] = user.clone();
            }
        }
    }
    Ok(process)
}

fn merge_env(env: &mut Vec<String>, entry: &str, replace: bool) {
    let key = |entry: &str| entry.split('=').next().map(str::to_owned);
    match env.iter_mut().find(|known| key(known) == key(entry)) {
        Some(known) if replace => entry.clone_into(known),
        Some(_) => {}
        None => env.push(entry.to_owned()),
    }
}

/// Root gets podman's capabilities. Others get none, and cannot get more than these by a program
/// with file capabilities.
fn set_user(process: &mut Value, run_as: &RunAs<'_>) {
    let is_root = match run_as {
        RunAs::Numbers(user) => {
            process["user"] = json!({
                "uid": user.uid,
                "gid": user.gid,
                "additionalGids": user.additional_gids,
            });
            user.uid == 0
        }
        // The name is all that is known here, as it is for podman.
        RunAs::Later(text) => matches!(text.split(':').next(), None | Some("" | "0" | "root")),
    };
    process["capabilities"] = if is_root {
        json!({"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES})
    } else {
        json!({"bounding": CAPABILITIES, "effective": [], "permitted": []})
    };
}

fn resources(limits: &Limits, cgroups: Cgroups) -> Value {
    // Nothing first; the runtime adds the usual harmless ones. An image may hold device nodes.
    let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
    if let Some(milli) = limits.milli_cpus {
        // The kernel takes no quota below a millisecond.
        let quota = (u64::from(milli) * PERIOD_US / 1000).max(1000);
        resources["cpu"] = json!({"quota": quota, "period": PERIOD_US});
    }
    if let Some(bytes) = limits.memory {
        resources["memory"] = match cgroups {
            Cgroups::V1 => json!({"limit": bytes}),
            // As much again of swap is podman's default where there is any; here there is none.
            Cgroups::V2 => json!({"limit": bytes, "swap": bytes}),
        };
    }
    resources
}

#[cfg(test)]
mod tests;
