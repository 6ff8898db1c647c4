//! What Kubernetes is told of a node's handlers: a RuntimeClass for each.
//!
//! `overhead.podFixed` is what a pod's processes take of the host beside its containers' limits. A
//! kubelet adds it to those for the limit of the pod's control group, in which all of the machine
//! is: a machine that may hold more than that would be ended by the host's kernel in the middle of
//! its work. So it is what the sizing policy adds, and what the processes themselves were measured
//! to take.

use std::fmt::Write as _;

use pericarp_config::{Config, sizing::Policy};
use pericarp_hypervisor::Driver;

use crate::daemon_set::Selector;

const MIB: u64 = 1 << 20;
/// The shim and the sidecars, MiB: three times what they take of an idle pod's host, since under load
/// they hold requests. PERF.md, "What does a pod take of its host?".
const SIDECARS: u64 = 32;
/// The monitor, beside the guest's memory, MiB: twice and more.
const MONITOR: u64 = 8;
/// QEMU, likewise: with an emulated CPU it keeps what it has translated.
const QEMU: u64 = 256;

/// Bytes of a pod's overhead.
#[must_use]
pub fn overhead(policy: Policy, driver: Driver) -> u64 {
    let hypervisor = match driver {
        Driver::Pericarp => MONITOR,
        Driver::Qemu(_) => QEMU,
    };
    policy.beside_limits() + (SIDECARS + hypervisor) * MIB
}

/// All of a node's, as one YAML stream. Where only some nodes of a cluster have the handlers, they are
/// the ones with this label, and pods go there.
#[must_use]
pub fn runtime_classes(config: &Config, driver: Driver, nodes: Option<&Selector>) -> String {
    let mut text = String::new();
    for (handler, profile) in config.handlers() {
        let mib = overhead(profile.settings().sizing, driver).div_ceil(MIB);
        // A label, which needs no quotes in YAML.
        let _ = write!(
            text,
            "---\n\
             apiVersion: node.k8s.io/v1\n\
             kind: RuntimeClass\n\
             metadata:\n\
             \x20 name: {handler}\n\
             \x20 labels:\n\
             \x20   app.kubernetes.io/part-of: pericarp\n\
             handler: {handler}\n\
             overhead:\n\
             \x20 podFixed:\n\
             \x20   memory: {mib}Mi\n"
        );
        if let Some(selector) = nodes {
            let _ = write!(text, "scheduling:\n  nodeSelector:\n{}", selector.line(4));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_for_each_handler_with_what_its_machine_may_hold() {
        let text = runtime_classes(&Config::default(), Driver::Pericarp, None);
        assert!(!text.contains("scheduling"), "{text}");
        for handler in [
            "pericarp",
            "kata-mshv-vm-isolation",
            "kata-vm-isolation",
            "kata",
        ] {
            assert!(text.contains(&format!("  name: {handler}\n")), "{text}");
            assert!(text.contains(&format!("\nhandler: {handler}\n")), "{text}");
        }
        let mib = (2048 + SIDECARS + MONITOR).to_string();
        assert!(text.contains(&format!("    memory: {mib}Mi\n")), "{text}");
        let some = Selector::default();
        let text = runtime_classes(&Config::default(), Driver::Pericarp, Some(&some));
        let scheduling = "scheduling:\n  nodeSelector:\n    io.pericarp/node: \"true\"\n";
        assert_eq!(text.matches(scheduling).count(), 4, "{text}");
        let small = overhead(Policy::AksGa, Driver::Pericarp);
        assert!(small < 128 * MIB && overhead(Policy::Kata, Driver::Pericarp) > small);
    }
}
