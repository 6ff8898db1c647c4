//! Names: listings that are complete while names go away, renames, and nodes
//! that live as long as the guest knows them.

use std::collections::BTreeSet;
use std::fs;

use pericarp_tests::fs::wire::posix::{O_CREAT, O_EXCL, O_RDWR, RENAME_EXCHANGE, RENAME_NOREPLACE};
use pericarp_tests::fs::wire::{Name, ROOT};
use pericarp_tests::fs::{Options, refused};
use rustix::io::Errno;

use crate::session;

const UNKNOWN: [Errno; 3] = [Errno::STALE, Errno::BADF, Errno::NOENT];

fn names(list: &[Name]) -> Vec<String> {
    let mut names: Vec<String> = list.iter().map(|name| name.name.clone()).collect();
    names.sort();
    names
}

#[test]
fn listings_are_complete_and_true() {
    let Some((server, mut c)) = session("listings_are_complete_and_true", Options::default())
    else {
        return;
    };
    let dir = server.path("dir");
    fs::create_dir(&dir).unwrap();
    let mut want: Vec<String> = (0..300u32)
        .map(|i| format!("{i}{}", "x".repeat(i as usize % 200)))
        .collect();
    want.sort();
    for (i, name) in want.iter().enumerate() {
        if i % 3 == 0 {
            fs::create_dir(dir.join(name)).unwrap();
        } else {
            fs::write(dir.join(name), name).unwrap();
        }
    }
    let node = c.lookup(ROOT, "dir").unwrap().node;
    for (plus, size) in [(false, 4096), (false, 300), (true, 4096), (true, 500)] {
        let list = c.list(node, plus, size).unwrap();
        assert_eq!(names(&list), want, "plus {plus}, {size} bytes at a time");
        for name in list {
            let host = fs::symlink_metadata(dir.join(&name.name)).unwrap();
            let kind = if host.is_dir() { 4 } else { 8 };
            assert_eq!(name.kind, kind, "{name:?}");
            let Some(entry) = name.entry else { continue };
            assert_eq!(entry.attr.size, host.len());
            let found = c.lookup(node, &name.name).unwrap();
            assert_eq!((entry.node, entry.attr), (found.node, found.attr));
        }
    }
}

#[test]
fn a_listing_goes_on_while_names_go_away() {
    let Some((server, mut c)) =
        session("a_listing_goes_on_while_names_go_away", Options::default())
    else {
        return;
    };
    let dir = server.path("dir");
    for plus in [false, true] {
        fs::create_dir(&dir).unwrap();
        let all: BTreeSet<String> = (0..400).map(|i| format!("name{i}")).collect();
        for name in &all {
            fs::write(dir.join(name), b"").unwrap();
        }
        let node = c.lookup(ROOT, "dir").unwrap().node;
        let fh = c.opendir(node).unwrap();
        let mut left = all.clone();
        let mut seen: Vec<String> = Vec::new();
        let mut cookie = 0;
        loop {
            let some = if plus {
                c.readdirplus(node, fh, cookie, 2048).unwrap()
            } else {
                c.readdir(node, fh, cookie, 512).unwrap()
            };
            let Some(last) = some.last() else { break };
            cookie = last.cookie;
            for name in some {
                // As rm -r: what was seen goes, the one before it has gone.
                if c.unlink(node, &name.name).is_ok() {
                    left.remove(&name.name);
                }
                seen.push(name.name);
            }
        }
        seen.retain(|name| name != "." && name != "..");
        let unique: BTreeSet<String> = seen.iter().cloned().collect();
        assert_eq!(unique.len(), seen.len(), "a name came twice");
        assert_eq!(unique, all, "plus {plus}: names were left out");
        assert!(left.is_empty());
        // From the start again, with what came meanwhile.
        fs::write(dir.join("late"), b"").unwrap();
        let again = c.readdir(node, fh, 0, 4096).unwrap();
        let again: Vec<Name> = again
            .into_iter()
            .filter(|name| !name.name.starts_with('.'))
            .collect();
        assert_eq!(names(&again), ["late"]);
        c.unlink(node, "late").unwrap();
        c.releasedir(node, fh).unwrap();
        c.rmdir(ROOT, "dir").unwrap();
    }
}

#[test]
fn renames_have_flags() {
    let Some((server, mut c)) = session("renames_have_flags", Options::default()) else {
        return;
    };
    for name in ["a", "b"] {
        fs::write(server.path(name), name).unwrap();
    }
    let taken = c.rename((ROOT, "a"), (ROOT, "b"), RENAME_NOREPLACE);
    refused(taken, &[Errno::EXIST]).unwrap();
    c.rename((ROOT, "a"), (ROOT, "b"), RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(server.path("a")).unwrap(), b"b");
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let sub = c.mkdir(dir.node, "sub", 0o755).unwrap();
    c.rename((ROOT, "a"), (sub.node, "a"), RENAME_NOREPLACE)
        .unwrap();
    assert_eq!(fs::read(server.path("dir/sub/a")).unwrap(), b"b");
    let below_itself = c.rename((ROOT, "dir"), (sub.node, "dir"), 0);
    refused(below_itself, &[Errno::INVAL]).unwrap();
    let none = c.rename((ROOT, "none"), (ROOT, "x"), 0);
    refused(none, &[Errno::NOENT]).unwrap();
    assert!(c.rename((ROOT, "b"), (ROOT, "x"), 1 << 20).is_err());
    assert!(server.path("b").exists());
}

#[test]
fn directories_are_made_and_removed() {
    let Some((server, mut c)) = session("directories_are_made_and_removed", Options::default())
    else {
        return;
    };
    let dir = c.mkdir(ROOT, "dir", 0o750).unwrap();
    refused(c.mkdir(ROOT, "dir", 0o750), &[Errno::EXIST]).unwrap();
    c.create(dir.node, "file", 0o600, O_RDWR).unwrap();
    let again = c.create(dir.node, "file", 0o600, O_RDWR | O_CREAT | O_EXCL);
    refused(again, &[Errno::EXIST]).unwrap();
    refused(c.rmdir(ROOT, "dir"), &[Errno::NOTEMPTY]).unwrap();
    refused(c.rmdir(dir.node, "file"), &[Errno::NOTDIR]).unwrap();
    let as_file = [Errno::ISDIR, Errno::PERM];
    refused(c.unlink(ROOT, "dir"), &as_file).unwrap();
    refused(c.unlink(dir.node, "none"), &[Errno::NOENT]).unwrap();
    c.unlink(dir.node, "file").unwrap();
    let fh = c.opendir(dir.node).unwrap();
    c.fsyncdir(dir.node, fh).unwrap();
    c.releasedir(dir.node, fh).unwrap();
    c.rmdir(ROOT, "dir").unwrap();
    assert!(!server.path("dir").exists());
    // Known, but gone: nothing can be made in it.
    refused(c.mkdir(dir.node, "x", 0o700), &[Errno::NOENT, Errno::STALE]).unwrap();
}

#[test]
fn nodes_live_as_long_as_they_are_known() {
    let Some((server, mut c)) = session("nodes_live_as_long_as_they_are_known", Options::default())
    else {
        return;
    };
    for name in ["one", "two"] {
        fs::write(server.path(name), name).unwrap();
    }
    let one = c.lookup(ROOT, "one").unwrap();
    let two = c.lookup(ROOT, "two").unwrap();
    assert_ne!(one.node, two.node);
    assert_eq!(c.lookup(ROOT, "one").unwrap().node, one.node);
    // Looked up twice, forgotten once: known.
    c.forget(one.node, 1).unwrap();
    assert_eq!(c.getattr(one.node).unwrap().size, 3);
    // Renamed behind our back: still the same file.
    fs::rename(server.path("one"), server.path("moved")).unwrap();
    fs::write(server.path("one"), b"another").unwrap();
    assert_eq!(c.getattr(one.node).unwrap().size, 3);
    assert_ne!(c.lookup(ROOT, "one").unwrap().node, one.node);
    assert_eq!(c.lookup(ROOT, "moved").unwrap().node, one.node);
    c.batch_forget(&[(one.node, 2), (two.node, 1)]).unwrap();
    refused(c.getattr(one.node), &UNKNOWN).unwrap();
    refused(c.getattr(two.node), &UNKNOWN).unwrap();
    assert_eq!(c.lookup(ROOT, "two").unwrap().attr.size, 3);
}

#[test]
fn a_new_session_knows_no_old_node() {
    let test = "a_new_session_knows_no_old_node";
    let Some((mut server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let (file, fh) = c.create(ROOT, "file", 0o600, O_RDWR).unwrap();
    let (other, _) = c.create(ROOT, "other", 0o600, O_RDWR).unwrap();
    drop(c);
    let mut c = server.client().unwrap();
    refused(c.getattr(file.node), &UNKNOWN).unwrap();
    assert!(c.read(file.node, fh, 0, 16).is_err());
    assert!(c.open(other.node, O_RDWR).is_err());
    assert_eq!(c.lookup(ROOT, "file").unwrap().attr.ino, file.attr.ino);
    // DESTROY and INIT on one connection are as good.
    c.destroy().unwrap();
    c.init().unwrap();
    assert_eq!(c.lookup(ROOT, "file").unwrap().attr.ino, file.attr.ino);
}
