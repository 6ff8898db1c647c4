//! One file, read, written, mapped, cut, punched, copied and closed at random,
//! and compared after each step with what it must be: fsx, in a guest, with all
//! that a guest may keep.
//!
//! `PERICARP_FSX_OPERATIONS` has each make more than the 2,000 steps that a run
//! of all tests has time for: in turns with a seed each, for fsx 0.3.2 never undoes
//! the maps that it reads through, and comes to the end of what one process may
//! have of them.

use std::env;
use std::time::Duration;

use pericarp_tests::bounded::OneCpu;
use pericarp_tests::fs::mounted::in_uml;
use pericarp_tests::fs::{Options, Server};
use pericarp_tests::parts::Part;

/// Steps of a file, each at most 64 KiB of 256.
const OPERATIONS: &str = "2000";
/// Steps of one turn at most.
const TURN: u32 = 10_000;
/// For them; more have as much more time.
const LIMIT: Duration = Duration::from_secs(60);

/// How often each step is made. Syncs cost a disk's time and are rare, so
/// maps are not written back one by one. Linux 6.1 maps no file that bypasses its
/// cache.
const SETTINGS: &str = "
nomsyncafterwrite = true
[weights]
close_open = 1
read = 10
write = 10
mapread = MAPS
mapwrite = MAPS
invalidate = INVALIDATES
truncate = 4
fsync = 0.05
fdatasync = 0.05
posix_fallocate = 2
punch_hole = 2
sendfile = 2
posix_fadvise = 1
copy_file_range = 2
";

fn exercise(test: &str, cache: &'static str, writeback: bool, direct: bool) {
    let operations = env::var("PERICARP_FSX_OPERATIONS").unwrap_or(OPERATIONS.into());
    let count: u32 = operations.parse().unwrap();
    let limit = LIMIT * (count / 5000).max(1);
    let parts = [Part::UserModeLinux, Part::Fsx];
    let options = Options {
        cache,
        direct,
        extra: if writeback { &["--writeback"] } else { &[] },
        lifetime: limit + Duration::from_secs(60),
        ..Options::default()
    };
    let Some(mut server) = Server::for_test(test, &parts, options) else {
        return;
    };
    let _cpu = OneCpu::turn();
    let (maps, invalidates) = if cache == "never" {
        ("0", "0")
    } else {
        ("10", "1")
    };
    let settings = SETTINGS
        .replace("MAPS", maps)
        .replace("INVALIDATES", invalidates);
    let script = format!(
        "cat >/tmp/settings <<'end'\n{settings}end\n\
         left={count} seed=7\n\
         while [ $left -gt 0 ]; do\n\
         steps=$left\n\
         [ $steps -le {TURN} ] || steps={TURN}\n\
         $fsx -f /tmp/settings -N $steps -S $seed -P /tmp share/file 2>&1\n\
         left=$((left - steps)) seed=$((seed + 1))\n\
         done\n\
         umount share\n"
    );
    let report = in_uml(&server, &parts[1..], &script, limit, || {});
    let report = report.unwrap_or_else(|error| panic!("{error}\nit {}", server.epitaph()));
    let said = format!("{}\nthe server {}", report.output, server.epitaph());
    assert_eq!(report.code, 0, "{said}");
    let turns = usize::try_from(count.div_ceil(TURN)).unwrap();
    assert_eq!(report.output.matches("A-OK").count(), turns, "{said}");
}

#[test]
fn a_file_without_a_cache() {
    exercise("a_file_without_a_cache", "never", false, true);
}

#[test]
fn a_file_that_may_be_kept_for_a_while() {
    exercise("a_file_that_may_be_kept_for_a_while", "auto", false, false);
}

#[test]
fn a_file_that_nobody_else_changes() {
    exercise("a_file_that_nobody_else_changes", "always", false, false);
}

#[test]
fn a_file_that_is_written_back_later() {
    exercise("a_file_that_is_written_back_later", "auto", true, false);
}

#[test]
fn a_file_that_is_all_the_guests() {
    exercise("a_file_that_is_all_the_guests", "always", true, true);
}
