//! What a guest can take is bounded, and said so: files, names it knows,
//! requests at once.

use std::fs;

use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::wire::op;
use pericarp_tests::fs::wire::posix::O_RDONLY;
use pericarp_tests::fs::{Options, SLOTS, refused, transfer_body};
use pericarp_tests::usage::Watch;
use rustix::io::Errno;

use crate::{pattern, session};

/// libkrun and others: EMFILE made READDIRPLUS leave names out.
#[test]
fn too_many_files_are_an_error_and_listings_stay_complete() {
    let options = Options {
        descriptors: Some(700),
        ..Options::default()
    };
    let test = "too_many_files_are_an_error_and_listings_stay_complete";
    let Some((mut server, mut c)) = session(test, options) else {
        return;
    };
    for i in 0..600 {
        fs::write(server.path(&format!("file{i}")), format!("{i}")).unwrap();
    }
    let file = c.lookup(ROOT, "file0").unwrap().node;
    let mut open = Vec::new();
    let limit = [Errno::NFILE, Errno::MFILE];
    loop {
        match c.open(file, O_RDONLY) {
            Ok(fh) => open.push(fh),
            Err(wrong) => {
                refused(Err::<(), _>(wrong), &limit).unwrap();
                break;
            }
        }
        assert!(open.len() < 2000, "there is no limit");
    }
    assert!(open.len() >= 64, "{} files are few", open.len());
    // With one directory less than that, every name is still found.
    for _ in 0..16 {
        c.release(file, open.pop().unwrap()).unwrap();
    }
    for plus in [true, false] {
        let list = c.list(ROOT, plus, 4096).unwrap();
        assert_eq!(list.len(), 600, "plus {plus}");
    }
    for fh in open.drain(..) {
        c.release(file, fh).unwrap();
    }
    let fh = c.open(file, O_RDONLY).unwrap();
    assert_eq!(c.read(file, fh, 0, 8).unwrap(), b"0");
    assert!(server.is_alive(), "{}", server.epitaph());
}

#[test]
fn more_files_are_known_than_there_are_descriptors() {
    let options = Options {
        descriptors: Some(700),
        ..Options::default()
    };
    let test = "more_files_are_known_than_there_are_descriptors";
    let Some((mut server, mut c)) = session(test, options) else {
        return;
    };
    let text = |i: usize| format!("file {i}");
    for i in 0..3000 {
        fs::write(server.path(&format!("file{i}")), text(i)).unwrap();
    }
    let known: Vec<_> = (0..3000)
        .map(|i| c.lookup(ROOT, &format!("file{i}")).unwrap().node)
        .collect();
    c.rename((ROOT, "file7"), (ROOT, "seven"), 0).unwrap();
    c.unlink(ROOT, "file8").unwrap();
    for (i, node) in known.iter().enumerate() {
        let size = c.getattr(*node).unwrap().size;
        assert_eq!(size, text(i).len() as u64, "file{i}");
        if i != 8 {
            let fh = c.open(*node, O_RDONLY).unwrap();
            assert_eq!(c.read(*node, fh, 0, 64).unwrap(), text(i).as_bytes());
            c.release(*node, fh).unwrap();
        }
    }
    assert!(server.is_alive(), "{}", server.epitaph());
}

#[test]
fn what_a_guest_knows_and_forgets_costs_nothing_later() {
    let test = "what_a_guest_knows_and_forgets_costs_nothing_later";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    for i in 0..1000 {
        fs::write(server.path(&format!("file{i}")), b"").unwrap();
    }
    let mut round = || {
        let list = c.list(ROOT, true, 4096).unwrap();
        let nodes: Vec<(u64, u64)> = list
            .iter()
            .filter_map(|name| name.entry)
            .filter(|entry| entry.node != 0)
            .map(|entry| (entry.node, 1))
            .collect();
        for some in nodes.chunks(200) {
            c.batch_forget(some).unwrap();
        }
    };
    round();
    let before = server.footprint().unwrap();
    for _ in 0..20 {
        round();
    }
    let after = server.footprint().unwrap();
    assert!(after.fds <= before.fds + 8, "{before:?} -> {after:?}");
    let grown = after.anon_kib.saturating_sub(before.anon_kib);
    assert!(grown < 4096, "{before:?} -> {after:?}");
}

#[test]
fn a_full_queue_of_reads_takes_no_memory() {
    let test = "a_full_queue_of_reads_takes_no_memory";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let data = pattern(9, 1 << 20);
    fs::write(server.path("file"), &data).unwrap();
    let file = c.lookup(ROOT, "file").unwrap().node;
    let fh = c.open(file, O_RDONLY).unwrap();
    let mut before = None;
    for _ in 0..8 {
        for slot in 0..SLOTS {
            let at = u64::from(slot) * 4000;
            let body = transfer_body(fh, at, 4000, 0);
            c.begin(slot, op::READ, file, body, 4000).unwrap();
        }
        c.go();
        let all = c.finish(SLOTS.into()).unwrap();
        assert_eq!(all.len(), usize::from(SLOTS));
        for (slot, answer) in all {
            let at = usize::from(slot) * 4000;
            assert_eq!(answer.errno(), None);
            assert!(answer.body == data[at..at + 4000], "slot {slot}");
        }
        before = before.or(server.footprint());
    }
    let (before, after) = (before.unwrap(), server.footprint().unwrap());
    let grown = after.anon_kib.saturating_sub(before.anon_kib);
    assert!(grown < 16_384, "{before:?} -> {after:?}");
}

/// Names, open files and directories half read, as many as a guest likes: each has its price, and
/// there is an end to it.
#[test]
fn floods_of_names_files_and_directories_are_bounded() {
    const NAMES: usize = 4000;
    let test = "floods_of_names_files_and_directories_are_bounded";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    for i in 0..NAMES {
        fs::write(
            server.path(&format!("file-with-a-name-of-some-length-{i}")),
            b"",
        )
        .unwrap();
    }
    let dir = c.opendir(ROOT).unwrap();
    c.releasedir(ROOT, dir).unwrap();

    let watch = Watch::begin(server.pid());
    let names: Vec<_> = (0..NAMES)
        .map(|i| {
            c.lookup(ROOT, &format!("file-with-a-name-of-some-length-{i}"))
                .unwrap()
                .node
        })
        .collect();
    // 1 KiB for each, with 4 MiB for what tables double by.
    watch.end("fs, 4000 names looked up", NAMES as u64 + 4096);

    let watch = Watch::begin(server.pid());
    let open: Vec<_> = names
        .iter()
        .map(|node| c.open(*node, O_RDONLY).unwrap())
        .collect();
    watch.end("fs, 4000 files open", NAMES as u64 + 4096);

    let watch = Watch::begin(server.pid());
    for (node, fh) in names.iter().zip(open) {
        c.release(*node, fh).unwrap();
    }
    for round in 0..5 {
        for some in names.chunks(200) {
            let some: Vec<(u64, u64)> = some.iter().map(|node| (*node, 1)).collect();
            c.batch_forget(&some).unwrap();
        }
        if round < 4 {
            for i in 0..NAMES {
                c.lookup(ROOT, &format!("file-with-a-name-of-some-length-{i}"))
                    .unwrap();
            }
        }
    }
    watch.end("fs, 4000 names forgotten and looked up, 5 times", 4096);

    let watch = Watch::begin(server.pid());
    for _ in 0..600 {
        let fh = c.opendir(ROOT).unwrap();
        c.readdir(ROOT, fh, 0, 200).unwrap();
    }
    // 256 of them keep what was read and not asked for, up to 32 KiB.
    watch.end("fs, 600 directories half read", 256 * 32 + 8192);
}
