//! The suite again where the kernel is older or forbids things, which forces
//! `pericarp-fs` to do them another way: by calls that its own filter must let
//! through as well. A call that is not on the filter's list ends the process,
//! and with it the test that made it.
//!
//! Each test here starts this suite once more, on a thread whose filter answers
//! ENOSYS for system calls that the pretended kernel lacks. The server that the
//! suite starts inherits it, and confines itself on top as it always does.

use std::io;
use std::process::{Command, Output};
use std::thread;

use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::wire::posix::O_RDWR;
use pericarp_tests::fs::{Options, Server};
use pericarp_tests::parts::Part;
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Calls of one kind, and what they are answered.
type Missing = (&'static [i64], Errno);

/// By number: the same on all architectures.
const IO_URING_SETUP: i64 = 425;
const OPEN_TREE: i64 = 428;
const MOVE_MOUNT: i64 = 429;
const MOUNT_SETATTR: i64 = 442;
const LANDLOCK: [i64; 3] = [444, 445, 446];
const FCHMODAT2: i64 = 452;
/// setxattrat, getxattrat, listxattrat, removexattrat.
const XATTRAT: [i64; 4] = [463, 464, 465, 466];

/// Linux 6.1, Debian 12's.
const LINUX_6_1: &[Missing] = &[(&[FCHMODAT2], Errno::NOSYS), (&XATTRAT, Errno::NOSYS)];

/// Linux 5.10 in a container that forbids io_uring: no own mounts, no Landlock,
/// I/O by plain system calls.
const LINUX_5_10: &[Missing] = &[
    (&[FCHMODAT2], Errno::NOSYS),
    (&XATTRAT, Errno::NOSYS),
    (&LANDLOCK, Errno::NOSYS),
    (&[OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR], Errno::NOSYS),
    (&[IO_URING_SETUP], Errno::PERM),
];

/// What is played again: all that needs no guest of its own and no minute.
const MODULES: [&str; 6] = [
    "semantics::",
    "directories::",
    "privileges::",
    "limits::",
    "messages::",
    "sweep::",
];
/// Fewer would mean that a name above is none.
const FEWEST: usize = 35;

/// Runs `act` on a thread where calls are missing, in what it starts as well.
fn without<T: Send + 'static>(
    missing: &'static [Missing],
    act: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = thread::spawn(move || {
        for (calls, errno) in missing {
            let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
            let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
            let error = SeccompAction::Errno(errno.raw_os_error().unsigned_abs());
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, error, arch);
            let program: BpfProgram = filter.unwrap().try_into().unwrap();
            apply_filter(&program).unwrap();
        }
        act()
    });
    thread.join().unwrap()
}

/// Plays the suite again and counts.
fn again(missing: &'static [Missing]) {
    let played = || -> io::Result<Output> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(MODULES).output()
    };
    let output = without(missing, played).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = || format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}", said());
    // "test result: ok. 40 passed; 0 failed; ..."
    let count = text.lines().find_map(|line| {
        let (_, rest) = line.split_once("test result: ok. ")?;
        rest.split_whitespace().next()?.parse::<usize>().ok()
    });
    assert!(count >= Some(FEWEST), "{}", said());
}

/// False, and said, where the suite would not run anyway.
fn usable(test: &str) -> bool {
    Server::for_test(test, &[Part::Ours("pericarp-fs")], Options::default()).is_some()
}

#[test]
fn the_suite_on_linux_6_1() {
    if usable("the_suite_on_linux_6_1") {
        again(LINUX_6_1);
    }
}

#[test]
fn the_suite_on_linux_5_10_without_io_uring() {
    if usable("the_suite_on_linux_5_10_without_io_uring") {
        again(LINUX_5_10);
    }
}

/// Calls are missing for the server, too, or the tests above would show nothing.
#[test]
fn what_is_missing_is_missing_for_the_server() {
    let test = "what_is_missing_is_missing_for_the_server";
    if !usable(test) {
        return;
    }
    without(LINUX_5_10, move || {
        let Some(mut server) = Server::for_test(test, &[], Options::default()) else {
            return;
        };
        let mut c = server.client().unwrap();
        // Before Linux 6.13 there is no way to an attribute of a link.
        let link = c.symlink(ROOT, "link", "x").unwrap().node;
        let got = c
            .getxattr(link, "trusted.x", 64)
            .map_err(|wrong| wrong.errno());
        assert_eq!(got, Err(Some(Errno::OPNOTSUPP)));
        let (file, fh) = c.create(ROOT, "file", 0o600, O_RDWR).unwrap();
        c.write(file.node, fh, 0, b"by a plain call").unwrap();
        let said = server.epitaph();
        assert!(said.contains("io_uring"), "{said}");
        assert!(said.to_lowercase().contains("landlock"), "{said}");
    });
}
