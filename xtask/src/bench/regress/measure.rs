//! Runs both builds in turns and collects their numbers.
//!
//! The base goes first: what it cannot do here (tracing may be forbidden, an
//! option may be too new) is not compared, and said. What only this tree cannot
//! do is a failure.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::side::Side;
use super::verdict::Samples;
use crate::command::{self, Failure, capture, cargo};
use crate::project::Project;

/// Turns of a piece under callgrind.
const TURNS: u64 = 200;
/// Milliseconds of a piece's time in one round.
const MILLISECONDS: u64 = 100;
/// The loads of `block-calls`, which knows what they are.
const LOADS: [&str; 4] = ["cached-1", "cached-32", "direct-1", "direct-32"];

/// The base, then this tree.
type Pair<T> = [T; 2];

/// All that is to be measured.
pub(super) struct Bench {
    sides: Pair<Side>,
    /// What both sides have, and the requests of one turn.
    pieces: Vec<(String, f64)>,
    /// The program that drives `pericarp-block`, of this tree.
    driver: PathBuf,
    dir: PathBuf,
    /// What the base could not do.
    given_up: RefCell<BTreeSet<String>>,
}

impl Bench {
    /// Builds the driver, as `cargo xtask test` does, which leaves it behind.
    pub(super) fn new(
        project: &Project,
        dir: &Path,
        base: Side,
        this: Side,
    ) -> Result<Self, Failure> {
        println!("regress: builds the driver");
        let mut command = cargo();
        command.current_dir(&project.root).args([
            "build",
            "--quiet",
            "--workspace",
            "--bin",
            "block-calls",
        ]);
        command::run(&mut command)?;
        let sides = [base, this];
        let mut lists = Vec::new();
        for gate in sides.iter().filter_map(|side| side.gate.as_deref()) {
            lists.push(list(gate)?);
        }
        let pieces = match <[_; 2]>::try_from(lists) {
            Ok([base, this]) => this.into_iter().filter(|p| base.contains(p)).collect(),
            Err(_) => Vec::new(),
        };
        Ok(Self {
            sides,
            pieces,
            driver: project.target.join("debug/block-calls"),
            dir: dir.to_owned(),
            given_up: RefCell::default(),
        })
    }

    /// Instructions of the pieces: the same every time.
    pub(super) fn exact(&self, samples: &mut Samples) -> Result<(), Failure> {
        println!("regress: counts instructions");
        for (name, count) in &self.pieces {
            self.both(&format!("instructions/{name}"), samples, |side| {
                let metric = format!("instructions/{name}");
                let per_request = instructions(side, name, &self.dir)? / (*count * TURNS as f64);
                Ok(vec![(metric, per_request)])
            })?;
        }
        Ok(())
    }

    /// One round of all that has a spread.
    pub(super) fn round(&self, samples: &mut Samples) -> Result<(), Failure> {
        println!("regress: a round of system calls and times");
        for (name, _) in &self.pieces {
            self.both(&format!("time/{name}"), samples, |side| {
                let mut command = gate(side)?;
                command.args(["time", name, &MILLISECONDS.to_string()]);
                let text = capture(&mut command)?;
                let nanoseconds = text.trim().parse().map_err(|_| strange(&text))?;
                Ok(vec![(format!("time/{name}"), nanoseconds)])
            })?;
        }
        for load in LOADS {
            self.both(load, samples, |side| self.calls(side, load))?;
        }
        Ok(())
    }

    fn calls(&self, side: &Side, load: &str) -> Result<Vec<(String, f64)>, Failure> {
        let mut command = Command::new(&self.driver);
        command
            .arg("--program")
            .arg(&side.block)
            .arg("--file")
            .arg(self.dir.join("disk.img"))
            .args(["--case", load]);
        let text = capture(&mut command)?;
        let line: Value = serde_json::from_str(text.trim()).map_err(|_| strange(&text))?;
        let number = |key: &str| line[key].as_f64();
        let mut numbers = Vec::new();
        for (kind, value) in [
            ("syscalls", number("syscalls")),
            ("kicks", number("kicks")),
            ("calls", number("calls")),
            ("time", number("us").map(|us| us * 1000.0)),
        ] {
            let value = value.ok_or_else(|| strange(&text))?;
            numbers.push((format!("{kind}/{load}"), value));
        }
        if let Some(value) = number("instructions") {
            numbers.push((format!("instructions/{load}"), value));
        }
        Ok(numbers)
    }

    /// Measures something on both sides, or on neither.
    fn both(
        &self,
        what: &str,
        samples: &mut Samples,
        measure: impl Fn(&Side) -> Result<Vec<(String, f64)>, Failure>,
    ) -> Result<(), Failure> {
        if self.given_up.borrow().contains(what) {
            return Ok(());
        }
        let [base, this] = &self.sides;
        let base = match measure(base) {
            Ok(numbers) => numbers,
            Err(failure) => {
                println!("regress: NOT COMPARED: {what}: {}: {failure}", base.name);
                self.given_up.borrow_mut().insert(what.to_owned());
                return Ok(());
            }
        };
        let this = measure(this).map_err(|e| format!("{what}: {}: {e}", this.name))?;
        for (metric, value) in base {
            samples.add_base(metric, value);
        }
        for (metric, value) in this {
            samples.add_this(metric, value);
        }
        Ok(())
    }
}

fn gate(side: &Side) -> Result<Command, Failure> {
    let gate = side.gate.as_ref().ok_or("no gate program")?;
    Ok(Command::new(gate))
}

/// The pieces of a gate program and the requests of one turn.
fn list(gate: &Path) -> Result<Vec<(String, f64)>, Failure> {
    let text = capture(Command::new(gate).arg("list"))?;
    let parse = |line: &str| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    let pieces: Option<Vec<_>> = text.lines().map(parse).collect();
    pieces.ok_or_else(|| strange(&text))
}

/// Instructions of all turns of a piece.
fn instructions(side: &Side, piece: &str, dir: &Path) -> Result<f64, Failure> {
    let report = dir.join("callgrind.out");
    let mut command = Command::new("valgrind");
    command
        .args(["--quiet", "--tool=callgrind", "--toggle-collect=*measured*"])
        .arg(format!("--callgrind-out-file={}", report.display()))
        .arg(side.gate.as_deref().ok_or("no gate program")?)
        .args(["run", piece, &TURNS.to_string()]);
    capture(&mut command)?;
    let text = std::fs::read_to_string(&report)
        .map_err(|e| format!("cannot read {}: {e}", report.display()))?;
    let total = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("totals: "));
    let total = total.and_then(|total| total.trim().parse().ok());
    // None at all: the function to count in was not found.
    total
        .filter(|&count: &f64| count > 0.0)
        .ok_or_else(|| "callgrind counted nothing".into())
}

fn strange(text: &str) -> Failure {
    let line = text.lines().next().unwrap_or_default();
    format!("a measuring program printed '{line}'").into()
}
