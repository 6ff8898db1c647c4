//! All kinds of file calls at random and many at a time: stress-ng's stressors of
//! file systems, in a guest, each of which checks what it gets. After it the
//! server has nothing left of it.
//!
//! `PERICARP_STRESS_SECONDS` has it go on for longer than the 8 seconds that a
//! run of all tests has time for.

use std::env;
use std::time::Duration;

use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::fs::mounted::in_uml;
use pericarp_tests::fs::{Options, Server};
use pericarp_tests::parts::Part;
use pericarp_tests::peer::Footprint;

/// Those of stress-ng's class `filesystem` that use the directory they are given.
/// `chattr`, `fiemap` and others find out what they cannot do. Not `fanotify`: it asks for
/// events of all the others' files, and reads them late, if at all; each keeps its file,
/// removed ones among them, until there are more than the server has descriptors.
const STRESSORS: &str = "access chattr chdir chmod chown copy-file dentry dir dirdeep dnotify \
    dup fallocate fcntl fiemap file-ioctl filename flock fpunch fsize fstat \
    getdent handle hdd inode-flags inotify io iomix lease link locka lockf lockofd mknod open \
    rename sync-file touch utime xattr";

const SECONDS: u64 = 8;

/// All of them at once, for a moment and then for longer; whatever they leave is
/// removed each time. A stressor that finds a fault says so and ends with 2.
const SCRIPT: &str = r#"
stress() {
    mkdir share/work
    chmod 777 share/work
    $stress_ng "$@" --verify --temp-path "$PWD/share/work" --no-rand-seed 2>&1
    rm -r share/work
    settle
}
# A guest may know as many files as the server has descriptors, which on some
# machines are few thousand: `symlink` makes 8,192, and `dirmany` any number.
all="--chdir-dirs 256 --dir-dirs 256 --dentries 256 --dirdeep-inodes 512"
all="$all --hdd-bytes 16m --fallocate-bytes 16m --iomix-bytes 16m --sync-file-bytes 16m"
for name in $stressors; do all="$all --$name 1"; done
stress $all --timeout 5
stress $all --timeout $seconds
umount share
"#;

/// What is left of the server after one round.
#[derive(Debug)]
struct Left {
    held: Vec<(String, u64)>,
    footprint: Option<Footprint>,
}

fn left(server: &Server) -> Left {
    let held = || {
        let held = server.held().unwrap().unwrap_or_default();
        let count = |(name, value): (String, serde_json::Value)| (name, value.as_u64().unwrap());
        held.into_iter().map(count).collect::<Vec<_>>()
    };
    // The guest forgets when it gets round to it.
    poll(Duration::from_secs(10), || {
        held().iter().all(|(_, count)| *count == 0).then_some(())
    });
    Left {
        held: held(),
        footprint: server.footprint(),
    }
}

#[test]
fn all_kinds_of_calls_at_once_leave_nothing() {
    let test = "all_kinds_of_calls_at_once_leave_nothing";
    let seconds = env::var("PERICARP_STRESS_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let limit = Duration::from_secs(seconds * 2 + 180);
    let parts = [Part::UserModeLinux, Part::StressNg];
    let options = Options {
        cache: "auto",
        control: true,
        lifetime: limit + Duration::from_secs(60),
        ..Options::default()
    };
    let Some(mut server) = Server::for_test(test, &parts, options) else {
        return;
    };
    let _alone = Alone::turn();
    let script = format!("seconds={seconds} stressors=\"{STRESSORS}\"\n{SCRIPT}");
    let mut rounds = Vec::new();
    let report = in_uml(&server, &parts[1..], &script, limit, || {
        rounds.push(left(&server));
    });
    let report = report.unwrap_or_else(|error| panic!("{error}\nit {}", server.epitaph()));
    let said = format!("{}\nthe server {}", report.output, server.epitaph());
    assert_eq!(report.code, 0, "{said}");
    let [first, last] = rounds.as_slice() else {
        panic!("{rounds:?}\n{said}");
    };
    if server.is_ours() {
        for left in [first, last] {
            assert_eq!(left.held.len(), 3, "{left:?}");
            let any = left.held.iter().any(|(_, count)| *count > 0);
            assert!(!any, "the guest has forgotten all, and it holds {left:?}");
        }
        let (Some(first), Some(last)) = (&first.footprint, &last.footprint) else {
            panic!("{rounds:?}");
        };
        // Threads of the kernel's and helpers come and go.
        assert!(last.fds <= first.fds + 8, "{rounds:?}");
        assert!(last.anon_kib <= first.anon_kib + 4096, "{rounds:?}");
    }
}
