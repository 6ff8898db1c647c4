//! `block-compare`: `pericarp-block` next to its peers on one file, in one run.
//!
//! Backends are driven by the `virtio-driver` crate; `fio` on the host shows
//! what the file itself can do. A developer starts it; PERF.md has its results.

mod cases;
mod fio;
mod load;

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cases::{CASES, Case, Target};
use load::Peer;
use pericarp_benches::options::Options;
use pericarp_benches::turns::{Measured, Run};
use pericarp_benches::{Outcome, disk, table};
use pericarp_tests::peer::{Cache, Kind};
use pericarp_tests::scratch::Scratch;

const ABOUT: &str = "block-compare: pericarp-block, its peers and host fio on one file, in turns";

fn main() -> ExitCode {
    let cases: Vec<_> = CASES.iter().map(|case| case.name).collect();
    let all = CASES.iter().flat_map(|case| case.targets);
    let mut targets: Vec<_> = all.map(|target| target.name()).collect();
    targets.sort_unstable();
    targets.dedup();
    Options::run(ABOUT, &cases, &targets, compare)
}

fn compare(options: &Options) -> Outcome<()> {
    disk::prepare(&options.file)?;
    let scratch = Scratch::new();
    let mut run = Run::new(options);
    for case in CASES.iter().filter(|case| options.wants_case(case.name)) {
        if case.cache == Cache::Buffered {
            // Into the page cache, all of it.
            std::io::copy(&mut File::open(&options.file)?, &mut std::io::sink())?;
        }
        let targets = case.targets.iter().map(|target| (*target, target.name()));
        let rows = run.case(case.name, targets, |target, build| {
            case.run((target, build), options, &scratch)
        })?;
        let base = rows.first().map_or("", |row| &row.target);
        table::print(case.name, &rows, &[("ratio", base)]);
    }
    run.save()
}

impl Case {
    fn run(
        &self,
        (target, build): (Target, Option<&Path>),
        options: &Options,
        scratch: &Scratch,
    ) -> Outcome<Measured> {
        let turn = Duration::from_secs(options.seconds);
        match target {
            Target::HostFio => fio::run(self, &options.file, turn, scratch),
            Target::Backend(kind) => {
                let build = build.map(Path::to_owned);
                let peer = Peer { build, aio: None };
                load::one(self, kind, peer, options, scratch)
            }
            Target::QemuUring => {
                let aio = Some("io_uring");
                let peer = Peer { build: None, aio };
                load::one(self, Kind::QemuStorageDaemon, peer, options, scratch)
            }
            Target::Disks(count) => load::disks(self, (count, 1), options, scratch),
            Target::Workers(workers) => load::disks(self, (self.disks, workers), options, scratch),
            Target::RoundTrip => load::round_trip(turn),
        }
    }
}
