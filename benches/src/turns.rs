//! Targets in turns, and the raw numbers of all of them.

use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use serde_json::{Value, json};

use crate::Outcome;
use crate::options::{BASELINE, Options};

/// The target that a baseline is another build of.
const OURS: &str = "pericarp-block";

/// What one turn gave.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Operations per second.
    pub iops: f64,
    /// Median latency seen by the generator, microseconds.
    pub p50_us: f64,
    /// 99th percentile of the same.
    pub p99_us: f64,
    /// CPU time of the backend process per operation, microseconds. For host
    /// fio, all of fio.
    pub cpu_us: f64,
}

/// One target's turns.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub target: &'static str,
    /// One for each round.
    pub results: Vec<Measured>,
}

/// One run of a bench.
#[derive(Debug)]
pub struct Run<'a> {
    options: &'a Options,
    raw: Vec<Value>,
}

impl<'a> Run<'a> {
    /// One with nothing measured yet.
    pub fn new(options: &'a Options) -> Self {
        Run {
            options,
            raw: Vec::new(),
        }
    }

    /// Measures those `targets` of a case that are wanted, one after the other,
    /// for all rounds. `measure` is told of another build of the program, if that
    /// is the one to be measured.
    ///
    /// # Errors
    /// The first one that `measure` has.
    pub fn case<T: Copy>(
        &mut self,
        case: &str,
        targets: impl IntoIterator<Item = (T, &'static str)>,
        mut measure: impl FnMut(T, Option<&Path>) -> Outcome<Measured>,
    ) -> Outcome<Vec<Row>> {
        let rounds = self.options.rounds;
        let baseline = self.options.baseline.as_deref();
        let with_baseline = |(who, target)| {
            let also = baseline.filter(|_| target == OURS);
            let also = also.map(|build| ((who, Some(build)), BASELINE));
            std::iter::once(((who, None), target)).chain(also)
        };
        let (who, mut rows): (Vec<(T, Option<&Path>)>, Vec<Row>) = targets
            .into_iter()
            .flat_map(with_baseline)
            .filter(|(_, target)| self.options.wants_target(target))
            .map(|(who, target)| {
                let results = Vec::with_capacity(rounds);
                (who, Row { target, results })
            })
            .unzip();
        for round in 0..rounds {
            for ((who, build), row) in who.iter().zip(&mut rows) {
                let target = row.target;
                eprintln!("{case}: round {} of {rounds}: {target}", round + 1);
                let measured =
                    measure(*who, *build).map_err(|e| format!("{case}, {target}: {e}"))?;
                self.raw.push(json!({
                    "case": case, "target": target, "round": round,
                    "iops": measured.iops, "p50_us": measured.p50_us, "p99_us": measured.p99_us,
                    "backend_cpu_us_per_io": measured.cpu_us,
                }));
                row.results.push(measured);
            }
        }
        Ok(rows)
    }

    /// Writes the raw numbers where they are wanted.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(self) -> Outcome<()> {
        let Some(path) = &self.options.json else {
            return Ok(());
        };
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let machine = json!({
            "kernel": kernel.trim(),
            "cpus": available_parallelism()?.get(),
            "seconds": self.options.seconds, "rounds": self.options.rounds,
        });
        let raw = json!({ "machine": machine, "results": self.raw });
        fs::write(path, serde_json::to_string_pretty(&raw)? + "\n")?;
        Ok(())
    }
}
