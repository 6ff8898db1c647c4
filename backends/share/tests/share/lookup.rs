//! Names, nodes, and how they end.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use pericarp_share::{Errno, Handle, NodeId, SetAttributes, ShareError, Time};

use crate::scratch::{Scratch, me, open};

const ROOT: NodeId = NodeId::ROOT;

#[test]
fn an_entry_is_what_the_host_says() {
    let scratch = Scratch::new();
    scratch.file("f", "hello");
    let share = scratch.share();
    let entry = share.lookup(ROOT, c"f").unwrap();
    let meta = fs::metadata(scratch.path("f")).unwrap();
    let a = entry.attributes;
    assert_eq!((a.ino, a.size, a.mode), (meta.ino(), 5, meta.mode()));
    assert_eq!((a.nlink, a.blocks), (1, meta.blocks()));
    assert_eq!(
        (a.mtime, i64::from(a.mtime_ns)),
        (meta.mtime(), meta.mtime_nsec())
    );
    assert!(!entry.submount);
    assert_eq!(share.attributes(entry.node, None), Ok(a));
    assert_eq!(share.lookup(ROOT, c"f").unwrap().node, entry.node);
}

#[test]
fn names_that_are_none_are_refused_everywhere() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("d")).unwrap();
    scratch.file("f", "");
    fs::write(scratch.outside("secret"), "").unwrap();
    let share = scratch.share();
    let directory = share.lookup(ROOT, c"d").unwrap().node;
    let file = share.lookup(ROOT, c"f").unwrap().node;
    let long = CString::new("x".repeat(256)).unwrap();
    let names = [c"", c".", c"..", c"a/b", c"../secret", c"/etc", &*long];
    for name in names {
        for parent in [ROOT, directory] {
            let me = me();
            let refused = [
                share.lookup(parent, name).map(drop),
                share.make_dir(&me, parent, name, 0o755, 0).map(drop),
                share
                    .make_node(&me, parent, name, 0o100_644, 0, 0)
                    .map(drop),
                share.make_symlink(&me, parent, name, c"x").map(drop),
                share
                    .create(&me, parent, name, 0, 0o644, 0, false)
                    .map(drop),
                share.link(file, parent, name).map(drop),
                share.unlink(parent, name),
                share.remove_dir(parent, name),
                share.rename(parent, name, ROOT, c"n", 0),
                share.rename(ROOT, c"f", parent, name, 0),
            ];
            for result in refused {
                let errno = result.expect_err("refused");
                let expected = [Errno::NOENT, Errno::INVAL, Errno::NAMETOOLONG];
                assert!(expected.contains(&errno), "{name:?}: {errno}");
            }
        }
    }
    assert_eq!(fs::read_dir(scratch.root()).unwrap().count(), 2);
}

#[test]
fn unknown_nodes_and_handles_are_stale_and_bad() {
    let scratch = Scratch::new();
    scratch.file("f", "");
    let share = scratch.share_with(|o| o.xattr = true);
    let gone = share.lookup(ROOT, c"f").unwrap().node;
    share.forget(gone, 1);
    for node in [
        gone,
        NodeId(0),
        NodeId(2),
        NodeId(u64::MAX),
        NodeId(gone.0 ^ 1 << 40),
    ] {
        let stale = [
            share.lookup(node, c"x").map(drop),
            share.attributes(node, None).map(drop),
            share
                .set_attributes(node, None, &SetAttributes::default())
                .map(drop),
            share.read_link(node).map(drop),
            share.make_dir(&me(), node, c"x", 0, 0).map(drop),
            share.open_file(node, 0, false).map(drop),
            share.open_dir(node).map(drop),
            share.unlink(node, c"x"),
            share.rename(node, c"x", ROOT, c"y", 0),
            share.rename(ROOT, c"f", node, c"y", 0),
            share.link(node, ROOT, c"y").map(drop),
            share.access(&me(), node, 0),
            share.statistics(node).map(drop),
            share.get_xattr(node, c"user.x", 0).map(drop),
        ];
        for (place, result) in stale.into_iter().enumerate() {
            assert_eq!(result, Err(Errno::STALE), "{place}");
        }
    }
    for handle in [0, 1, u64::MAX, 1 << 32].map(Handle) {
        assert_eq!(share.file(handle).map(drop), Err(Errno::BADF));
        assert_eq!(share.close_file(handle), Err(Errno::BADF));
        assert_eq!(share.close_dir(handle), Err(Errno::BADF));
        assert_eq!(
            share.attributes(ROOT, Some(handle)).map(drop),
            Err(Errno::BADF)
        );
        assert_eq!(share.read_dir(handle, 0, &mut |_| true), Err(Errno::BADF));
    }
}

#[test]
fn forgetting_too_much_ends_one_node_and_never_the_root() {
    let scratch = Scratch::new();
    scratch.file("f", "");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    share.lookup(ROOT, c"f").unwrap();
    share.forget(node, 1);
    assert!(share.attributes(node, None).is_ok());
    share.forget(node, u64::MAX);
    share.forget(node, u64::MAX);
    assert_eq!(share.attributes(node, None), Err(Errno::STALE));
    share.forget(ROOT, u64::MAX);
    assert!(share.attributes(ROOT, None).is_ok());
    let again = share.lookup(ROOT, c"f").unwrap();
    assert_ne!(again.node, node);
    assert!(again.node.0 > 1);
    // Its slot has another node now.
    assert_eq!(share.attributes(node, None), Err(Errno::STALE));
    share.forget(node, 1);
    assert!(share.attributes(again.node, None).is_ok());
}

#[test]
fn a_reset_leaves_the_root() {
    let scratch = Scratch::new();
    scratch.file("f", "");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let handle = share.open_file(node, libc::O_RDWR, false).unwrap().handle;
    let directory = share.open_dir(ROOT).unwrap();
    let busy = share.file(handle).unwrap();
    share.reset();
    assert_eq!(share.attributes(node, None), Err(Errno::STALE));
    assert_eq!(share.file(handle).map(drop), Err(Errno::BADF));
    assert_eq!(share.close_dir(directory), Err(Errno::BADF));
    assert_eq!(share.counts(), (0, 0, 1));
    // Who is at work goes on.
    assert_eq!(rustix::io::pwrite(&*busy, b"x", 0), Ok(1));
    drop(busy);
    assert_eq!(share.counts(), (0, 0, 0));
    let again = share.lookup(ROOT, c"f").unwrap().node;
    let reopened = share.open_file(again, 0, false).unwrap().handle;
    assert_ne!((again, reopened), (node, handle));
}

#[test]
fn symbolic_links_are_read_and_never_followed() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("d")).unwrap();
    for (name, target) in [
        ("up", ".."),
        ("abs", "/"),
        ("in", "d"),
        ("magic", "/proc/self/root"),
    ] {
        symlink(target, scratch.path(name)).unwrap();
    }
    let share = scratch.share();
    for (name, target) in [
        (c"up", ".."),
        (c"abs", "/"),
        (c"in", "d"),
        (c"magic", "/proc/self/root"),
    ] {
        let entry = share.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attributes.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(share.read_link(entry.node).unwrap(), target.as_bytes());
        assert_eq!(share.lookup(entry.node, c"etc"), Err(Errno::NOTDIR));
        assert_eq!(
            share.open_file(entry.node, 0, false).map(drop),
            Err(Errno::LOOP)
        );
        assert_eq!(share.open_dir(entry.node), Err(Errno::NOTDIR));
        assert_eq!(
            share.make_dir(&me(), entry.node, c"n", 0, 0),
            Err(Errno::NOTDIR)
        );
        let created = share.create(&me(), ROOT, name, libc::O_WRONLY, 0o644, 0, false);
        assert_eq!(created.map(drop), Err(Errno::LOOP));
    }
    let directory = share.lookup(ROOT, c"d").unwrap().node;
    assert_eq!(share.read_link(directory), Err(Errno::INVAL));
}

#[test]
fn hard_links_are_one_node_with_two_names() {
    let scratch = Scratch::new();
    scratch.file("f", "x");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let linked = share.link(node, ROOT, c"g").unwrap();
    assert_eq!((linked.node, linked.attributes.nlink), (node, 2));
    share.unlink(ROOT, c"f").unwrap();
    assert_eq!(share.attributes(node, None).unwrap().nlink, 1);
    share.forget(node, 1);
    assert!(share.attributes(node, None).is_ok());
    share.forget(node, 1);
    assert!(share.attributes(node, None).is_err());
    let directory = share.make_dir(&me(), ROOT, c"d", 0o755, 0).unwrap().node;
    assert_eq!(share.link(directory, ROOT, c"e"), Err(Errno::PERM));
}

#[test]
fn attributes_are_changed_one_by_one() {
    let scratch = Scratch::new();
    scratch.file("f", "hello");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let set = SetAttributes {
        mode: Some(0o100_640),
        size: Some(2),
        atime: Some(Time::At(-5, 7)),
        mtime: Some(Time::At(1 << 33, 999_999_999)),
        ..SetAttributes::default()
    };
    let a = share.set_attributes(node, None, &set).unwrap();
    assert_eq!((a.mode & 0o7777, a.size), (0o640, 2));
    assert_eq!((a.atime, a.atime_ns), (-5, 7));
    assert_eq!((a.mtime, a.mtime_ns), (1 << 33, 999_999_999));
    let now = SetAttributes {
        mtime: Some(Time::Now),
        ..SetAttributes::default()
    };
    let b = share.set_attributes(node, None, &now).unwrap();
    assert!(b.mtime > 1_600_000_000 && b.mtime < 1 << 33);
    assert_eq!(b.atime, -5);
    for ns in [
        1_000_000_000,
        rustix::fs::UTIME_NOW as u32,
        rustix::fs::UTIME_OMIT as u32,
    ] {
        let set = SetAttributes {
            atime: Some(Time::At(0, ns)),
            ..SetAttributes::default()
        };
        assert_eq!(share.set_attributes(node, None, &set), Err(Errno::INVAL));
    }
    let size = |size| SetAttributes {
        size: Some(size),
        ..SetAttributes::default()
    };
    assert_eq!(
        share.set_attributes(node, None, &size(u64::MAX)),
        Err(Errno::FBIG)
    );
    assert_eq!(
        share.set_attributes(ROOT, None, &size(0)),
        Err(Errno::ISDIR)
    );
    let nobody = SetAttributes {
        uid: Some(u32::MAX),
        ..SetAttributes::default()
    };
    assert_eq!(share.set_attributes(node, None, &nobody), Err(Errno::INVAL));
}

#[test]
fn a_read_only_share_changes_nothing() {
    let scratch = Scratch::new();
    scratch.file("f", "x");
    fs::create_dir(scratch.path("d")).unwrap();
    let share = scratch.share_with(|o| (o.read_only, o.xattr) = (true, true));
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let handle = share.open_file(node, libc::O_RDONLY, false).unwrap().handle;
    let me = &me();
    let refused = [
        share.make_dir(me, ROOT, c"n", 0o755, 0).map(drop),
        share.make_node(me, ROOT, c"n", 0o100_644, 0, 0).map(drop),
        share.make_symlink(me, ROOT, c"n", c"x").map(drop),
        share.create(me, ROOT, c"n", 0, 0o644, 0, false).map(drop),
        share
            .create(me, ROOT, c"f", libc::O_RDWR, 0o644, 0, false)
            .map(drop),
        share
            .make_temporary(me, ROOT, libc::O_RDWR, 0o644, 0)
            .map(drop),
        share.link(node, ROOT, c"n").map(drop),
        share.unlink(ROOT, c"f"),
        share.remove_dir(ROOT, c"d"),
        share.rename(ROOT, c"f", ROOT, c"n", 0),
        share
            .set_attributes(node, None, &SetAttributes::default())
            .map(drop),
        share.open_file(node, libc::O_WRONLY, false).map(drop),
        share.open_file(node, libc::O_RDWR, false).map(drop),
        share.open_file(node, libc::O_TRUNC, false).map(drop),
        share.access(me, node, libc::W_OK),
        share.kill_privileges(handle),
        share.copy_range(handle, 0, handle, 10, 1).map(drop),
        share.set_xattr(node, c"user.x", b"", 0, false),
        share.remove_xattr(node, c"user.x"),
    ];
    for (place, result) in refused.into_iter().enumerate() {
        assert_eq!(result, Err(Errno::ROFS), "{place}");
    }
    let (entry, _) = share
        .create(me, ROOT, c"f", libc::O_CREAT, 0, 0, false)
        .unwrap();
    assert_eq!(entry.node, node);
    assert_eq!(fs::read(scratch.path("f")).unwrap(), b"x");
    assert_eq!(fs::read_dir(scratch.root()).unwrap().count(), 2);
}

#[test]
fn what_is_no_share_is_said_at_the_start() {
    use pericarp_share::{Share, ShareOptions};
    let scratch = Scratch::new();
    scratch.file("f", "");
    let file = fs::File::open(scratch.path("f")).unwrap();
    let result = Share::open(file.into(), ShareOptions::default());
    assert!(matches!(result, Err(ShareError::NotADirectory)));
    let with = |change: fn(&mut ShareOptions)| {
        let mut options = ShareOptions::default();
        change(&mut options);
        Share::open(open(&scratch.root()), options).unwrap_err()
    };
    assert!(matches!(
        with(|o| o.posix_acl = true),
        ShareError::AclWithoutXattr
    ));
    assert!(matches!(
        with(|o| o.descriptors = 63),
        ShareError::TooFew { .. }
    ));
    assert!(matches!(
        with(|o| o.open_files = u32::MAX),
        ShareError::Limit { .. }
    ));
}
