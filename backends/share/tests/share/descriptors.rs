//! The budget of descriptors, with file handles and without.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;

use pericarp_share::{Errno, NodeId, Share};

use crate::scratch::{Scratch, me, root};

const ROOT: NodeId = NodeId::ROOT;
const FILES: usize = 3000;

fn name(number: usize) -> CString {
    CString::new(format!("f{number}")).unwrap()
}

fn many() -> Scratch {
    let scratch = Scratch::new();
    for number in 0..FILES {
        scratch.file(name(number).to_str().unwrap(), &number.to_string());
    }
    scratch
}

/// Names and how many of them have a node.
fn read_all(share: &Share) -> (HashSet<CString>, Vec<NodeId>) {
    let (mut names, mut nodes, mut offset) = (HashSet::new(), Vec::new(), 0);
    let handle = share.open_dir(ROOT).unwrap();
    loop {
        let mut room = 100;
        let before = names.len();
        share
            .read_dir_plus(handle, offset, &mut |entry, node| {
                room -= 1;
                if room == 0 {
                    return false;
                }
                offset = entry.offset;
                assert!(names.insert(entry.name.to_owned()), "{:?}", entry.name);
                nodes.extend(node.map(|node| node.node));
                true
            })
            .unwrap();
        if names.len() == before {
            break;
        }
    }
    share.close_dir(handle).unwrap();
    (names, nodes)
}

#[test]
fn thousands_of_nodes_share_a_few_descriptors() {
    if !root() {
        return;
    }
    let scratch = many();
    let share = scratch.share_with(|o| o.descriptors = 64);
    let (names, nodes) = read_all(&share);
    assert_eq!((names.len(), nodes.len()), (FILES + 2, FILES));
    assert!(share.counts().0 <= 64);
    for number in 0..FILES {
        let entry = share.lookup(ROOT, &name(number)).unwrap();
        assert!(
            nodes.contains(&entry.node),
            "another node for the same file"
        );
        share.forget(entry.node, 1);
        assert!(share.counts().0 <= 64);
    }
    for node in &nodes {
        let attributes = share.attributes(*node, None).unwrap();
        let opened = share.open_file(*node, libc::O_RDONLY, false).unwrap();
        assert_eq!(share.attributes(ROOT, Some(opened.handle)), Ok(attributes));
        share.close_file(opened.handle).unwrap();
        assert!(share.counts().0 <= 64);
    }
    for node in nodes {
        share.forget(node, 1);
    }
    assert_eq!(share.counts(), (0, 0, 0));
}

#[test]
fn many_threads_stay_within_the_budget() {
    if !root() {
        return;
    }
    let scratch = many();
    let share = scratch.share_with(|o| o.descriptors = 64);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let share = &share;
            scope.spawn(move || {
                for step in 0..2000 {
                    let number = (step * 7 + thread * 131) % FILES;
                    let entry = share.lookup(ROOT, &name(number)).unwrap();
                    let size = number.to_string().len() as u64;
                    let attributes = share.attributes(entry.node, None).unwrap();
                    assert_eq!(attributes.size, size);
                    assert!(share.counts().0 <= 64);
                    share.forget(entry.node, 1);
                }
            });
        }
    });
    assert_eq!(share.counts(), (0, 0, 0));
}

#[test]
fn without_handles_the_limit_is_said_and_no_name_is_lost() {
    let scratch = many();
    let share = scratch.share_with(|o| (o.descriptors, o.file_handles) = (64, false));
    // What has no name any more lives by its descriptor alone.
    let used: Vec<_> = (0..64)
        .map(|number| {
            let node = share.lookup(ROOT, &name(number)).unwrap().node;
            share.unlink(ROOT, &name(number)).unwrap();
            node
        })
        .collect();
    let (names, nodes) = read_all(&share);
    assert_eq!((names.len(), nodes.len()), (FILES - 64 + 2, 0));
    let other = name(FILES - 1);
    assert_eq!(share.lookup(ROOT, &other), Err(Errno::NFILE));
    // Nothing is made that could not be answered.
    assert_eq!(
        share.make_dir(&me(), ROOT, c"new", 0o755, 0),
        Err(Errno::NFILE)
    );
    assert!(!scratch.path("new").exists());
    for (number, node) in used.iter().enumerate() {
        let attributes = share.attributes(*node, None).unwrap();
        let size = number.to_string().len() as u64;
        assert_eq!((attributes.nlink, attributes.size), (0, size));
    }
    share.forget(used[0], 1);
    assert!(share.lookup(ROOT, &other).is_ok());
}

#[test]
fn a_file_that_takes_the_number_of_another_is_not_taken_for_it() {
    if !root() {
        return;
    }
    let scratch = many();
    let share = scratch.share_with(|o| o.descriptors = 64);
    scratch.file("victim", "old");
    let old = share.lookup(ROOT, c"victim").unwrap();
    let _ = read_all(&share);
    let _ = read_all(&share);
    fs::remove_file(scratch.path("victim")).unwrap();
    // ext4 gives the lowest free number of the group.
    let mut tried = 0;
    let heir = loop {
        let name = format!("heir{tried}");
        scratch.file(&name, "new");
        if fs::metadata(scratch.path(&name)).unwrap().ino() == old.attributes.ino {
            break name;
        }
        tried += 1;
        if tried == 2000 {
            eprintln!("the number was not given again");
            return;
        }
    };
    let name = CString::new(heir).unwrap();
    let new = share.lookup(ROOT, &name).unwrap();
    assert_eq!(new.attributes.ino, old.attributes.ino);
    assert_ne!(new.node, old.node);
    assert_eq!(share.attributes(old.node, None), Err(Errno::STALE));
    assert_eq!(share.attributes(new.node, None), Ok(new.attributes));
}

#[test]
fn a_removed_directory_in_use_outlives_the_pressure() {
    if !root() {
        return;
    }
    let scratch = many();
    let share = scratch.share_with(|o| o.descriptors = 64);
    let used = share.make_dir(&me(), ROOT, c"used", 0o755, 0).unwrap().node;
    share.remove_dir(ROOT, c"used").unwrap();
    let _ = read_all(&share);
    let _ = read_all(&share);
    assert_eq!(share.attributes(used, None).map(|a| a.nlink), Ok(0));
    assert_eq!(share.lookup(used, c"x"), Err(Errno::NOENT));
}

#[test]
fn open_files_are_bounded() {
    let scratch = Scratch::new();
    scratch.file("f", "");
    let share = scratch.share_with(|o| o.open_files = 64);
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let handles: Vec<_> = (0..64)
        .map(|_| share.open_file(node, 0, false).unwrap().handle)
        .collect();
    assert_eq!(share.open_file(node, 0, false).map(drop), Err(Errno::NFILE));
    assert_eq!(share.open_dir(ROOT), Err(Errno::NFILE));
    let created = share.create(&me(), ROOT, c"n", libc::O_RDWR, 0o644, 0, false);
    assert_eq!(created.map(drop), Err(Errno::NFILE));
    assert!(!scratch.path("n").exists());
    share.close_file(handles[0]).unwrap();
    assert!(share.open_file(node, 0, false).is_ok());
}

#[test]
fn a_closed_file_in_use_keeps_its_descriptor() {
    use std::os::fd::{AsFd, AsRawFd};
    let scratch = Scratch::new();
    scratch.file("f", "secret");
    scratch.file("g", "other");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let other = share.lookup(ROOT, c"g").unwrap().node;
    let opened = share.open_file(node, 0, false).unwrap();
    let busy = share.file(opened.handle).unwrap();
    let number = busy.as_fd().as_raw_fd();
    let handle = opened.handle;
    drop(opened);
    share.close_file(handle).unwrap();
    assert_eq!(share.file(handle).map(drop), Err(Errno::BADF));
    for _ in 0..50 {
        let next = share.open_file(other, 0, false).unwrap();
        assert_ne!(next.file.as_fd().as_raw_fd(), number);
        assert_ne!(next.handle, handle);
        assert_eq!(share.file(handle).map(drop), Err(Errno::BADF));
        share.close_file(next.handle).unwrap();
    }
    let mut buffer = [0; 6];
    assert_eq!(rustix::io::pread(&*busy, &mut buffer, 0), Ok(6));
    assert_eq!(&buffer, b"secret");
}
