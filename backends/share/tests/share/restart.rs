//! Shares that end without a word and are gone on with by another: what a guest
//! knows and has open is as it was.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use pericarp_share::{Errno, Handle, NodeId, Restored, Share, ShareOptions, State, StateError};

use crate::mounts::{mount_with, unmount, with_own_mounts};
use crate::scratch::{Scratch, me, open};

const SHAPE: (u16, u16) = (2, 16);
const ROOT: NodeId = NodeId::ROOT;

fn state_file(scratch: &Scratch) -> File {
    let path = scratch.outside("state");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    file.set_len(State::bytes(SHAPE.0, SHAPE.1)).unwrap();
    file
}

fn kept(scratch: &Scratch, handles: bool) -> (Share, Restored) {
    let state = State::open(state_file(scratch), 0, SHAPE, [7; 64]).unwrap();
    let options = ShareOptions {
        descriptors: 512,
        open_files: 128,
        file_handles: handles,
        ..ShareOptions::default()
    };
    let (share, restored) = Share::open(open(&scratch.root()), options)
        .unwrap()
        .remember(state);
    share.state().unwrap().set_session(1);
    (share, restored)
}

fn ino(scratch: &Scratch, name: &str) -> u64 {
    fs::symlink_metadata(scratch.path(name)).unwrap().ino()
}

fn shown(share: &Share, node: NodeId) -> Result<u64, Errno> {
    share.attributes(node, None).map(|a| a.ino)
}

fn read(share: &Share, handle: Handle) -> Vec<u8> {
    let file = File::from(
        share
            .file(handle)
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .unwrap(),
    );
    let mut bytes = vec![0; 100];
    let len = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(len);
    bytes
}

fn all_comes_back(handles: bool) {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("a/b")).unwrap();
    scratch.file("a/b/file", "content");
    std::os::unix::fs::symlink("nowhere", scratch.path("a/link")).unwrap();
    let (share, restored) = kept(&scratch, handles);
    assert_eq!(restored, Restored::default());
    let a = share.lookup(ROOT, c"a").unwrap().node;
    let b = share.lookup(a, c"b").unwrap().node;
    let file = share.lookup(b, c"file").unwrap().node;
    assert_eq!(share.lookup(b, c"file").unwrap().node, file);
    let link = share.lookup(a, c"link").unwrap().node;
    let reading = share.open_file(file, libc::O_RDONLY, false).unwrap().handle;
    let closed = share.open_file(file, libc::O_RDONLY, false).unwrap().handle;
    let writing = share
        .open_file(file, libc::O_WRONLY | libc::O_APPEND | libc::O_TRUNC, false)
        .unwrap()
        .handle;
    let listing = share.open_dir(a).unwrap();
    share.close_file(closed).unwrap();
    let forgotten = share.lookup(ROOT, c"a").unwrap().node;
    share.forget(forgotten, 1);
    scratch.file("a/b/file", "content");
    drop(share);

    let (share, restored) = kept(&scratch, handles);
    assert_eq!((restored.nodes, restored.open, restored.lost), (4, 3, 0));
    assert_eq!(shown(&share, file), Ok(ino(&scratch, "a/b/file")));
    assert_eq!(shown(&share, a), Ok(ino(&scratch, "a")));
    assert_eq!(share.read_link(link).unwrap(), b"nowhere");
    assert_eq!(
        share.lookup(a, c"b").unwrap().node,
        b,
        "it is the same node"
    );
    share.forget(b, 1);
    // It was not cut off again.
    assert_eq!(read(&share, reading), b"content");
    assert!(share.file(writing).unwrap().traits().writable);
    assert!(!share.file(writing).unwrap().traits().readable);
    let mut names = Vec::new();
    share
        .read_dir(listing, 0, &mut |entry| {
            names.push(entry.name.to_owned());
            true
        })
        .unwrap();
    assert!(names.contains(&c"link".to_owned()), "{names:?}");
    assert_eq!(share.file(closed).unwrap_err(), Errno::BADF);
    // Numbers are given once.
    let new = share.open_file(file, libc::O_RDONLY, false).unwrap().handle;
    assert!(![reading, closed, writing, listing].contains(&new));
    // So often as it was looked up.
    share.forget(file, 1);
    assert!(shown(&share, file).is_ok());
    share.forget(file, 1);
    assert_eq!(shown(&share, file), Err(Errno::STALE));
    let again = share.lookup(b, c"file").unwrap().node;
    assert_ne!(again, file);
    drop(share);

    let (share, restored) = kept(&scratch, handles);
    // Who forgets what he has open has lost it; no kernel does.
    assert_eq!((restored.nodes, restored.open, restored.lost), (4, 1, 3));
    assert_eq!(shown(&share, file), Err(Errno::STALE));
    assert_eq!(shown(&share, again), Ok(ino(&scratch, "a/b/file")));
    // A guest that mounts anew has nothing.
    share.state().unwrap().set_session(0);
    drop(share);
    let (share, restored) = kept(&scratch, handles);
    assert_eq!(restored, Restored::default());
    assert_eq!(shown(&share, again), Err(Errno::STALE));
    assert_ne!(share.lookup(ROOT, c"a").unwrap().node, a);
}

#[test]
fn what_a_guest_knows_and_has_open_comes_back_by_name() {
    all_comes_back(false);
}

#[test]
fn what_a_guest_knows_and_has_open_comes_back_by_handle() {
    all_comes_back(true);
}

/// A container's root: its first change gives a file another time of its making.
#[test]
fn what_an_overlay_copies_up_is_the_same_file() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| scratch.outside(name));
        for dir in [&lower.join("dir"), &upper, &work] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(lower.join("dir/file"), "below").unwrap();
        let [lower, upper, work] = [lower, upper, work].map(|dir| dir.display().to_string());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        mount_with("overlay", &scratch.root(), "overlay", 0, &options);
        let born = || fs::metadata(scratch.path("dir/file")).unwrap().created();
        let (share, _) = kept(&scratch, false);
        let dir = share.lookup(ROOT, c"dir").unwrap().node;
        let file = share.lookup(dir, c"file").unwrap().node;
        let before = born().unwrap();
        let open = |flags| share.open_file(file, flags, false).unwrap().handle;
        let handles = [open(libc::O_RDONLY), open(libc::O_RDWR)];
        assert_ne!(born().unwrap(), before);
        drop(share);
        for round in 1..3 {
            let (share, restored) = kept(&scratch, false);
            assert_eq!((restored.open, restored.lost), (2, 0));
            assert_eq!(shown(&share, file), Ok(ino(&scratch, "dir/file")));
            assert_eq!(share.lookup(dir, c"file").unwrap().node, file, "{round}");
            for handle in handles {
                assert_eq!(read(&share, handle), b"below");
            }
        }
        unmount(&scratch.root());
    });
}

#[test]
fn places_follow_what_the_guest_moves() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("a/b")).unwrap();
    fs::create_dir(scratch.path("c")).unwrap();
    scratch.file("a/b/file", "1");
    scratch.file("c/other", "2");
    let (share, _) = kept(&scratch, false);
    let a = share.lookup(ROOT, c"a").unwrap().node;
    let b = share.lookup(a, c"b").unwrap().node;
    let c = share.lookup(ROOT, c"c").unwrap().node;
    let file = share.lookup(b, c"file").unwrap().node;
    let other = share.lookup(c, c"other").unwrap().node;
    share.rename(a, c"b", c, c"moved", 0).unwrap();
    share
        .rename(b, c"file", c, c"other", libc::RENAME_EXCHANGE)
        .unwrap();
    // A name with one byte less and one with many more.
    let long = CString::new("n".repeat(255)).unwrap();
    share.rename(ROOT, c"a", ROOT, &long, 0).unwrap();
    // What fails moves nothing.
    let failed = share.rename(ROOT, &long, c, c"moved", libc::RENAME_NOREPLACE);
    assert_eq!(failed, Err(Errno::EXIST));
    drop(share);
    let (share, _) = kept(&scratch, false);
    assert_eq!(shown(&share, file), Ok(ino(&scratch, "c/other")));
    assert_eq!(shown(&share, other), Ok(ino(&scratch, "c/moved/file")));
    let long = long.to_str().unwrap();
    assert_eq!(shown(&share, a), Ok(ino(&scratch, long)));
}

#[test]
fn what_is_gone_is_stale_and_nobody_else_is_taken_for_it() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("dir")).unwrap();
    for name in ["dir/gone", "dir/replaced", "kept"] {
        scratch.file(name, name);
    }
    let (share, _) = kept(&scratch, false);
    let dir = share.lookup(ROOT, c"dir").unwrap().node;
    let node = |parent, name: &CStr| share.lookup(parent, name).unwrap().node;
    let (gone, replaced) = (node(dir, c"gone"), node(dir, c"replaced"));
    let kept_node = node(ROOT, c"kept");
    let open = |node| share.open_file(node, libc::O_RDWR, false).unwrap().handle;
    let (gone_open, replaced_open, kept_open) = (open(gone), open(replaced), open(kept_node));
    share.unlink(dir, c"gone").unwrap();
    share.unlink(dir, c"replaced").unwrap();
    drop(share);
    // Most file systems give the number away at once.
    for _ in 0..3 {
        scratch.file("dir/replaced", "another");
        fs::rename(scratch.path("dir/replaced"), scratch.path("dir/r")).unwrap();
        fs::remove_file(scratch.path("dir/r")).unwrap();
    }
    scratch.file("dir/replaced", "another");
    let (share, restored) = kept(&scratch, false);
    assert_eq!((restored.nodes, restored.open, restored.lost), (4, 1, 2));
    for (node, handle) in [(gone, gone_open), (replaced, replaced_open)] {
        assert_eq!(shown(&share, node), Err(Errno::STALE));
        assert_eq!(share.file(handle).unwrap_err(), Errno::BADF);
    }
    assert_eq!(read(&share, kept_open), b"kept");
    let new = share.lookup(dir, c"replaced").unwrap().node;
    assert_ne!(new, replaced);
    share.forget(gone, 1);
    share.forget(replaced, 1);
    assert_eq!(shown(&share, new), Ok(ino(&scratch, "dir/replaced")));
}

#[test]
fn a_state_belongs_to_one_share() {
    let scratch = Scratch::new();
    drop(kept(&scratch, true));
    let open = |shape, identity| State::open(state_file(&scratch), 0, shape, identity);
    assert!(matches!(open(SHAPE, [8; 64]), Err(StateError::Other)));
    assert!(matches!(open((1, 32), [7; 64]), Err(StateError::Other)));
    state_file(&scratch).write_all_at(b"something", 0).unwrap();
    assert!(matches!(open(SHAPE, [7; 64]), Err(StateError::Other)));
}

/// Whatever is there after the magic number, nothing breaks: its owner is
/// trusted, but a file system may lose some of it.
#[test]
fn noise_is_survived() {
    let scratch = Scratch::new();
    scratch.file("file", "content");
    let (share, _) = kept(&scratch, false);
    let file = share.lookup(ROOT, c"file").unwrap().node;
    drop(share);
    let size = fs::metadata(scratch.outside("state")).unwrap().len();
    let mut random = 1u64;
    let mut next = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        random >> 33
    };
    for _ in 0..40 {
        let bytes: Vec<u8> = (0..4096).map(|_| next() as u8 % 5).collect();
        // Beyond the header: moves, slots and what is open, or nodes.
        let page = [1, 2070][next() as usize % 2] + next() % 40;
        let at = 4096 * page;
        state_file(&scratch).write_all_at(&bytes, at).unwrap();
        let (share, _) = kept(&scratch, false);
        let _ = shown(&share, file);
        let found = share.lookup(ROOT, c"file").unwrap().node;
        assert_eq!(shown(&share, found), Ok(ino(&scratch, "file")));
    }
    assert_eq!(fs::metadata(scratch.outside("state")).unwrap().len(), size);
}

/// Random acts and ends; whatever the guest knows is what it was.
#[test]
fn many_ends_lose_nothing() {
    for handles in [false, true] {
        lives(handles);
    }
}

/// All inode numbers below a directory.
fn inodes(path: &std::path::Path) -> Vec<u64> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        all.push(entry.metadata().unwrap().ino());
        if entry.file_type().unwrap().is_dir() {
            all.extend(inodes(&entry.path()));
        }
    }
    all
}

fn lives(handles: bool) {
    const NAMES: [&CStr; 5] = [c"a", c"b", c"c", c"d", c"e"];
    let scratch = Scratch::new();
    let (mut share, _) = kept(&scratch, handles);
    let mut random = 77u64;
    let mut below = move |n: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) as usize % n
    };
    // Nodes with their inode numbers and how often they were looked up.
    let mut known: HashMap<NodeId, (u64, u64)> = HashMap::new();
    let mut directories = vec![ROOT];
    for round in 0..600 {
        let (parent, name) = (directories[below(directories.len())], NAMES[below(5)]);
        let (to, new) = (directories[below(directories.len())], NAMES[below(5)]);
        let entry = match below(8) {
            0 => share.make_dir(&me(), parent, name, 0o755, 0),
            1 => share
                .create(&me(), parent, name, libc::O_RDWR, 0o644, 0, false)
                .map(|(entry, opened)| {
                    share.close_file(opened.handle).unwrap();
                    entry
                }),
            2 | 3 => share.lookup(parent, name),
            4 | 5 => {
                let flags = [0, libc::RENAME_EXCHANGE][below(2)];
                let _ = share.rename(parent, name, to, new, flags);
                continue;
            }
            6 => {
                // Not what has a name that is open only: it is lost.
                let _ = share.remove_dir(parent, name);
                continue;
            }
            _ => {
                drop(share);
                (share, _) = kept(&scratch, handles);
                let there = inodes(&scratch.root());
                for (node, (ino, _)) in &known {
                    let found = shown(&share, *node);
                    let gone = !there.contains(ino);
                    assert!(
                        found == Ok(*ino) || (gone && found == Err(Errno::STALE)),
                        "round {round}: {found:?} instead of {ino}"
                    );
                }
                continue;
            }
        };
        let Ok(entry) = entry else { continue };
        let ino = entry.attributes.ino;
        // The number is another file's now.
        known.retain(|id, (other, _)| *other != ino || *id == entry.node);
        let node = known.entry(entry.node).or_insert((ino, 0));
        assert_eq!(node.0, ino, "round {round}");
        node.1 += 1;
        if entry.attributes.mode & libc::S_IFMT == libc::S_IFDIR && directories.len() < 12 {
            directories.push(entry.node);
        }
        if below(10) == 0 {
            let (ino, lookups) = known[&entry.node];
            let there = |share: &Share| shown(share, entry.node) == Ok(ino);
            if entry.attributes.mode & libc::S_IFMT != libc::S_IFDIR {
                share.forget(entry.node, lookups - 1);
                assert!(lookups == 1 || there(&share), "round {round}");
                share.forget(entry.node, 1);
                assert!(!there(&share), "round {round}: more lookups than were");
                known.remove(&entry.node);
            }
        }
    }
    // Names that are there lead to the nodes that are known.
    for (node, (ino, _)) in known {
        if let Ok(found) = shown(&share, node) {
            assert_eq!(found, ino);
        }
    }
}
