//! Reading directories.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;

use pericarp_share::{Errno, Handle, NodeId, Share};

use crate::scratch::Scratch;

const ROOT: NodeId = NodeId::ROOT;

/// At most `most` names from a cookie on, and the cookie after them.
fn some(share: &Share, handle: Handle, offset: u64, most: usize) -> (Vec<CString>, u64) {
    let (mut names, mut next) = (Vec::new(), offset);
    share
        .read_dir(handle, offset, &mut |entry| {
            if names.len() == most {
                return false;
            }
            names.push(entry.name.to_owned());
            next = entry.offset;
            true
        })
        .unwrap();
    (names, next)
}

#[test]
fn cookies_survive_deletions() {
    let scratch = Scratch::new();
    for number in 0..2000 {
        scratch.file(&format!("f{number}"), "");
    }
    let share = scratch.share();
    let handle = share.open_dir(ROOT).unwrap();
    let (mut seen, mut offset) = (BTreeSet::new(), 0);
    loop {
        let (names, next) = some(&share, handle, offset, 37);
        if names.is_empty() {
            break;
        }
        for name in names {
            assert!(seen.insert(name.clone()), "{name:?} twice");
            if name.to_bytes().starts_with(b"f") {
                share.unlink(ROOT, &name).unwrap();
            }
        }
        offset = next;
    }
    assert_eq!(seen.len(), 2002);
    assert_eq!(fs::read_dir(scratch.root()).unwrap().count(), 0);
}

/// More of them than may keep what was read of them and not asked for.
#[test]
fn many_directories_read_side_by_side_lose_nothing() {
    let scratch = Scratch::new();
    for number in 0..300 {
        scratch.file(&format!("f{number}"), "");
    }
    let share = scratch.share_with(|o| (o.descriptors, o.open_files) = (64, 400));
    let handles: Vec<_> = (0..350).map(|_| share.open_dir(ROOT).unwrap()).collect();
    let mut seen = vec![(BTreeSet::new(), 0); handles.len()];
    for _ in 0..8 {
        for (handle, (seen, offset)) in handles.iter().zip(&mut seen) {
            let (names, next) = some(&share, *handle, *offset, 50);
            for name in names {
                assert!(seen.insert(name.clone()), "{name:?} twice");
            }
            *offset = next;
        }
    }
    assert!(seen.iter().all(|(seen, _)| seen.len() == 302));
}

#[test]
fn any_cookie_seen_can_be_gone_back_to() {
    let scratch = Scratch::new();
    for number in 0..1000 {
        scratch.file(&format!("f{number}"), "");
    }
    let share = scratch.share();
    let handle = share.open_dir(ROOT).unwrap();
    let mut all = Vec::new();
    share
        .read_dir(handle, 0, &mut |entry| {
            all.push((entry.name.to_owned(), entry.offset));
            true
        })
        .unwrap();
    assert_eq!(all.len(), 1002);
    for place in [0, 1, 500, 3, 999, 1000] {
        let (names, _) = some(&share, handle, all[place].1, 2);
        let expected: Vec<_> = all[place + 1..]
            .iter()
            .take(2)
            .map(|e| e.0.clone())
            .collect();
        assert_eq!(names, expected);
    }
    assert!(some(&share, handle, all[1001].1, 2).0.is_empty());
    assert_eq!(
        share.read_dir(handle, u64::MAX, &mut |_| true),
        Err(Errno::INVAL)
    );
    // From the start it is read anew.
    scratch.file("new", "");
    let (names, _) = some(&share, handle, 0, 5000);
    assert!(names.contains(&c"new".to_owned()));
}

#[test]
fn entries_have_kinds_and_the_root_nothing_above() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("d")).unwrap();
    scratch.file("f", "");
    let share = scratch.share();
    let root = fs::metadata(scratch.root()).unwrap().ino();
    let handle = share.open_dir(ROOT).unwrap();
    let mut seen = 0;
    share
        .read_dir(handle, 0, &mut |entry| {
            seen += 1;
            match entry.name.to_bytes() {
                b"." | b".." => assert_eq!((entry.ino, entry.kind), (root, 4)),
                b"d" => assert_eq!(entry.kind, 4),
                _ => assert_eq!(entry.kind, 8),
            }
            true
        })
        .unwrap();
    assert_eq!(seen, 4);
    assert_eq!(share.sync_dir(handle, false), Ok(()));
    assert_eq!(share.sync_dir(handle, true), Ok(()));
    assert_eq!(share.close_file(handle), Err(Errno::BADF));
    assert_eq!(share.file(handle).map(drop), Err(Errno::BADF));
    share.close_dir(handle).unwrap();
    assert_eq!(share.close_dir(handle), Err(Errno::BADF));
}

#[test]
fn what_is_not_taken_is_forgotten() {
    let scratch = Scratch::new();
    for number in 0..10 {
        scratch.file(&format!("f{number}"), "");
    }
    let share = scratch.share();
    let handle = share.open_dir(ROOT).unwrap();
    let mut taken = 0;
    share
        .read_dir_plus(handle, 0, &mut |entry, node| {
            let dots = entry.name.to_bytes().starts_with(b".");
            assert_eq!(node.is_none(), dots);
            taken += usize::from(!dots);
            taken < 4
        })
        .unwrap();
    assert_eq!(share.counts().1, 3);
}
