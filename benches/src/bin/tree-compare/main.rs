//! `tree-compare`: what people do with trees of small files, in a directory of
//! the host: natively, and in User-mode Linux through `pericarp-fs` and through
//! `virtiofsd`, in turns. A source tree is unpacked, put under version control,
//! looked at and removed; a tree of 300,000 files is walked through, with a count
//! of what the server then holds.
//!
//! ```text
//! cargo run --release -p pericarp-benches --bin tree-compare -- --help
//! ```
//!
//! It wants root, fio's rig (`cargo xtask bench compare --quick` installs that)
//! and git.

mod script;
mod source;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use pericarp_benches::options::Options;
use pericarp_benches::served::{How, Served, Server};
use pericarp_benches::turns::{Measured, Run};
use pericarp_benches::{Outcome, table, trees};
use pericarp_tests::bounded::poll;
use pericarp_tests::peer::Footprint;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;
use script::{PHASES, WALK, phases};
use source::{Source, Walked};

const ABOUT: &str = "\
tree-compare: a source tree unpacked, committed, looked at and removed, and 300,000
files found, on the host and in User-mode Linux in a directory of pericarp-fs and of
virtiofsd with a pool of no, 1, 8 or 64 threads; the trees lie beside --file";

/// The longest that a turn may take.
const LIMIT: Duration = Duration::from_secs(600);
/// MiB of a guest, which is to know all of the files that it walks through.
const MEMORY_MIB: u32 = 1024;
/// What the others are compared with.
const BASE: &str = "host";
const PEER: &str = "virtiofsd";

/// Where a turn runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Host,
    Shared(Server),
}

const TARGETS: [(Target, &str); 6] = [
    (Target::Host, BASE),
    (Target::Shared(Server::Pericarp), "pericarp-fs"),
    (Target::Shared(Server::Virtiofsd(0)), PEER),
    (Target::Shared(Server::Virtiofsd(1)), "virtiofsd-1"),
    (Target::Shared(Server::Virtiofsd(8)), "virtiofsd-8"),
    (Target::Shared(Server::Virtiofsd(64)), "virtiofsd-64"),
];

fn main() -> ExitCode {
    let cases = [PHASES, &[WALK]].concat();
    let targets: Vec<_> = TARGETS.iter().map(|(_, name)| *name).collect();
    Options::run(ABOUT, &cases, &targets, compare)
}

fn compare(options: &Options) -> Outcome<()> {
    let parent = options.file.parent().filter(|dir| *dir != Path::new(""));
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let parent = std::fs::canonicalize(parent)?;
    trees::remove_old(&parent);
    let scratch = Scratch::new();
    let mut run = Run::new(options);
    let ratios = [("of host", BASE), ("of vfsd", PEER)];
    let wanted: Vec<_> = PHASES
        .iter()
        .filter(|phase| options.wants_case(phase))
        .collect();
    if !wanted.is_empty() {
        let source = Source::make(&parent)?;
        // A turn goes through all phases; its times are kept until their case
        // comes.
        let mut kept: HashMap<(&str, String, usize), Measured> = HashMap::new();
        for (number, phase) in wanted.iter().enumerate() {
            let mut rounds: HashMap<String, usize> = HashMap::new();
            let rows = run.case(phase, TARGETS, |target, _| {
                let name = format!("{target:?}");
                let round = rounds.entry(name.clone()).or_default();
                *round += 1;
                if number == 0 {
                    let script = script::source(&source.archive);
                    let said = turn(target, source.directory()?.path(), &script, &scratch)?.0;
                    for (phase, took) in phases(&said)? {
                        let measured = finished(target, source.files, took);
                        kept.insert((phase, name.clone(), *round), measured);
                    }
                }
                let found = kept.get(&(phase, name, *round)).copied();
                found.ok_or_else(|| format!("the turn said nothing of {phase}").into())
            })?;
            let heading = format!("{phase}: files a second, of {}", source.files);
            table::print(&heading, &rows, &ratios);
        }
    }
    if options.wants_case(WALK) {
        let walked = Walked::make(&parent)?;
        let rows = run.case(WALK, TARGETS, |target, _| {
            let (said, held) = turn(target, walked.directory.path(), &script::walk(), &scratch)?;
            let took = phases(&said)?.into_iter().next();
            let (_, took) = took.ok_or("the turn said nothing")?;
            Ok(Measured {
                memory_kib: held.as_ref().map(|held| held.memory_kib),
                descriptors: held.map(|held| held.descriptors),
                ..finished(target, walked.files, took)
            })
        })?;
        let heading = format!("{WALK}: files a second, of {}", walked.files);
        table::print(&heading, &rows, &ratios);
    }
    run.save()
}

fn finished(target: Target, files: usize, took: Duration) -> Measured {
    let each = took.as_secs_f64() * 1e6 / files as f64;
    Measured {
        iops: 1e6 / each,
        p50_us: each,
        p99_us: each,
        cpu_us: f64::NAN,
        rig: match target {
            Target::Host => "native, directory",
            Target::Shared(_) => "UML, 1 CPU, virtiofs",
        },
        ..Measured::default()
    }
}

/// What a server has at the end of a turn.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    memory_kib: f64,
}

/// Runs a script in `directory`; what it said, and what the server holds then.
fn turn(
    target: Target,
    directory: &Path,
    script: &str,
    scratch: &Scratch,
) -> Outcome<(String, Option<Held>)> {
    let Target::Shared(server) = target else {
        let script = format!("cd {}\n{script}", directory.display());
        let path = scratch.file("script.sh", script.as_bytes());
        let mut process = Process::start(command(Path::new("/bin/sh")).arg("-e").arg(path), LIMIT)?;
        let ended = process.wait(LIMIT);
        let said = process.output().lines().join("\n");
        process.kill();
        return match ended {
            Some(status) if status.success() => Ok((said, None)),
            _ => Err(format!("the script {}: {said}", process.epitaph()).into()),
        };
    };
    let how = How {
        direct: false,
        build: None,
        file: None,
    };
    let served = Served::start(server, how, directory, scratch, LIMIT)?;
    let marks = Marks::make(scratch)?;
    let mut machine = Machine::new(&[], &script::in_guest(&marks.0, script));
    machine.shares.push(served.socket().to_owned());
    machine.limit = LIMIT;
    machine.memory_mib = MEMORY_MIB;
    let pid = served.pid();
    let looked = std::thread::scope(|scope| {
        let watch = scope.spawn(|| marks.look(pid));
        let report = machine.run();
        (report, watch.join())
    });
    let (report, held) = looked;
    let report = report?;
    if report.code != 0 {
        return Err(format!("the script ended with {}: {}", report.code, report.output).into());
    }
    Ok((report.output, held.ok().flatten()))
}

/// Files by which a guest says that it is done and is told that it was seen.
struct Marks(PathBuf);

impl Marks {
    fn make(scratch: &Scratch) -> Outcome<Self> {
        let dir = scratch.path("marks");
        std::fs::create_dir_all(&dir)?;
        for name in ["held", "seen"] {
            let _ = std::fs::remove_file(dir.join(name));
        }
        Ok(Self(dir))
    }

    /// Waits until the guest is done and looks at its server.
    fn look(&self, server: i32) -> Option<Held> {
        let done = self.0.join("held");
        poll(LIMIT, || done.exists().then_some(()))?;
        let descriptors = std::fs::read_dir(format!("/proc/{server}/fd")).ok();
        let held = Footprint::of(server).zip(descriptors);
        let held = held.map(|(footprint, descriptors)| Held {
            descriptors: descriptors.count(),
            memory_kib: footprint.anon_kib as f64,
        });
        let _ = std::fs::write(self.0.join("seen"), []);
        held
    }
}
