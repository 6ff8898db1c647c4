//! `block-compare`: `pericarp-block` next to its peers on one file, in one run.
//!
//! Targets take turns for a number of rounds, so that what the machine does
//! meanwhile hits all of them; the table shows medians with minimum and
//! maximum, the raw numbers go to a JSON file. Backends are driven by the
//! `virtio-driver` crate; `fio` on the host shows what the file itself can do.

mod cases;
mod fio;
mod load;
mod table;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use cases::{CASES, Case, Measured, Target};
use lexopt::prelude::*;
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;
use serde_json::json;

const HELP: &str = "\
block-compare: pericarp-block, its peers and host fio on one file, in turns

  --file PATH      the disk image; made and filled with 1 GiB of data if missing
  --rounds N       how often each target has its turn (default 5)
  --seconds N      length of one turn (default 3)
  --case NAME      only this case; may be repeated
  --target NAME    only this target; may be repeated
  --pericarp-arg A one more argument for pericarp-block; may be repeated
  --json PATH      where the raw numbers go
";

/// Size of the disk that is made.
const DISK_BYTES: u64 = 1 << 30;

struct Options {
    file: PathBuf,
    rounds: usize,
    seconds: u64,
    cases: Vec<String>,
    targets: Vec<String>,
    extra: Vec<String>,
    json: Option<PathBuf>,
}

fn options() -> Result<Option<Options>, String> {
    let mut options = Options {
        file: PathBuf::from("target/bench/disk.img"),
        rounds: 5,
        seconds: 3,
        cases: Vec::new(),
        targets: Vec::new(),
        extra: Vec::new(),
        json: None,
    };
    let mut parser = lexopt::Parser::from_env();
    let text = |e: lexopt::Error| format!("{e}; see --help");
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Long("file") => options.file = parser.value().map_err(text)?.into(),
            Long("json") => options.json = Some(parser.value().map_err(text)?.into()),
            Long("rounds") => {
                options.rounds = parser.value().and_then(|v| v.parse()).map_err(text)?;
            }
            Long("seconds") => {
                options.seconds = parser.value().and_then(|v| v.parse()).map_err(text)?;
            }
            Long("case") => {
                let name = parser.value().and_then(|v| v.string()).map_err(text)?;
                if !CASES.iter().any(|c| c.name == name) {
                    let known: Vec<_> = CASES.iter().map(|c| c.name).collect();
                    return Err(format!(
                        "--case {name:?}: unknown; use one of {}",
                        known.join(", ")
                    ));
                }
                options.cases.push(name);
            }
            Long("target") => {
                options
                    .targets
                    .push(parser.value().and_then(|v| v.string()).map_err(text)?);
            }
            Long("pericarp-arg") => {
                options
                    .extra
                    .push(parser.value().and_then(|v| v.string()).map_err(text)?);
            }
            Long("help") | Short('h') => return Ok(None),
            other => return Err(text(other.unexpected())),
        }
    }
    if options.rounds == 0 || options.seconds == 0 {
        return Err("--rounds and --seconds: at least 1".into());
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(line) => {
            eprintln!("block-compare: {line}");
            return ExitCode::from(2);
        }
    };
    match compare(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("block-compare: {error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn compare(options: &Options) -> Outcome<()> {
    prepare(&options.file)?;
    let scratch = Scratch::new();
    let mut raw = Vec::new();
    for case in CASES
        .iter()
        .filter(|c| options.cases.is_empty() || options.cases.iter().any(|n| n == c.name))
    {
        if case.cache == Cache::Buffered {
            // Into the page cache, all of it.
            std::io::copy(&mut File::open(&options.file)?, &mut std::io::sink())?;
        }
        let mut rows: Vec<(Target, Vec<Measured>)> = case
            .targets
            .iter()
            .filter(|t| options.targets.is_empty() || options.targets.iter().any(|n| n == t.name()))
            .map(|t| (*t, Vec::new()))
            .collect();
        for round in 0..options.rounds {
            for (target, results) in &mut rows {
                eprintln!(
                    "{}: round {} of {}: {}",
                    case.name,
                    round + 1,
                    options.rounds,
                    target.name()
                );
                let measured = case.run(*target, options, &scratch)?;
                raw.push(json!({
                    "case": case.name, "target": target.name(), "round": round,
                    "iops": measured.iops, "p50_us": measured.p50_us, "p99_us": measured.p99_us,
                    "backend_cpu_us_per_io": measured.cpu_us,
                }));
                results.push(measured);
            }
        }
        table::print(case, &rows);
    }
    if let Some(path) = &options.json {
        let machine = json!({
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "cpus": std::thread::available_parallelism()?.get(),
            "seconds": options.seconds, "rounds": options.rounds,
        });
        let text = serde_json::to_string_pretty(&json!({ "machine": machine, "results": raw }))?;
        std::fs::write(path, text + "\n")?;
    }
    Ok(())
}

/// Makes the disk if it is not there. Its blocks are written, so that reads
/// reach the medium and not a hole.
fn prepare(path: &Path) -> Outcome<()> {
    if path.exists() {
        return Ok(());
    }
    eprintln!("filling {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut file = File::create(path)?;
    let mut block = vec![0u8; 1 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..DISK_BYTES / block.len() as u64 {
        for bytes in block.chunks_exact_mut(8) {
            state = load::next_random(state);
            bytes.copy_from_slice(&state.to_ne_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

impl Case {
    fn run(&self, target: Target, options: &Options, scratch: &Scratch) -> Outcome<Measured> {
        let turn = Duration::from_secs(options.seconds);
        match target {
            Target::HostFio => fio::run(self, &options.file, turn),
            Target::Backend(kind) => load::one(self, kind, None, options, scratch),
            Target::QemuUring => {
                let kind = Kind::QemuStorageDaemon;
                load::one(self, kind, Some("io_uring"), options, scratch)
            }
            Target::Disks(count) => load::disks(self, count, options, scratch),
            Target::RoundTrip => load::round_trip(turn),
        }
    }
}
