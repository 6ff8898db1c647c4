//! The container of a run, described: what the command line, the image and the defaults make of
//! it together.
//!
//! Called by `check`, because all of it may be refused, and by `run` for the description itself.

use std::collections::BTreeMap;

use pericarp_oci::{
    config::{self, ConfigError, Process, Wishes},
    image::Defaults,
    runtime::{self, Bind, Cgroups, Container, Limits, Network, RunAs},
};
use serde_json::Value;

use crate::input::{
    check::{Plan, Root, RuntimePlan},
    volume::Volume,
};

/// Host name seen by the command.
pub(crate) const HOSTNAME: &str = "pericarp";

/// Our own environment, as far as it is text.
pub(crate) fn own_environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// What the container runs, with our own environment as the caller's.
pub(crate) fn process(root: &Root, wishes: Wishes<'_>) -> Result<Process, ConfigError> {
    let none = Defaults::default();
    let defaults = match root {
        Root::Oci(image) => image.defaults(),
        Root::Image(_) | Root::Directory(_) => &none,
    };
    let caller = own_environment();
    let caller = Some(&caller);
    config::merge(defaults, &Wishes { caller, ..wishes })
}

/// The OCI runtime's configuration, without the root, the user's numbers and the cgroup: only
/// where the root is mounted can these be told.
pub(crate) fn spec(plan: &Plan) -> Value {
    let read_only = matches!(&plan.root, Root::Image(image) if image.read_only);
    let binds: Vec<Bind<'_>> = match plan.runtime {
        // There the agent knows where they are.
        RuntimePlan::Vm(_) => Vec::new(),
        RuntimePlan::Runc => plan.volumes.iter().map(bind).collect(),
    };
    runtime::config(&Container {
        process: &plan.process,
        run_as: RunAs::Later(&plan.process.user),
        root: None,
        read_only,
        binds: &binds,
        hostname: HOSTNAME,
        limits: Limits {
            milli_cpus: plan.limits.milli_cpus,
            memory: plan.limits.memory,
        },
        cgroups: match plan.runtime {
            // The guest has nothing else.
            RuntimePlan::Vm(_) => Cgroups::V2,
            RuntimePlan::Runc => host_cgroups(),
        },
        cgroups_path: None,
        network: match plan.runtime {
            RuntimePlan::Vm(_) => Network::Shared,
            RuntimePlan::Runc => Network::Own,
        },
    })
}

fn bind(volume: &Volume) -> Bind<'_> {
    Bind {
        source: &volume.host,
        destination: &volume.guest,
        read_only: volume.read_only,
    }
}

/// Which control groups runc meets on this host.
fn host_cgroups() -> Cgroups {
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Cgroups::V2
    } else {
        Cgroups::V1
    }
}
