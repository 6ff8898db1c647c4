//! `net-compare`: `pericarp-net` beside a card written plainly on the crates of rust-vmm
//! (`pericarp-reference-net`) and Cloud Hypervisor's `vhost_user_net`, where it is in the
//! search path, in turns, each on a tap in a network of its own. As root:
//!
//! ```text
//! target/release/net-compare --rounds 5
//! ```
//!
//! One thread plays the guest's driver and the host's other end, so that a busy
//! backend has a CPU for itself on a machine with two. What the guest sends goes to an
//! address that the host has not, so that it ends where the tap hands it over; what it
//! gets comes from a packet socket. Driver and sender look instead of being called,
//! as a guest under load does; the backend is kicked where it asks for it.
//!
//! `in-chains-64k` is `in-64k` for a driver that does not spread packets over buffers.
//!
//! CPU is that of the backend's threads, which includes the host's network stack as
//! far as the kernel runs it in a write to the tap. The raw numbers go to `--json`.
//!
//! `--limits` measures `pericarp-net` alone, against the rates that it is told to keep,
//! and fails where one is missed by more than 5 % either way, or is none because the
//! machine hardly gets more through without a limit.

mod card;
mod host;
mod limits;
mod turn;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use pericarp_benches::table::median;
use pericarp_benches::{Outcome, turns};
use pericarp_tests::parts::{beside_us, search_path};
use serde_json::{Value, json};

use turn::{Turn, turn_apart};

const HELP: &str = "\
net-compare: pericarp-net beside a plain backend and Cloud Hypervisor's, as root

  --rounds N     how often each target has its turn (default 5)
  --seconds N    length of one turn (default 2)
  --case C       only this case; may be repeated
  --limits       instead, whether pericarp-net keeps limits: 1 if one is off by over 5 %
  --json PATH    where the raw numbers go
";

/// Cases, and what their rate counts.
const CASES: [(&str, &str); 7] = [
    ("out-64", "packets/s"),
    ("in-64", "packets/s"),
    ("out-64k", "MiB/s"),
    ("in-64k", "MiB/s"),
    ("in-chains-64k", "MiB/s"),
    ("both-64k", "MiB/s"),
    ("echo-64", "echoes/s"),
];
const TARGETS: [&str; 3] = ["pericarp-net", "pericarp-reference-net", "vhost_user_net"];

struct Wanted {
    rounds: usize,
    seconds: u64,
    cases: Vec<String>,
    limits: bool,
    json: Option<PathBuf>,
}

impl Wanted {
    fn has(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|name| name == case)
    }
}

fn main() -> ExitCode {
    let measure = |wanted: &Wanted| match wanted.limits {
        true => limits::keep(wanted),
        false => compare(wanted),
    };
    match wanted() {
        Ok(Some(wanted)) => match measure(&wanted) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("net-compare: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(None) => {
            let names: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
            println!("{HELP}\nCases: {}", names.join(", "));
            ExitCode::SUCCESS
        }
        Err(mistake) => {
            eprintln!("net-compare: {mistake}");
            ExitCode::from(2)
        }
    }
}

fn wanted() -> Result<Option<Wanted>, String> {
    use lexopt::prelude::*;
    let mut wanted = Wanted {
        rounds: 5,
        seconds: 2,
        cases: Vec::new(),
        limits: false,
        json: None,
    };
    let mut parser = lexopt::Parser::from_env();
    let text = |e: lexopt::Error| format!("{e}; see --help");
    while let Some(argument) = parser.next().map_err(text)? {
        let name = match argument {
            Long(name) => name.to_owned(),
            Short('h') => return Ok(None),
            other => return Err(text(other.unexpected())),
        };
        match name.as_str() {
            "help" => return Ok(None),
            "limits" => {
                wanted.limits = true;
                continue;
            }
            _ => {}
        }
        let value = parser.value().and_then(|v| v.string()).map_err(text)?;
        let number = || {
            let number = value.parse().ok().filter(|n| (1..=100).contains(n));
            number.ok_or_else(|| format!("--{name} {value:?}: not a number from 1 to 100"))
        };
        match name.as_str() {
            "rounds" => wanted.rounds = number()?,
            "seconds" => wanted.seconds = number()? as u64,
            "json" => wanted.json = Some(value.into()),
            "case" if CASES.iter().any(|(case, _)| *case == value) => wanted.cases.push(value),
            "case" => return Err(format!("--case {value:?}: unknown; see --help")),
            _ => return Err(format!("--{name}: unknown option; see --help")),
        }
    }
    Ok(Some(wanted))
}

fn compare(wanted: &Wanted) -> Outcome<()> {
    let mut raw = Vec::new();
    for (case, unit) in CASES {
        if !wanted.has(case) {
            continue;
        }
        let mut results: Vec<Vec<Turn>> = vec![Vec::new(); TARGETS.len()];
        for _ in 0..wanted.rounds {
            for (target, turns) in TARGETS.iter().zip(&mut results) {
                let Some(program) = find(target) else {
                    continue;
                };
                let length = Duration::from_secs(wanted.seconds);
                turns.push(turn_apart(&program, case, length, &[])?);
            }
        }
        raw.push(table(case, unit, &results));
    }
    if let Some(path) = &wanted.json {
        let text = json!({"bench": "net-compare", "rounds": wanted.rounds,
            "seconds": wanted.seconds, "cases": raw});
        turns::write(path, &format!("{text:#}\n"))?;
    }
    Ok(())
}

fn find(target: &str) -> Option<PathBuf> {
    match target {
        "vhost_user_net" => search_path(target),
        ours => Some(beside_us().join(ours)).filter(|path| path.is_file()),
    }
}

/// Prints what all targets did in a case; the same as raw numbers.
fn table(case: &str, unit: &str, results: &[Vec<Turn>]) -> Value {
    let large = unit == "MiB/s";
    let cost = if large { "ms/GiB" } else { "us/packet" };
    println!(
        "\n{case:<22} {unit:>12} {:>23} {cost:>12} {:>9} {:>9}",
        "min .. max", "p50 us", "p99 us"
    );
    let mut raw = serde_json::Map::new();
    let mut medians = Vec::new();
    for (target, turns) in TARGETS
        .iter()
        .zip(results)
        .filter(|(_, turns)| !turns.is_empty())
    {
        let of = |what: fn(&Turn) -> f64| median(turns.iter().map(what).collect());
        let (rate, cpu) = (of(|t| t.rate), of(|t| t.cpu));
        let rates = turns.iter().map(|t| t.rate);
        let (least, most) = rates.fold((f64::MAX, 0.0f64), |(low, high), rate| {
            (low.min(rate), high.max(rate))
        });
        println!(
            "{target:<22} {rate:>12.0} {least:>10.0} .. {most:>9.0} {cpu:>12.2} {:>9.1} {:>9.1}",
            of(|t| t.p50_us),
            of(|t| t.p99_us)
        );
        medians.push((*target, rate, cpu));
        let turns = turns
            .iter()
            .map(|t| json!({"rate": t.rate, "cpu": t.cpu, "p50_us": t.p50_us, "p99_us": t.p99_us}));
        raw.insert((*target).to_owned(), turns.collect());
    }
    if let [(_, rate, cpu), others @ ..] = medians.as_slice() {
        for (peer, other, others) in others {
            let peer = format!("to {peer}");
            println!("{peer:<22} {:>12.2} {:>36.2}", rate / other, cpu / others);
        }
    }
    json!({"case": case, "unit": unit, "cpu": cost, "targets": raw})
}
