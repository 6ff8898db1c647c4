//! Nodes without file handles, more of them than descriptors: each is found
//! where it was seen last, and nothing else is taken for it.

use std::ffi::{CStr, CString};
use std::fs;

use pericarp_share::{Errno, NodeId, Share};

use crate::scratch::{Scratch, me};

const ROOT: NodeId = NodeId::ROOT;
const FILES: usize = 600;
const DESCRIPTORS: u32 = 64;

fn name(number: usize) -> CString {
    CString::new(format!("f{number}")).unwrap()
}

fn share(scratch: &Scratch) -> Share {
    scratch.share_with(|o| (o.descriptors, o.file_handles) = (DESCRIPTORS, false))
}

/// Many files in a directory, each of a size of its own.
fn many(directory: &str) -> Scratch {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path(directory)).unwrap();
    for number in 0..FILES {
        let path = format!("{directory}/f{number}");
        scratch.file(&path, &"x".repeat(number));
    }
    scratch
}

/// Takes all descriptors from whoever can do without.
fn press(share: &Share, directory: NodeId) {
    for number in 0..FILES {
        let entry = share.lookup(directory, &name(number)).unwrap();
        assert_eq!(entry.attributes.size, number as u64);
        share.forget(entry.node, 1);
        assert!(share.counts().0 <= DESCRIPTORS);
    }
}

fn at(share: &Share, parent: NodeId, name: &CStr) -> NodeId {
    share.lookup(parent, name).unwrap().node
}

fn size(share: &Share, node: NodeId) -> Result<u64, Errno> {
    share.attributes(node, None).map(|known| known.size)
}

/// All from this one on are the files that they were.
fn all_are_there(share: &Share, nodes: &[NodeId], from: usize) {
    for (number, node) in nodes.iter().enumerate().skip(from) {
        assert_eq!(size(share, *node), Ok(number as u64));
    }
}

#[test]
fn all_nodes_are_found_where_they_are() {
    let scratch = many("a/b");
    let share = share(&scratch);
    let a = at(&share, ROOT, c"a");
    let b = at(&share, a, c"b");
    let nodes: Vec<_> = (0..FILES).map(|n| at(&share, b, &name(n))).collect();
    for (number, node) in nodes.iter().enumerate() {
        assert_eq!(size(&share, *node), Ok(number as u64));
        let opened = share.open_file(*node, libc::O_RDWR, false).unwrap();
        share.close_file(opened.handle).unwrap();
        assert_eq!(at(&share, b, &name(number)), *node, "another node");
        assert!(share.counts().0 <= DESCRIPTORS);
    }
    for node in &nodes {
        share.forget(*node, 2);
    }
    share.forget(a, 1);
    share.forget(b, 1);
    assert_eq!(share.counts(), (0, 0, 0));
}

#[test]
fn what_the_guest_moves_is_found_where_it_moved_to() {
    let scratch = many("a/b");
    let share = share(&scratch);
    let a = at(&share, ROOT, c"a");
    let b = at(&share, a, c"b");
    let nodes: Vec<_> = (0..FILES).map(|n| at(&share, b, &name(n))).collect();
    press(&share, b);
    share.rename(b, c"f7", a, c"seven", 0).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE.bits();
    share.rename(b, c"f8", b, c"f9", exchange).unwrap();
    share.rename(ROOT, c"a", ROOT, c"z", 0).unwrap();
    let linked = share.link(nodes[10], ROOT, c"ten").unwrap();
    assert_eq!(linked.node, nodes[10]);
    share.unlink(b, c"f10").unwrap();
    all_are_there(&share, &nodes, 20);
    all_are_there(&share, &nodes, 20);
    for number in [7, 8, 9, 10] {
        assert_eq!(size(&share, nodes[number]), Ok(number as u64));
    }
    assert_eq!(at(&share, b, c"f9"), nodes[8]);
    assert_eq!(at(&share, a, c"seven"), nodes[7]);
    assert_eq!(share.lookup(ROOT, c"a"), Err(Errno::NOENT));
    assert!(share.counts().0 <= DESCRIPTORS);
}

#[test]
fn what_the_guest_removes_lives_as_long_as_it_is_known() {
    let scratch = many("a");
    let share = share(&scratch);
    let a = at(&share, ROOT, c"a");
    let used = share.make_dir(&me(), a, c"used", 0o755, 0).unwrap().node;
    let nodes: Vec<_> = (0..FILES).map(|n| at(&share, a, &name(n))).collect();
    // They have been at their places for long now.
    all_are_there(&share, &nodes, 0);
    share.unlink(a, c"f3").unwrap();
    share.rename(a, c"f4", a, c"f5", 0).unwrap();
    share.remove_dir(a, c"used").unwrap();
    // Another file takes the first one's name, and its number perhaps.
    let new = share.create(&me(), a, c"f3", libc::O_RDWR, 0o644, 0, false);
    let new = new.unwrap();
    share.close_file(new.1.handle).unwrap();
    assert_ne!(new.0.node, nodes[3]);
    all_are_there(&share, &nodes, 10);
    for number in [3, 4, 5] {
        assert_eq!(size(&share, nodes[number]), Ok(number as u64));
        let links = share.attributes(nodes[number], None).unwrap().nlink;
        assert_eq!(links, u32::from(number == 4));
    }
    assert_eq!(share.attributes(used, None).map(|u| u.nlink), Ok(0));
    assert_eq!(share.lookup(used, c"x"), Err(Errno::NOENT));
}

/// A place that others changed leads nowhere until the file is seen again.
#[test]
fn what_others_move_is_stale_until_it_is_seen() {
    let scratch = many("a");
    let share = share(&scratch);
    let a = at(&share, ROOT, c"a");
    let nodes: Vec<_> = (0..FILES).map(|n| at(&share, a, &name(n))).collect();
    all_are_there(&share, &nodes, 100);
    fs::rename(scratch.path("a/f3"), scratch.path("elsewhere")).unwrap();
    fs::remove_file(scratch.path("a/f4")).unwrap();
    fs::rename(scratch.path("a/f6"), scratch.path("a/f5")).unwrap();
    scratch.file("a/f4", "another");
    for number in [3, 4, 5, 6] {
        assert_eq!(size(&share, nodes[number]), Err(Errno::STALE), "{number}");
    }
    assert_ne!(at(&share, a, c"f4"), nodes[4]);
    assert_eq!(at(&share, ROOT, c"elsewhere"), nodes[3]);
    assert_eq!(at(&share, a, c"f5"), nodes[6]);
    all_are_there(&share, &nodes, 100);
    assert_eq!(size(&share, nodes[3]), Ok(3));
    assert_eq!(size(&share, nodes[6]), Ok(6));
    // All of a directory moved away, and back.
    fs::rename(scratch.path("a"), scratch.path("b")).unwrap();
    for node in &nodes[100..200] {
        let _ = size(&share, *node);
    }
    fs::rename(scratch.path("b"), scratch.path("a")).unwrap();
    all_are_there(&share, &nodes, 100);
    assert!(share.counts().0 <= DESCRIPTORS);
}

/// Names come and go while nodes lose their descriptors: no file that is known
/// is ever lost by it.
#[test]
fn removing_races_with_the_pressure() {
    let scratch = many("a");
    let share = share(&scratch);
    let a = at(&share, ROOT, c"a");
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for part in 0..2 {
            let (share, over) = (&share, &over);
            scope.spawn(move || {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for number in (part..FILES).step_by(2) {
                        let node = at(share, a, &name(number));
                        share.forget(node, 1);
                    }
                }
            });
        }
        for turn in 0..400 {
            let flags = libc::O_RDWR;
            let made = share.create(&me(), a, c"made", flags, 0o644, 0, false);
            let (entry, opened) = made.unwrap();
            share.close_file(opened.handle).unwrap();
            if turn % 2 == 0 {
                std::thread::yield_now();
            }
            share.unlink(a, c"made").unwrap();
            let links = share.attributes(entry.node, None).map(|e| e.nlink);
            assert_eq!(links, Ok(0), "{turn}");
            share.forget(entry.node, 1);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
