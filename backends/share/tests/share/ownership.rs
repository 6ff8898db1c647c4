//! Whose a new file is, and what a change takes from an old one. All as root,
//! since others create as themselves.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use pericarp_share::{Caller, Errno, IdMap, IdRange, NodeId, SetAttributes, Share};
use rustix::process::{getegid, geteuid, getgroups};
use rustix::thread::{Gid, set_thread_groups};

use crate::scratch::{Scratch, me, root};

const ROOT: NodeId = NodeId::ROOT;
const STRANGER: Caller = Caller {
    uid: 65534,
    gid: 65533,
    pid: 0,
    group: None,
};
const TEAM: u32 = 4711;

/// On a thread of its own, whose groups can be changed, and which must be who it
/// was at the end.
fn on_a_thread(test: impl FnOnce() + Send + 'static) {
    if !root() {
        return;
    }
    let thread = std::thread::spawn(|| {
        // We are in the team, as root may be in any group; callers are not.
        set_thread_groups(&[Gid::from_raw(TEAM)]).unwrap();
        test();
        assert!(geteuid().is_root() && getegid().is_root());
        assert_eq!(getgroups().unwrap(), [Gid::from_raw(TEAM)]);
        let sets = rustix::thread::capabilities(None).unwrap();
        assert_eq!(sets.effective, sets.permitted);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn team_directory(scratch: &Scratch) {
    chown(scratch.root(), Some(0), Some(TEAM)).unwrap();
    fs::set_permissions(scratch.root(), fs::Permissions::from_mode(0o2777)).unwrap();
}

#[test]
fn new_files_are_the_callers() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        let share = scratch.share();
        let s = &STRANGER;
        // A directory of root's: the guest's kernel has allowed it.
        let made = [
            share.make_dir(s, ROOT, c"d", 0o750, 0o022).unwrap(),
            share.make_node(s, ROOT, c"n", 0o100_666, 0o027, 0).unwrap(),
            share.make_symlink(s, ROOT, c"l", c"x").unwrap(),
            share
                .create(s, ROOT, c"c", 0, 0o666, 0o077, false)
                .unwrap()
                .0,
            share
                .make_temporary(s, ROOT, libc::O_RDWR, 0o600, 0)
                .unwrap()
                .0,
        ];
        for entry in made {
            let a = entry.attributes;
            assert_eq!((a.uid, a.gid), (65534, 65533), "{a:?}");
        }
        let modes = made.map(|entry| entry.attributes.mode & 0o7777);
        assert_eq!(modes, [0o750, 0o640, 0o777, 0o600, 0o600]);
        assert_eq!(share.make_dir(s, ROOT, c"d", 0, 0), Err(Errno::EXIST));
        let ours = share.make_dir(&me(), ROOT, c"ours", 0o755, 0).unwrap();
        assert_eq!((ours.attributes.uid, ours.attributes.gid), (0, 0));
    });
}

/// CVE-2022-0358: a caller outside the group of a setgid directory must not get
/// a program that runs as that group.
#[test]
fn strangers_make_no_setgid_programs_for_a_group() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        team_directory(&scratch);
        let share = scratch.share();
        let s = &STRANGER;
        let modes = |entry: pericarp_share::Entry| {
            assert_eq!(entry.attributes.gid, TEAM);
            entry.attributes.mode & 0o7777
        };
        let create = |caller: &Caller, name| {
            share
                .create(caller, ROOT, name, libc::O_RDWR, 0o2755, 0, false)
                .unwrap()
                .0
        };
        assert_eq!(modes(create(s, c"c")), 0o755);
        assert_eq!(
            modes(share.make_node(s, ROOT, c"n", 0o102_755, 0, 0).unwrap()),
            0o755
        );
        let unnamed = share
            .make_temporary(s, ROOT, libc::O_RDWR, 0o2755, 0)
            .unwrap()
            .0;
        assert_eq!(modes(unnamed), 0o755);
        // A directory passes the group on, whoever makes it.
        assert_eq!(
            modes(share.make_dir(s, ROOT, c"d", 0o755, 0).unwrap()),
            0o2755
        );
        // A member may.
        let member = Caller {
            group: Some(TEAM),
            ..STRANGER
        };
        assert_eq!(modes(create(&member, c"m")), 0o2755);
    });
}

fn suid_file(scratch: &Scratch, name: &str) {
    scratch.file(name, "program");
    let mode = fs::Permissions::from_mode(0o6775);
    fs::set_permissions(scratch.path(name), mode).unwrap();
}

fn mode(scratch: &Scratch, name: &str) -> u32 {
    fs::metadata(scratch.path(name)).unwrap().mode() & 0o7777
}

fn node(share: &Share) -> NodeId {
    share.lookup(ROOT, c"f").unwrap().node
}

#[test]
fn cutting_a_program_takes_its_rights_if_the_caller_has_none() {
    on_a_thread(|| {
        for kill in [false, true] {
            let expected = if kill { 0o775 } else { 0o6775 };
            let scratch = Scratch::new();
            let share = scratch.share();
            let cut = libc::O_WRONLY | libc::O_TRUNC;
            suid_file(&scratch, "f");
            share.open_file(node(&share), cut, kill).unwrap();
            assert_eq!(mode(&scratch, "f"), expected, "open");
            suid_file(&scratch, "f");
            share
                .create(&STRANGER, ROOT, c"f", cut, 0, 0, kill)
                .unwrap();
            assert_eq!(mode(&scratch, "f"), expected, "create");
            for by_handle in [false, true] {
                suid_file(&scratch, "f");
                let opened = share.open_file(node(&share), libc::O_RDWR, false).unwrap();
                let set = SetAttributes {
                    size: Some(3),
                    kill_suid_gid: kill,
                    ..Default::default()
                };
                let handle = by_handle.then_some(opened.handle);
                share.set_attributes(node(&share), handle, &set).unwrap();
                assert_eq!(mode(&scratch, "f"), expected, "size {by_handle}");
            }
            suid_file(&scratch, "f");
            share.open_file(node(&share), libc::O_WRONLY, kill).unwrap();
            assert_eq!(mode(&scratch, "f"), 0o6775, "an open alone changes nothing");
        }
    });
}

#[test]
fn a_write_takes_rights_where_it_is_to() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        suid_file(&scratch, "f");
        let share = scratch.share();
        let opened = share.open_file(node(&share), libc::O_RDWR, false).unwrap();
        rustix::io::pwrite(&*opened.file, b"x", 0).unwrap();
        assert_eq!(mode(&scratch, "f"), 0o6775, "root's own write");
        share.kill_privileges(opened.handle).unwrap();
        rustix::io::pwrite(&*opened.file, b"x", 0).unwrap();
        assert_eq!(mode(&scratch, "f"), 0o775);
        // Setgid without execution is a mark, not a right.
        let marked = fs::Permissions::from_mode(0o2664);
        fs::set_permissions(scratch.path("f"), marked).unwrap();
        share.kill_privileges(opened.handle).unwrap();
        assert_eq!(mode(&scratch, "f"), 0o2664);
    });
}

#[test]
fn a_new_owner_gets_no_rights_with_it() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        suid_file(&scratch, "f");
        let share = scratch.share();
        let owner = SetAttributes {
            uid: Some(65534),
            ..Default::default()
        };
        let changed = share.set_attributes(node(&share), None, &owner).unwrap();
        assert_eq!((changed.uid, changed.mode & 0o7777), (65534, 0o775));
        let both = SetAttributes {
            gid: Some(5),
            mode: Some(0o4755),
            ..Default::default()
        };
        let changed = share.set_attributes(node(&share), None, &both).unwrap();
        assert_eq!((changed.gid, changed.mode & 0o7777), (5, 0o4755));
    });
}

/// CVE-2021-20263: a changed program loses its file capabilities.
#[test]
fn any_change_takes_file_capabilities() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        scratch.file("f", "program");
        let share = scratch.share_with(|o| o.xattr = true);
        let node = node(&share);
        let name = c"security.capability";
        // VFS_CAP_REVISION_2 | effective, CAP_NET_RAW.
        let mut value = [0; 20];
        value[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
        value[4..8].copy_from_slice(&(1u32 << 13).to_le_bytes());
        let opened = share.open_file(node, libc::O_RDWR, false).unwrap();
        let size = SetAttributes {
            size: Some(2),
            ..Default::default()
        };
        let owner = SetAttributes {
            uid: Some(1),
            ..Default::default()
        };
        let changes: [&dyn Fn(); 4] = [
            &|| assert_eq!(rustix::io::pwrite(&*opened.file, b"x", 0), Ok(1)),
            &|| assert!(share.set_attributes(node, None, &size).is_ok()),
            &|| assert!(share.set_attributes(node, None, &owner).is_ok()),
            &|| {
                drop(
                    share
                        .open_file(node, libc::O_RDWR | libc::O_TRUNC, false)
                        .unwrap(),
                )
            },
        ];
        for (place, change) in changes.into_iter().enumerate() {
            share.set_xattr(node, name, &value, 0, false).unwrap();
            assert!(share.get_xattr(node, name, 100).is_ok());
            change();
            let left = share.get_xattr(node, name, 100);
            assert_eq!(left, Err(Errno::NODATA), "{place}");
        }
    });
}

#[test]
fn ids_are_those_of_the_map() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        let map = |count| {
            let range = IdRange {
                guest: 0,
                host: 100_000,
                count,
            };
            IdMap::new(vec![range]).unwrap()
        };
        fs::set_permissions(scratch.root(), fs::Permissions::from_mode(0o777)).unwrap();
        let share = scratch.share_with(|o| (o.uid_map, o.gid_map) = (map(1000), map(1000)));
        let caller = |uid| Caller {
            uid,
            gid: 7,
            ..Caller::default()
        };
        let entry = share.make_dir(&caller(0), ROOT, c"d", 0o755, 0).unwrap();
        assert_eq!((entry.attributes.uid, entry.attributes.gid), (0, 7));
        let meta = fs::metadata(scratch.path("d")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (100_000, 100_007));
        let refused = share.make_dir(&caller(1000), ROOT, c"e", 0o755, 0);
        assert_eq!(refused, Err(Errno::OVERFLOW));
        let set = |uid| SetAttributes {
            uid: Some(uid),
            ..Default::default()
        };
        share.set_attributes(entry.node, None, &set(999)).unwrap();
        assert_eq!(fs::metadata(scratch.path("d")).unwrap().uid(), 100_999);
        let refused = share.set_attributes(entry.node, None, &set(1000));
        assert_eq!(refused, Err(Errno::INVAL));
        // Root of the host is nobody here.
        scratch.file("host", "");
        let host = share.lookup(ROOT, c"host").unwrap().attributes;
        assert_eq!((host.uid, host.gid), (65534, 65534));
    });
}

#[test]
fn access_is_the_callers() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        scratch.file("f", "");
        fs::set_permissions(scratch.path("f"), fs::Permissions::from_mode(0o640)).unwrap();
        let share = scratch.share();
        let node = node(&share);
        assert_eq!(
            share.access(&STRANGER, node, libc::R_OK),
            Err(Errno::ACCESS)
        );
        assert_eq!(share.access(&me(), node, libc::R_OK | libc::W_OK), Ok(()));
        assert_eq!(share.access(&STRANGER, node, 1 << 20), Err(Errno::INVAL));
    });
}

/// Creation by somebody who is not root and cannot be anybody else.
#[test]
fn without_rights_we_create_as_ourselves() {
    on_a_thread(|| {
        let scratch = Scratch::new();
        fs::set_permissions(scratch.root(), fs::Permissions::from_mode(0o777)).unwrap();
        let share = scratch.share();
        let plain = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                use rustix::thread::{
                    Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
                };
                set_thread_groups(&[]).unwrap();
                let (uid, gid) = (Uid::from_raw(1001), Gid::from_raw(1001));
                set_thread_res_gid(gid, gid, gid).unwrap();
                set_thread_res_uid(uid, uid, uid).unwrap();
                share.make_dir(&STRANGER, ROOT, c"d", 0o700, 0)
            });
            thread.join().unwrap()
        });
        let a = plain.unwrap().attributes;
        assert_eq!((a.uid, a.gid), (1001, 1001));
    });
}
