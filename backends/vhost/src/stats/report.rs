//! Statistics as an operator reads them: JSON, and Prometheus' text format.

use std::fmt::{Display, Write};

use serde_json::{Map, Value, json};

use super::{DeviceStats, QueueStats, load};
use crate::histogram::{Histogram, Snapshot};

/// The quantiles that are reported and their names in JSON.
const QUANTILES: [(&str, &str, f64); 4] = [
    ("p50", "0.5", 0.5),
    ("p90", "0.9", 0.9),
    ("p99", "0.99", 0.99),
    ("p999", "0.999", 0.999),
];

/// A histogram as a member: latencies in nanoseconds. All of it, if that is wanted: who asks twice
/// knows the quantiles of what lies between.
fn histogram(histogram: &Histogram, whole: bool) -> Value {
    let snapshot = histogram.snapshot();
    let mut members = Map::new();
    members.insert("count".to_owned(), json!(snapshot.count()));
    members.insert("sum".to_owned(), json!(snapshot.sum()));
    for (name, _, q) in QUANTILES {
        members.insert(name.to_owned(), json!(snapshot.quantile(q)));
    }
    members.insert("max".to_owned(), json!(snapshot.max()));
    if whole {
        let buckets: Vec<_> = snapshot.buckets().collect();
        members.insert("buckets".to_owned(), json!(buckets));
    }
    Value::Object(members)
}

fn queue(index: usize, stats: &QueueStats, classes: &[&str], whole: bool) -> Value {
    let requests: Map<String, Value> = classes
        .iter()
        .zip(&stats.classes)
        .map(|(name, class)| {
            let members = json!({
                "count": load(&class.requests),
                "bytes": load(&class.bytes),
                "errors": load(&class.errors),
            });
            ((*name).to_owned(), members)
        })
        .collect();
    json!({
        "queue": index,
        "requests": requests,
        "kicks": load(&stats.kicks),
        "calls": load(&stats.calls),
        "turns": load(&stats.turns),
        "throttled": load(&stats.throttled),
        "in_flight": load(&stats.in_flight),
        "batch": histogram(&stats.batch, false),
        "latency_ns": {
            "queue_wait": histogram(&stats.queue_wait, whole),
            "backend": histogram(&stats.backend, whole),
            "device": histogram(&stats.device, whole),
            "total": histogram(&stats.total, whole),
        },
    })
}

/// The queues of a device as a JSON array, with their `whole` histograms or the quantiles alone.
pub(crate) fn json(stats: &DeviceStats, whole: bool) -> Value {
    let queues = stats.queues.iter().enumerate();
    queues
        .map(|(index, q)| queue(index, q, stats.classes, whole))
        .collect()
}

type Counter = fn(&QueueStats) -> u64;
const COUNTERS: [(&str, &str, &str, Counter); 5] = [
    (
        "kicks_total",
        "counter",
        "Times the driver woke the worker.",
        |q| load(&q.kicks),
    ),
    (
        "calls_total",
        "counter",
        "Times the driver was called.",
        |q| load(&q.calls),
    ),
    (
        "turns_total",
        "counter",
        "Turns that popped or finished a request.",
        |q| load(&q.turns),
    ),
    (
        "throttled_total",
        "counter",
        "Turns in which a limit kept requests waiting.",
        |q| load(&q.throttled),
    ),
    (
        "in_flight",
        "gauge",
        "Requests popped and not finished.",
        |q| load(&q.in_flight),
    ),
];

type Class = fn(&super::ClassStats) -> u64;
const CLASSES: [(&str, &str, Class); 3] = [
    ("requests_total", "Requests that have ended.", |c| {
        load(&c.requests)
    }),
    ("bytes_total", "Bytes of requests that succeeded.", |c| {
        load(&c.bytes)
    }),
    ("errors_total", "Requests that failed.", |c| load(&c.errors)),
];

type Part = fn(&QueueStats) -> &Histogram;
const PARTS: [(&str, &str, Part); 4] = [
    (
        "queue_wait_seconds",
        "From seen in the ring to popped.",
        |q| &q.queue_wait,
    ),
    (
        "backend_seconds",
        "Neither waiting in the ring nor in the kernel.",
        |q| &q.backend,
    ),
    ("device_seconds", "In the kernel.", |q| &q.device),
    (
        "request_seconds",
        "From seen in the ring to published.",
        |q| &q.total,
    ),
];

/// What a device's driver has of it, by name.
type Held<'a> = &'a [(&'static str, u64)];

/// All devices in Prometheus' text format, each with its name.
pub(crate) fn prometheus(devices: &[(&str, &DeviceStats)], held: &[(&str, Held<'_>)]) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in COUNTERS {
        head(&mut text, name, kind, help);
        each(devices, |labels, q, _| {
            line(&mut text, name, labels, value(q))
        });
    }
    for (name, help, value) in CLASSES {
        head(&mut text, name, "counter", help);
        each(devices, |labels, q, classes| {
            for (class, stats) in classes.iter().zip(&q.classes) {
                let labels = format!("{labels},class=\"{class}\"");
                line(&mut text, name, &labels, value(stats));
            }
        });
    }
    for (name, help, value) in PARTS {
        head(&mut text, name, "summary", help);
        each(devices, |labels, q, _| {
            summary(&mut text, name, labels, &value(q).snapshot())
        });
    }
    if held.iter().any(|(_, held)| !held.is_empty()) {
        head(&mut text, "held", "gauge", "What the driver has of it now.");
        for (id, held) in held {
            for (what, count) in *held {
                let labels = format!("device=\"{}\",what=\"{what}\"", quoted(id));
                line(&mut text, "held", &labels, count);
            }
        }
    }
    text
}

/// A name as a label's value.
fn quoted(id: &str) -> String {
    id.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn each(devices: &[(&str, &DeviceStats)], mut write: impl FnMut(&str, &QueueStats, &[&str])) {
    for (id, stats) in devices {
        let id = quoted(id);
        for (index, queue) in stats.queues.iter().enumerate() {
            write(
                &format!("device=\"{id}\",queue=\"{index}\""),
                queue,
                stats.classes,
            );
        }
    }
}

// Writing to a string cannot fail.
fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(
        text,
        "# HELP pericarp_{name} {help}\n# TYPE pericarp_{name} {kind}"
    );
}

fn line(text: &mut String, name: &str, labels: &str, value: impl Display) {
    let _ = writeln!(text, "pericarp_{name}{{{labels}}} {value}");
}

fn summary(text: &mut String, name: &str, labels: &str, snapshot: &Snapshot) {
    let seconds = |ns: u64| ns as f64 / 1e9;
    for (_, label, q) in QUANTILES {
        let labels = format!("{labels},quantile=\"{label}\"");
        line(text, name, &labels, seconds(snapshot.quantile(q)));
    }
    line(
        text,
        &format!("{name}_sum"),
        labels,
        seconds(snapshot.sum()),
    );
    line(text, &format!("{name}_count"), labels, snapshot.count());
}
