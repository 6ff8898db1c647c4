//! Who may do what: owners, set-user-ID and set-group-ID bits, special files,
//! and a share that is read-only whatever the guest's kernel believes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use pericarp_tests::fs::wire::posix::{
    O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY, S_IFCHR, S_IFIFO, S_IFMT, S_IFREG,
};
use pericarp_tests::fs::wire::{ROOT, WRITE_KILL_SUIDGID, Who, set};
use pericarp_tests::fs::{Change, Client, Options, Wrong, refused};
use pericarp_tests::parts::absent;
use rustix::fs::{CWD, FileType, makedev, mknodat};
use rustix::io::Errno;

use crate::session;

const USER: Who = Who {
    uid: 1000,
    gid: 1001,
};

fn owned(path: &Path, mode: u32, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn what_a_user_makes_is_the_users() {
    let Some((server, mut c)) = session("what_a_user_makes_is_the_users", Options::default())
    else {
        return;
    };
    owned(&server.dir(), 0o777, 0, 0);
    c.who = USER;
    let (file, _) = c.create(ROOT, "file", 0o644, O_RDWR).unwrap();
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let link = c.symlink(ROOT, "link", "x").unwrap();
    let fifo = c.mknod(ROOT, "fifo", S_IFIFO | 0o600, 0).unwrap();
    for (name, entry) in [("file", file), ("dir", dir), ("link", link), ("fifo", fifo)] {
        let host = fs::symlink_metadata(server.path(name)).unwrap();
        let ids = (host.uid(), host.gid());
        assert_eq!(ids, (USER.uid, USER.gid), "{name}");
        assert_eq!((entry.attr.uid, entry.attr.gid), ids, "{name}");
    }
    // And nobody makes what he may not.
    owned(&server.dir(), 0o755, 0, 0);
    let no = [Errno::ACCESS];
    refused(c.create(ROOT, "no", 0o644, O_RDWR), &no).unwrap();
    refused(c.mkdir(ROOT, "no", 0o755), &no).unwrap();
    refused(c.symlink(ROOT, "no", "x"), &no).unwrap();
    refused(c.mknod(ROOT, "no", S_IFREG | 0o600, 0), &no).unwrap();
    // The thread that did it is root again.
    c.who = Who::ROOT;
    c.create(ROOT, "yes", 0o600, O_RDWR).unwrap();
    assert_eq!(fs::metadata(server.path("yes")).unwrap().uid(), 0);
}

/// CVE-2022-0358: a set-group-ID file of a group that the user is not in.
#[test]
fn no_set_group_id_file_of_a_foreign_group() {
    let test = "no_set_group_id_file_of_a_foreign_group";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    fs::create_dir(server.path("dir")).unwrap();
    owned(&server.path("dir"), 0o2777, 0, 0);
    let dir = c.lookup(ROOT, "dir").unwrap().node;
    c.who = USER;
    c.create(dir, "created", 0o2755, O_RDWR).unwrap();
    c.mknod(dir, "node", S_IFREG | 0o2755, 0).unwrap();
    for name in ["dir/created", "dir/node"] {
        let host = fs::metadata(server.path(name)).unwrap();
        assert_eq!((host.uid(), host.gid()), (USER.uid, 0), "{name}");
        assert_eq!(host.mode() & 0o7000, 0, "{name}: {:o}", host.mode());
    }
    // A directory inherits the bit with the group.
    let sub = c.mkdir(dir, "sub", 0o755).unwrap();
    assert_eq!((sub.attr.gid, sub.attr.mode & 0o2000), (0, 0o2000));
}

#[test]
fn writes_of_users_clear_set_id_bits() {
    let Some((server, mut c)) = session("writes_of_users_clear_set_id_bits", Options::default())
    else {
        return;
    };
    let path = server.path("tool");
    fs::write(&path, b"#!").unwrap();
    let file = c.lookup(ROOT, "tool").unwrap().node;
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    owned(&path, 0o6777, 0, 0);
    let fh = c.open(file, O_RDWR).unwrap();
    c.who = USER;
    c.write_with(file, fh, 0, b"x", WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(mode(), 0o777);
    // The guest's kernel decides: without the flag the writer may keep them.
    owned(&path, 0o6777, 0, 0);
    c.who = Who::ROOT;
    c.write(file, fh, 0, b"y").unwrap();
    assert_eq!(mode(), 0o6777);
    let cut = Change {
        valid: set::SIZE | set::KILL_SUIDGID,
        size: 1,
        ..Change::default()
    };
    c.who = USER;
    c.setattr(file, cut).unwrap();
    assert_eq!(mode(), 0o777);
    assert_eq!(fs::read(&path).unwrap(), b"y");
}

/// CVE-2020-35517: a special file is the guest's own affair. Nobody waits for
/// the other end of a fifo, and no device of the host is opened.
#[test]
fn special_files_are_never_opened() {
    let test = "special_files_are_never_opened";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let mut names = vec!["fifo", "socket"];
    mknodat(CWD, server.path("fifo"), FileType::Fifo, 0o666.into(), 0).unwrap();
    let _listener = UnixListener::bind(server.path("socket")).unwrap();
    let zero = makedev(1, 5);
    let device = FileType::CharacterDevice;
    match mknodat(CWD, server.path("zero"), device, 0o666.into(), zero) {
        Ok(()) => names.push("zero"),
        Err(errno) => {
            absent(test, &format!("no device node can be made here ({errno})"));
        }
    }
    for name in names {
        let node = c.lookup(ROOT, name).unwrap().node;
        for flags in [
            O_RDONLY,
            O_WRONLY,
            O_RDWR,
            O_WRONLY | O_TRUNC,
            O_WRONLY | O_APPEND,
        ] {
            let opened = c.open(node, flags);
            let errno = opened.as_ref().err().and_then(Wrong::errno);
            assert!(errno.is_some(), "{name}, flags {flags:o}: {opened:?}");
        }
        // CREATE opens what is there as well.
        let created = c.create(ROOT, name, 0o600, O_RDWR);
        let errno = created.as_ref().err().and_then(Wrong::errno);
        assert!(errno.is_some(), "{name}: {created:?}");
        let cut = c.truncate(node, 0);
        assert!(!matches!(cut, Err(Wrong::Driver(_))), "{name}: {cut:?}");
        let dir = c.opendir(node).err().and_then(|wrong| wrong.errno());
        assert!(dir.is_some(), "{name} is no directory");
        // It is there, all the same, and can be renamed, linked and removed.
        assert_eq!(c.getattr(node).unwrap().nlink, 1);
        c.link(node, ROOT, "other").unwrap();
        c.rename((ROOT, "other"), (ROOT, "third"), 0).unwrap();
        c.unlink(ROOT, "third").unwrap();
    }
    if let Ok(made) = c.mknod(ROOT, "made", S_IFCHR | 0o600, 0x105) {
        assert_eq!((made.attr.mode & S_IFMT, made.attr.rdev), (S_IFCHR, 0x105));
        assert!(c.open(made.node, O_RDONLY).is_err());
    }
    c.create(ROOT, "file", 0o600, O_RDWR).unwrap();
}

#[test]
fn a_read_only_share_changes_nothing() {
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let Some((server, mut c)) = session("a_read_only_share_changes_nothing", options) else {
        return;
    };
    fs::write(server.path("file"), b"content").unwrap();
    fs::create_dir(server.path("dir")).unwrap();
    let before = picture(&server.dir());
    let file = c.lookup(ROOT, "file").unwrap().node;
    let dir = c.lookup(ROOT, "dir").unwrap().node;
    let ro = [Errno::ROFS];
    refused(c.create(ROOT, "new", 0o600, O_RDWR), &ro).unwrap();
    refused(c.mkdir(ROOT, "new", 0o700), &ro).unwrap();
    refused(c.mknod(ROOT, "new", S_IFREG | 0o600, 0), &ro).unwrap();
    refused(c.symlink(ROOT, "new", "x"), &ro).unwrap();
    refused(c.link(file, ROOT, "new"), &ro).unwrap();
    refused(c.unlink(ROOT, "file"), &ro).unwrap();
    refused(c.rmdir(ROOT, "dir"), &ro).unwrap();
    refused(c.rename((ROOT, "file"), (dir, "file"), 0), &ro).unwrap();
    refused(c.truncate(file, 0), &ro).unwrap();
    for valid in [set::MODE, set::UID, set::GID, set::MTIME] {
        let change = Change {
            valid,
            ..Change::default()
        };
        refused(c.setattr(file, change), &ro).unwrap();
    }
    refused(c.setxattr(file, "user.x", b"1", 0), &ro).unwrap();
    refused(c.removexattr(file, "user.x"), &ro).unwrap();
    for flags in [O_WRONLY, O_RDWR, O_RDONLY | O_TRUNC] {
        refused(c.open(file, flags), &ro).unwrap();
    }
    refused(
        c.tmpfile(ROOT, S_IFREG | 0o600, O_RDWR),
        &[Errno::ROFS, Errno::NOSYS],
    )
    .unwrap();
    // A handle that may read does not write.
    let fh = c.open(file, O_RDONLY).unwrap();
    let ro = [Errno::ROFS, Errno::BADF];
    refused(c.write(file, fh, 0, b"x"), &ro).unwrap();
    refused(c.fallocate(file, fh, 0, 4096, 0), &ro).unwrap();
    let copied = c.copy_file_range((file, fh, 0), (file, fh, 7), 7);
    refused(copied, &ro).unwrap();
    assert_eq!(c.read(file, fh, 0, 64).unwrap(), b"content");
    assert_eq!(c.list(ROOT, true, 4096).unwrap().len(), 2);
    assert_eq!(picture(&server.dir()), before);
    reads_work(&mut c, file);
}

fn reads_work(c: &mut Client, file: u64) {
    c.getattr(file).unwrap();
    c.statfs(ROOT).unwrap();
    c.listxattr(file, 4096).unwrap();
}

/// Names, contents and modes of a directory's files.
fn picture(dir: &Path) -> Vec<(String, Vec<u8>, u32, i64)> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let meta = entry.metadata().unwrap();
            let content = fs::read(entry.path()).unwrap_or_default();
            (name, content, meta.mode(), meta.mtime())
        })
        .collect();
    all.sort();
    all
}
