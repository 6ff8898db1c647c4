//! What Linux need not ask, counted by the server: names that are not there,
//! files that it has open or has read already, attributes before each write.
//! Each is set beside a mount where it does ask, so that what is counted is seen
//! to be counted.

use std::fs;
use std::time::Duration;

use pericarp_tests::bounded::OneCpu;
use pericarp_tests::fs::wire::posix::{O_RDONLY, O_RDWR};
use pericarp_tests::fs::wire::{Body, ROOT, feature, op};
use pericarp_tests::fs::{Client, Counts, Options, Server, TAG, refused, transfer_body};
use pericarp_tests::parts::Part;
use pericarp_tests::uml::Machine;
use rustix::io::Errno;

use crate::guests::MOUNT;

/// How often each thing is done.
const TIMES: u64 = 40;
/// Files of a directory that takes several pages to list.
const LISTED: u64 = 150;

/// A directory, its server, and what it counts while Linux does `work` there.
fn counted(test: &str, cache: &'static str, read_only: bool, work: &str) -> Option<Counts> {
    let options = Options {
        cache,
        read_only,
        control: true,
        lifetime: Duration::from_secs(200),
        ..Options::default()
    };
    let mut server = Server::for_test(test, &[Part::UserModeLinux], options)?;
    if !server.is_ours() {
        return None;
    }
    fs::create_dir_all(server.path("dir/sub")).unwrap();
    for index in 0..10 {
        fs::write(server.path(&format!("dir/file{index}")), "content\n").unwrap();
    }
    fs::create_dir(server.path("many")).unwrap();
    for index in 0..LISTED {
        fs::write(server.path(&format!("many/file{index}")), "content\n").unwrap();
    }
    let _cpu = OneCpu::turn();
    let body = format!(
        "cd share\nset -- $(seq {TIMES})\nfor i; do {work}\ndone >/dev/null\ncd ..\numount share"
    );
    let mut machine = Machine::new(&[], &format!("tag={TAG}\n{MOUNT}{body}"));
    machine.shares.push(server.socket());
    let report = machine
        .run()
        .unwrap_or_else(|error| panic!("{error}\nthe server {}", server.epitaph()));
    let said = format!("{}\n{}", report.output, report.console);
    assert_eq!(report.code, 0, "{said}\nthe server {}", server.epitaph());
    let counts = server.counts();
    eprintln!("{test} cache {cache} read-only {read_only}: {counts:?}");
    Some(counts)
}

#[test]
fn names_that_are_not_there_are_asked_for_once() {
    let test = "names_that_are_not_there_are_asked_for_once";
    let work = "[ ! -e dir/none ] || exit 9";
    let Some(never) = counted(test, "never", false, work) else {
        return;
    };
    assert!(never.of("lookup") >= TIMES, "{never:?}");
    let always = counted(test, "always", false, work).unwrap();
    assert!(always.of("lookup") <= 5, "{always:?}");
}

#[test]
fn what_was_listed_is_not_asked_for_one_by_one() {
    let test = "what_was_listed_is_not_asked_for_one_by_one";
    let work = "ls -l many; [ $i -lt 3 ] || break";
    let Some(always) = counted(test, "always", false, work) else {
        return;
    };
    assert!(always.of("lookup") <= 5, "{always:?}");
    // Entries that may not be kept would be looked at for nothing.
    let never = counted(test, "never", false, work).unwrap();
    assert!(never.of("lookup") >= 3 * LISTED, "{never:?}");
    assert!(never.of("list") < 60, "{never:?}");
}

#[test]
fn what_was_read_is_neither_opened_nor_read_again() {
    let test = "what_was_read_is_neither_opened_nor_read_again";
    let work = "read line <dir/file3; [ \"$line\" = content ] || exit 9; ls dir";
    // Each turn opens and closes a file and a directory.
    let Some(auto) = counted(test, "auto", true, work) else {
        return;
    };
    assert!(auto.of("open") >= 4 * TIMES, "{auto:?}");
    assert!(auto.of("read") >= TIMES, "{auto:?}");
    // A directory that changes by the guest alone: opened, and not read.
    let writable = counted(test, "always", false, work).unwrap();
    assert!(writable.of("open") >= 4 * TIMES, "{writable:?}");
    assert!(writable.of("read") <= 5, "{writable:?}");
    assert!(writable.of("list") <= 5, "{writable:?}");
    // One that nobody changes: asked once whether it has to be.
    let nothing = counted(test, "always", true, work).unwrap();
    assert!(nothing.of("open") <= 2, "{nothing:?}");
    assert!(nothing.of("read") <= 5, "{nothing:?}");
    assert!(nothing.of("list") <= 5, "{nothing:?}");
}

#[test]
fn closing_is_told_once_and_a_write_asks_for_no_attribute() {
    let test = "closing_is_told_once_and_a_write_asks_for_no_attribute";
    let work = "exec 3<>dir/file1; echo a >&3; echo b >&3; echo c >&3; exec 3>&-";
    let Some(counts) = counted(test, "auto", false, work) else {
        return;
    };
    assert!(counts.of("write") >= 3 * TIMES, "{counts:?}");
    // FLUSH is in this class: the first is refused for good.
    assert!(counts.of("sync") <= 2, "{counts:?}");
    // GETXATTR of security.capability would be among the others, one a write.
    assert!(counts.of("other") < TIMES, "{counts:?}");
}

/// The same with our own front end, which has nothing but node numbers.
#[test]
fn a_guest_that_opens_nothing_reads_by_node() {
    let test = "a_guest_that_opens_nothing_reads_by_node";
    let options = Options {
        cache: "always",
        read_only: true,
        ..Options::default()
    };
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    let data = crate::pattern(5, 100_000);
    fs::write(server.path("file"), &data).unwrap();
    let mut c = server.connect(&Client::setup()).unwrap();
    let asked = feature::LINUX | feature::NO_OPEN | feature::NO_OPENDIR;
    let agreed = c.init_as(7, 41, asked).unwrap().features;
    assert_ne!(agreed & feature::NO_OPEN, 0);
    assert_eq!(agreed & feature::ATOMIC_O_TRUNC, 0);
    let node = c.lookup(ROOT, "file").unwrap().node;
    for flags in [O_RDONLY, O_RDWR] {
        refused(c.open(node, flags), &[Errno::NOSYS]).unwrap();
    }
    refused(c.opendir(ROOT), &[Errno::NOSYS]).unwrap();
    assert_eq!(c.read(node, 0, 50_000, 4096).unwrap(), data[50_000..54_096]);
    assert_eq!(c.read(node, 0, 99_990, 4096).unwrap(), data[99_990..]);
    let body = transfer_body(0, 0, 4096, 0);
    let names = c.ask(op::READDIRPLUS, ROOT, body, 4096).unwrap();
    assert!(!names.is_empty());
    refused(c.write(node, 0, 0, b"x"), &[Errno::ROFS]).unwrap();
    refused(c.read(ROOT, 0, 0, 10), &[Errno::ISDIR]).unwrap();
    refused(c.flush(node, 0), &[Errno::NOSYS]).unwrap();
    // Pipes and devices are opened as little as ever.
    let fifo = server.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    // It was told that there is none only if it asked.
    let fifo = c.lookup(ROOT, "fifo").unwrap().node;
    refused(c.read(fifo, 0, 0, 10), &[Errno::ACCESS]).unwrap();
    let body = Body::new().u64(0).u64(0).u32(4096).u32(0).u64(0).u64(0);
    refused(c.ask(op::READDIR, node, body, 4096), &[Errno::NOTDIR]).unwrap();
}
