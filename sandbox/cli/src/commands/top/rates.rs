//! What lies between two looks at all machines, as numbers and as JSON.

use std::time::Duration;

use pericarp_pod::record::DeviceKind;
use serde_json::{Map, Value, json};

use crate::observe::{Device, PARTS, Pod};

/// The quantiles that are shown.
const QUANTILES: [(&str, f64); 2] = [("p50", 0.5), ("p99", 0.99)];

/// All machines in an interval.
#[derive(Debug)]
pub(super) struct Rates {
    pub(super) seconds: f64,
    pub(super) pods: Vec<PodRates>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct PodRates {
    /// As it is now.
    pub(super) now: Pod,
    /// Percent of one CPU that the guest's took.
    pub(super) guest_cpu: Option<f64>,
    /// The same for each process, in their order; that of the machine without the guest's.
    pub(super) cpu: Vec<f64>,
    /// What was done with each device, in their order.
    pub(super) since: Vec<Device>,
}

/// What lies between; of a pod that was not there before, all that it has done.
pub(super) fn between(earlier: &[Pod], now: &[Pod], time: Duration) -> Rates {
    let seconds = time.as_secs_f64().max(1e-3);
    let pods = now.iter().map(|pod| {
        let before = earlier.iter().find(|one| one.record.id == pod.record.id);
        of_pod(before, pod, seconds)
    });
    Rates {
        seconds,
        pods: pods.collect(),
    }
}

fn of_pod(before: Option<&Pod>, now: &Pod, seconds: f64) -> PodRates {
    let percent = |now: Duration, before: Option<Duration>| {
        // Another process in its place has less behind it.
        let spent = before.and_then(|before| now.checked_sub(before));
        spent
            .unwrap_or(if before.is_some() {
                now
            } else {
                Duration::ZERO
            })
            .as_secs_f64()
            * 100.0
            / seconds
    };
    let guest_before = before.and_then(|pod| pod.guest);
    let guest_cpu = now
        .guest
        .map(|guest| percent(guest.cpu, guest_before.map(|guest| guest.cpu)));
    let cpu = now.processes.iter().map(|process| {
        let same = |one: &&crate::observe::Process| {
            one.role == process.role && one.device == process.device
        };
        let earlier = before.and_then(|pod| pod.processes.iter().find(same));
        let all = percent(process.cost.cpu, earlier.map(|one| one.cost.cpu));
        match process.role.as_str() {
            // The two clocks tick differently.
            pericarp_pod::record::MACHINE => (all - guest_cpu.unwrap_or(0.0)).max(0.0),
            _ => all,
        }
    });
    let since = now.devices.iter().map(|device| {
        let same = |one: &&Device| one.id == device.id;
        let earlier = before.and_then(|pod| pod.devices.iter().find(same));
        // Nothing is known of the time before one was first seen.
        device.since(earlier.unwrap_or(device))
    });
    PodRates {
        guest_cpu,
        cpu: cpu.collect(),
        since: since.collect(),
        now: now.clone(),
    }
}

impl PodRates {
    /// Disks and shares, in an interval.
    pub(super) fn volumes(&self) -> impl Iterator<Item = &Device> {
        self.since.iter().filter(|one| one.kind != DeviceKind::Card)
    }

    /// Percent of one CPU that all processes and the guest took.
    pub(super) fn all_cpu(&self) -> f64 {
        self.cpu.iter().sum::<f64>() + self.guest_cpu.unwrap_or(0.0)
    }

    /// Bytes that all processes have of their own.
    pub(super) fn host_memory(&self) -> u64 {
        self.now.processes.iter().map(|one| one.cost.resident).sum()
    }
}

impl Rates {
    /// All of it.
    pub(super) fn json(&self) -> Value {
        let pods: Vec<Value> = self.pods.iter().map(|pod| self.pod(pod)).collect();
        json!({ "seconds": round(self.seconds), "pods": pods })
    }

    fn pod(&self, pod: &PodRates) -> Value {
        let record = &pod.now.record;
        let processes = pod.now.processes.iter().zip(&pod.cpu);
        let processes = processes.map(|(one, cpu)| {
            json!({
                "process": one.role,
                "device": one.device,
                "cpu_percent": round(*cpu),
                "resident": one.cost.resident,
            })
        });
        let devices = pod.since.iter().zip(&pod.now.devices);
        let of_kind = |card: bool| -> Vec<Value> {
            let some = devices.clone();
            let some = some.filter(|(one, _)| (one.kind == DeviceKind::Card) == card);
            some.map(|(since, now)| match card {
                true => self.card(since),
                false => self.volume(since, now),
            })
            .collect()
        };
        let silent = pod.now.controls.iter().filter(|(_, answered)| !answered);
        json!({
            "namespace": pod.now.namespace(),
            "pod": pod.now.name(),
            "sandbox": record.id,
            "hypervisor": record.hypervisor,
            "vcpus": record.vcpus,
            "guest": {
                "cpu_percent": pod.guest_cpu.map(round),
                "memory": record.memory,
                "resident": pod.now.guest.and_then(|guest| guest.resident),
            },
            "processes": processes.collect::<Vec<_>>(),
            "volumes": of_kind(false),
            "cards": of_kind(true),
            "silent": silent.map(|(control, _)| control).collect::<Vec<_>>(),
        })
    }

    fn volume(&self, since: &Device, now: &Device) -> Value {
        let (did, all) = (since.all(), now.all());
        let times = PARTS.iter().zip(&since.times).map(|((part, _), time)| {
            let quantiles = QUANTILES.map(|(name, q)| {
                let us = time.quantile_us(q).map(round);
                (name.to_owned(), json!(us))
            });
            ((*part).to_owned(), Value::Object(Map::from_iter(quantiles)))
        });
        json!({
            "device": since.id,
            "kind": since.kind.name(),
            "volume": since.volume,
            "iops": self.rate(did.requests),
            "bytes_per_second": self.rate(did.bytes),
            "errors": did.errors,
            "in_flight": since.in_flight,
            "latency_us": Value::Object(times.collect()),
            "total": {"requests": all.requests, "bytes": all.bytes, "errors": all.errors},
        })
    }

    fn card(&self, since: &Device) -> Value {
        let directions = since.classes.iter().filter(|(name, _)| *name != "control");
        let mut card: Map<String, Value> = directions
            .map(|(name, class)| {
                let members = json!({
                    "packets_per_second": self.rate(class.requests.saturating_sub(class.errors)),
                    "bytes_per_second": self.rate(class.bytes),
                    "dropped": class.errors,
                });
                (name.clone(), members)
            })
            .collect();
        card.insert("device".to_owned(), json!(since.id));
        Value::Object(card)
    }

    fn rate(&self, count: u64) -> f64 {
        round(count as f64 / self.seconds)
    }
}

/// To a thousandth, which is more than is known.
fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::observe::tests::sample;

    pub(crate) fn rates() -> Rates {
        between(&[sample(10)], &[sample(30)], Duration::from_secs(2))
    }

    #[test]
    fn what_lies_between_two_looks_is_told() {
        let said = rates().json();
        let pod = &said["pods"][0];
        assert_eq!(
            (&pod["pod"], &pod["namespace"]),
            (&json!("web"), &json!("default"))
        );
        let volume = &pod["volumes"][0];
        assert_eq!(volume["iops"], 10.0);
        assert_eq!(volume["bytes_per_second"], 40960.0);
        assert_eq!(volume["latency_us"]["total"]["p99"], 50.0);
        assert_eq!(volume["latency_us"]["queue"]["p50"], Value::Null);
        assert_eq!(volume["total"]["requests"], 30);
        assert_eq!(pod["cards"][0]["rx"]["packets_per_second"], 0.0);
        // 20 x 10 ms in 2 s; 9 of each 10 are the guest's.
        assert_eq!(pod["guest"]["cpu_percent"], 9.0);
        assert_eq!(pod["processes"][1]["cpu_percent"], 1.0);
        assert_eq!(pod["processes"][2]["cpu_percent"], 10.0);
        assert_eq!(pod["silent"], json!(["fs.control"]));
    }

    #[test]
    fn a_pod_that_is_new_has_done_nothing_yet() {
        let rates = between(&[], &[sample(30)], Duration::from_secs(1));
        assert_eq!(rates.pods[0].volumes().next().unwrap().all().requests, 0);
        assert_eq!(rates.pods[0].all_cpu(), 0.0);
        // One whose sidecar and machine are others by now has done what they have.
        let rates = between(&[sample(30)], &[sample(10)], Duration::from_secs(1));
        assert_eq!(rates.pods[0].volumes().next().unwrap().all().requests, 10);
        assert_eq!(rates.pods[0].guest_cpu, Some(9.0));
        // One that has gone is not shown.
        assert!(between(&[sample(1)], &[], Duration::ZERO).pods.is_empty());
    }
}
