//! Targets in turns, and the raw numbers of all of them.

use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use serde_json::{Value, json};

use crate::Outcome;
use crate::options::{BASELINE, Options};

/// Whether a baseline is another build of what this target is about.
fn is_built_as(build: &Path, target: &str) -> bool {
    match build.file_name().and_then(|name| name.to_str()) {
        Some("pericarp-fs") => target == "pericarp-fs",
        _ => ["pericarp-block", "pericarp"].contains(&target),
    }
}

/// What one turn gave.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Operations per second.
    pub iops: f64,
    /// Median latency seen by the generator, microseconds.
    pub p50_us: f64,
    /// 99th percentile of the same.
    pub p99_us: f64,
    /// CPU time of the backend process per operation, microseconds. For host
    /// fio, all of fio. With `shares`, that of all processes but the store's.
    pub cpu_us: f64,
    /// Whose CPU time that was, where more than one process was looked at.
    pub shares: Option<Shares>,
    /// The most operations that the store had in flight.
    pub in_flight: Option<usize>,
    /// Operations of the disk that got the fewest, of those of the one that got
    /// the most, where there are several.
    pub fairness: Option<f64>,
    /// Private memory of the backend at the end, KiB.
    pub memory_kib: Option<f64>,
    /// Descriptors that the backend had open at the end.
    pub descriptors: Option<usize>,
    /// What kind of machine the load ran on, where that differs between targets.
    pub rig: &'static str,
}

/// CPU time per operation in microseconds, by process; `None` where there is
/// no such process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shares {
    /// The one that serves the disk.
    pub backend: Option<f64>,
    /// All that the guest is made of on its host.
    pub guest: Option<f64>,
    /// fio by its own reckoning. In a guest this is a part of the guest's.
    pub fio: Option<f64>,
    /// The file system with injected latency that the file is on.
    pub store: Option<f64>,
}

impl Measured {
    /// Its numbers for the raw file, without any that were not looked at.
    fn raw(&self) -> Value {
        let mut raw = json!({
            "iops": self.iops, "p50_us": self.p50_us, "p99_us": self.p99_us,
        });
        for (name, value) in [
            ("fewest_of_most_operations", self.fairness),
            ("backend_private_kib", self.memory_kib),
            (
                "backend_descriptors",
                self.descriptors.map(|count| count as f64),
            ),
        ] {
            if let Some(value) = value {
                raw[name] = json!(value);
            }
        }
        match &self.shares {
            None => raw["backend_cpu_us_per_io"] = json!(self.cpu_us),
            Some(shares) => {
                raw["rig"] = json!(self.rig);
                if let Some(most) = self.in_flight {
                    raw["most_in_flight_on_store"] = json!(most);
                }
                raw["cpu_us_per_io"] = json!({
                    "all": self.cpu_us, "backend": shares.backend, "guest": shares.guest,
                    "fio": shares.fio, "store": shares.store,
                });
            }
        }
        raw
    }
}

/// One target's turns.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub target: String,
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
            let also = baseline.filter(|build| is_built_as(build, target));
            let also = also.map(|build| ((who, Some(build)), BASELINE));
            std::iter::once(((who, None), target)).chain(also)
        };
        let (who, mut rows): (Vec<(T, Option<&Path>)>, Vec<Row>) = targets
            .into_iter()
            .flat_map(with_baseline)
            .filter(|(_, target)| self.options.wants_target(target))
            .map(|(who, target)| {
                let results = Vec::with_capacity(rounds);
                let target = target.to_owned();
                (who, Row { target, results })
            })
            .unzip();
        for round in 0..rounds {
            for ((who, build), row) in who.iter().zip(&mut rows) {
                let target = &row.target;
                eprint!("{case}: round {} of {rounds}: {target}", round + 1);
                let measured =
                    measure(*who, *build).map_err(|e| format!("{case}, {target}: {e}"))?;
                eprintln!(": {:.0} a second", measured.iops);
                let mut raw = measured.raw();
                raw["case"] = json!(case);
                raw["target"] = json!(target);
                raw["round"] = json!(round);
                self.raw.push(raw);
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
        write(path, &(serde_json::to_string_pretty(&raw)? + "\n"))
    }
}

/// Writes a result, in a directory that may have to be made.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, text: &str) -> Outcome<()> {
    let parent = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, text))
        .map_err(|e| format!("cannot write {}: {e}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_takes_turns_with_the_program_it_is_another_build_of() {
        let (block, fs) = (
            Path::new("old/pericarp-block"),
            Path::new("old/pericarp-fs"),
        );
        assert!(is_built_as(block, "pericarp") && is_built_as(block, "pericarp-block"));
        assert!(is_built_as(fs, "pericarp-fs") && !is_built_as(fs, "pericarp"));
        assert!(!is_built_as(block, "pericarp-fs") && !is_built_as(fs, "virtiofsd"));
    }

    #[test]
    fn raw_numbers_say_which_processes_were_looked_at() {
        let mut measured = Measured {
            iops: 10.0,
            cpu_us: 5.0,
            ..Measured::default()
        };
        assert_eq!(measured.raw()["backend_cpu_us_per_io"], 5.0);
        assert!(measured.raw().get("rig").is_none());
        measured.rig = "native";
        measured.shares = Some(Shares {
            fio: Some(5.0),
            ..Shares::default()
        });
        let raw = measured.raw();
        assert_eq!(raw["rig"], "native");
        assert_eq!(raw["cpu_us_per_io"]["all"], 5.0);
        assert_eq!(raw["cpu_us_per_io"]["fio"], 5.0);
        assert!(raw["cpu_us_per_io"]["backend"].is_null());
        assert!(raw.get("backend_cpu_us_per_io").is_none());
    }
}
