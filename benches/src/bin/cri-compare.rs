//! `cri-compare`: how long a kubelet waits, from RunPodSandbox to the first line in the container's
//! log, call by call: containerd with runc, containerd with our shim, and QEMU's microvm with
//! virtiofsd, in turns. And how long StopPodSandbox and RemovePodSandbox take.
//!
//! ```text
//! cargo xtask lab -- target/release/cri-compare --rounds 10
//! target/release/cri-compare --rounds 5
//! ```
//!
//! The second is what a host without KVM has: machines of QEMU's, a q35 with an emulated CPU. What stands for
//! microvm is a bare machine without containerd, network and container in its way
//! (`pericarp_benches::microvm`): a pod on it would take longer, so more is asked of ours.
//!
//! Ours says itself how long each part of its start took (`pericarp_pod::starts`). The raw numbers are
//! the last line that it prints, since there is no place for a file in the laboratory.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::laboratory::{millis, print_raw, race_anywhere, range};
use pericarp_benches::microvm::{self, MEMORY, Microvm};
use pericarp_benches::table::median;
use pericarp_tests::bounded::poll;
use pericarp_tests::cri::{Handler, Node, SMALL, container, pod};
use pericarp_tests::guest::Assets;
use pericarp_tests::parts::beside_us;
use pericarp_tests::scratch::Scratch;
use rustix::event::{PollFd, PollFlags, Timespec, poll as poll_descriptors};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::{Value, json};

/// What the container says.
const LINE: &str = "the-container-is-there";
/// The longest that a line may take.
const LIMIT: Duration = Duration::from_secs(240);
/// What all of a round may take.
const ROUND: Duration = Duration::from_secs(300);
/// Our shim's parts are written a moment after the line.
const PARTS: Duration = Duration::from_secs(10);
/// Between two questions whether the container has ended.
const PAUSE: Duration = Duration::from_millis(250);
/// The handlers; ours is the second.
const HANDLERS: [&str; 2] = ["runc", "pericarp"];
const CALLS: [&str; 6] = [
    "RunPodSandbox",
    "Create",
    "Start",
    "first line",
    "Stop",
    "Remove",
];

/// One start.
struct Start {
    target: &'static str,
    round: usize,
    /// To the first line, ms.
    total: f64,
    /// How long each of `CALLS` took, ms; the first line counts from where Start was called. Empty for
    /// what is no pod.
    calls: Vec<f64>,
    /// Parts of our shim's: whose, which, ms.
    parts: Vec<(&'static str, String, f64)>,
}

fn main() -> ExitCode {
    race_anywhere("cri-compare", 5, compare)
}

fn compare(rounds: usize) -> Outcome<()> {
    let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
    let scratch = Scratch::new();
    let microvm = Microvm::new(&scratch, &assets, LINE)?;
    let handlers = [Handler::runc(HANDLERS[0]), ours()];
    let life = ROUND * u32::try_from(rounds + 1)?;
    let node = Node::start_for("cri-compare", &handlers, life);
    let node = node.ok_or("a part of the node is missing")?;
    println!("containerd is up");
    let mut starts = Vec::new();
    let mut driver = None;
    // The first starts of each are for the caches.
    for round in 0..=rounds {
        for handler in HANDLERS {
            let (start, by) = of_pod(&node, handler, round)?;
            println!("round {round}: {handler}: {:.0} ms", start.total);
            driver = by.or(driver);
            starts.push(start);
        }
        let total = millis(microvm.start()?);
        println!("round {round}: {}: {total:.0} ms", microvm::name());
        starts.push(Start {
            target: microvm::name(),
            round,
            total,
            calls: Vec::new(),
            parts: Vec::new(),
        });
    }
    starts.retain(|start| start.round > 0);
    report(&starts, driver.as_deref().unwrap_or("an unknown driver"));
    Ok(())
}

fn ours() -> Handler {
    Handler {
        name: HANDLERS[1].into(),
        runtime_type: "io.containerd.pericarp.v2".into(),
        programs: Some(beside_us()),
        pod_annotations: Vec::new(),
        // On an emulated CPU.
        config: Some("[profiles.pericarp]\nannotations = [\"memory\"]\nboot-timeout = 200\n"),
    }
}

/// A pod with one container, from the first call to the last; and what ran it, if that is a machine.
fn of_pod(node: &Node, handler: &'static str, round: usize) -> Outcome<(Start, Option<String>)> {
    let name = format!("{handler}-{round}");
    let mut config = pod(&name);
    config.annotations.insert(SMALL.0.into(), MEMORY.into());
    let logs = node.scratch().path("logs").join(&name);
    fs::create_dir_all(&logs)?;
    let command = container("echo", &["/bin/echo", LINE]);
    let (tell, seen) = channel();
    let log = logs.join(&command.log_path);
    let watch = Watch::of(log)?;
    thread::spawn(move || tell.send(watch.wait().map_err(|error| error.to_string())));

    let mut calls = Vec::new();
    let begun = Instant::now();
    let mut last = begun;
    let mut over = |begun: &mut Instant| {
        let now = Instant::now();
        calls.push(millis(now - *begun));
        *begun = now;
    };
    let pod = node.run_pod(config, handler)?;
    over(&mut last);
    let echo = pod.create(&command)?;
    over(&mut last);
    let start = last;
    echo.start()?;
    over(&mut last);
    let line = seen.recv_timeout(LIMIT)??;
    calls.push(millis(line - start));
    let directory = node.root().join("run/pericarp/k8s.io").join(&pod.id);
    let parts = match handler == HANDLERS[1] {
        true => parts(&directory, &pod.id)?,
        false => Vec::new(),
    };
    let driver = fs::read(directory.join("pod.json")).ok();
    let driver = driver.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    let driver = driver.and_then(|record| Some(record["hypervisor"].as_str()?.to_owned()));
    // So that Stop finds an empty pod. Asked now and then: who asks takes the CPU from who is asked.
    let end = Instant::now() + LIMIT;
    while echo.status()?.finished_at == 0 {
        if Instant::now() > end {
            return Err(format!("{handler}: the container does not end").into());
        }
        thread::sleep(PAUSE);
    }

    let client = node.client();
    let before = Instant::now();
    client.stop_pod(&pod.id)?;
    let stopped = Instant::now();
    client.remove_pod(&pod.id)?;
    calls.extend([millis(stopped - before), millis(stopped.elapsed())]);
    let start = Start {
        target: handler,
        round,
        total: millis(line - begun),
        calls,
        parts,
    };
    Ok((start, driver))
}

/// What our shim says of a pod's start, once it has said the last of it.
fn parts(directory: &std::path::Path, pod: &str) -> Outcome<Vec<(&'static str, String, f64)>> {
    let file = directory.join("start.jsonl");
    let said = poll(PARTS, || {
        let text = fs::read_to_string(&file).ok()?;
        let lines: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
        let lines = lines.ok()?;
        lines
            .iter()
            .any(|line| line["phase"] == "output")
            .then_some(lines)
    });
    let said = said.ok_or("the shim does not say how long its parts took")?;
    let part = |line: &Value| {
        let whose = if line["id"] == pod {
            "pod"
        } else {
            "container"
        };
        let phase = line["phase"].as_str()?.to_owned();
        Some((whose, phase, line["took_us"].as_f64()? / 1000.0))
    };
    Ok(said.iter().filter_map(part).collect())
}

/// Waits for the line without asking again and again: CPU time is what is measured here.
struct Watch {
    log: PathBuf,
    notices: std::os::fd::OwnedFd,
}

impl Watch {
    fn of(log: PathBuf) -> Outcome<Self> {
        let notices = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let directory = log.parent().ok_or("a log without a directory")?;
        inotify::add_watch(&notices, directory, WatchFlags::CREATE | WatchFlags::MODIFY)?;
        Ok(Self { log, notices })
    }

    fn wait(&self) -> Outcome<Instant> {
        let end = Instant::now() + LIMIT;
        let pause = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        while Instant::now() < end {
            let mut fds = [PollFd::new(&self.notices, PollFlags::IN)];
            poll_descriptors(&mut fds, Some(&pause))?;
            let now = Instant::now();
            // What they say is of no interest.
            let _ = rustix::io::read(&self.notices, &mut [0; 4096]);
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            if text.contains(LINE) && text.ends_with('\n') {
                return Ok(now);
            }
        }
        Err("the container says nothing".into())
    }
}

fn report(starts: &[Start], driver: &str) {
    let targets = [HANDLERS[1], microvm::name(), HANDLERS[0]];
    let of = |target: &'static str| starts.iter().filter(move |start| start.target == target);
    let totals =
        |target: &'static str| -> Vec<f64> { of(target).map(|start| start.total).collect() };
    let base = median(totals(microvm::name()));
    println!("\npericarp's machines are run by {driver}");
    println!(
        "\nto the first line{:<9}{:>8}  {:>16}{:>12}",
        "", "ms", "min .. max", "of peer"
    );
    for target in targets {
        let totals = totals(target);
        println!(
            "{target:<26}{:>8.0}  {:>16}{:>12.2}",
            median(totals.clone()),
            range(&totals),
            median(totals) / base
        );
    }
    println!(
        "\n{:<26}{:>12}{:>22}",
        "calls, ms", HANDLERS[1], HANDLERS[0]
    );
    for (index, call) in CALLS.iter().enumerate() {
        let row = [HANDLERS[1], HANDLERS[0]].map(|target| {
            let times = of(target).filter_map(|start| start.calls.get(index).copied());
            let times: Vec<f64> = times.collect();
            format!("{:>8.0}  {:>12}", median(times.clone()), range(&times))
        });
        println!("{call:<22}{}{}", row[0], row[1]);
    }
    println!("\nparts of ours, ms");
    let all: Vec<_> = of(HANDLERS[1]).flat_map(|start| &start.parts).collect();
    let mut named: Vec<(&str, &str)> = Vec::new();
    for part in &all {
        let name = (part.0, part.1.as_str());
        if !named.contains(&name) {
            named.push(name);
        }
    }
    for (whose, phase) in named {
        let mine = all
            .iter()
            .filter(|one| (one.0, one.1.as_str()) == (whose, phase));
        let times: Vec<f64> = mine.map(|one| one.2).collect();
        println!(
            "  {whose:<10}{phase:<12}{:>8.0}  {:>14}",
            median(times.clone()),
            range(&times)
        );
    }
    let raw = |start: &Start| {
        let calls: serde_json::Map<String, Value> = CALLS
            .iter()
            .zip(&start.calls)
            .map(|(call, ms)| ((*call).to_owned(), json!(ms)))
            .collect();
        let parts: Vec<Value> = start
            .parts
            .iter()
            .map(|(whose, phase, ms)| json!({"of": whose, "phase": phase, "ms": ms}))
            .collect();
        json!({
            "target": start.target,
            "round": start.round,
            "total_ms": start.total,
            "calls_ms": calls,
            "parts": parts,
        })
    };
    let mut results: Vec<Value> = vec![json!({ "pericarp": driver, "microvm_memory": MEMORY })];
    results.extend(starts.iter().map(raw));
    print_raw(&results);
}
