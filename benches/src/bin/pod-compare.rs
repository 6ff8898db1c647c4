//! `pod-compare`: how long it takes from the start of everything that a pod needs to the first
//! line of the program in its container, where KVM is backed by hardware: `pericarp run` in
//! a machine, runc from the same program and the same directory, and QEMU's microvm
//! with virtiofsd and that directory, in turns.
//!
//! ```text
//! cargo xtask lab -- target/release/pod-compare --rounds 10
//! ```
//!
//! What stands for microvm is the least that a sandbox of that kind could take
//! (`pericarp_benches::microvm`), and more is asked of ours.
//!
//! The raw numbers are the last line that it prints, since there is no place for a file
//! in the laboratory.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::laboratory::{millis, print_raw, race, range};
use pericarp_benches::microvm::{Microvm, first_line};
use pericarp_benches::table::median;
use pericarp_tests::guest::Assets;
use pericarp_tests::parts::beside_us;
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

/// What the program says.
const LINE: &str = "the-container-is-there";
/// The longest that one start may take.
const LIMIT: Duration = Duration::from_secs(120);
const RUNC: &str = "runc";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Machine,
    Microvm,
    Runc,
}

const TARGETS: [(Target, &str); 3] = [
    (Target::Machine, "pericarp run"),
    (Target::Microvm, "qemu-microvm, virtiofsd"),
    (Target::Runc, "runc"),
];

/// One start.
struct Start {
    target: &'static str,
    round: usize,
    /// To the first line.
    total: Duration,
    /// From there until all of it has ended, where that is its own doing.
    end: Option<Duration>,
    /// What ours says of its phases, in ms.
    phases: BTreeMap<String, f64>,
}

fn main() -> ExitCode {
    race("pod-compare", 10, compare)
}

fn compare(rounds: usize) -> Outcome<()> {
    let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
    let scratch = Scratch::new();
    let microvm = Microvm::new(&scratch, &assets, LINE)?;
    let root = microvm.root();
    let bundle = bundle(&scratch, root)?;
    let mut starts = Vec::new();
    // The first starts of each are for the caches.
    for round in 0..=rounds {
        for (target, name) in TARGETS {
            let start = match target {
                Target::Machine => ours(name, round, &scratch, &assets, root)?,
                Target::Microvm => Start {
                    target: name,
                    round,
                    total: microvm.start()?,
                    end: None,
                    phases: BTreeMap::new(),
                },
                Target::Runc => runc(name, round, &bundle)?,
            };
            println!("round {round}: {name}: {:.0} ms", millis(start.total));
            if round > 0 {
                starts.push(start);
            }
        }
    }
    report(&starts);
    Ok(())
}

/// What runc starts: as its own example, with our program and directory.
fn bundle(scratch: &Scratch, root: &Path) -> Outcome<PathBuf> {
    let bundle = scratch.path("bundle");
    fs::create_dir_all(&bundle)?;
    let made = Command::new(RUNC)
        .arg("spec")
        .current_dir(&bundle)
        .status()?;
    made.success()
        .then_some(())
        .ok_or("runc makes no example")?;
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(["/bin/busybox", "echo", LINE]);
    config["root"]["path"] = root.to_string_lossy().into();
    fs::write(file, config.to_string())?;
    Ok(bundle)
}

fn runc(name: &'static str, round: usize, bundle: &Path) -> Outcome<Start> {
    let mut command = Command::new(RUNC);
    command.arg("--root").arg(bundle.join("state"));
    command.args(["run", "container"]);
    command.current_dir(bundle);
    let begun = Instant::now();
    let (mut child, total) = first_line(name, LINE, &mut command, begun)?;
    wait(name, &mut child)?;
    Ok(Start {
        target: name,
        round,
        total,
        end: Some(begun.elapsed() - total),
        phases: BTreeMap::new(),
    })
}

fn ours(
    name: &'static str,
    round: usize,
    scratch: &Scratch,
    assets: &Assets,
    root: &Path,
) -> Outcome<Start> {
    let mut command = Command::new(beside_us().join("pericarp"));
    command
        .args(["run", "--json", "--rootfs"])
        .arg(root)
        .args(["--", "/bin/busybox", "echo", LINE])
        .env("PERICARP_ASSETS", assets.dir())
        .env("HOME", scratch.dir())
        .stderr(Stdio::piped());
    let begun = Instant::now();
    let (mut child, total) = first_line(name, LINE, &mut command, begun)?;
    let mut said = String::new();
    if let Some(mut words) = child.stderr.take() {
        words.read_to_string(&mut said)?;
    }
    wait(name, &mut child)?;
    let end = said.lines().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line["event"] == "end").then_some(line)
    });
    let phases = end.as_ref().and_then(|end| end["phases_ms"].as_object());
    let phases = phases
        .into_iter()
        .flatten()
        .map(|(name, ms)| (name.clone(), ms.as_f64().unwrap_or(f64::NAN)))
        .collect();
    Ok(Start {
        target: name,
        round,
        total,
        end: Some(begun.elapsed() - total),
        phases,
    })
}

fn wait(name: &str, child: &mut Child) -> Outcome<()> {
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("{name} did not end").into())
}

fn report(starts: &[Start]) {
    let of = |name: &str, value: &dyn Fn(&Start) -> f64| -> Vec<f64> {
        let mine = starts.iter().filter(|start| start.target == name);
        mine.map(value).collect()
    };
    let total = |name: &str| of(name, &|start| millis(start.total));
    let base = median(total(TARGETS[1].1));
    println!(
        "\n{:<26}{:>8}  {:>16}{:>12}{:>10}",
        "", "ms", "min .. max", "of microvm", "end ms"
    );
    for (_, name) in TARGETS {
        let totals = total(name);
        let end = median(of(name, &|start| start.end.map_or(f64::NAN, millis)));
        println!(
            "{name:<26}{:>8.0}  {:>16}{:>12.2}{:>10}",
            median(totals.clone()),
            range(&totals),
            median(totals) / base,
            if end.is_nan() {
                "-".into()
            } else {
                format!("{end:.0}")
            },
        );
    }
    let mine = starts.iter().filter(|start| start.target == TARGETS[0].1);
    let mut phases: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (phase, ms) in mine.flat_map(|start| &start.phases) {
        phases.entry(phase).or_default().push(*ms);
    }
    println!("\nphases of ours, ms");
    for (phase, times) in phases {
        println!("  {phase:<12}{:>8.0}", median(times));
    }
    let raw = |start: &Start| {
        json!({
            "target": start.target,
            "round": start.round,
            "total_ms": millis(start.total),
            "end_ms": start.end.map(millis),
            "phases_ms": start.phases,
        })
    };
    let results: Vec<Value> = starts.iter().map(raw).collect();
    print_raw(&results);
}
