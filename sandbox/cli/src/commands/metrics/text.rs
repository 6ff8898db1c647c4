//! Prometheus' text format (version 0.0.4) of what was seen of all machines.

use std::fmt::{Display, Write as _};

use pericarp_pod::record::DeviceKind;

use super::names::{self, Metric, POD_LABELS};
use crate::observe::{Device, Histogram, PARTS, Pod, Process};

/// The upper ends of a histogram's buckets, in microseconds.
const ENDS_US: [u64; 14] = [
    25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000,
];

/// All of it.
pub(super) fn text(pods: &[Pod]) -> String {
    let mut text = Text::default();
    let runs = pods.iter().filter(|pod| pod.is_run()).count();
    text.begin(&names::PODS);
    text.line("", &["containerd"], pods.len() - runs);
    text.line("", &["run"], runs);
    of_pods(&mut text, pods);
    of_processes(&mut text, pods);
    text.each(&names::SIDECAR_UP, pods, |text, pod| {
        for (control, up) in &pod.controls {
            text.line("", &[control], u8::from(*up));
        }
    });
    of_volumes(&mut text, pods);
    of_cards(&mut text, pods);
    text.written
}

fn of_pods(text: &mut Text, pods: &[Pod]) {
    text.each(&names::INFO, pods, |text, pod| {
        let record = &pod.record;
        let kernel = record.kernel.as_deref().unwrap_or_default();
        text.line("", &[&record.uid, &record.hypervisor, kernel], 1);
    });
    type Value = fn(&Pod) -> Option<f64>;
    let values: [(&Metric, Value); 10] = [
        (&names::STARTED, |pod| Some(pod.record.created as f64)),
        (&names::VCPUS, |pod| Some(pod.record.vcpus.into())),
        (&names::OVERHEAD, |pod| Some(pod.overhead()? as f64)),
        (&names::OVERHEAD_ALLOWED, |pod| {
            let allowed = pod.record.overhead;
            (allowed > 0).then_some(allowed as f64)
        }),
        (&names::OVERHEAD_EXCEEDED, |pod| {
            let allowed = pod.record.overhead;
            let exceeded = pod.overhead()? > allowed;
            (allowed > 0).then_some(f64::from(u8::from(exceeded)))
        }),
        (&names::GROUP_MEMORY, |pod| Some(pod.memory?.used as f64)),
        (&names::GROUP_LIMIT, |pod| Some(pod.memory?.limit? as f64)),
        (&names::GUEST_MEMORY, |pod| Some(pod.record.memory as f64)),
        (&names::GUEST_RESIDENT, |pod| {
            Some(pod.guest?.resident? as f64)
        }),
        (&names::GUEST_CPU, |pod| Some(pod.guest?.cpu.as_secs_f64())),
    ];
    for (metric, value) in values {
        text.each(metric, pods, |text, pod| {
            if let Some(value) = value(pod) {
                text.line("", &[], value);
            }
        });
    }
}

fn of_processes(text: &mut Text, pods: &[Pod]) {
    type Value = fn(&Process) -> Option<f64>;
    let values: [(&Metric, Value); 3] = [
        (&names::PROCESS_CPU, |one| Some(one.cost.cpu.as_secs_f64())),
        (&names::PROCESS_RESIDENT, |one| {
            Some(one.cost.resident as f64)
        }),
        (&names::PROCESS_PROPORTIONAL, |one| {
            Some(one.cost.proportional? as f64)
        }),
    ];
    for (metric, value) in values {
        text.each(metric, pods, |text, pod| {
            for one in &pod.processes {
                if let Some(value) = value(one) {
                    text.line("", &[&one.role, &one.device], value);
                }
            }
        });
    }
}

fn is_card(device: &Device) -> bool {
    device.kind == DeviceKind::Card
}

fn of_volumes(text: &mut Text, pods: &[Pod]) {
    let mut each = |metric: &'static Metric, show: &dyn Fn(&mut Text, &Device, [&str; 3])| {
        text.each(metric, pods, |text, pod| {
            for device in pod.devices.iter().filter(|one| !is_card(one)) {
                let labels = [device.kind.name(), &device.id, &device.volume];
                show(text, device, labels);
            }
        });
    };
    each(
        &names::VOLUME_REQUESTS,
        &|text, device, [kind, id, volume]| {
            for (class, one) in &device.classes {
                text.line("", &[kind, id, volume, class], one.requests);
            }
        },
    );
    each(&names::VOLUME_BYTES, &|text, device, [kind, id, volume]| {
        for (class, one) in &device.classes {
            text.line("", &[kind, id, volume, class], one.bytes);
        }
    });
    each(
        &names::VOLUME_ERRORS,
        &|text, device, [kind, id, volume]| {
            for (class, one) in &device.classes {
                text.line("", &[kind, id, volume, class], one.errors);
            }
        },
    );
    each(&names::VOLUME_IN_FLIGHT, &|text, device, labels| {
        text.line("", &labels, device.in_flight);
    });
    each(&names::VOLUME_THROTTLED, &|text, device, labels| {
        text.line("", &labels, device.throttled);
    });
    each(
        &names::VOLUME_LATENCY,
        &|text, device, [kind, id, volume]| {
            for ((part, _), time) in PARTS.iter().zip(&device.times) {
                text.histogram(&[kind, id, volume, part], time);
            }
        },
    );
}

fn of_cards(text: &mut Text, pods: &[Pod]) {
    type Value = fn(&crate::observe::device::Class) -> u64;
    let values: [(&Metric, Value); 3] = [
        (&names::NET_PACKETS, |class| {
            class.requests.saturating_sub(class.errors)
        }),
        (&names::NET_BYTES, |class| class.bytes),
        (&names::NET_DROPPED, |class| class.errors),
    ];
    for (metric, value) in values {
        text.each(metric, pods, |text, pod| {
            for device in pod.devices.iter().filter(|one| is_card(one)) {
                for direction in ["rx", "tx"] {
                    if let Some(class) = device.classes.get(direction) {
                        text.line("", &[&device.id, direction], value(class));
                    }
                }
            }
        });
    }
}

/// The text so far, and what the next lines are of.
#[derive(Default)]
struct Text {
    written: String,
    metric: Option<Metric>,
    /// Labels of the pod, as they are written.
    pod: String,
}

// Writing to a string cannot fail.
impl Text {
    fn begin(&mut self, metric: &Metric) {
        let Metric {
            name, kind, help, ..
        } = metric;
        let _ = writeln!(self.written, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self.metric = Some(*metric);
        self.pod.clear();
    }

    /// One metric, pod by pod.
    fn each(&mut self, metric: &Metric, pods: &[Pod], show: impl Fn(&mut Self, &Pod)) {
        self.begin(metric);
        for pod in pods {
            let values = [pod.namespace(), pod.name(), &pod.record.id];
            self.pod = labels(&POD_LABELS, &values);
            show(self, pod);
        }
    }

    /// A value with the metric's labels.
    fn line(&mut self, suffix: &str, values: &[&str], value: impl Display) {
        self.line_with(suffix, values, "", value);
    }

    fn line_with(&mut self, suffix: &str, values: &[&str], more: &str, value: impl Display) {
        let Some(metric) = self.metric else {
            return;
        };
        let own = labels(metric.labels, values);
        let all: Vec<&str> = [self.pod.as_str(), &own, more]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        let _ = writeln!(
            self.written,
            "{}{suffix}{{{}}} {value}",
            metric.name,
            all.join(",")
        );
    }

    fn histogram(&mut self, values: &[&str], time: &Histogram) {
        for end in ENDS_US {
            let more = format!("le=\"{}\"", end as f64 / 1e6);
            self.line_with("_bucket", values, &more, time.at_most(end * 1_000));
        }
        self.line_with("_bucket", values, "le=\"+Inf\"", time.count());
        self.line("_sum", values, time.seconds());
        self.line("_count", values, time.count());
    }
}

/// `name="value"` of each that has a value: one that is empty is as good as missing.
fn labels(names: &[&str], values: &[&str]) -> String {
    let pairs = names.iter().zip(values);
    let pairs = pairs.filter(|(_, value)| !value.is_empty());
    let pairs: Vec<String> = pairs
        .map(|(name, value)| format!("{name}=\"{}\"", quoted(value)))
        .collect();
    pairs.join(",")
}

fn quoted(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::observe::tests::sample;

    #[test]
    fn a_pod_is_written_with_all_that_was_seen() {
        let written = text(&[sample(7)]);
        let pod = "namespace=\"default\",pod=\"web\",sandbox=\"aa11\"";
        let disk = "kind=\"disk\",device=\"disk1\",volume=\"data \\\"x\\\"\"";
        for line in [
            "pericarp_pods{by=\"containerd\"} 1".to_owned(),
            "pericarp_pods{by=\"run\"} 0".to_owned(),
            format!(
                "pericarp_pod_info{{{pod},pod_uid=\"u-1\",hypervisor=\"pericarp-vmm: KVM\"}} 1"
            ),
            format!("pericarp_pod_start_time_seconds{{{pod}}} 1000"),
            format!("pericarp_pod_overhead_bytes{{{pod}}} 10485760"),
            format!("pericarp_pod_overhead_exceeded{{{pod}}} 0"),
            format!("pericarp_pod_cgroup_memory_limit_bytes{{{pod}}} 314572800"),
            format!("pericarp_guest_memory_bytes{{{pod}}} 268435456"),
            format!("pericarp_guest_cpu_seconds_total{{{pod}}} 0.063"),
            format!(
                "pericarp_process_cpu_seconds_total{{{pod},process=\"pericarp-block\",device=\"disk1\"}} 0.07"
            ),
            format!("pericarp_process_resident_bytes{{{pod},process=\"shim\"}} 5242880"),
            format!("pericarp_sidecar_up{{{pod},control=\"fs.control\"}} 0"),
            format!("pericarp_volume_requests_total{{{pod},{disk},class=\"read\"}} 7"),
            format!("pericarp_volume_bytes_total{{{pod},{disk},class=\"read\"}} 28672"),
            format!("pericarp_volume_in_flight{{{pod},{disk}}} 3"),
            format!(
                "pericarp_volume_latency_seconds_bucket{{{pod},{disk},part=\"disk\",le=\"0.000025\"}} 0"
            ),
            format!(
                "pericarp_volume_latency_seconds_bucket{{{pod},{disk},part=\"disk\",le=\"0.00005\"}} 7"
            ),
            format!(
                "pericarp_volume_latency_seconds_bucket{{{pod},{disk},part=\"total\",le=\"+Inf\"}} 7"
            ),
            format!("pericarp_volume_latency_seconds_count{{{pod},{disk},part=\"queue\"}} 0"),
            format!("pericarp_net_packets_total{{{pod},device=\"card1\",direction=\"rx\"}} 8"),
            format!("pericarp_net_dropped_total{{{pod},device=\"card1\",direction=\"rx\"}} 2"),
        ] {
            let there = written.lines().any(|one| one == line);
            assert!(there, "{line}\nis not in\n{written}");
        }
        // Packets are no requests of a volume.
        assert!(!written.contains("device=\"card1\",volume"), "{written}");
    }

    #[test]
    fn each_line_is_of_a_metric_that_was_begun() {
        let mut greedy = sample(3);
        greedy.record.overhead = 1;
        greedy.record.id = "bb22".into();
        let written = text(&[sample(1), greedy]);
        assert!(
            written.contains(
                "overhead_exceeded{namespace=\"default\",pod=\"web\",sandbox=\"bb22\"} 1"
            )
        );
        let mut begun = BTreeSet::new();
        let mut current = "";
        for line in written.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                current = rest.split(' ').next().unwrap();
                assert!(begun.insert(current), "{current} is begun twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(current) && !current.is_empty(), "{line}");
                let (_, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
            }
        }
        let all: BTreeSet<_> = names::ALL.iter().map(|one| one.name).collect();
        assert_eq!(begun, all);
        // The same names without a pod.
        assert_eq!(text(&[]).matches("# TYPE ").count(), names::ALL.len());
    }
}
