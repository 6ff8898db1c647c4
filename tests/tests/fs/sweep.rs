//! Every request once, with success where a share allows it, to a server that
//! is confined: its filter must let through whatever that takes. For writable
//! and read-only shares, with access control lists, and as a user.

use std::fs;
use std::os::unix::fs::{lchown, symlink};

use pericarp_tests::fs::wire::posix::{KEEP_SIZE, O_RDONLY, O_RDWR, S_IFIFO, SEEK_HOLE};
use pericarp_tests::fs::wire::{ROOT, WRITE_KILL_SUIDGID, Who, feature, set};
use pericarp_tests::fs::{Change, Client, Options, Server, Wrong};
use rustix::fs::{CWD, FileType, mknodat};
use rustix::io::Errno;

/// SYNCFS, which Linux sends for the whole of a mount.
const SYNCFS: u32 = 50;

/// What the server said, which is alive then.
fn alive<T>(answer: Result<T, Wrong>) -> Result<T, Errno> {
    answer.map_err(|wrong| match wrong {
        Wrong::Refused(errno) => errno,
        wrong => panic!("{wrong}"),
    })
}

/// Everything that looks and changes nothing.
fn looks(c: &mut Client) {
    let file = c.lookup(ROOT, "file").unwrap().node;
    let dir = c.lookup(ROOT, "dir").unwrap().node;
    let link = c.lookup(ROOT, "link").unwrap().node;
    let fifo = c.lookup(ROOT, "fifo").unwrap().node;
    for node in [ROOT, file, dir, link, fifo] {
        c.getattr(node).unwrap();
        c.statfs(node).unwrap();
        alive(c.access(node, 4)).unwrap();
        let _ = alive(c.getxattr(node, "user.x", 64));
        let _ = alive(c.getxattr(node, "system.posix_acl_access", 64));
        let _ = alive(c.listxattr(node, 4096));
    }
    assert_eq!(c.readlink(link).unwrap(), "file");
    let fh = c.open(file, O_RDONLY).unwrap();
    assert_eq!(c.read(file, fh, 0, 64).unwrap(), b"content");
    c.getattr_of(file, fh).unwrap();
    c.fsync(file, fh).unwrap();
    c.lseek(file, fh, 0, SEEK_HOLE).unwrap();
    assert_eq!(alive(c.flush(file, fh)), Err(Errno::NOSYS));
    c.release(file, fh).unwrap();
    let dirh = c.opendir(ROOT).unwrap();
    c.readdir(ROOT, dirh, 0, 4096).unwrap();
    c.readdirplus(ROOT, dirh, 0, 4096).unwrap();
    c.fsyncdir(ROOT, dirh).unwrap();
    c.releasedir(ROOT, dirh).unwrap();
    alive(c.ask(SYNCFS, ROOT, [0; 8], 0)).unwrap();
    c.batch_forget(&[(file, 1), (dir, 1), (link, 1), (fifo, 1)])
        .unwrap();
}

/// Everything that changes something, or is refused with `refused`.
fn changes(c: &mut Client, refused: Option<Errno>) {
    let as_told = |outcome: Result<(), Errno>| assert_eq!(outcome.err(), refused);
    let file = c.lookup(ROOT, "file").unwrap().node;
    let who = c.who;
    let change = |valid| Change {
        valid,
        mode: 0o640,
        size: 7,
        uid: who.uid,
        gid: who.gid,
        mtime: 1_000_000,
        ..Change::default()
    };
    let all = [
        change(set::MODE),
        change(set::UID | set::GID),
        change(set::SIZE),
        change(set::SIZE | set::KILL_SUIDGID),
        change(set::MTIME),
    ];
    for one in all {
        as_told(alive(c.setattr(file, one)).map(drop));
    }
    as_told(alive(c.mkdir(ROOT, "made", 0o755)).map(drop));
    as_told(alive(c.mknod(ROOT, "pipe", S_IFIFO | 0o600, 0)).map(drop));
    as_told(alive(c.symlink(ROOT, "points", "file")).map(drop));
    as_told(alive(c.link(file, ROOT, "linked")).map(drop));
    as_told(alive(c.rename((ROOT, "linked"), (ROOT, "again"), 0)));
    as_told(alive(c.unlink(ROOT, "again")));
    as_told(alive(c.rmdir(ROOT, "made")));
    as_told(alive(c.setxattr(file, "user.x", b"1", 0)));
    as_told(alive(c.removexattr(file, "user.x")));
    as_told(alive(c.tmpfile(ROOT, 0o100_600, O_RDWR)).map(drop));
    as_told(alive(c.create(ROOT, "new", 0o644, O_RDWR)).map(drop));
    as_told(alive(c.open(file, O_RDWR)).map(drop));
    if refused.is_some() {
        return;
    }
    let (one, fh) = c.create(ROOT, "second", 0o644, O_RDWR).unwrap();
    let data = [3; 5000];
    assert_eq!(c.write(one.node, fh, 0, &data).unwrap(), 5000);
    let killed = c.write_with(one.node, fh, 0, b"x", WRITE_KILL_SUIDGID);
    assert_eq!(killed.unwrap(), 1);
    c.fallocate(one.node, fh, 0, 100_000, KEEP_SIZE).unwrap();
    let (two, to) = c.create(ROOT, "third", 0o644, O_RDWR).unwrap();
    let copied = c.copy_file_range((one.node, fh, 0), (two.node, to, 0), 5000);
    assert_eq!(copied.unwrap(), 5000);
    c.fsync(two.node, to).unwrap();
    let by_handle = Change {
        fh: to,
        ..change(set::SIZE | set::FH | set::MODE)
    };
    c.setattr(two.node, by_handle).unwrap();
    c.unlink(ROOT, "third").unwrap();
    c.getattr_of(two.node, to).unwrap();
}

/// What each round begins with.
fn prepare(server: &Server) {
    for entry in fs::read_dir(server.dir()).unwrap() {
        let path = entry.unwrap().path();
        let gone = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        gone.unwrap();
    }
    let path = |name: &str| server.path(name);
    fs::write(path("file"), b"content").unwrap();
    fs::create_dir(path("dir")).unwrap();
    symlink("file", path("link")).unwrap();
    mknodat(CWD, path("fifo"), FileType::Fifo, 0o666.into(), 0).unwrap();
    if let Some(user) = server.options().user {
        for name in ["", "file", "dir", "link", "fifo"] {
            lchown(path(name), Some(user), Some(user)).unwrap();
        }
    }
}

/// All of it with every set of features: each has ways of its own.
fn sweep(test: &str, options: Options, refused: Option<Errno>) {
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    for features in [feature::LINUX, 0, u64::MAX] {
        prepare(&server);
        let user = Who {
            uid: 1000,
            gid: 1001,
        };
        let users = match server.options().user {
            // Its ids are all that it has.
            Some(id) => vec![Who { uid: id, gid: id }],
            None => vec![Who::ROOT, user],
        };
        for who in users {
            prepare(&server);
            let mut c = server.connect(&Client::setup()).unwrap();
            c.init_as(7, 41, features).unwrap();
            c.who = who;
            looks(&mut c);
            changes(&mut c, refused);
            drop(c);
            assert!(server.is_alive(), "{}", server.epitaph());
        }
    }
}

#[test]
fn every_request_of_a_writable_share() {
    sweep(
        "every_request_of_a_writable_share",
        Options::default(),
        None,
    );
}

#[test]
fn every_request_of_a_share_with_lists() {
    let options = Options {
        lists: true,
        ..Options::default()
    };
    sweep("every_request_of_a_share_with_lists", options, None);
}

#[test]
fn every_request_of_a_read_only_share() {
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let test = "every_request_of_a_read_only_share";
    sweep(test, options, Some(Errno::ROFS));
}

#[test]
fn every_request_of_a_users_share() {
    let options = Options {
        user: Some(1000),
        ..Options::default()
    };
    sweep("every_request_of_a_users_share", options, None);
}
