//! Files: what is written is there, for the guest and for the host, under
//! whatever name or without one.

use std::fs;
use std::os::unix::fs::MetadataExt;

use pericarp_tests::fs::wire::posix::{
    KEEP_SIZE, O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY, PUNCH_HOLE, S_IFLNK, S_IFMT, S_IFREG,
    SEEK_DATA, SEEK_HOLE, XATTR_CREATE, XATTR_REPLACE,
};
use pericarp_tests::fs::wire::{Body, ROOT, WRITE_CACHE, Who, op, set};
use pericarp_tests::fs::{Change, Options, Pieces, Shape, refused};
use pericarp_tests::parts::absent;
use rustix::io::Errno;

use crate::{pattern, session};

#[test]
fn what_is_written_is_read_back() {
    let Some((server, mut c)) = session("what_is_written_is_read_back", Options::default()) else {
        return;
    };
    let data = pattern(1, 10_000);
    let (file, fh) = c.create(ROOT, "file", 0o640, O_RDWR).unwrap();
    assert_eq!(file.attr.mode, S_IFREG | 0o640);
    assert_eq!(c.write(file.node, fh, 0, &data).unwrap(), 10_000);
    assert_eq!(fs::read(server.path("file")).unwrap(), data);
    for (offset, size) in [(0, 10_000), (1, 1), (4095, 4098), (0, 4096), (9_999, 1)] {
        let end = offset + size as usize;
        let read = c.read(file.node, fh, offset as u64, size).unwrap();
        assert!(read == data[offset..end], "{size} bytes at {offset}");
    }
    // The end of the file is a short reply, never an error.
    assert_eq!(c.read(file.node, fh, 9_990, 4096).unwrap(), &data[9_990..]);
    assert_eq!(c.read(file.node, fh, 10_000, 4096).unwrap(), b"");
    assert_eq!(c.read(file.node, fh, 1 << 40, 4096).unwrap(), b"");
    // Behind the end: a hole.
    assert_eq!(c.write(file.node, fh, 20_000, b"end").unwrap(), 3);
    assert_eq!(c.read(file.node, fh, 10_000, 10_000).unwrap(), [0; 10_000]);
    assert_eq!(c.getattr(file.node).unwrap().size, 20_003);
    assert_eq!(c.getattr_of(file.node, fh).unwrap().size, 20_003);
    c.fsync(file.node, fh).unwrap();
    if let Err(wrong) = c.flush(file.node, fh) {
        // A server may tell the guest to leave it out.
        assert_eq!(wrong.errno(), Some(Errno::NOSYS), "{wrong}");
    }
    c.release(file.node, fh).unwrap();
    refused(c.read(file.node, fh, 0, 16), &[Errno::BADF]).unwrap();
}

#[test]
fn every_shape_of_a_request_means_the_same() {
    let Some((server, mut c)) = session(
        "every_shape_of_a_request_means_the_same",
        Options::default(),
    ) else {
        return;
    };
    let data = pattern(2, 50);
    fs::write(server.path("file"), &data).unwrap();
    let pieces = [
        Pieces::HeaderAndRest,
        Pieces::Whole,
        Pieces::Of(1),
        Pieces::Of(3),
        Pieces::Of(17),
        Pieces::Of(39),
        Pieces::Of(41),
    ];
    for request in pieces {
        for reply in pieces {
            for indirect in [false, true] {
                c.shape = Shape {
                    request,
                    reply,
                    indirect,
                };
                let file = c.lookup(ROOT, "file").unwrap();
                let fh = c.open(file.node, O_RDWR).unwrap();
                let read = c.read(file.node, fh, 0, 64).unwrap();
                assert!(read == data, "{:?}", c.shape);
                assert_eq!(c.write(file.node, fh, 0, &data).unwrap(), 50);
                assert_eq!(c.getattr(file.node).unwrap().size, 50);
                c.release(file.node, fh).unwrap();
                c.forget(file.node, 1).unwrap();
            }
        }
    }
    assert_eq!(fs::read(server.path("file")).unwrap(), data);
}

#[test]
fn the_largest_transfer_is_one_request() {
    let Some((server, mut c)) = session("the_largest_transfer_is_one_request", Options::default())
    else {
        return;
    };
    assert!(c.agreed.max_write >= 128 << 10, "{:?}", c.agreed);
    let data = pattern(3, c.agreed.max_write as usize);
    let (file, fh) = c.create(ROOT, "file", 0o600, O_RDWR).unwrap();
    // Pages as a guest scatters them, and odd ones.
    for size in [4096, 5000] {
        c.shape.request = Pieces::Of(size);
        c.shape.reply = Pieces::Of(size);
        let len = data.len() as u32;
        assert_eq!(c.write(file.node, fh, 7, &data).unwrap(), len);
        assert!(c.read(file.node, fh, 7, len).unwrap() == data);
    }
    assert!(fs::read(server.path("file")).unwrap()[7..] == data);
}

#[test]
fn appends_go_to_the_end() {
    let Some((server, mut c)) = session("appends_go_to_the_end", Options::default()) else {
        return;
    };
    fs::write(server.path("log"), b"one ").unwrap();
    let file = c.lookup(ROOT, "log").unwrap();
    c.file_flags = O_WRONLY | O_APPEND;
    let fh = c.open(file.node, c.file_flags).unwrap();
    c.write(file.node, fh, 0, b"two ").unwrap();
    // Somebody else was there first.
    fs::write(server.path("log"), b"one two three ").unwrap();
    c.write(file.node, fh, 8, b"four").unwrap();
    let log = fs::read_to_string(server.path("log")).unwrap();
    assert_eq!(log, "one two three four");
}

/// A guest may take O_APPEND back without a word, and writes pages of a mapping
/// back through whatever is open for writing.
#[test]
fn appending_is_of_each_write() {
    let Some((server, mut c)) = session("appending_is_of_each_write", Options::default()) else {
        return;
    };
    fs::write(server.path("log"), b"one two").unwrap();
    let file = c.lookup(ROOT, "log").unwrap();
    let fh = c.open(file.node, O_RDWR | O_APPEND).unwrap();
    // Pages that were cached belong where they are.
    c.file_flags = O_RDWR | O_APPEND;
    c.write_with(file.node, fh, 0, b"ONE", WRITE_CACHE).unwrap();
    // The flag was cleared by fcntl.
    c.file_flags = O_RDWR;
    c.write(file.node, fh, 4, b"TWO").unwrap();
    // And set for what was opened without.
    let other = c.open(file.node, O_WRONLY).unwrap();
    c.file_flags = O_WRONLY | O_APPEND;
    c.write(file.node, other, 0, b" three").unwrap();
    let log = fs::read_to_string(server.path("log")).unwrap();
    assert_eq!(log, "ONE TWO three");
}

#[test]
fn files_are_cut_and_grown() {
    let Some((server, mut c)) = session("files_are_cut_and_grown", Options::default()) else {
        return;
    };
    fs::write(server.path("file"), [7; 1000]).unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    assert_eq!(c.truncate(file.node, 10).unwrap().size, 10);
    assert_eq!(c.truncate(file.node, 2000).unwrap().size, 2000);
    let fh = c.open(file.node, O_RDWR).unwrap();
    let want = [&[7; 10][..], &[0; 1990]].concat();
    assert_eq!(c.read(file.node, fh, 0, 4096).unwrap(), want);
    let by_handle = Change {
        valid: set::SIZE | set::FH,
        fh,
        size: 5,
        ..Change::default()
    };
    assert_eq!(c.setattr(file.node, by_handle).unwrap().size, 5);
    assert_eq!(fs::read(server.path("file")).unwrap(), [7; 5]);
    c.open(file.node, O_WRONLY | O_TRUNC).unwrap();
    assert_eq!(c.getattr(file.node).unwrap().size, 0);
}

#[test]
fn attributes_are_set_and_kept() {
    let Some((server, mut c)) = session("attributes_are_set_and_kept", Options::default()) else {
        return;
    };
    fs::write(server.path("file"), b"x").unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    let change = Change {
        valid: set::MODE | set::UID | set::GID | set::MTIME,
        mode: S_IFREG | 0o604,
        uid: 1001,
        gid: 1002,
        mtime: 86_400,
        ..Change::default()
    };
    let attr = c.setattr(file.node, change).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.mtime), (1001, 1002, 86_400));
    let host = fs::metadata(server.path("file")).unwrap();
    assert_eq!(host.mode(), S_IFREG | 0o604);
    assert_eq!((host.uid(), host.gid(), host.mtime()), (1001, 1002, 86_400));
    assert_eq!((attr.ino, attr.nlink), (host.ino(), 1));
}

#[test]
fn an_open_file_outlives_its_name() {
    let Some((_server, mut c)) = session("an_open_file_outlives_its_name", Options::default())
    else {
        return;
    };
    let (file, fh) = c.create(ROOT, "gone", 0o600, O_RDWR).unwrap();
    c.write(file.node, fh, 0, b"before").unwrap();
    c.unlink(ROOT, "gone").unwrap();
    refused(c.lookup(ROOT, "gone"), &[Errno::NOENT]).unwrap();
    c.write(file.node, fh, 6, b" after").unwrap();
    assert_eq!(c.read(file.node, fh, 0, 64).unwrap(), b"before after");
    assert_eq!(c.getattr_of(file.node, fh).unwrap().nlink, 0);
    assert_eq!(c.truncate(file.node, 3).unwrap().size, 3);
    // Another one of that name is another file.
    let (other, _) = c.create(ROOT, "gone", 0o600, O_RDWR).unwrap();
    assert_ne!((other.node, other.generation), (file.node, file.generation));
    c.release(file.node, fh).unwrap();
    c.forget(file.node, 1).unwrap();
    assert_eq!(c.getattr(other.node).unwrap().size, 0);
}

#[test]
fn a_file_renamed_over_stays_open() {
    let Some((server, mut c)) = session("a_file_renamed_over_stays_open", Options::default())
    else {
        return;
    };
    fs::write(server.path("old"), b"old").unwrap();
    fs::write(server.path("new"), b"new").unwrap();
    let old = c.lookup(ROOT, "old").unwrap();
    let new = c.lookup(ROOT, "new").unwrap();
    let fh = c.open(old.node, O_RDONLY).unwrap();
    c.rename((ROOT, "new"), (ROOT, "old"), 0).unwrap();
    assert_eq!(c.read(old.node, fh, 0, 16).unwrap(), b"old");
    assert_eq!(c.lookup(ROOT, "old").unwrap().node, new.node);
    refused(c.lookup(ROOT, "new"), &[Errno::NOENT]).unwrap();
    let fh = c.open(new.node, O_RDONLY).unwrap();
    assert_eq!(c.read(new.node, fh, 0, 16).unwrap(), b"new");
}

#[test]
fn hard_links_are_one_node() {
    let Some((server, mut c)) = session("hard_links_are_one_node", Options::default()) else {
        return;
    };
    let (file, fh) = c.create(ROOT, "first", 0o600, O_RDWR).unwrap();
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let second = c.link(file.node, dir.node, "second").unwrap();
    assert_eq!((second.node, second.attr.nlink), (file.node, 2));
    fs::hard_link(server.path("first"), server.path("third")).unwrap();
    let third = c.lookup(ROOT, "third").unwrap();
    assert_eq!((third.node, third.attr.nlink), (file.node, 3));
    c.unlink(ROOT, "first").unwrap();
    c.write(file.node, fh, 0, b"shared").unwrap();
    assert_eq!(fs::read(server.path("dir/second")).unwrap(), b"shared");
    refused(c.link(dir.node, ROOT, "no"), &[Errno::PERM]).unwrap();
}

#[test]
fn symbolic_links_are_read_and_not_followed() {
    let Some((server, mut c)) = session(
        "symbolic_links_are_read_and_not_followed",
        Options::default(),
    ) else {
        return;
    };
    fs::write(server.path("target"), b"secret").unwrap();
    let link = c.symlink(ROOT, "link", "target").unwrap();
    assert_eq!(link.attr.mode & S_IFMT, S_IFLNK);
    assert_eq!(c.readlink(link.node).unwrap(), "target");
    assert_eq!(c.lookup(ROOT, "link").unwrap().node, link.node);
    // A guest's kernel follows it by itself; a node is the link alone.
    let no = [Errno::LOOP, Errno::INVAL, Errno::BADF];
    refused(c.open(link.node, O_RDONLY), &no).unwrap();
    let not_a_dir = [Errno::NOTDIR, Errno::LOOP];
    refused(c.lookup(link.node, "x"), &not_a_dir).unwrap();
    assert!(c.truncate(link.node, 0).is_err());
    assert_eq!(fs::read(server.path("target")).unwrap(), b"secret");
    let target = c.lookup(ROOT, "target").unwrap();
    refused(c.readlink(target.node), &[Errno::INVAL, Errno::NOENT]).unwrap();
    // A target has no form: the host never reads it.
    let long = "../".repeat(1300);
    let link = c.symlink(ROOT, "long", &long).unwrap();
    assert_eq!(c.readlink(link.node).unwrap(), long);
}

#[test]
fn holes_are_found() {
    let Some((server, mut c)) = session("holes_are_found", Options::default()) else {
        return;
    };
    const MIB: u64 = 1 << 20;
    fs::write(server.path("file"), b"").unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    let fh = c.open(file.node, O_RDWR).unwrap();
    c.write(file.node, fh, MIB, &pattern(4, 1 << 16)).unwrap();
    c.truncate(file.node, 4 * MIB).unwrap();
    c.fsync(file.node, fh).unwrap();
    assert_eq!(c.lseek(file.node, fh, 0, SEEK_DATA).unwrap(), MIB);
    assert_eq!(c.lseek(file.node, fh, 0, SEEK_HOLE).unwrap(), 0);
    let hole = c.lseek(file.node, fh, MIB, SEEK_HOLE).unwrap();
    assert_eq!(hole, MIB + (1 << 16));
    refused(c.lseek(file.node, fh, hole, SEEK_DATA), &[Errno::NXIO]).unwrap();
    // A punched one; the size stays.
    c.fallocate(file.node, fh, MIB, 1 << 16, PUNCH_HOLE | KEEP_SIZE)
        .unwrap();
    refused(c.lseek(file.node, fh, 0, SEEK_DATA), &[Errno::NXIO]).unwrap();
    assert_eq!(c.read(file.node, fh, MIB, 16).unwrap(), [0; 16]);
    assert_eq!(c.getattr(file.node).unwrap().size, 4 * MIB);
    // Space that is there before data is.
    c.fallocate(file.node, fh, 4 * MIB, MIB, 0).unwrap();
    let attr = c.getattr(file.node).unwrap();
    assert_eq!(attr.size, 5 * MIB);
    assert!(attr.blocks >= 2048, "{attr:?}");
    c.fallocate(file.node, fh, 6 * MIB, MIB, KEEP_SIZE).unwrap();
    assert_eq!(c.getattr(file.node).unwrap().size, 5 * MIB);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let Some((server, mut c)) = session("ranges_are_copied_on_the_host", Options::default()) else {
        return;
    };
    let data = pattern(5, 200_000);
    fs::write(server.path("from"), &data).unwrap();
    let from = c.lookup(ROOT, "from").unwrap();
    let reader = c.open(from.node, O_RDONLY).unwrap();
    let (to, writer) = c.create(ROOT, "to", 0o600, O_WRONLY).unwrap();
    let mut done = 0;
    while done < 150_000 {
        let source = (from.node, reader, 1000 + done);
        let copied = c
            .copy_file_range(source, (to.node, writer, 500 + done), 150_000 - done)
            .unwrap();
        assert!(copied > 0);
        done += u64::from(copied);
    }
    let copy = fs::read(server.path("to")).unwrap();
    assert!(copy[500..] == data[1000..151_000], "{}", copy.len());
    // Nothing is left behind the end.
    let source = (from.node, reader, 200_000);
    let none = c.copy_file_range(source, (to.node, writer, 0), 10);
    assert_eq!(none.unwrap(), 0);
}

#[test]
fn a_file_without_a_name_gets_one() {
    let test = "a_file_without_a_name_gets_one";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR;
    if let Err(errno) = rustix::fs::open(server.dir(), flags, 0o600.into()) {
        absent(test, &format!("the host has no O_TMPFILE here ({errno})"));
        return;
    }
    c.who = Who {
        uid: 1000,
        gid: 1001,
    };
    fs::set_permissions(
        server.dir(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let (file, fh) = c.tmpfile(ROOT, S_IFREG | 0o640, O_RDWR).unwrap();
    assert_eq!(file.attr.nlink, 0);
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 1001));
    c.write(file.node, fh, 0, b"nameless").unwrap();
    assert_eq!(c.list(ROOT, false, 4096).unwrap(), []);
    c.who = Who::ROOT;
    let named = c.link(file.node, ROOT, "named").unwrap();
    assert_eq!((named.node, named.attr.nlink), (file.node, 1));
    assert_eq!(fs::read(server.path("named")).unwrap(), b"nameless");
}

#[test]
fn extended_attributes() {
    let test = "extended_attributes";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    fs::write(server.path("file"), b"x").unwrap();
    let on_host = |name: &str| {
        let mut value = vec![0; 256];
        let path = server.path("file");
        rustix::fs::lgetxattr(path, name, &mut value[..]).map(|len| value[..len].to_vec())
    };
    let probe = rustix::fs::lsetxattr(
        server.path("file"),
        "user.host",
        b"from the host",
        rustix::fs::XattrFlags::empty(),
    );
    if let Err(errno) = probe {
        absent(test, &format!("the host has no attributes here ({errno})"));
        return;
    }
    let file = c.lookup(ROOT, "file").unwrap().node;
    assert_eq!(c.getxattr(file, "user.host", 64).unwrap(), b"from the host");
    c.setxattr(file, "user.one", b"1", XATTR_CREATE).unwrap();
    assert_eq!(on_host("user.one").unwrap(), b"1");
    let again = c.setxattr(file, "user.one", b"2", XATTR_CREATE);
    refused(again, &[Errno::EXIST]).unwrap();
    let new = c.setxattr(file, "user.two", b"2", XATTR_REPLACE);
    refused(new, &[Errno::NODATA]).unwrap();
    c.setxattr(file, "user.one", b"", XATTR_REPLACE).unwrap();
    assert_eq!(c.getxattr(file, "user.one", 64).unwrap(), b"");
    // Size 0 asks how much there is.
    let size = c.getxattr(file, "user.host", 0).unwrap();
    assert_eq!(size[..4], 13u32.to_le_bytes());
    refused(c.getxattr(file, "user.host", 12), &[Errno::RANGE]).unwrap();
    refused(c.getxattr(file, "user.none", 64), &[Errno::NODATA]).unwrap();
    let list = c.listxattr(file, 4096).unwrap();
    let mut names: Vec<&[u8]> = list
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user."))
        .collect();
    names.sort();
    assert_eq!(names, [&b"user.host"[..], b"user.one"]);
    let size = c.listxattr(file, 0).unwrap();
    assert_eq!(size[..4], (list.len() as u32).to_le_bytes());
    refused(c.listxattr(file, 3), &[Errno::RANGE]).unwrap();
    c.removexattr(file, "user.one").unwrap();
    assert!(on_host("user.one").is_err());
    refused(c.removexattr(file, "user.one"), &[Errno::NODATA]).unwrap();
}

#[test]
fn attributes_that_were_not_asked_for_do_not_exist() {
    let options = Options {
        xattr: false,
        ..Options::default()
    };
    let test = "attributes_that_were_not_asked_for_do_not_exist";
    let Some((server, mut c)) = session(test, options) else {
        return;
    };
    fs::write(server.path("file"), b"x").unwrap();
    let file = c.lookup(ROOT, "file").unwrap().node;
    let none = [Errno::NOSYS];
    refused(c.setxattr(file, "user.a", b"1", 0), &none).unwrap();
    refused(c.getxattr(file, "user.a", 8), &none).unwrap();
    refused(c.listxattr(file, 8), &none).unwrap();
    refused(c.removexattr(file, "user.a"), &none).unwrap();
}

#[test]
fn the_file_systems_size_is_the_hosts() {
    let Some((server, mut c)) = session("the_file_systems_size_is_the_hosts", Options::default())
    else {
        return;
    };
    let host = rustix::fs::statvfs(server.dir()).unwrap();
    let space = c.statfs(ROOT).unwrap();
    assert_eq!(space.blocks, host.f_blocks);
    assert_eq!(u64::from(space.frsize), host.f_frsize);
    assert_eq!(u64::from(space.namelen), host.f_namemax);
}

#[test]
fn the_umask_is_the_guests() {
    let Some((server, mut c)) = session("the_umask_is_the_guests", Options::default()) else {
        return;
    };
    for (umask, want) in [(0o000, 0o666), (0o022, 0o644), (0o077, 0o600)] {
        let name = format!("file{umask:o}");
        let body = Body::new().u32(O_RDWR).u32(S_IFREG | 0o666).u32(umask);
        c.ask(op::CREATE, ROOT, body.u32(0).name(&name), 144)
            .unwrap();
        let mode = fs::metadata(server.path(&name)).unwrap().mode();
        assert_eq!(mode, S_IFREG | want, "umask {umask:o}");
        let name = format!("dir{umask:o}");
        let body = Body::new().u32(0o777).u32(umask).name(&name);
        c.ask(op::MKDIR, ROOT, body, 128).unwrap();
        let mode = fs::metadata(server.path(&name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o777 & !umask, "umask {umask:o}");
    }
}
