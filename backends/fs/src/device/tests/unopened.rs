//! Guests that open nothing: node by node, with handle 0.

use super::*;

const LINUX: u64 = feature::INIT_EXT | feature::NO_OPEN | feature::NO_OPENDIR;

fn guest(cache: Cache, options: ShareOptions) -> Guest {
    let settings = Settings {
        cache,
        ..Settings::default()
    };
    Guest::new(settings, options)
}

fn read_only() -> ShareOptions {
    ShareOptions {
        read_only: true,
        ..ShareOptions::default()
    }
}

fn agreed(guest: &mut Guest, asked: u64) -> u64 {
    word(&guest.init(asked).body, 12) & 0xffff_ffff
}

#[test]
fn only_who_can_neither_change_nor_miss_anything_opens_nothing() {
    let direct = ShareOptions {
        direct_io: true,
        ..read_only()
    };
    let cases = [
        (Cache::Always, read_only(), LINUX, true),
        (Cache::Always, read_only(), LINUX - feature::NO_OPEN, false),
        (
            Cache::Always,
            read_only(),
            LINUX - feature::NO_OPENDIR,
            false,
        ),
        (Cache::Always, ShareOptions::default(), LINUX, false),
        (Cache::Auto, read_only(), LINUX, false),
        (Cache::Always, direct, LINUX, false),
    ];
    for (cache, options, asked, nothing) in cases {
        let mut guest = guest(cache, options);
        std::fs::write(guest.path("f"), b"x").unwrap();
        let agreed = agreed(&mut guest, asked);
        let both = feature::NO_OPEN | feature::NO_OPENDIR;
        assert_eq!(agreed & both, if nothing { both } else { 0 }, "{asked:x}");
        let node = word(&guest.lookup(c"f").body, 0);
        for (code, node) in [(opcode::OPEN, node), (opcode::OPENDIR, 1)] {
            let error = guest.ask(code, node, &halves(&[0, 0]), 16).error;
            assert_eq!(error, if nothing { -libc::ENOSYS } else { 0 }, "{code}");
        }
    }
}

/// READ of a whole small file by its node.
fn read(guest: &mut Guest, node: u64, handle: u64) -> Answer {
    let mut request = header(IN_HEADER + 40, opcode::READ, node);
    request.extend(words(&[handle, 0]));
    request.extend(halves(&[100, 0, 0, 0, 0, 0]));
    let mut step = guest.offer(&request, &[80], &[16 + 100]);
    if let Step::Read { .. } = step {
        step = guest.resume(step, 1);
        step = guest.resume(step, 0);
    }
    guest.finish(step)
}

#[test]
fn files_are_read_by_node_and_as_many_stay_open_as_have_a_place() {
    let mut options = read_only();
    options.open_files = 64;
    let mut guest = guest(Cache::Always, options);
    for index in 0..100 {
        std::fs::write(guest.path(&format!("f{index}")), b"x").unwrap();
    }
    guest.init(LINUX);
    let mut nodes = Vec::new();
    for round in 0..3 {
        for index in 0..100 {
            let name = std::ffi::CString::new(format!("f{index}")).unwrap();
            let node = word(&guest.lookup(&name).body, 0);
            assert_eq!(read(&mut guest, node, 0).used, 17, "{round} {index}");
            nodes.push(node);
        }
        let open = guest.device.share.counts().2;
        assert!((1..=16).contains(&open), "{open} are open");
    }
    // No other handle is any, and no other node.
    assert_eq!(read(&mut guest, nodes[0], 1).error, -libc::EBADF);
    assert_eq!(read(&mut guest, 1, 0).error, -libc::EISDIR);
    assert_eq!(read(&mut guest, 1 << 40, 0).error, -libc::ESTALE);
    for node in nodes {
        guest.ask(opcode::FORGET, node, &words(&[1]), 0);
    }
    assert_eq!(guest.device.share.counts(), (0, 0, 0), "with the nodes");
    let node = word(&guest.lookup(c"f0").body, 0);
    assert_eq!(read(&mut guest, node, 0).used, 17);
    guest.device.abandoned();
    assert_eq!(guest.device.share.counts(), (0, 0, 0), "with the guest");
}

#[test]
fn directories_are_listed_by_node_by_many_readers() {
    let mut guest = guest(Cache::Always, read_only());
    for index in 0..20 {
        std::fs::write(guest.path(&format!("file-{index:02}")), b"").unwrap();
    }
    guest.init(LINUX);
    let (mut seen, mut offsets) = ([0, 0], [0u64, 0]);
    // Two of them, in turn: neither loses its place.
    for turn in 0..44 {
        let reader = turn % 2;
        let mut body = words(&[0, offsets[reader]]);
        body.extend(halves(&[40, 0, 0, 0, 0, 0]));
        let answer = guest.ask(opcode::READDIR, 1, &body, 4096);
        assert_eq!(answer.error, 0);
        offsets[reader] = word(&answer.body, 8);
        seen[reader] += 1;
    }
    assert_eq!(seen, [22, 22]);
    for offset in offsets {
        let mut body = words(&[0, offset]);
        body.extend(halves(&[40, 0, 0, 0, 0, 0]));
        let end = guest.ask(opcode::READDIR, 1, &body, 4096);
        assert!(end.error == 0 && end.body.is_empty());
    }
    assert_eq!(guest.device.share.counts().2, 1, "one is open for all");
}

#[test]
fn whatever_needs_no_handle_works_and_what_changes_something_is_refused() {
    let mut guest = guest(Cache::Always, read_only());
    std::fs::write(guest.path("f"), b"x").unwrap();
    guest.init(LINUX);
    let node = word(&guest.lookup(c"f").body, 0);
    // By the open file, of which there is none.
    let mut body = halves(&[1, 0]);
    body.extend(words(&[0]));
    assert_eq!(guest.ask(opcode::GETATTR, node, &body, 104).error, 0);
    let mut body = words(&[0, 0]);
    body.extend(halves(&[libc::SEEK_DATA as u32, 0]));
    assert_eq!(guest.ask(opcode::LSEEK, node, &body, 8).error, 0);
    let body = words(&[0, 0, 0]);
    let flushed = guest.ask(opcode::FLUSH, node, &body, 0);
    assert_eq!(flushed.error, -libc::ENOSYS);
    let mut write = transfer(opcode::WRITE, 0, 0, 1, 1);
    write.push(7);
    let step = guest.offer(&write, &[81], &[16 + 8]);
    assert_eq!(guest.finish(step).error, -libc::EROFS);
    let step = guest.offer(&transfer(opcode::FALLOCATE, 0, 0, 1, 0), &[80], &[16]);
    assert_eq!(guest.finish(step).error, -libc::EROFS);
    // A name that the guest took for missing.
    let create = |guest: &mut Guest, flags: i32, name: &[u8]| {
        let mut body = halves(&[flags as u32, 0o644, 0, 0]);
        body.extend(name);
        guest.ask(opcode::CREATE, 1, &body, ENTRY as u32 + 16)
    };
    let created = create(&mut guest, libc::O_RDONLY, b"f\0");
    assert_eq!((created.error, word(&created.body, ENTRY)), (0, 0));
    assert_eq!(word(&created.body, 0), node);
    let known = guest.device.share.counts().1;
    for (flags, name, error) in [
        (libc::O_WRONLY, &b"f\0"[..], libc::EROFS),
        (libc::O_TRUNC, b"f\0", libc::EROFS),
        (libc::O_EXCL, b"f\0", libc::EEXIST),
        (libc::O_RDONLY, b"g\0", libc::EROFS),
    ] {
        assert_eq!(create(&mut guest, flags, name).error, -error, "{flags:x}");
        assert_eq!(guest.device.share.counts().1, known);
    }
}
