//! A tree that changes while it is looked at: names swapped for symbolic links,
//! fifos and devices. Nothing outside is ever reached and nothing special opened.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use pericarp_share::{Errno, NodeId, Share};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};

use crate::scratch::{Scratch, me, root};

const ROOT: NodeId = NodeId::ROOT;

/// Runs `test` while another thread makes changes, again and again.
fn while_changing(change: impl Fn() + Sync, test: impl FnOnce()) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                change();
            }
        });
        let _stop = Stop(&over);
        test();
    });
}

/// Fails, rather than waits for ever, where a fifo is opened.
fn within_a_minute(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match wait.recv_timeout(Duration::from_secs(60)) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("stuck: a fifo was opened"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

fn exchange(a: &Path, b: &Path) {
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
}

/// All inode numbers below a directory, itself among them.
fn numbers(path: &Path) -> HashSet<u64> {
    let mut all = HashSet::from([fs::symlink_metadata(path).unwrap().ino()]);
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap() {
            all.extend(numbers(&entry.unwrap().path()));
        }
    }
    all
}

/// Whatever can be reached by these names, one after the other.
fn walk(share: &Share, names: &[&std::ffi::CStr], mut each: impl FnMut(u64)) -> usize {
    let mut at = ROOT;
    let mut known = Vec::new();
    for name in names {
        match share.lookup(at, name) {
            Ok(entry) => {
                each(entry.attributes.ino);
                known.push(entry.node);
                at = entry.node;
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::AGAIN) => break,
            Err(errno) => panic!("{name:?}: {errno}"),
        }
    }
    for node in &known {
        share.forget(*node, 1);
    }
    known.len()
}

#[test]
fn names_swapped_for_links_lead_nowhere() {
    let scratch = Scratch::new();
    let outside = scratch.outside("outside");
    fs::create_dir_all(outside.join("b")).unwrap();
    fs::write(outside.join("b/secret"), "secret").unwrap();
    let secrets = numbers(&outside);
    fs::create_dir_all(scratch.path("a/b")).unwrap();
    scratch.file("a/b/secret", "public");
    symlink("../outside", scratch.path("relative")).unwrap();
    symlink(&outside, scratch.path("absolute")).unwrap();
    symlink("/proc/self/cwd", scratch.path("magic")).unwrap();
    symlink(outside.join("b"), scratch.path("below")).unwrap();
    let share = scratch.share();
    let (a, b) = (scratch.path("a"), scratch.path("a/b"));
    let mut whole = 0;
    let change = || {
        for link in ["relative", "absolute", "magic"] {
            let link = scratch.path(link);
            exchange(&a, &link);
            exchange(&a, &link);
        }
        exchange(&b, &scratch.path("below"));
        exchange(&b, &scratch.path("below"));
    };
    while_changing(change, || {
        for _ in 0..10_000 {
            let names = [c"a", c"b", c"secret"];
            let far = walk(&share, &names, |ino| {
                assert!(!secrets.contains(&ino), "outside was reached");
            });
            whole += usize::from(far == names.len());
        }
    });
    assert!(whole > 100, "{whole} of 10000 walks came to the end");
    assert_eq!(share.counts().1, 0);
}

#[test]
fn directories_that_move_away_take_nobody_up() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("x/deep/deeper")).unwrap();
    fs::create_dir(scratch.path("y")).unwrap();
    let inside = numbers(&scratch.root());
    let share = scratch.share();
    let (here, there) = (scratch.path("x/deep"), scratch.path("y/deep"));
    let change = || {
        fs::rename(&here, &there).unwrap();
        fs::rename(&there, &here).unwrap();
    };
    while_changing(change, || {
        for turn in 0..10_000 {
            let first = if turn % 2 == 0 { c"x" } else { c"y" };
            walk(&share, &[first, c"deep", c"deeper"], |ino| {
                assert!(inside.contains(&ino));
            });
            if let Ok(entry) = share.lookup(ROOT, first) {
                assert_eq!(share.lookup(entry.node, c".."), Err(Errno::INVAL));
                share.forget(entry.node, 1);
            }
        }
    });
}

#[test]
fn special_files_are_nodes_and_never_opened() {
    if !root() {
        return;
    }
    within_a_minute(|| {
        let scratch = Scratch::new();
        let share = scratch.share();
        let me = me();
        let _socket = std::os::unix::net::UnixListener::bind(scratch.path("host")).unwrap();
        let kinds = [
            (c"fifo", libc::S_IFIFO, 0),
            (c"socket", libc::S_IFSOCK, 0),
            (c"null", libc::S_IFCHR, 0x103),
            (c"disk", libc::S_IFBLK, 0x700),
        ];
        for (name, kind, rdev) in kinds {
            let made = share
                .make_node(&me, ROOT, name, kind | 0o600, 0, rdev)
                .unwrap();
            let attributes = made.attributes;
            assert_eq!((attributes.mode, attributes.rdev), (kind | 0o600, rdev));
        }
        for name in [c"fifo", c"socket", c"null", c"disk", c"host"] {
            let node = share.lookup(ROOT, name).unwrap().node;
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
                let opened = share.open_file(node, flags, false).map(drop);
                assert_eq!(opened, Err(Errno::ACCESS), "{name:?}");
                let created = share.create(&me, ROOT, name, flags, 0o600, 0, false);
                assert_eq!(created.map(drop), Err(Errno::ACCESS), "{name:?}");
            }
            assert_eq!(share.open_dir(node), Err(Errno::NOTDIR));
            let size = pericarp_share::SetAttributes {
                size: Some(0),
                ..Default::default()
            };
            assert_eq!(share.set_attributes(node, None, &size), Err(Errno::INVAL));
            // What does not open it is as with any file.
            let mode = pericarp_share::SetAttributes {
                mode: Some(0o640),
                uid: Some(5),
                mtime: Some(pericarp_share::Time::At(7, 0)),
                ..Default::default()
            };
            let changed = share.set_attributes(node, None, &mode).unwrap();
            assert_eq!(
                (changed.mode & 0o777, changed.uid, changed.mtime),
                (0o640, 5, 7)
            );
        }
        let other = share.make_node(&me, ROOT, c"dir", libc::S_IFDIR, 0, 0);
        assert_eq!(other.map(drop), Err(Errno::INVAL));
        assert_eq!(share.counts().2, 0);
    });
}

#[test]
fn a_file_swapped_for_a_fifo_does_not_hold_anybody_up() {
    within_a_minute(|| {
        let scratch = Scratch::new();
        scratch.file("f", "hello");
        let (file, fifo) = (scratch.path("f"), scratch.path("fifo"));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let share = scratch.share();
        let (mut opened, mut refused) = (0, 0);
        while_changing(
            || exchange(&file, &fifo),
            || {
                for turn in 0..5000 {
                    let result = if turn % 2 == 0 {
                        share.create(&me(), ROOT, c"f", libc::O_RDONLY, 0o600, 0, false)
                    } else {
                        share.lookup(ROOT, c"f").and_then(|entry| {
                            let opened = share.open_file(entry.node, libc::O_RDONLY, false);
                            match opened {
                                Ok(opened) => Ok((entry, opened)),
                                Err(errno) => {
                                    share.forget(entry.node, 1);
                                    Err(errno)
                                }
                            }
                        })
                    };
                    match result {
                        Ok((entry, open)) => {
                            let mode = rustix::fs::fstat(&*open.file).unwrap().st_mode;
                            assert_eq!(mode & libc::S_IFMT, libc::S_IFREG);
                            share.close_file(open.handle).unwrap();
                            share.forget(entry.node, 1);
                            opened += 1;
                        }
                        Err(Errno::ACCESS) => refused += 1,
                        Err(errno) => panic!("{errno}"),
                    }
                }
            },
        );
        assert!(
            opened > 0 && refused > 0,
            "{opened} opened, {refused} refused"
        );
    });
}

#[test]
fn names_that_come_and_go_are_there_or_not() {
    let scratch = Scratch::new();
    let share = scratch.share();
    let path = scratch.path("f");
    let change = || {
        fs::write(&path, "x").unwrap();
        let _ = fs::remove_file(&path);
    };
    while_changing(change, || {
        for _ in 0..3000 {
            match share.create(&me(), ROOT, c"f", libc::O_RDWR, 0o600, 0, false) {
                Ok((entry, opened)) => {
                    share.close_file(opened.handle).unwrap();
                    share.forget(entry.node, 1);
                }
                Err(errno) => assert_eq!(errno, Errno::AGAIN),
            }
            if let Ok(entry) = share.lookup(ROOT, c"f") {
                share.forget(entry.node, 1);
            }
        }
    });
    assert_eq!(share.counts(), (0, 0, 0));
}
