//! `bench-compare`: fio's jobs on the host, in a container of runc, and in a guest
//! on `pericarp-block` and on `qemu-storage-daemon`, in turns; where they are
//! named, in a guest that `pericarp-fs` or `virtiofsd` show a directory, too.
//!
//! `cargo xtask bench compare` installs what this needs, builds it and starts it;
//! PERF.md has its results. Guests are User-mode Linux: Linux's own virtio
//! drivers, the CPU's own speed, no KVM.

mod ground;
mod guest;
mod native;
mod profiles;
mod targets;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ground::Place;
use pericarp_benches::cpu::Spent;
use pericarp_benches::fio::Report;
use pericarp_benches::options::{Bench, Options};
use pericarp_benches::turns::{Measured, Row, Run, Shares, write};
use pericarp_benches::{Outcome, plot, table};
use pericarp_tests::scratch::Scratch;
use profiles::{Ground, PROFILES, Profile, QUICK};
use targets::{BASE, FILE_PEER, PEER, TARGETS, Target};

const ABOUT: &str = "\
bench-compare: fio's jobs on the host, in a container (runc), and in User-mode Linux
on pericarp-block (pericarp) and on qemu-storage-daemon (qsd), in turns; by name, in
a directory of pericarp-fs and of virtiofsd with a pool of no, 1, 8 or 64 threads";

fn main() -> ExitCode {
    let profiles: Vec<_> = PROFILES.iter().map(|profile| profile.name).collect();
    let targets: Vec<_> = TARGETS.iter().map(|target| target.name()).collect();
    let by_name = TARGETS.iter().filter(|target| target.is_by_name_only());
    let by_name: Vec<_> = by_name.map(|target| target.name()).collect();
    let bench = Bench {
        by_name: &by_name,
        about: ABOUT,
        cases: &profiles,
        targets: &targets,
        quick: Some(QUICK),
    };
    bench.run(compare)
}

fn compare(options: &Options) -> Outcome<()> {
    let profiles: Vec<_> = PROFILES
        .iter()
        .filter(|profile| options.wants_case(profile.name))
        .collect();
    let targets: Vec<_> = TARGETS
        .iter()
        .filter(|target| options.wants_target(target.name()))
        .collect();
    let turns = profiles.len() * targets.len() * options.rounds;
    let plan = format!(
        "{} profiles on {} targets, {} rounds: {turns} turns of about {} s each",
        profiles.len(),
        targets.len(),
        options.rounds,
        options.seconds + 2
    );
    if options.plan {
        println!("{plan}");
    } else {
        eprintln!("{plan}");
    }
    for (profile, target) in profiles
        .iter()
        .flat_map(|profile| targets.iter().map(move |target| (profile, target)))
    {
        if let Some(what) = target.lacks(profile) {
            let problem = format!("{} on {}: {what}", profile.name, target.name());
            if !options.plan {
                return Err(problem.into());
            }
            println!("{problem}");
        }
    }
    if options.plan {
        return Ok(());
    }
    let scratch = Scratch::new();
    let mut run = Run::new(options);
    let measured = all(&profiles, &mut run, options, &scratch);
    // What was measured before a failure is worth keeping.
    run.save()?;
    let cases = measured?;
    if let Some(path) = &options.plot {
        write(path, &plot::svg("fio against runc", BASE, &cases))?;
    }
    for path in [&options.json, &options.plot].into_iter().flatten() {
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// All turns of all profiles, with a table after each.
fn all(
    profiles: &[&Profile],
    run: &mut Run<'_>,
    options: &Options,
    scratch: &Scratch,
) -> Outcome<Vec<(String, Vec<Row>)>> {
    let mut cases = Vec::new();
    for profile in profiles {
        let place = Place::prepare(profile, &options.file, scratch)?;
        let targets = TARGETS.iter().map(|target| (*target, target.name()));
        let rows = run.case(profile.name, targets, |target, build| {
            place.renew()?;
            measure(profile, (target, build), &place, options, scratch)
        })?;
        let ratios = [("of runc", BASE), ("of qsd", PEER), ("of vfsd", FILE_PEER)];
        // A column for who is there.
        let is_there = |of: &str| rows.iter().any(|row| row.target == of);
        let ratios: Vec<_> = ratios.into_iter().filter(|(_, of)| is_there(of)).collect();
        table::print(&profile.heading(), &rows, &ratios);
        cases.push((profile.name.to_owned(), rows));
    }
    Ok(cases)
}

/// One turn.
fn measure(
    profile: &Profile,
    (target, build): (Target, Option<&Path>),
    place: &Place,
    options: &Options,
    scratch: &Scratch,
) -> Outcome<Measured> {
    let native = match target {
        Target::Host => native::on_host,
        Target::Container => native::in_container,
        Target::Guest(kind) => {
            if profile.ground == Ground::Tree {
                place.format()?;
                place.renew()?;
            }
            let (report, spent) = guest::on_disk(profile, (kind, build), place, options, scratch)?;
            return Ok(in_guest((report, spent), target.rig(profile.ground), place));
        }
        Target::Shared(server) => {
            let done = guest::in_directory(profile, (server, build), place, options, scratch)?;
            return Ok(in_guest(done, target.rig(profile.ground), place));
        }
    };
    let tree = match profile.ground {
        Ground::Tree => Some(place.tree()?),
        _ => None,
    };
    let on = tree
        .as_ref()
        .map_or(place.image.as_path(), |tree| tree.path());
    let report = native(profile, on, options.seconds, scratch)?;
    let fio = report.measured.cpu_us;
    let shares = Shares {
        fio: Some(fio),
        ..Shares::default()
    };
    Ok(finished(
        report,
        target.rig(profile.ground),
        fio,
        shares,
        place,
    ))
}

/// What a turn in a guest came to.
fn in_guest((report, spent): (Report, Spent), rig: &'static str, place: &Place) -> Measured {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / report.requests as f64;
    let shares = Shares {
        backend: Some(each(spent.backend)),
        guest: Some(each(spent.guest)),
        fio: Some(report.measured.cpu_us),
        store: place.is_stored().then(|| each(spent.own)),
    };
    let all = each(spent.backend + spent.guest);
    finished(report, rig, all, shares, place)
}

fn finished(
    report: Report,
    rig: &'static str,
    all: f64,
    shares: Shares,
    place: &Place,
) -> Measured {
    Measured {
        cpu_us: all,
        shares: Some(shares),
        rig,
        in_flight: place.most_in_flight(),
        ..report.measured
    }
}
