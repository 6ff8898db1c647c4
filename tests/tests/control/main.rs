//! The control socket of `pericarp-block`: what it tells, what it changes, and
//! what a peer that means harm can do to it.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod hostile;
mod limits;
mod resize;
mod rig;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::client::Client;
use serde_json::{Value, json};

use rig::{Rig, http};

#[test]
fn statistics_count_every_request_once() {
    let Some(rig) = Rig::start("control statistics", &["--num-queues=2"]) else {
        return;
    };
    assert_eq!(
        rig.control.metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut client = Client::connect(rig.backend.socket(), 2, 8).unwrap();
    for round in 0..20 {
        client.write(0, 4096 * round, &[7; 4096]).unwrap();
        client.read(1, 4096 * round, 8192).unwrap();
    }
    client.flush(0).unwrap();
    client.read(1, 1 << 30, 512).unwrap_err();
    let stats = rig.ask(&json!({"op": "stats"}));
    assert_eq!(stats["ok"], true, "{stats}");
    let queues = &stats["devices"][0]["queues"];
    assert_eq!(
        queues[0]["requests"]["write"],
        json!({"count": 20, "bytes": 81920, "errors": 0})
    );
    assert_eq!(
        queues[0]["requests"]["flush"],
        json!({"count": 1, "bytes": 0, "errors": 0})
    );
    assert_eq!(
        queues[1]["requests"]["read"],
        json!({"count": 21, "bytes": 163_840, "errors": 1})
    );
    for (queue, count) in [(&queues[0], 21), (&queues[1], 21)] {
        assert_eq!(queue["in_flight"], 0);
        assert_eq!(queue["batch"]["sum"], count);
        assert!(queue["kicks"].as_u64().unwrap() >= 1);
        // One request at a time: the driver was called for every one.
        assert!(queue["calls"].as_u64().unwrap() >= count);
        let latency = &queue["latency_ns"];
        let part = |name: &str, of: &str| latency[name][of].as_u64().unwrap();
        for name in ["queue_wait", "backend", "device", "total"] {
            assert_eq!(part(name, "count"), count, "{name}");
            assert!(part(name, "p50") <= part(name, "p99"), "{latency}");
            assert!(part(name, "p999") <= part(name, "max"), "{latency}");
        }
        let parts = ["queue_wait", "backend", "device"];
        let sum: u64 = parts.into_iter().map(|name| part(name, "sum")).sum();
        assert_eq!(sum, part("total", "sum"), "{latency}");
        assert!(part("device", "max") > 0);
    }
    // Who asks for whole histograms can say what lies between two looks.
    assert!(queues[0]["latency_ns"]["total"].get("buckets").is_none());
    let whole = rig.ask(&json!({"op": "stats", "histograms": true}));
    let times = &whole["devices"][0]["queues"][0]["latency_ns"];
    for name in ["queue_wait", "backend", "device", "total"] {
        let buckets = times[name]["buckets"].as_array().unwrap();
        let count = |bucket: &Value| bucket[1].as_u64().unwrap();
        assert_eq!(buckets.iter().map(count).sum::<u64>(), 21, "{times}");
        let values: Vec<_> = buckets.iter().map(|one| one[0].as_u64()).collect();
        assert!(values.is_sorted(), "{times}");
    }
    let odd = rig.ask(&json!({"op": "stats", "histograms": 1}));
    assert_eq!(odd["error"], "histograms 1: use true or false");
    // A scraper sees the same.
    let text = http(&rig.control, "/metrics");
    for line in [
        "pericarp_requests_total{device=\"disk\",queue=\"0\",class=\"write\"} 20",
        "pericarp_errors_total{device=\"disk\",queue=\"1\",class=\"read\"} 1",
        "pericarp_device_seconds_count{device=\"disk\",queue=\"1\"} 21",
        "# TYPE pericarp_request_seconds summary",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    let metrics = rig.ask(&json!({"op": "metrics"}));
    assert!(
        metrics["metrics"]
            .as_str()
            .unwrap()
            .contains("pericarp_kicks_total")
    );
    assert!(http(&rig.control, "/other").starts_with("HTTP/1.0 404"));
    let version = rig.ask(&json!({"op": "version"}));
    assert_eq!(version["program"], "pericarp-block");
}

#[test]
fn the_socket_goes_with_the_program() {
    let Some(rig) = Rig::start("control socket removed", &[]) else {
        return;
    };
    let Rig {
        backend, control, ..
    } = rig;
    assert!(backend.stop().unwrap().success());
    assert!(!control.exists());
}

#[test]
fn an_idle_program_is_not_woken() {
    let Some(rig) = Rig::start("control idle", &["--iops=1000"]) else {
        return;
    };
    let mut client = Client::connect(rig.backend.socket(), 1, 8).unwrap();
    for _ in 0..50 {
        client.read(0, 0, 4096).unwrap();
    }
    // Kept open: a peer costs nothing while it is silent.
    let peer = std::os::unix::net::UnixStream::connect(&rig.control).unwrap();
    let quiet = poll(Duration::from_secs(20), || {
        let before = rig.switches();
        std::thread::sleep(Duration::from_secs(1));
        (rig.switches() == before).then_some(())
    });
    assert!(quiet.is_some(), "threads are woken all the time");
    drop(peer);
}
