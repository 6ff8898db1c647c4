//! Extended attributes and access control lists.

use std::os::unix::fs::MetadataExt;

use pericarp_share::{Errno, IdMap, IdRange, NodeId, Xattr};

use crate::scratch::{Scratch, me, root};

const ROOT: NodeId = NodeId::ROOT;

/// A list: (tag, permissions, id).
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

const NO_ID: u32 = u32::MAX;

#[test]
fn attributes_are_off_unless_asked_for() {
    let scratch = Scratch::new();
    let share = scratch.share();
    let refused = [
        share.get_xattr(ROOT, c"user.a", 10).map(drop),
        share.list_xattr(ROOT, 10).map(drop),
        share.set_xattr(ROOT, c"user.a", b"x", 0, false),
        share.remove_xattr(ROOT, c"user.a"),
    ];
    assert!(refused.into_iter().all(|r| r == Err(Errno::NOSYS)));
}

#[test]
fn attributes_are_set_listed_and_removed() {
    let scratch = Scratch::new();
    scratch.file("f", "");
    let share = scratch.share_with(|o| o.xattr = true);
    let file = share.lookup(ROOT, c"f").unwrap().node;
    for node in [ROOT, file] {
        share
            .set_xattr(node, c"user.a", b"value", libc::XATTR_CREATE as u32, false)
            .unwrap();
        assert_eq!(
            share.set_xattr(node, c"user.a", b"", libc::XATTR_CREATE as u32, false),
            Err(Errno::EXIST)
        );
        assert_eq!(
            share.set_xattr(node, c"user.b", b"", libc::XATTR_REPLACE as u32, false),
            Err(Errno::NODATA)
        );
        assert_eq!(
            share.set_xattr(node, c"user.b", b"", 8, false),
            Err(Errno::INVAL)
        );
        assert_eq!(share.get_xattr(node, c"user.a", 0), Ok(Xattr::Size(5)));
        assert_eq!(share.get_xattr(node, c"user.a", 4), Err(Errno::RANGE));
        for size in [5, 100, u32::MAX] {
            assert_eq!(
                share.get_xattr(node, c"user.a", size),
                Ok(Xattr::Value(b"value".to_vec()))
            );
        }
        assert_eq!(share.list_xattr(node, 0), Ok(Xattr::Size(7)));
        assert_eq!(share.list_xattr(node, 6), Err(Errno::RANGE));
        assert_eq!(
            share.list_xattr(node, 7),
            Ok(Xattr::Value(b"user.a\0".to_vec()))
        );
        share.remove_xattr(node, c"user.a").unwrap();
        assert_eq!(share.get_xattr(node, c"user.a", 9), Err(Errno::NODATA));
        for name in [
            c"",
            c"system.nfs4_acl",
            c"system.posix_acl_access",
            c"nonsense",
        ] {
            assert!(share.get_xattr(node, name, 9).is_err(), "{name:?}");
            assert!(
                share.set_xattr(node, name, b"", 0, false).is_err(),
                "{name:?}"
            );
        }
    }
    let large = vec![0; 64 * 1024 + 1];
    assert_eq!(
        share.set_xattr(file, c"user.a", &large, 0, false),
        Err(Errno::TOOBIG)
    );
    if root() {
        // Of what can be reached by no open file.
        let link = share.make_symlink(&me(), ROOT, c"l", c"f").unwrap().node;
        match share.set_xattr(link, c"trusted.a", b"x", 0, false) {
            Ok(()) => {
                assert_eq!(share.get_xattr(link, c"trusted.a", 0), Ok(Xattr::Size(1)));
                assert_eq!(share.get_xattr(file, c"trusted.a", 0), Err(Errno::NODATA));
            }
            // Before Linux 6.13.
            Err(errno) => assert_eq!(errno, Errno::OPNOTSUPP),
        }
    }
}

#[test]
fn a_list_passes_with_its_ids_translated() {
    if !root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.file("f", "");
    let map = || {
        let range = IdRange {
            guest: 0,
            host: 100_000,
            count: 1000,
        };
        IdMap::new(vec![range]).unwrap()
    };
    let mapped = scratch.share_with(|o| {
        (o.xattr, o.posix_acl) = (true, true);
        (o.uid_map, o.gid_map) = (map(), map());
    });
    let plain = scratch.share_with(|o| (o.xattr, o.posix_acl) = (true, true));
    let name = c"system.posix_acl_access";
    let with = |id| {
        list(&[
            (1, 6, NO_ID),
            (2, 4, id),
            (4, 4, NO_ID),
            (0x10, 4, NO_ID),
            (0x20, 0, NO_ID),
        ])
    };
    let node = mapped.lookup(ROOT, c"f").unwrap().node;
    mapped.set_xattr(node, name, &with(7), 0, false).unwrap();
    assert_eq!(mapped.get_xattr(node, name, 100), Ok(Xattr::Value(with(7))));
    assert_eq!(
        mapped.set_xattr(node, name, &with(1000), 0, false),
        Err(Errno::INVAL)
    );
    let node = plain.lookup(ROOT, c"f").unwrap().node;
    assert_eq!(
        plain.get_xattr(node, name, 100),
        Ok(Xattr::Value(with(100_007)))
    );
    let names = plain.list_xattr(node, 100).unwrap();
    assert_eq!(names, Xattr::Value(b"system.posix_acl_access\0".to_vec()));
    // Where lists are off they are not shown.
    let without = scratch.share_with(|o| o.xattr = true);
    let node = without.lookup(ROOT, c"f").unwrap().node;
    assert_eq!(without.list_xattr(node, 100), Ok(Xattr::Value(Vec::new())));
    assert_eq!(without.get_xattr(node, name, 100), Err(Errno::OPNOTSUPP));
}

#[test]
fn a_list_set_by_a_stranger_takes_setgid() {
    let scratch = Scratch::new();
    let share = scratch.share_with(|o| (o.xattr, o.posix_acl) = (true, true));
    let access = list(&[(1, 7, NO_ID), (4, 5, NO_ID), (0x20, 5, NO_ID)]);
    for (kill, mode) in [(false, 0o2755), (true, 0o755)] {
        let node = share
            .create(&me(), ROOT, c"f", 0, 0o2755, 0, false)
            .unwrap()
            .0
            .node;
        let name = c"system.posix_acl_access";
        share.set_xattr(node, name, &access, 0, kill).unwrap();
        assert_eq!(share.attributes(node, None).unwrap().mode & 0o7777, mode);
        share.unlink(ROOT, c"f").unwrap();
    }
}

#[test]
fn the_umask_holds_unless_the_directory_has_a_default_list() {
    for posix_acl in [true, false] {
        let scratch = Scratch::new();
        let share = scratch.share_with(|o| (o.xattr, o.posix_acl) = (true, posix_acl));
        let make = |name| {
            let entry = share.make_dir(&me(), ROOT, name, 0o777, 0o077).unwrap();
            entry.attributes.mode & 0o777
        };
        assert_eq!(make(c"before"), 0o700);
        if posix_acl {
            let default = list(&[(1, 7, NO_ID), (4, 5, NO_ID), (0x20, 5, NO_ID)]);
            let name = c"system.posix_acl_default";
            share.set_xattr(ROOT, name, &default, 0, false).unwrap();
            assert_eq!(make(c"after"), 0o755);
            let created = share
                .create(&me(), ROOT, c"f", 0, 0o666, 0o077, false)
                .unwrap();
            assert_eq!(created.0.attributes.mode & 0o777, 0o644);
            assert_eq!(
                std::fs::metadata(scratch.path("f")).unwrap().mode() & 0o777,
                0o644
            );
        }
        assert_eq!(rustix::process::umask(rustix::fs::Mode::empty()).bits(), 0);
    }
}
