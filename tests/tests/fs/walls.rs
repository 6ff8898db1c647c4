//! What holds the server besides its own care: it is confined unless it is told
//! not to be, there is no window into memory, and names are names.

use std::fs;
use std::path::{Path, PathBuf};

use pericarp_tests::fs::wire::posix::{O_RDWR, O_TRUNC, O_WRONLY, S_IFREG};
use pericarp_tests::fs::wire::{Body, ROOT, op};
use pericarp_tests::fs::{Options, Server, Wrong, init_body, refused};
use pericarp_tests::parts::absent;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::session;

/// A line of `/proc/PID/status`.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.starts_with(name));
    let word = line.and_then(|line| line.split_whitespace().nth(1));
    word.unwrap_or_else(|| panic!("no {name} in {status}"))
        .to_owned()
}

/// CVE-2026-47243: a server that was started without its sandbox, so that its
/// own care was all there was.
#[test]
fn the_server_is_confined_unless_told_otherwise() {
    let test = "the_server_is_confined_unless_told_otherwise";
    let Some(mut server) = Server::for_test(test, &[], Options::default()) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    let mut c = server.client().unwrap();
    c.create(ROOT, "file", 0o600, O_RDWR).unwrap();
    let process = PathBuf::from(format!("/proc/{}", server.pid()));
    let mut threads = 0;
    for task in fs::read_dir(process.join("task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        // A filter, and no way to more rights; the rights of files alone.
        assert_eq!(field(&status, "Seccomp:"), "2");
        assert_eq!(field(&status, "NoNewPrivs:"), "1");
        let files: u64 = [0, 1, 2, 3, 4, 6, 7, 27, 31]
            .iter()
            .map(|bit| 1u64 << bit)
            .sum();
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            let set = u64::from_str_radix(&field(&status, set), 16).unwrap();
            assert_eq!(set & !files, 0, "{status}");
        }
        threads += 1;
    }
    assert!(threads > 1, "{threads} threads");
    if server.epitaph().contains("namespaces (") {
        absent(test, "this kernel gives no namespaces");
        return;
    }
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
    }
    let root = fs::read_dir(process.join("root")).unwrap();
    let names: Vec<_> = root.flatten().map(|entry| entry.file_name()).collect();
    assert!(names.is_empty(), "its root has {names:?}");
}

/// The same advisory: FUSE_SYMLINK of an absolute name made a link there. And
/// libkrun#329: names that are paths.
#[test]
fn an_absolute_name_makes_nothing_outside() {
    let test = "an_absolute_name_makes_nothing_outside";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let outside = server.scratch.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(server.path("file"), b"x").unwrap();
    let file = c.lookup(ROOT, "file").unwrap().node;
    for name in [
        outside.join("new").display().to_string(),
        "../outside/new".to_owned(),
        format!("//{}", outside.join("new").display()),
    ] {
        let attempts = [
            c.symlink(ROOT, &name, "x").map(drop),
            c.mkdir(ROOT, &name, 0o755).map(drop),
            c.mknod(ROOT, &name, S_IFREG | 0o644, 0).map(drop),
            c.create(ROOT, &name, 0o644, O_RDWR).map(drop),
            c.link(file, ROOT, &name).map(drop),
            c.rename((ROOT, "file"), (ROOT, &name), 0),
        ];
        for (index, attempt) in attempts.into_iter().enumerate() {
            let refused = matches!(attempt, Err(Wrong::Refused(_)));
            assert!(refused, "{name}, attempt {index}: {attempt:?}");
        }
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(fs::read_dir(server.dir()).unwrap().count(), 1);
}

/// CVE-2026-24834 was a read-only image that a guest could write through such a
/// window. There is none: what would make one is unknown, and not agreed to.
#[test]
fn there_is_no_window_into_memory() {
    let test = "there_is_no_window_into_memory";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    const SETUPMAPPING: u32 = 48;
    const REMOVEMAPPING: u32 = 49;
    const MAP_ALIGNMENT: u64 = 1 << 26;
    const HAS_INODE_DAX: u64 = 1 << 33;
    fs::write(server.path("file"), b"content").unwrap();
    let file = c.lookup(ROOT, "file").unwrap().node;
    let fh = c.open(file, O_RDWR).unwrap();
    // Handle, file offset, length, read and write, memory offset.
    let map = Body::new().u64(fh).u64(0).u64(4096).u64(3).u64(0);
    refused(c.ask(SETUPMAPPING, file, map, 0), &[Errno::NOSYS]).unwrap();
    let unmap = Body::new().u32(1).u64(0).u64(4096);
    refused(c.ask(REMOVEMAPPING, file, unmap, 0), &[Errno::NOSYS]).unwrap();
    let agreed = c.init_as(7, 41, u64::MAX).unwrap();
    assert_eq!(agreed.features & (MAP_ALIGNMENT | HAS_INODE_DAX), 0);
    let told = c.ask(op::INIT, 0, init_body(7, 41, u64::MAX), 64).unwrap();
    // `map_alignment`, after `max_pages`.
    assert_eq!(told[30..32], [0, 0]);
    assert_eq!(fs::read(server.path("file")).unwrap(), b"content");
}

/// CVE-2021-20263: capabilities of a program that outlived a change of it.
#[test]
fn file_capabilities_go_with_any_change() {
    let test = "file_capabilities_go_with_any_change";
    let Some((server, mut c)) = session(test, Options::default()) else {
        return;
    };
    const NAME: &str = "security.capability";
    let path = server.path("tool");
    fs::write(&path, b"#!").unwrap();
    // CAP_CHOWN, effective, version 2 (linux/capability.h).
    let value: Vec<u8> = [0x0200_0001u32, 1, 0, 0, 0].map(u32::to_le_bytes).concat();
    let bless = || rustix::fs::lsetxattr(&path, NAME, &value, XattrFlags::empty());
    let blessed = || {
        let mut space = [0; 64];
        rustix::fs::lgetxattr(&path, NAME, &mut space[..]).is_ok()
    };
    if let Err(errno) = bless() {
        absent(
            test,
            &format!("the host has no file capabilities here ({errno})"),
        );
        return;
    }
    let tool = c.lookup(ROOT, "tool").unwrap().node;
    assert_eq!(c.getxattr(tool, NAME, 64).unwrap(), value);
    let fh = c.open(tool, O_RDWR).unwrap();
    // As root and without WRITE_KILL_SUIDGID: nothing keeps them.
    c.write(tool, fh, 0, b"x").unwrap();
    assert!(!blessed(), "kept after a write");
    bless().unwrap();
    c.truncate(tool, 1).unwrap();
    assert!(!blessed(), "kept after a cut");
    bless().unwrap();
    c.open(tool, O_WRONLY | O_TRUNC).unwrap();
    assert!(!blessed(), "kept after O_TRUNC");
    bless().unwrap();
    c.fallocate(tool, fh, 0, 100, 0).unwrap();
    assert!(!blessed(), "kept after an allocation");
    bless().unwrap();
    assert_eq!(c.link(tool, ROOT, "other").unwrap().node, tool);
    assert!(blessed(), "another name is no change");
}
