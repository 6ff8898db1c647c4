//! The job in User-mode Linux, on a disk that a backend serves or in a directory
//! that a file server does.
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
use pericarp_benches::served::{How, Served, Server};
use pericarp_tests::peer::{self, Backend, Cache, Kind};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;

use crate::ground::Place;
use crate::profiles::{Ground, Profile, Rig};

/// How much longer than a turn a backend may live.
const LEAVE: Duration = Duration::from_secs(10);

/// Runs the job once on a disk; what it reports and what it cost.
pub(crate) fn on_disk(
    profile: &Profile,
    (kind, build): (Kind, Option<&Path>),
    place: &Place,
    options: &Options,
    scratch: &Scratch,
) -> Outcome<(Report, Spent)> {
    let how = peer::Options {
        cache: match profile.ground {
            Ground::Warm => Cache::Buffered,
            _ => Cache::Direct,
        },
        extra: options.extra.clone(),
        build: build.map(Path::to_owned),
        lifetime: limit(options) + LEAVE,
        ..peer::Options::default()
    };
    let mut backend = Backend::start(kind, scratch, &place.image, &how)?;
    let ground = match profile.ground {
        Ground::Tree => (TREE_ON_DISK, "/mnt/work/tree".to_owned()),
        _ => (DISK, "/dev/vda".to_owned()),
    };
    let attach = |machine: &mut Machine| machine.disks.push(backend.socket().to_owned());
    let ended = turn(profile, (ground, backend.pid()), options, scratch, attach);
    if !backend.is_alive() {
        return Err(format!("the backend ended: it {}", backend.epitaph()).into());
    }
    ended
}

/// The same in a directory.
pub(crate) fn in_directory(
    profile: &Profile,
    (server, build): (Server, Option<&Path>),
    place: &Place,
    options: &Options,
    scratch: &Scratch,
) -> Outcome<(Report, Spent)> {
    let tree = match profile.ground {
        Ground::Tree => Some(place.tree()?),
        _ => None,
    };
    let mounted = "/mnt/work/share";
    let (directory, path) = match &tree {
        Some(tree) => (tree.path(), mounted.to_owned()),
        None => {
            let (directory, name) = (place.image.parent(), place.image.file_name());
            let (directory, name) = directory.zip(name).ok_or("the image has no directory")?;
            (directory, format!("{mounted}/{}", name.to_string_lossy()))
        }
    };
    let lifetime = limit(options) + LEAVE;
    let how = How {
        direct: profile.ground != Ground::Warm,
        build,
        file: tree.is_none().then_some(place.image.as_path()),
    };
    let mut served = Served::start(server, how, directory, scratch, lifetime)?;
    let ground = (SHARE, path);
    let attach = |machine: &mut Machine| machine.shares.push(served.socket().to_owned());
    let ended = turn(profile, (ground, served.pid()), options, scratch, attach);
    // The peer ends with its guest.
    let died = served.death().filter(|_| server.outlives_its_guest());
    match died {
        Some(how) => Err(format!("the server ended: it {how}").into()),
        None => ended,
    }
}

/// Work that is fixed takes as long as it takes, half a minute and more through
/// some servers.
fn limit(options: &Options) -> Duration {
    Duration::from_secs(options.seconds) + 4 * SLACK
}

/// Boots a guest with what `attach` adds, and runs the job on this ground.
fn turn(
    profile: &Profile,
    ((mount, path), backend): ((&str, String), i32),
    options: &Options,
    scratch: &Scratch,
    attach: impl FnOnce(&mut Machine),
) -> Outcome<(Report, Spent)> {
    let turn = Duration::from_secs(options.seconds);
    let marks = scratch.path("marks");
    fs::create_dir_all(&marks)?;
    for mark in ["begin", "end"] {
        let _ = fs::remove_file(marks.join(mark));
    }
    let script = script(profile, (mount, &path), options.seconds, &marks);
    let mut machine = Machine::new(&[], &script);
    machine.limit = limit(options);
    attach(&mut machine);
    let watch = Watch::start(&marks, backend);
    let report = machine.run()?;
    let spent = watch.finish();
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

/// What makes a disk of a backend the ground of a job.
///
/// qemu-storage-daemon 7.2 tells its guest that nothing is cached ("write
/// through"), so that Linux would send it no flush, but does not sync what is
/// written either. A sync in the guest is to be one on the disk everywhere.
const DISK: &str = "\
cache=/sys/block/vda/queue/write_cache
grep -q back $cache || echo write back >/sys/block/vda/cache_type
grep -q back $cache
";
const TREE_ON_DISK: &str = "\
cache=/sys/block/vda/queue/write_cache
grep -q back $cache || echo write back >/sys/block/vda/cache_type
grep -q back $cache
mkdir tree
mount -t ext4 /dev/vda tree
";
/// The same of a server's directory. The driver is a module here.
const SHARE: &str = "\
modules=/usr/lib/uml/modules/$(uname -r)/kernel/fs/fuse
insmod $modules/fuse.ko
insmod $modules/virtiofs.ko
mkdir share
mount -t virtiofs bench share
";

/// Runs the job and prints nothing but its report.
fn script(profile: &Profile, (mount, path): (&str, &str), seconds: u64, marks: &Path) -> String {
    let variables: String = profile
        .environment(path, seconds, Rig::Guest)
        .iter()
        .map(|(name, value)| format!("{name}={value} "))
        .collect();
    format!(
        "cat >job.fio <<'END'\n{}END\n\
         mkdir marks\nmount -t hostfs marks marks -o {}\n{mount}\
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
    use pericarp_benches::served::TAG;

    #[test]
    fn the_directory_is_mounted_by_its_tag() {
        assert!(SHARE.ends_with(&format!("mount -t virtiofs {TAG} share\n")));
    }

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
