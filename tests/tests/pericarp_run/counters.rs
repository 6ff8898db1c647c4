//! `pericarp metrics` and `pericarp top`: what a machine does with its disk and its volume is counted,
//! to the byte, and one sidecar that stands still hides nothing of the others.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use super::rig::*;
use super::volumes::VOLUMES;

/// What the machine writes: to its disk, and into a file of its volume.
const TO_DISK: u64 = 256 << 10;
const TO_FILE: u64 = 300_000;

/// The value of the line with this name and all of these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let named = |line: &&str| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with('{'))
    };
    let mut lines = text.lines().filter(named);
    let line = lines.find(|line| labels.iter().all(|label| line.contains(label)))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[test]
fn what_a_machine_does_is_counted() {
    let Some(rig) = Rig::new("what_a_machine_does_is_counted", &VOLUMES) else {
        return;
    };
    let disk = rig.scratch.sparse("disk.img", 8 * MIB);
    let data = rig.scratch.path("data");
    fs::create_dir(&data).unwrap();
    // Buffered, and written once each; then it reads the disk, whose cache goes with its last user,
    // until it is ended.
    let script = format!(
        "dd if=/dev/zero of=/dev/pericarp/disk1 bs=4096 count={} conv=fsync 2>/dev/null
         head -c {TO_FILE} /dev/zero > /data/out
         echo ready
         while [ ! -e /data/end ]; do
             dd if=/dev/pericarp/disk1 of=/dev/null bs=65536 2>/dev/null
         done",
        TO_DISK / 4096
    );
    let volume = format!("{}:/data", data.display());
    let running = rig.start_ready(&[
        "--name",
        "counted",
        "--memory",
        "64M",
        "--disk",
        disk.to_str().unwrap(),
        "--volume",
        &volume,
        "--rootfs-image",
        &rig.image(),
        "--",
        "sh",
        "-c",
        &script,
    ]);
    let metrics = || {
        let asked = rig.call("metrics", &[]);
        assert_eq!((asked.code, asked.stderr.as_str()), (0, ""));
        asked.text()
    };
    let text = metrics();
    let of = |name: &str, labels: &[&str]| {
        let found = value(&text, name, labels);
        found.unwrap_or_else(|| panic!("{name} {labels:?} is not in\n{text}"))
    };
    let run = "pod=\"counted\"";
    assert_eq!(of("pericarp_pods", &["by=\"run\""]), 1.0);
    assert_eq!(of("pericarp_pod_info", &[run, "hypervisor=\""]), 1.0);
    let bytes = "pericarp_volume_bytes_total";
    let on_disk = [
        run,
        "device=\"disk1\"",
        "volume=\"/dev/pericarp/disk1\"",
        "class=\"write\"",
    ];
    assert_eq!(of(bytes, &on_disk), TO_DISK as f64);
    let on_share = [run, "kind=\"share\"", "volume=\"/data\"", "class=\"write\""];
    assert_eq!(of(bytes, &on_share), TO_FILE as f64);
    let requests = "pericarp_volume_requests_total";
    let all: f64 = ["read", "write", "flush", "discard", "write_zeroes", "other"]
        .iter()
        .filter_map(|class| {
            let class = format!("class=\"{class}\"");
            value(&text, requests, &[run, "device=\"disk1\"", &class])
        })
        .sum();
    // Each that has ended is in the histogram of each part.
    for part in ["total", "queue", "backend", "disk"] {
        let part = format!("part=\"{part}\"");
        let counted = of(
            "pericarp_volume_latency_seconds_count",
            &[run, "device=\"disk1\"", &part],
        );
        assert!(
            counted > 0.0 && (counted - all).abs() <= 64.0,
            "{counted} of {all}"
        );
    }
    assert!(
        of("pericarp_guest_cpu_seconds_total", &[run]) > 0.0,
        "{text}"
    );
    assert!(of("pericarp_guest_memory_resident_bytes", &[run]) > 16e6);
    for process in [
        "run",
        "machine",
        "pericarp-block",
        "pericarp-fs",
        "pericarp-vsock",
    ] {
        let process = format!("process=\"{process}\"");
        assert!(of("pericarp_process_resident_bytes", &[run, &process]) > 0.0);
        let share = of("pericarp_process_proportional_bytes", &[run, &process]);
        // Whatever the guest has, it is no process's own.
        assert!(share > 0.0 && share < 512e6, "{process} {share}");
    }
    assert_eq!(of("pericarp_pod_overhead_exceeded", &[run]), 0.0);
    for control in ["block", "fs"] {
        let control = format!("control=\"{control}.control\"");
        assert_eq!(of("pericarp_sidecar_up", &[run, &control]), 1.0);
    }

    // What it does at the moment.
    let top = rig.call("top", &["--once", "--json", "--interval", "1"]);
    assert_eq!((top.code, top.stderr.as_str()), (0, ""));
    let seen: Value = serde_json::from_str(top.text().trim()).unwrap();
    let pod = &seen["pods"][0];
    assert_eq!(pod["pod"], "counted", "{seen}");
    let volumes = pod["volumes"].as_array().unwrap();
    let of_disk = volumes.iter().find(|one| one["device"] == "disk1").unwrap();
    assert!(of_disk["iops"].as_f64().unwrap() > 0.0, "{seen}");
    let p99 = of_disk["latency_us"]["total"]["p99"].as_f64().unwrap();
    assert!(
        p99 >= of_disk["latency_us"]["disk"]["p50"].as_f64().unwrap(),
        "{seen}"
    );
    assert!(of_disk["total"]["bytes"].as_u64().unwrap() >= TO_DISK);
    let table = rig.call("top", &["--once", "--interval", "0.2"]).text();
    assert!(table.contains("disk1 /dev/pericarp/disk1"), "{table}");
    assert!(!table.contains('\x1b'), "{table}");

    served_over_http(&rig);
    one_that_stands_still(&rig, &metrics);

    fs::write(data.join("end"), "").unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(
        value(&metrics(), "pericarp_pods", &["by=\"run\""]),
        Some(0.0)
    );
    rig.assert_clean();
}

/// The same over HTTP, at a port of this machine's that is free.
fn served_over_http(rig: &Rig) {
    let mut command = rig.pericarp("metrics");
    command.args(["--listen", "0"]);
    let server = Running::start(command);
    let said = poll(Duration::from_secs(30), || {
        let said = server.stderr.lock().unwrap().clone();
        said.ends_with(b"\n").then_some(said)
    });
    let said = String::from_utf8(said.unwrap()).unwrap();
    let address = said
        .trim()
        .strip_prefix("pericarp metrics: listens at http://");
    let address = address
        .and_then(|rest| rest.strip_suffix("/metrics"))
        .unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{said}");
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(value(&answer, "pericarp_pods", &["by=\"run\""]), Some(1.0));
    // It is ended as it is dropped.
}

/// A sidecar that answers nothing is said to be silent, and the rest is there.
fn one_that_stands_still(rig: &Rig, metrics: &dyn Fn() -> String) {
    let server = rig.processes("pericarp-fs")[0];
    kill_process(server, Signal::STOP).unwrap();
    let text = metrics();
    let table = rig.call("top", &["--once", "--interval", "0.2"]).text();
    kill_process(server, Signal::CONT).unwrap();
    let up = |control: &str| value(&text, "pericarp_sidecar_up", &[control]);
    assert_eq!(up("fs.control"), Some(0.0), "{text}");
    assert_eq!(up("block.control"), Some(1.0));
    let written = ["device=\"disk1\"", "class=\"write\""];
    let bytes = value(&text, "pericarp_volume_bytes_total", &written);
    assert_eq!(bytes, Some(TO_DISK as f64));
    assert!(table.contains("fs.control: does not answer"), "{table}");
    let back = poll(Duration::from_secs(30), || {
        thread::sleep(Duration::from_millis(50));
        let text = metrics();
        (value(&text, "pericarp_sidecar_up", &["fs.control"]) == Some(1.0)).then_some(())
    });
    assert!(back.is_some(), "it answers again");
}
