//! The device against chains laid out by hand, on a real directory. What only a
//! guest can show is in the suite `fs`.

use std::ffi::CStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pericarp_ring::{
    Buffer, GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue,
};
use pericarp_share::ShareOptions;
use pericarp_vhost::FileRef;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::wire::{ENTRY, MAX_TRANSFER, WRITE_CACHE, feature};

const MEMORY: u64 = 0x40_0000;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x20_0000;

/// A directory that is removed again.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-fs-unit-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A guest with one request at a time.
struct Guest {
    directory: Directory,
    device: FsDevice,
    memory: File,
    queue: RequestQueue<Request>,
    offered: u16,
    head: u16,
}

/// What a guest finds.
#[derive(Debug, PartialEq)]
struct Answer {
    used: u32,
    error: i32,
    body: Vec<u8>,
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn header(len: usize, code: u32, node: u64) -> Vec<u8> {
    let mut bytes = halves(&[len as u32, code]);
    bytes.extend(words(&[0x1122_3344, node]));
    bytes.extend(halves(&[0, 0, 1, 0]));
    bytes
}

impl Guest {
    fn new(settings: Settings, options: ShareOptions) -> Self {
        let directory = Directory::new();
        let root = File::open(&directory.0).unwrap();
        let share = Share::open(root.into(), options).unwrap();
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let spec = RegionSpec {
            guest_address: 0,
            size: MEMORY,
            user_address: 0,
            file_offset: 0,
        };
        let region = Region::map(memory.try_clone().unwrap(), spec).unwrap();
        let layout = QueueLayout {
            size: 64,
            descriptors: 0,
            available: 0x1000,
            used: 0x2000,
        };
        let regions = Arc::new(GuestMemory::new(vec![region]).unwrap());
        let queue = SplitQueue::new(regions, layout, 0, false).unwrap();
        Self {
            device: FsDevice::new(share, "tag", 1, 64, settings),
            directory,
            memory,
            queue: RequestQueue::new(queue),
            offered: 0,
            head: 0,
        }
    }

    fn mounted() -> Self {
        let mut guest = Self::new(Settings::default(), ShareOptions::default());
        guest.init(u64::from(u32::MAX));
        guest
    }

    fn init(&mut self, features: u64) -> Answer {
        let mut body = halves(&[7, 41, 0x2_0000, features as u32, (features >> 32) as u32]);
        body.resize(64, 0);
        self.ask(opcode::INIT, 0, &body, 64)
    }

    /// Offers a chain of these lengths, written and read.
    fn offer(&mut self, request: &[u8], sent: &[u32], taken: &[u32]) -> Step {
        self.memory.write_all_at(request, REQUEST).unwrap();
        let sent = sent.iter().map(|len| (*len, 0u16));
        let chain: Vec<_> = sent.chain(taken.iter().map(|len| (*len, 2))).collect();
        let (mut from, mut to) = (REQUEST, ANSWER);
        for (index, (len, flags)) in chain.iter().enumerate() {
            let place = if *flags == 0 { &mut from } else { &mut to };
            let next = u16::from(index + 1 < chain.len());
            let mut raw = place.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            raw.extend((flags | next).to_le_bytes());
            raw.extend((index as u16 + 1).to_le_bytes());
            self.memory.write_all_at(&raw, 16 * index as u64).unwrap();
            *place += u64::from(*len);
        }
        let slot = 0x1004 + 2 * u64::from(self.offered % 64);
        self.memory.write_all_at(&[0, 0], slot).unwrap();
        self.offered += 1;
        let index = self.offered.to_le_bytes();
        self.memory.write_all_at(&index, 0x1002).unwrap();
        let (head, loaded) = self.queue.pop().unwrap().unwrap();
        self.head = head;
        let (chain, request) = self.queue.request(head);
        self.device.start(loaded, chain, request)
    }

    /// A step ends with this result.
    fn resume(&mut self, step: Step, result: i32) -> Step {
        if let Ok(bytes) = u64::try_from(result) {
            match step {
                Step::Read { .. } => self.queue.read_done(self.head, Buffer::Chain, bytes),
                Step::Write { .. } => self.queue.write_done(self.head, bytes),
                _ => {}
            }
        }
        let (chain, request) = self.queue.request(self.head);
        self.device.resume(chain, request, result)
    }

    fn finish(&mut self, step: Step) -> Answer {
        let Step::Done { written } = step else {
            panic!("{step:?} is no end");
        };
        self.queue.finish(self.head, written);
        let mut bytes = vec![0; written as usize];
        self.memory.read_exact_at(&mut bytes, ANSWER).unwrap();
        if bytes.len() < OUT_HEADER {
            return Answer {
                used: written,
                error: 0,
                body: bytes,
            };
        }
        let body = bytes.split_off(OUT_HEADER);
        let number = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(number(0), written as i32);
        assert_eq!(bytes[8..], 0x1122_3344u64.to_le_bytes());
        Answer {
            used: written,
            error: number(4),
            body,
        }
    }

    fn ask(&mut self, code: u32, node: u64, body: &[u8], room: u32) -> Answer {
        let mut request = header(IN_HEADER + body.len(), code, node);
        request.extend(body);
        let sent = [request.len() as u32];
        let step = self.offer(&request, &sent, &[OUT_HEADER as u32 + room]);
        self.finish(step)
    }

    fn lookup(&mut self, name: &CStr) -> Answer {
        self.ask(opcode::LOOKUP, 1, name.to_bytes_with_nul(), ENTRY as u32)
    }

    /// Opens a file of the directory; its handle.
    fn open(&mut self, name: &CStr, flags: i32) -> u64 {
        let entry = self.lookup(name);
        assert_eq!(entry.error, 0);
        let node = word(&entry.body, 0);
        let opened = self.ask(opcode::OPEN, node, &halves(&[flags as u32, 0]), 16);
        assert_eq!(opened.error, 0);
        word(&opened.body, 0)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.0.join(name)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A request for a transfer without its data.
fn transfer(code: u32, handle: u64, offset: u64, size: u32, data: usize) -> Vec<u8> {
    let mut request = header(IN_HEADER + 40 + data, code, 1);
    request.extend(words(&[handle, offset]));
    request.extend(halves(&[size, 0, 0, 0, 0, 0]));
    request
}

#[test]
fn both_sides_agree_on_what_both_know() {
    let mut guest = Guest::new(Settings::default(), ShareOptions::default());
    assert_eq!(guest.lookup(c"a").error, -libc::ENOTCONN);
    let answer = guest.init(feature::INIT_EXT | feature::AUTO_INVAL_DATA | 1 << 36 | 1 << 2);
    assert_eq!((answer.error, answer.used), (0, 80));
    let flags = word(&answer.body, 12) as u32;
    assert_eq!(
        u64::from(flags),
        feature::INIT_EXT | feature::AUTO_INVAL_DATA
    );
    assert_eq!(answer.body[20..24], MAX_TRANSFER.to_le_bytes());
    assert_eq!(answer.body[32..36], (1u32 << 4).to_le_bytes());
    assert_eq!(guest.lookup(c"a").error, -libc::ENOENT);
    // Without INIT_EXT the other half is not looked at.
    let answer = guest.init(feature::AUTO_INVAL_DATA | 1 << 36);
    assert_eq!(answer.body[32..36], [0; 4]);
    // Too new is told, too old is refused.
    for (major, minor, error) in [(8, 0, 0), (7, 26, -libc::EPROTO), (6, 99, -libc::EPROTO)] {
        let mut body = halves(&[major, minor, 0, 0]);
        body.resize(64, 0);
        let answer = guest.ask(opcode::INIT, 0, &body, 64);
        assert_eq!(answer.error, error, "{major}.{minor}");
    }
    guest.ask(opcode::DESTROY, 0, &[], 0);
    assert_eq!(guest.lookup(c"a").error, -libc::ENOTCONN);
}

#[test]
fn a_read_goes_straight_to_the_guest_and_on_until_the_end() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let handle = guest.open(c"f", libc::O_RDONLY);
    // The header of the answer in three pieces, one of them with data.
    let request = transfer(opcode::READ, handle, 4096, 100, 0);
    let sent = [request.len() as u32];
    let step = guest.offer(&request, &sent, &[7, 8, 41, 1000]);
    let Step::Read { file, offset, .. } = step else {
        panic!("{step:?}");
    };
    assert!(matches!(file, FileRef::Open { .. }));
    assert_eq!(offset, 4096);
    let target = guest.queue.read_target(guest.head, Buffer::Chain);
    let total: usize = target.iter().map(|segment| segment.iov_len).sum();
    assert_eq!(total, 100, "the room beyond is not the request's");
    let step = guest.resume(step, 30);
    assert!(matches!(step, Step::Read { offset: 4126, .. }), "{step:?}");
    // A retry moves nothing.
    let step = guest.resume(step, -libc::EINTR);
    assert!(matches!(step, Step::Read { offset: 4126, .. }), "{step:?}");
    let step = guest.resume(step, 0);
    let answer = guest.finish(step);
    assert_eq!((answer.used, answer.error), (16 + 30, 0));
}

#[test]
fn a_failure_after_some_bytes_is_a_short_transfer() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let handle = guest.open(c"f", libc::O_RDWR);
    for (code, room, bytes) in [(opcode::READ, 100, 16 + 10), (opcode::WRITE, 8, 16 + 8)] {
        let mut request = transfer(code, handle, 0, 50, 50);
        request.extend([7; 50]);
        let sent = [request.len() as u32];
        let step = guest.offer(&request, &sent, &[16 + room]);
        let step = guest.resume(step, 10);
        let step = guest.resume(step, -libc::EIO);
        let answer = guest.finish(step);
        assert_eq!((answer.used, answer.error), (bytes, 0));
        let step = guest.offer(&request, &sent, &[16 + room]);
        let step = guest.resume(step, -libc::EIO);
        assert_eq!(guest.finish(step).error, -libc::EIO);
    }
}

#[test]
fn each_write_says_whether_it_goes_to_the_end() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let handle = guest.open(c"f", libc::O_RDWR | libc::O_APPEND);
    let append = libc::O_APPEND as u32;
    for (opened, how, wanted) in [
        (append, 0, libc::RWF_APPEND),
        (append, WRITE_CACHE, 0),
        (0, 0, 0),
    ] {
        let mut request = header(IN_HEADER + 44, opcode::WRITE, 1);
        request.extend(words(&[handle, 0]));
        request.extend(halves(&[4, how, 0, 0, opened, 0]));
        request.extend(b"data");
        let step = guest.offer(&request, &[84], &[16 + 8]);
        let Step::Write { flags, .. } = step else {
            panic!("{step:?}");
        };
        assert_eq!(flags, wanted, "open with {opened:o}, {how}");
        let step = guest.resume(step, 4);
        assert_eq!(guest.finish(step).error, 0);
    }
}

#[test]
fn a_write_of_nothing_takes_no_bits() {
    use std::os::unix::fs::PermissionsExt;
    let mut guest = Guest::mounted();
    let path = guest.path("f");
    std::fs::write(&path, b"x").unwrap();
    let set = std::fs::Permissions::from_mode(0o6755);
    std::fs::set_permissions(&path, set).unwrap();
    let handle = guest.open(c"f", libc::O_RDWR);
    let mut request = header(IN_HEADER + 40, opcode::WRITE, 1);
    request.extend(words(&[handle, 0]));
    request.extend(halves(&[0, 1 << 2, 0, 0, 0, 0]));
    let step = guest.offer(&request, &[80], &[16 + 8]);
    assert_eq!(guest.finish(step).error, 0);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o6755);
}

#[test]
fn transfers_that_lie_are_refused() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let reads = guest.open(c"f", libc::O_RDONLY);
    let writes = guest.open(c"f", libc::O_WRONLY);
    let cases = [
        (opcode::READ, writes, 0, 10, libc::EBADF),
        (opcode::WRITE, reads, 0, 10, libc::EBADF),
        (opcode::READ, 12345, 0, 10, libc::EBADF),
        (opcode::READ, reads, u64::MAX, 10, libc::EINVAL),
        (opcode::READ, reads, 1 << 63, 10, libc::EINVAL),
        (opcode::READ, reads, (1 << 63) - 5, 10, libc::EINVAL),
        (opcode::WRITE, writes, (1 << 63) - 5, 10, libc::EINVAL),
        (opcode::WRITE, writes, 0, 11, libc::EINVAL),
        (opcode::WRITE, writes, 0, u32::MAX, libc::EINVAL),
    ];
    for (code, handle, offset, size, errno) in cases {
        let mut request = transfer(code, handle, offset, size, 10);
        request.extend([0; 10]);
        let step = guest.offer(&request, &[request.len() as u32], &[16 + 100]);
        let answer = guest.finish(step);
        assert_eq!(answer.error, -errno, "{code} {handle} {offset} {size}");
    }
    // Of nothing at all there is nothing to wait for.
    let request = transfer(opcode::READ, reads, 0, 0, 0);
    let step = guest.offer(&request, &[80], &[16 + 100]);
    assert_eq!(guest.finish(step).used, 16);
}

#[test]
fn headers_that_lie_are_refused_and_those_without_room_get_no_answer() {
    let mut guest = Guest::mounted();
    let name = b"a\0";
    for len in [0, 39, 43, u32::MAX] {
        let mut request = header(len as usize, opcode::LOOKUP, 1);
        request.extend(name);
        let step = guest.offer(&request, &[42], &[16 + ENTRY as u32]);
        assert_eq!(guest.finish(step).error, -libc::EINVAL, "{len}");
    }
    // Less than there is: the rest is not the request's.
    let mut request = header(42, opcode::LOOKUP, 1);
    request.extend(b"a\0bcd");
    let step = guest.offer(&request, &[45], &[16 + ENTRY as u32]);
    assert_eq!(guest.finish(step).error, -libc::ENOENT);
    // A part of a header, no room for one of an answer, or for its body.
    let request = header(42, opcode::MKDIR, 1);
    for (sent, taken) in [(&[39][..], &[100][..]), (&[40, 2], &[15]), (&[42], &[])] {
        let step = guest.offer(&request, sent, taken);
        assert_eq!(guest.finish(step).used, 0);
    }
    let mut body = halves(&[0o755, 0]);
    body.extend(b"d\0");
    let answer = guest.ask(opcode::MKDIR, 1, &body, ENTRY as u32 - 1);
    assert_eq!(answer.error, -libc::EINVAL);
    assert!(!guest.path("d").exists(), "made without an answer");
    assert_eq!(guest.ask(opcode::MKDIR, 1, &body, ENTRY as u32).error, 0);
    assert!(guest.path("d").is_dir());
}

#[test]
fn what_has_no_answer_gets_none() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let node = word(&guest.lookup(c"f").body, 0);
    for (code, body) in [
        (opcode::INTERRUPT, words(&[5])),
        (opcode::BATCH_FORGET, words(&[u64::MAX])),
        (opcode::BATCH_FORGET, words(&[1, 99, 1])),
        (opcode::FORGET, words(&[1])),
    ] {
        assert_eq!(guest.device.share.counts().1, 1);
        assert_eq!(guest.ask(code, node, &body, 100).used, 0);
    }
    assert_eq!(guest.device.share.counts().1, 0, "it was forgotten");
}

#[test]
fn listings_fit_the_room_or_say_that_it_is_too_small() {
    let mut guest = Guest::mounted();
    for index in 0..20 {
        std::fs::write(guest.path(&format!("file-{index:02}")), b"").unwrap();
    }
    for (code, entry) in [(opcode::READDIR, 32), (opcode::READDIRPLUS, 160)] {
        let handle = word(&guest.ask(opcode::OPENDIR, 1, &halves(&[0, 0]), 16).body, 0);
        let ask = |guest: &mut Guest, offset: u64, size: u32, room: u32| {
            let mut body = words(&[handle, offset]);
            body.extend(halves(&[size, 0, 0, 0, 0, 0]));
            guest.ask(code, 1, &body, room)
        };
        let answer = ask(&mut guest, 0, 4096, entry - 1);
        assert_eq!(answer.error, -libc::EINVAL);
        let answer = ask(&mut guest, 0, entry - 1, 4096);
        assert_eq!(answer.error, -libc::EINVAL);
        let (mut offset, mut seen) = (0, 0);
        loop {
            let answer = ask(&mut guest, offset, 3 * entry + 5, 1 << 16);
            assert_eq!(answer.error, 0);
            let mut rest = &answer.body[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let at = entry as usize - 32;
                offset = word(rest, at + 8);
                seen += 1;
                rest = &rest[entry as usize..];
            }
        }
        assert_eq!(seen, 22);
    }
}

#[test]
fn a_guest_that_goes_leaves_nothing_open() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("f"), b"x").unwrap();
    let handle = guest.open(c"f", libc::O_RDONLY);
    let request = transfer(opcode::READ, handle, 0, 10, 0);
    let step = guest.offer(&request, &[80], &[100]);
    guest.device.abandoned();
    assert_eq!(guest.device.share.counts(), (0, 0, 1), "the read has it");
    let step = guest.resume(step, 1);
    let step = guest.resume(step, 0);
    assert_eq!(guest.finish(step).used, 17);
    assert_eq!(guest.device.share.counts(), (0, 0, 0));
}

#[test]
fn only_who_owns_the_directory_is_told_of_names_that_are_not_there() {
    for (cache, missing) in [(Cache::Auto, -libc::ENOENT), (Cache::Always, 0)] {
        let settings = Settings {
            cache,
            ..Settings::default()
        };
        let mut guest = Guest::new(settings, ShareOptions::default());
        guest.init(0);
        let answer = guest.lookup(c"none");
        assert_eq!(answer.error, missing);
        if cache == Cache::Always {
            assert_eq!((word(&answer.body, 0), word(&answer.body, 16)), (0, 86400));
        }
    }
}

#[test]
fn closes_are_told_where_something_comes_of_it() {
    let no_flush = u64::from(crate::wire::open::NO_FLUSH);
    // Nothing is served from elsewhere: one answer is enough for the whole mount. Something may be,
    // and this file is not; and locks end with a close.
    for (elsewhere, locks, wanted, answer) in [
        (false, false, 0, -libc::ENOSYS),
        (true, false, no_flush, 0),
        (true, true, 0, 0),
    ] {
        let options = ShareOptions {
            elsewhere,
            locks,
            ..ShareOptions::default()
        };
        let mut guest = Guest::new(Settings::default(), options);
        guest.init(u64::from(u32::MAX));
        std::fs::write(guest.path("f"), b"x").unwrap();
        let node = word(&guest.lookup(c"f").body, 0);
        let opened = guest.ask(opcode::OPEN, node, &halves(&[libc::O_RDWR as u32, 0]), 16);
        let (handle, flags) = (word(&opened.body, 0), word(&opened.body, 8));
        assert_eq!(flags & no_flush, wanted & no_flush, "{elsewhere} {locks}");
        // A helper makes the call where it may take long.
        let flush = header(IN_HEADER + 24, opcode::FLUSH, node);
        let flush = Header::parse(flush[..].try_into().unwrap());
        let body = words(&[handle, 0, 0]);
        let call = guest.device.call(&flush, &body, 0, None);
        let told = call.map_or_else(|errno| -errno.raw_os_error(), |_| 0);
        assert_eq!(told, answer, "{elsewhere} {locks}");
    }
}

#[test]
fn the_configuration_space_has_tag_and_queues() {
    let guest = Guest::mounted();
    let config = guest.device.config();
    assert_eq!(config.len(), 40);
    assert_eq!(config[..4], *b"tag\0");
    assert_eq!(config[36..], 1u32.to_le_bytes());
    assert_eq!(guest.device.queue_count(), 2);
}

mod unopened;
