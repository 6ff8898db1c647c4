//! The names of all metrics, with what they are and what tells their values apart. `text` writes no
//! other; METRICS.md beside the dashboard lists the same.

/// One metric.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub(super) kind: &'static str,
    /// One sentence, with the unit.
    pub(super) help: &'static str,
    /// Beside those of the pod, which come first.
    pub(super) labels: &'static [&'static str],
}

/// What every metric of a pod has.
pub(super) const POD_LABELS: [&str; 3] = ["namespace", "pod", "sandbox"];

const fn of_pod(
    name: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric {
        name,
        kind,
        help,
        labels,
    }
}

macro_rules! metrics {
    ($($constant:ident = $metric:expr;)*) => {
        $(pub(super) const $constant: Metric = $metric;)*
        /// Every one, for whoever looks whether it is written and documented.
        #[cfg(test)]
        pub(super) const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    PODS = Metric {
        name: "pericarp_pods",
        kind: "gauge",
        help: "Machines on this host, by who made them: containerd's shim, or pericarp run.",
        labels: &["by"],
    };
    INFO = of_pod(
        "pericarp_pod_info", "gauge", &["pod_uid", "hypervisor", "kernel"],
        "1 for each pod.",
    );
    STARTED = of_pod(
        "pericarp_pod_start_time_seconds", "gauge", &[],
        "When its machine was begun to be made, seconds since 1970.",
    );
    VCPUS = of_pod("pericarp_pod_vcpus", "gauge", &[], "Virtual CPUs of its machine.");
    OVERHEAD = of_pod(
        "pericarp_pod_overhead_bytes", "gauge", &[],
        "Host memory of all its processes together, beside the guest's memory.",
    );
    OVERHEAD_ALLOWED = of_pod(
        "pericarp_pod_overhead_allowed_bytes", "gauge", &[],
        "What that may be: the key overhead of its profile, or what is usual; no RuntimeClass is read.",
    );
    OVERHEAD_EXCEEDED = of_pod(
        "pericarp_pod_overhead_exceeded", "gauge", &[],
        "1 where it is more than it may be: the host may end the pod under load. For an alarm.",
    );
    GROUP_MEMORY = of_pod(
        "pericarp_pod_cgroup_memory_bytes", "gauge", &[],
        "What the pod's control group is charged with: the machine's memory and its processes.",
    );
    GROUP_LIMIT = of_pod(
        "pericarp_pod_cgroup_memory_limit_bytes", "gauge", &[],
        "What it may be charged with, by the least limit on it or above; beyond that it is ended.",
    );
    GUEST_MEMORY = of_pod(
        "pericarp_guest_memory_bytes", "gauge", &[],
        "Memory that the machine has.",
    );
    GUEST_RESIDENT = of_pod(
        "pericarp_guest_memory_resident_bytes", "gauge", &[],
        "What of it the host has given so far.",
    );
    GUEST_CPU = of_pod(
        "pericarp_guest_cpu_seconds_total", "counter", &[],
        "CPU time of the virtual CPUs' threads.",
    );
    PROCESS_CPU = of_pod(
        "pericarp_process_cpu_seconds_total", "counter", &["process", "device"],
        "CPU time of a process on the host; that of the machine has its virtual CPUs' in it.",
    );
    PROCESS_RESIDENT = of_pod(
        "pericarp_process_resident_bytes", "gauge", &["process", "device"],
        "What it has in memory (RSS), without shared memory, which the guest's is.",
    );
    PROCESS_PROPORTIONAL = of_pod(
        "pericarp_process_proportional_bytes", "gauge", &["process", "device"],
        "Its share of what it has in memory (PSS), without the guest's memory.",
    );
    SIDECAR_UP = of_pod(
        "pericarp_sidecar_up", "gauge", &["control"],
        "Whether a sidecar's control socket answers within a second.",
    );
    VOLUME_REQUESTS = of_pod(
        "pericarp_volume_requests_total", "counter", &["kind", "device", "volume", "class"],
        "Requests of a disk or share that have ended, by class: read, write, flush, lookup and others.",
    );
    VOLUME_BYTES = of_pod(
        "pericarp_volume_bytes_total", "counter", &["kind", "device", "volume", "class"],
        "Bytes of those that succeeded.",
    );
    VOLUME_ERRORS = of_pod(
        "pericarp_volume_errors_total", "counter", &["kind", "device", "volume", "class"],
        "Those that failed.",
    );
    VOLUME_IN_FLIGHT = of_pod(
        "pericarp_volume_in_flight", "gauge", &["kind", "device", "volume"],
        "Requests that were taken from the ring and have not ended.",
    );
    VOLUME_THROTTLED = of_pod(
        "pericarp_volume_throttled_total", "counter", &["kind", "device", "volume"],
        "Times that a limit kept requests waiting.",
    );
    VOLUME_LATENCY = of_pod(
        "pericarp_volume_latency_seconds", "histogram", &["kind", "device", "volume", "part"],
        "How long requests took, by part: queue is waiting in the ring, disk is in the host's kernel, \
         backend is the rest in the sidecar; total is all three.",
    );
    NET_PACKETS = of_pod(
        "pericarp_net_packets_total", "counter", &["device", "direction"],
        "Packets that a card carried; rx is to the guest.",
    );
    NET_BYTES = of_pod(
        "pericarp_net_bytes_total", "counter", &["device", "direction"],
        "Their bytes.",
    );
    NET_DROPPED = of_pod(
        "pericarp_net_dropped_total", "counter", &["device", "direction"],
        "Packets that were lost there.",
    );
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    const DASHBOARD: &str = include_str!("../../../dashboards/pericarp.json");
    const DOCUMENT: &str = include_str!("../../../dashboards/METRICS.md");

    /// Words of a text that are names of metrics.
    fn names(text: &str) -> BTreeSet<&str> {
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = text.split(|c| !inner(c));
        words.filter(|word| word.starts_with("pericarp_")).collect()
    }

    fn known(name: &str) -> bool {
        let of_histogram = |metric: &Metric| {
            let rest = name.strip_prefix(metric.name);
            metric.kind == "histogram" && matches!(rest, Some("_bucket" | "_sum" | "_count"))
        };
        ALL.iter().any(|one| one.name == name || of_histogram(one))
    }

    fn expressions(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                for (key, value) in members {
                    match value {
                        Value::String(text)
                            if ["expr", "query", "definition"].contains(&key.as_str()) =>
                        {
                            found.push(text.clone());
                        }
                        other => expressions(other, found),
                    }
                }
            }
            Value::Array(all) => all.iter().for_each(|one| expressions(one, found)),
            _ => {}
        }
    }

    #[test]
    fn the_dashboard_asks_for_what_there_is() {
        let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
        let mut found = Vec::new();
        expressions(&dashboard, &mut found);
        assert!(found.len() >= 15, "{found:?}");
        for expression in &found {
            let names = names(expression);
            // A source of data is a variable, too.
            assert!(
                !names.is_empty() || expression == "prometheus",
                "{expression}"
            );
            for name in names {
                assert!(known(name), "{name} in {expression}");
            }
            let open = expression.matches(['(', '{', '[']).count();
            assert_eq!(
                open,
                expression.matches([')', '}', ']']).count(),
                "{expression}"
            );
        }
        // Nothing else in it is called so.
        for name in names(DASHBOARD) {
            assert!(known(name), "{name}");
        }
        let panels = dashboard["panels"].as_array().unwrap();
        let ids: BTreeSet<_> = panels
            .iter()
            .map(|panel| panel["id"].as_u64().unwrap())
            .collect();
        assert_eq!(ids.len(), panels.len());
        assert!(!known("pericarp_volume_requests_total_bucket") && !known("pericarp_"));
    }

    #[test]
    fn the_document_lists_each_with_its_labels() {
        let listed: BTreeSet<_> = names(DOCUMENT);
        let all: BTreeSet<_> = ALL.iter().map(|one| one.name).collect();
        assert_eq!(all.len(), ALL.len());
        assert_eq!(listed, all);
        for metric in ALL {
            let labels = metric.labels.join(", ");
            let row = format!(
                "| `{}` | {} | {labels} | {} |",
                metric.name, metric.kind, metric.help
            );
            assert!(DOCUMENT.contains(&row), "METRICS.md wants the row\n{row}");
        }
    }
}
