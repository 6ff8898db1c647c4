//! The job in User-mode Linux, on a disk that a backend serves.
//!
//! Backend and guest are new for each turn and end with it, so that no other
//! target's runs meanwhile. In the guest fio puts a mark before its first job and
//! one after its last into a directory of the host: what was used between them
//! counts, and nothing of what it takes to boot and to start fio.

use std::fs;
use std::path::Path;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_benches::cpu::{Spent, Watch};
use pericarp_benches::fio::{self, Report, SLACK};
use pericarp_benches::options::Options;
use pericarp_tests::peer::{self, Backend, Cache, Kind};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;

use crate::ground::Place;
use crate::profiles::{Ground, Profile};

/// Runs the job once; what it reports and what it cost.
pub(crate) fn run(
    profile: &Profile,
    (kind, build): (Kind, Option<&Path>),
    place: &Place,
    options: &Options,
    scratch: &Scratch,
) -> Outcome<(Report, Spent)> {
    let turn = Duration::from_secs(options.seconds);
    let limit = turn + SLACK;
    let how = peer::Options {
        cache: Cache::Direct,
        extra: options.extra.clone(),
        build: build.map(Path::to_owned),
        lifetime: limit + Duration::from_secs(10),
        ..peer::Options::default()
    };
    let marks = scratch.path("marks");
    fs::create_dir_all(&marks)?;
    for mark in ["begin", "end"] {
        let _ = fs::remove_file(marks.join(mark));
    }
    let mut backend = Backend::start(kind, scratch, &place.image, &how)?;
    let script = script(profile, options.seconds, &marks);
    let mut machine = Machine::new(&[backend.socket()], &script);
    machine.limit = limit;
    let watch = Watch::start(&marks, backend.pid());
    let report = machine.run()?;
    let spent = watch.finish();
    if !backend.is_alive() {
        return Err(format!("the backend ended: it {}", backend.epitaph()).into());
    }
    if report.code != 0 {
        let said = report.output.trim();
        return Err(format!("the job ended with {}: {said}", report.code).into());
    }
    let spent = spent.ok_or("the guest left no marks around its job")?;
    // The guest keeps its own time: it must not have stretched a turn.
    if profile.ground != Ground::Tree && spent.took < turn {
        let took = spent.took;
        return Err(format!("{} s in the guest were {took:?} here", turn.as_secs()).into());
    }
    Ok((fio::read(&report.output)?, spent))
}

/// The job with its marks. All it does else is as it was.
fn marked(job: &str) -> String {
    // The end of the file is in the section of the last job. A later begin finds
    // the mark of the first.
    let begin = "[global]\nexec_prerun=touch marks/begin\n";
    job.replacen("[global]\n", begin, 1) + "exec_postrun=touch marks/end\n"
}

/// Runs the job and prints nothing but its report.
///
/// qemu-storage-daemon 7.2 tells its guest that nothing is cached ("write
/// through"), so that Linux would send it no flush, but does not sync what is
/// written either. A sync in the guest is to be one on the disk everywhere.
fn script(profile: &Profile, seconds: u64, marks: &Path) -> String {
    let (mount, place) = match profile.ground {
        Ground::Tree => (
            "mkdir tree\nmount -t ext4 /dev/vda tree\n",
            "/mnt/work/tree",
        ),
        Ground::Image | Ground::Share => ("", "/dev/vda"),
    };
    let variables: String = profile
        .environment(place, seconds)
        .iter()
        .map(|(name, value)| format!("{name}={value} "))
        .collect();
    format!(
        "cat >job.fio <<'END'\n{}END\n\
         mkdir marks\nmount -t hostfs marks marks -o {}\n\
         cache=/sys/block/vda/queue/write_cache\n\
         grep -q back $cache || echo write back >/sys/block/vda/cache_type\n\
         grep -q back $cache\n{mount}\
         {variables}fio --output-format=json --output=report job.fio >said 2>&1 || \
         {{ cat said report; exit 1; }}\n\
         cat report\n",
        marked(profile.job),
        marks.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profiles::PROFILES;

    #[test]
    fn marks_stand_before_the_first_job_and_after_the_last() {
        for Profile { name, job, .. } in PROFILES {
            let marked = marked(job);
            let options = |text: &str| text.matches("exec_").count();
            assert_eq!((options(job), options(&marked)), (0, 2), "{name}");
            let (head, jobs) = marked.split_once("\n\n[").unwrap();
            assert!(
                job.starts_with(head) && jobs.starts_with("global]\nexec_prerun="),
                "{name}"
            );
            let last = marked.rsplit("\n[").next().unwrap();
            assert!(last.ends_with("\nexec_postrun=touch marks/end\n"), "{name}");
        }
    }
}
