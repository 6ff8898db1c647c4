//! What POSIX says of names, modes, owners, times and errors, case by case:
//! pjdfstest, as root and as two users, in guests of two kinds.
//!
//! `tests/POSIX.md` has what it says of virtiofsd and of the host's own file
//! system.

use std::time::Duration;

use pericarp_tests::bounded::{Alone, OneCpu};
use pericarp_tests::fs::mounted::{attach, in_uml};
use pericarp_tests::fs::{Options, Server, TAG};
use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;

const LIMIT: Duration = Duration::from_secs(300);

/// Cases that fail, and why.
const KNOWN: &[(&str, &str)] = &[];

/// Users that every Debian has, each with a group of its own. A file's times
/// move with the host's ticks or the guest's, whichever are longer.
const SETTINGS: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.03
allow_remount = REMOUNT
expected_failures = [KNOWN]
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Fails when a case does that is not known to, or one does not that is. What it
/// says of cases that are fine is left out. All that it made is gone. The cases
/// for which the mount is made read-only come first, and by themselves: one of
/// the others (`open::einval_invalid_combination`) leaves a file open for writing.
const SCRIPT: &str = r#"
mkdir /tmp/other
mount -t tmpfs other /tmp/other
umask 022
export NO_COLOR=1
code=0
$pjdfstest -c /tmp/read-only -p share erofs >/tmp/said 2>&1 || code=$?
$pjdfstest -c /tmp/settings -s /tmp/other -p share >>/tmp/said 2>&1 || code=$?
grep -v -E ' ok$|^$' /tmp/said
[ -z "$(ls -A share)" ]
umount share
[ $code -eq 0 ]
"#;

fn settings() -> String {
    let known: Vec<String> = KNOWN.iter().map(|(name, _)| format!("{name:?}")).collect();
    let file = |name: &str, known: &str, remount: &str| {
        let settings = SETTINGS.replace("KNOWN", known).replace("REMOUNT", remount);
        format!("cat >/tmp/{name} <<'end'\n{settings}end\n")
    };
    file("read-only", "", "true") + &file("settings", &known.join(", "), "false")
}

fn options(cache: &'static str) -> Options {
    Options {
        cache,
        lifetime: LIMIT + Duration::from_secs(60),
        ..Options::default()
    }
}

/// So many cases were fine, of 398: that for the most links a file can have is
/// skipped, since a guest is not told.
fn check(said: &str) {
    let lines = said.lines().filter(|line| line.starts_with("Summary"));
    let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
    let passed = words.windows(2).filter(|pair| pair[1] == "passed,");
    let passed: u32 = passed.map(|pair| pair[0].parse::<u32>().unwrap()).sum();
    assert!(passed >= 390, "{passed}: {said}");
}

fn uml(test: &str, cache: &'static str) {
    let parts = [Part::UserModeLinux, Part::Pjdfstest];
    let Some(mut server) = Server::for_test(test, &parts, options(cache)) else {
        return;
    };
    let _cpu = OneCpu::turn();
    let script = format!("{}{SCRIPT}", settings());
    let report = in_uml(&server, &parts[1..], &script, LIMIT, || {});
    let report = report.unwrap_or_else(|error| panic!("{error}\nit {}", server.epitaph()));
    let said = format!("{}\nthe server {}", report.output, server.epitaph());
    assert_eq!(report.code, 0, "{said}");
    check(&said);
}

#[test]
fn posix_without_a_cache() {
    uml("posix_without_a_cache", "never");
}

#[test]
fn posix_in_a_stock_kernel() {
    let test = "posix_in_a_stock_kernel";
    let Some(assets) = Assets::for_test(test, &[Part::Pjdfstest]) else {
        return;
    };
    let Some(mut server) = Server::for_test(test, &[], options("auto")) else {
        return;
    };
    let _alone = Alone::turn();
    let pjdfstest = Part::Pjdfstest.find().unwrap();
    // One program is run by other names, which busybox would not know.
    let tools = [pjdfstest.to_str().unwrap(), "sleep"];
    let script = format!(
        "mkdir share\nmount -t virtiofs {TAG} share\npjdfstest=pjdfstest\n\
         cat >/etc/passwd <<'end'\n\
         root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nend\n\
         cat >/etc/group <<'end'\nroot:x:0:\ndaemon:x:1:\nnogroup:x:65534:\nend\n\
         {}{SCRIPT}",
        settings()
    );
    let image = initramfs(&server.scratch, &assets, &tools, &script).unwrap();
    let mut qemu = emulated(&assets, &image, "");
    attach(&mut qemu, &server);
    let mut guest = Process::start(&mut qemu, LIMIT).unwrap();
    let ended = guest.wait(LIMIT);
    let said = format!("{}\nit {}", guest.output().last(300), server.epitaph());
    assert!(ended.is_some(), "{said}");
    assert_eq!(exit_code(&said), Some("0"), "{said}");
    check(&said);
}
