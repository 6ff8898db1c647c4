//! Open files.

use std::fs;
use std::io::IoSlice;

use pericarp_share::{Errno, NodeId};
use rustix::io::{ReadWriteFlags, pread, pwrite, pwritev2};

use crate::scratch::{Scratch, me, share};

const ROOT: NodeId = NodeId::ROOT;

#[test]
fn flags_are_those_that_mean_something() {
    let scratch = Scratch::new();
    scratch.file("f", "hello");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    for bad in [
        libc::O_PATH,
        libc::O_TMPFILE | libc::O_RDWR,
        libc::O_ACCMODE,
        0x40_0000 | 2,
    ] {
        let errno = share.open_file(node, bad, false).unwrap_err();
        assert!([Errno::INVAL, Errno::NOTDIR].contains(&errno), "{bad:#o}");
    }
    let dropped = libc::O_CREAT
        | libc::O_EXCL
        | libc::O_NOCTTY
        | libc::O_NOATIME
        | libc::O_DIRECT
        | libc::O_NONBLOCK
        | libc::O_NOFOLLOW
        | 1 << 30;
    let opened = share
        .open_file(node, libc::O_RDWR | dropped, false)
        .unwrap();
    let flags = rustix::fs::fcntl_getfl(&*opened.file).unwrap();
    use rustix::fs::OFlags;
    assert!(!flags.intersects(OFlags::DIRECT | OFlags::NOATIME | OFlags::NONBLOCK));
    assert!(!opened.file.traits().direct);
    assert_eq!(share.open_file(ROOT, 0, false).map(drop), Err(Errno::ISDIR));
    assert_eq!(
        share.open_file(node, libc::O_DIRECTORY, false).map(drop),
        Err(Errno::NOTDIR)
    );
    let direct = scratch.share_with(|o| o.direct_io = true);
    let node = direct.lookup(ROOT, c"f").unwrap().node;
    let opened = direct
        .open_file(node, libc::O_RDWR | libc::O_DIRECT, false)
        .unwrap();
    assert!(opened.file.traits().direct);
    let (_, opened) = direct
        .create(
            &me(),
            ROOT,
            c"n",
            libc::O_RDWR | libc::O_DIRECT,
            0o644,
            0,
            false,
        )
        .unwrap();
    let flags = rustix::fs::fcntl_getfl(&*opened.file).unwrap();
    assert!(flags.contains(OFlags::DIRECT));
}

#[test]
fn appending_is_of_each_write_and_not_of_the_open_file() {
    let scratch = Scratch::new();
    scratch.file("f", "abc");
    let share = scratch.share();
    let node = share.lookup(ROOT, c"f").unwrap().node;
    let flags = libc::O_WRONLY | libc::O_APPEND;
    for writeback in [false, true] {
        share.set_writeback(writeback);
        let opened = share.open_file(node, flags, false).unwrap();
        assert_eq!(opened.file.traits().readable, writeback);
        assert!(opened.file.traits().writable);
        // Where it is meant to go, or to the end for who says so.
        pwrite(&*opened.file, b"X", 0).unwrap();
        let end = ReadWriteFlags::APPEND;
        pwritev2(&*opened.file, &[IoSlice::new(b"d")], 0, end).unwrap();
    }
    assert_eq!(fs::read(scratch.path("f")).unwrap(), b"Xbcdd");
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let scratch = Scratch::new();
    let share = scratch.share();
    let (entry, opened) = share
        .make_temporary(&me(), ROOT, libc::O_RDWR | libc::O_TMPFILE, 0o600, 0)
        .unwrap();
    assert_eq!(entry.attributes.nlink, 0);
    assert_eq!(fs::read_dir(scratch.root()).unwrap().count(), 0);
    pwrite(&*opened.file, b"hello", 0).unwrap();
    let linked = share.link(entry.node, ROOT, c"named").unwrap();
    assert_eq!(linked.node, entry.node);
    assert_eq!(fs::read(scratch.path("named")).unwrap(), b"hello");
    let exclusive = libc::O_RDWR | libc::O_EXCL;
    let (entry, _) = share
        .make_temporary(&me(), ROOT, exclusive, 0o600, 0)
        .unwrap();
    assert_eq!(share.link(entry.node, ROOT, c"never"), Err(Errno::NOENT));
}

#[test]
fn an_unlinked_file_that_is_open_goes_on() {
    let scratch = Scratch::new();
    let share = scratch.share();
    let (entry, opened) = share
        .create(&me(), ROOT, c"f", libc::O_RDWR, 0o644, 0, false)
        .unwrap();
    share.unlink(ROOT, c"f").unwrap();
    pwrite(&*opened.file, b"x", 9).unwrap();
    for handle in [None, Some(opened.handle)] {
        let attributes = share.attributes(entry.node, handle).unwrap();
        assert_eq!((attributes.nlink, attributes.size), (0, 10));
    }
    share.forget(entry.node, 1);
    let attributes = share.attributes(entry.node, Some(opened.handle)).unwrap();
    assert_eq!(attributes.nlink, 0);
    let set = pericarp_share::SetAttributes {
        size: Some(3),
        mode: Some(0o600),
        ..Default::default()
    };
    let changed = share
        .set_attributes(entry.node, Some(opened.handle), &set)
        .unwrap();
    assert_eq!((changed.size, changed.mode & 0o7777), (3, 0o600));
}

#[test]
fn create_opens_what_is_there_unless_exclusive() {
    let scratch = Scratch::new();
    scratch.file("f", "hello");
    let share = scratch.share();
    let flags = libc::O_RDWR | libc::O_CREAT;
    let (entry, opened) = share
        .create(&me(), ROOT, c"f", flags, 0o600, 0, false)
        .unwrap();
    assert_eq!(entry.attributes.size, 5);
    assert_eq!(opened.file.node(), entry.node);
    let exclusive = share.create(&me(), ROOT, c"f", flags | libc::O_EXCL, 0o600, 0, false);
    assert_eq!(exclusive.map(drop), Err(Errno::EXIST));
    share
        .create(&me(), ROOT, c"f", flags | libc::O_TRUNC, 0o600, 0, false)
        .unwrap();
    assert_eq!(fs::metadata(scratch.path("f")).unwrap().len(), 0);
    let new = share.create(&me(), ROOT, c"n", flags | libc::O_EXCL, 0o644, 0o022, false);
    assert_eq!(new.unwrap().0.attributes.mode, 0o100_644);
    fs::create_dir(scratch.path("d")).unwrap();
    let directory = share.create(&me(), ROOT, c"d", flags, 0o600, 0, false);
    assert_eq!(directory.map(drop), Err(Errno::ISDIR));
}

#[test]
fn holes_copies_and_their_bounds() {
    let scratch = Scratch::new();
    let share = scratch.share();
    let create = |name| {
        share
            .create(&me(), ROOT, name, libc::O_RDWR, 0o644, 0, false)
            .unwrap()
            .1
    };
    let (from, to) = (create(c"from"), create(c"to"));
    pwrite(&*from.file, &[7; 4096], 1 << 20).unwrap();
    assert_eq!(share.seek(from.handle, 0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(
        share.seek(from.handle, 1 << 20, libc::SEEK_HOLE),
        Ok((1 << 20) + 4096)
    );
    assert_eq!(
        share.seek(from.handle, 1 << 21, libc::SEEK_DATA),
        Err(Errno::NXIO)
    );
    assert_eq!(
        share.seek(from.handle, 0, libc::SEEK_END),
        Err(Errno::INVAL)
    );
    for offset in [1 << 63, u64::MAX] {
        assert_eq!(
            share.seek(from.handle, offset, libc::SEEK_DATA),
            Err(Errno::INVAL)
        );
        let copied = share.copy_range(from.handle, offset, to.handle, 0, 1);
        assert_eq!(copied, Err(Errno::INVAL));
        let copied = share.copy_range(from.handle, 0, to.handle, offset, 1);
        assert_eq!(copied, Err(Errno::INVAL));
    }
    assert_eq!(
        share.copy_range(from.handle, 1 << 20, to.handle, 10, 4096),
        Ok(4096)
    );
    let copy = fs::read(scratch.path("to")).unwrap();
    assert_eq!((copy.len(), &copy[10..]), (4106, &[7; 4096][..]));
}

#[test]
fn renames_do_what_their_flags_say() {
    let scratch = Scratch::new();
    scratch.file("a", "a");
    scratch.file("b", "b");
    let share = scratch.share();
    let rename = |flags| share.rename(ROOT, c"a", ROOT, c"b", flags);
    assert_eq!(rename(libc::RENAME_NOREPLACE), Err(Errno::EXIST));
    rename(libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(scratch.path("a")).unwrap(), b"b");
    for flags in [8, 1 << 31, u32::MAX] {
        assert_eq!(rename(flags), Err(Errno::INVAL));
    }
    // Over an open file, whose node stays what it was.
    let over = share.lookup(ROOT, c"b").unwrap().node;
    let opened = share.open_file(over, 0, false).unwrap();
    rename(0).unwrap();
    let mut byte = [0];
    pread(&*opened.file, &mut byte, 0).unwrap();
    assert_eq!(&byte, b"a");
    assert_ne!(share.lookup(ROOT, c"b").unwrap().node, over);
    assert_eq!(share.attributes(over, None).unwrap().nlink, 0);
    if crate::scratch::root() {
        share
            .rename(ROOT, c"b", ROOT, c"c", libc::RENAME_WHITEOUT)
            .unwrap();
        let white = share.lookup(ROOT, c"b").unwrap().attributes;
        assert_eq!((white.mode & libc::S_IFMT, white.rdev), (libc::S_IFCHR, 0));
    }
}

#[test]
fn whether_a_file_system_waits_is_found_out() {
    const EXT4: i64 = 0xef53;
    let scratch = Scratch::new();
    let magic = rustix::fs::statfs(scratch.root()).unwrap().f_type;
    let on_ext4 = scratch.share();
    let flags = libc::O_RDWR;
    let (_, file) = on_ext4
        .create(&me(), ROOT, c"f", flags, 0o644, 0, false)
        .unwrap();
    let traits = file.file.traits();
    assert!(!traits.waits);
    if magic == EXT4 {
        assert!(traits.reads_without_waiting);
        assert!(!traits.writes_without_waiting);
    }
    // Nothing is left of finding out.
    assert_eq!(fs::read_dir(scratch.root()).unwrap().count(), 1);
    let path =
        std::path::Path::new("/dev/shm").join(format!("pericarp-share-{}", std::process::id()));
    fs::create_dir(&path).unwrap();
    let on_tmpfs = share(&path, |_| {});
    let made = on_tmpfs.create(&me(), ROOT, c"f", flags, 0o644, 0, false);
    fs::remove_dir_all(&path).unwrap();
    let traits = *made.unwrap().1.file.traits();
    assert!(!traits.waits && !traits.reads_without_waiting && !traits.writes_without_waiting);
}
