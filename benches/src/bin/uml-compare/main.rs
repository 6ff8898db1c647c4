//! `uml-compare`: fio in a guest with Linux's own virtio driver, on
//! `pericarp-block` and on `qemu-storage-daemon`, next to the same job on the
//! host, all on one file.
//!
//! The guest is User-mode Linux: a real kernel at native speed, without KVM. A
//! developer starts this; PERF.md has its results.

mod cases;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cases::{CASES, Case, TARGETS, Target};
use pericarp_benches::fio::{self, SLACK};
use pericarp_benches::options::Options;
use pericarp_benches::turns::{Measured, Run};
use pericarp_benches::{Outcome, cpu, disk, table};
use pericarp_tests::parts::{Part, missing};
use pericarp_tests::peer::{self, Backend, Cache, Kind};
use pericarp_tests::process::command;
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;

const ABOUT: &str = "\
uml-compare: fio in User-mode Linux on pericarp-block and qemu-storage-daemon,
and on the host, on one file, in turns";

fn main() -> ExitCode {
    let cases: Vec<_> = CASES.iter().map(|case| case.name).collect();
    let targets: Vec<_> = TARGETS.iter().map(|target| target.name()).collect();
    Options::run(ABOUT, &cases, &targets, compare)
}

fn compare(options: &Options) -> Outcome<()> {
    if let Some(what) = TARGETS
        .iter()
        .filter(|target| options.wants_target(target.name()))
        .find_map(|target| missing(target.parts()))
    {
        return Err(what.into());
    }
    disk::prepare(&options.file)?;
    let scratch = Scratch::new();
    let mut run = Run::new(options);
    for case in CASES.iter().filter(|case| options.wants_case(case.name)) {
        let targets = TARGETS.iter().map(|target| (*target, target.name()));
        let rows = run.case(case.name, targets, |target, build| match target {
            Target::Host => host(case, options, &scratch),
            Target::Guest(kind) => guest(case, (kind, build), options, &scratch),
        })?;
        let peer = Target::Guest(Kind::QemuStorageDaemon).name();
        let ratios = [("of host", Target::Host.name()), ("of qemu-sd", peer)];
        table::print(case.name, &rows, &ratios);
    }
    run.save()
}

/// The job on the file itself.
fn host(case: &Case, options: &Options, scratch: &Scratch) -> Outcome<Measured> {
    let program = Part::Fio.find().ok_or("no fio")?;
    let mut command = command(&program);
    command
        .env("FIO_FILE", &options.file)
        .env("FIO_SECONDS", options.seconds.to_string())
        .arg(scratch.file("job.fio", case.job.as_bytes()));
    let limit = Duration::from_secs(options.seconds) + SLACK;
    Ok(fio::run(&mut command, scratch, limit)?.measured)
}

/// The job in a guest that has the file as its disk, served by `kind`. Both are
/// new for each turn and end with it, so that no other target's runs meanwhile.
fn guest(
    case: &Case,
    (kind, build): (Kind, Option<&Path>),
    options: &Options,
    scratch: &Scratch,
) -> Outcome<Measured> {
    let turn = Duration::from_secs(options.seconds);
    let limit = turn + SLACK;
    let how = peer::Options {
        cache: Cache::Direct,
        extra: options.extra.clone(),
        build: build.map(Path::to_owned),
        lifetime: limit + Duration::from_secs(10),
        ..peer::Options::default()
    };
    let mut backend = Backend::start(kind, scratch, &options.file, &how)?;
    let mut machine = Machine::new(&[backend.socket()], &script(case, options.seconds));
    machine.limit = limit;
    // Besides the job, which has no ramp, the guest only looks for partitions.
    let before = cpu::time(backend.pid())?;
    let start = Instant::now();
    let report = machine.run()?;
    let took = start.elapsed();
    let used = cpu::time(backend.pid())
        .map_err(|_| format!("the backend ended: it {}", backend.epitaph()))?
        .saturating_sub(before);
    if report.code != 0 {
        return Err(format!(
            "the job ended with {}: {}",
            report.code,
            report.output.trim()
        )
        .into());
    }
    // The guest keeps its own time: it must not have stretched a turn.
    if took < turn {
        return Err(format!("{} s in the guest were {took:?} here", turn.as_secs()).into());
    }
    let mut report = fio::read(&report.output)?;
    report.measured.cpu_us = used.as_secs_f64() * 1e6 / report.requests as f64;
    Ok(report.measured)
}

/// Runs the job and prints nothing but its report.
fn script(case: &Case, seconds: u64) -> String {
    format!(
        "cat >job.fio <<'END'\n{}END\n\
         FIO_FILE=/dev/vda FIO_SECONDS={seconds} \
         fio --output-format=json --output=report job.fio >said 2>&1 || {{ cat said report; exit 1; }}\n\
         cat report\n",
        case.job
    )
}
