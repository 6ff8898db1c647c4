//! What Kubernetes is told of a node's handlers: a RuntimeClass for each.
//!
//! `overhead.podFixed` is what a pod's processes take of the host beside its containers' limits. A
//! kubelet adds it to those for the limit of the pod's control group, in which all of the machine
//! is: a machine that may hold more than that would be ended by the host's kernel in the middle of
//! its work. So it is what the sizing policy adds, and what the processes themselves were measured
//! to take.

use std::fmt::Write as _;

use pericarp_config::{Config, Settings};
use pericarp_hypervisor::{HostFacts, select};
use pericarp_pod::overhead::{MIB, usual};

use crate::daemon_set::Selector;

/// MiB of a pod's overhead where nobody has measured: what its profile says, or what is usual for
/// what runs its machine on this host.
#[must_use]
pub fn overhead(settings: &Settings, host: &HostFacts) -> u64 {
    let processes = settings.overhead;
    let processes = processes.unwrap_or_else(|| usual(select(settings.hypervisor, host).driver));
    with_processes(settings, processes)
}

/// The same for these bytes of its processes.
#[must_use]
pub fn with_processes(settings: &Settings, processes: u64) -> u64 {
    (settings.sizing.beside_limits() + processes).div_ceil(MIB)
}

/// All of a node's, as one YAML stream, with so many MiB for each profile. Where only some nodes of
/// a cluster have the handlers, they are the ones with this label, and pods go there.
#[must_use]
pub fn runtime_classes(
    config: &Config,
    overhead: impl Fn(&str, &Settings) -> u64,
    nodes: Option<&Selector>,
) -> String {
    let mut text = String::new();
    for (handler, profile) in config.handlers() {
        let mib = overhead(handler, profile.settings());
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
    use pericarp_config::sizing::Policy;
    use pericarp_hypervisor::Wanted;

    use super::*;

    fn overhead_of(settings: Settings) -> u64 {
        let host = HostFacts {
            kvm_device: Ok(()),
            cpu_flag: Some("svm"),
        };
        overhead(&settings, &host)
    }

    #[test]
    fn a_class_for_each_handler_with_what_its_machine_may_hold() {
        let fixed = |_: &str, settings: &Settings| overhead_of(settings.clone());
        let text = runtime_classes(&Config::default(), fixed, None);
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
        assert!(text.contains("    memory: 2088Mi\n"), "{text}");
        let some = Selector::default();
        let text = runtime_classes(&Config::default(), fixed, Some(&some));
        let scheduling = "scheduling:\n  nodeSelector:\n    io.pericarp/node: \"true\"\n";
        assert_eq!(text.matches(scheduling).count(), 4, "{text}");
    }

    #[test]
    fn an_overhead_is_what_the_profile_makes_it() {
        let of = |sizing, hypervisor, overhead| {
            overhead_of(Settings {
                sizing,
                hypervisor,
                overhead,
                ..Settings::default()
            })
        };
        assert_eq!(of(Policy::AksGa, Wanted::Auto, None), 40);
        assert_eq!(of(Policy::Kata, Wanted::Auto, None), 72);
        assert_eq!(of(Policy::AksGa, Wanted::QemuTcg, None), 288);
        assert_eq!(of(Policy::Kata, Wanted::QemuTcg, Some(30 * MIB)), 62);
        assert_eq!(of(Policy::AksGa, Wanted::Auto, Some(1)), 1);
    }
}
