//! Both engines through the same paces: what a worker relies on must hold for
//! io_uring and for plain system calls alike.
#![expect(unsafe_code)]
// UNSAFETY: reads and writes are unsafe to start; the buffers here outlive them.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use libc::iovec;
use pericarp_uring::{
    Completion, Engine, EngineKind, EngineOptions, Extent, FileSlot, Place, Transfer, ZEROES,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Every engine this kernel lets us have. A second ring, for files that are
/// polled, changes nothing for those that are not.
fn engines() -> Vec<Engine> {
    let plain = [EngineKind::Auto, EngineKind::Sync].map(|kind| Engine::new(kind, 8, 4));
    let polling = Engine::with(&EngineOptions {
        kind: EngineKind::Auto,
        depth: 8,
        files: 4,
        commands: false,
        buffers: 0,
        threads: None,
        polled: true,
        descriptors: false,
    });
    let mut engines: Vec<_> = plain
        .into_iter()
        .chain([polling])
        .map(Result::unwrap)
        .collect();
    engines.iter_mut().for_each(|e| e.start().unwrap());
    engines
}

/// Submits and collects until `count` completions are there.
fn collect(engine: &mut Engine, count: usize) -> Vec<Completion> {
    let mut got = Vec::new();
    while got.len() < count {
        engine.submit(true).unwrap();
        engine.completions(&mut got);
    }
    got
}

/// What is there without waiting.
fn glance(engine: &mut Engine) -> Vec<Completion> {
    let mut got = Vec::new();
    // One turn to let the kernel's deferred work run, one to see its results.
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(20));
        engine.submit(false).unwrap();
        engine.completions(&mut got);
    }
    got
}

fn file() -> File {
    memfd_create("disk", MemfdFlags::CLOEXEC).unwrap().into()
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn segment(buffer: &mut [u8]) -> iovec {
    iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }
}

fn transfer(file: FileSlot, segments: &[iovec], offset: u64, token: u64) -> Transfer<'_> {
    Transfer {
        file,
        segments,
        offset,
        flags: 0,
        token,
    }
}

#[test]
fn reads_and_writes_move_bytes_and_carry_their_token() {
    for mut engine in engines() {
        let mut disk = file();
        disk.write_all(b"0123456789").unwrap();
        let slot = engine.add_file(disk.as_raw_fd()).unwrap();
        let (mut a, mut b, mut c) = ([0u8; 2], [0u8; 3], *b"xyz");
        let into = [segment(&mut a), segment(&mut b)];
        let from = [segment(&mut c)];
        // SAFETY: the buffers live until the completions below.
        unsafe {
            engine.read(transfer(slot, &into, 1, 11));
            engine.write(transfer(slot, &from, 20, 12));
        }
        engine.sync(slot, false, 13);
        let mut done = collect(&mut engine, 3);
        done.sort_by_key(|c| c.token);
        let results: Vec<_> = done.iter().map(|c| (c.token, c.result)).collect();
        assert_eq!(results, [(11, 5), (12, 3), (13, 0)]);
        assert_eq!((&a, &b), (b"12", b"345"));
        disk.seek(std::io::SeekFrom::Start(20)).unwrap();
        let mut text = String::new();
        disk.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xyz");
    }
}

/// A segment longer than an entry's 32 bits is cut, not wrapped to nothing.
#[test]
fn one_segment_of_more_than_four_gigabytes_is_a_short_read() {
    const LEN: usize = (4 << 30) + 4096;
    for mut engine in engines() {
        let mut disk = file();
        disk.write_all(&[7; 8192]).unwrap();
        let slot = engine.add_file(disk.as_raw_fd()).unwrap();
        // SAFETY: an anonymous mapping at an address the kernel chooses, of
        // which only the first pages are ever touched.
        let memory = unsafe {
            let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            mmap_anonymous(
                std::ptr::null_mut(),
                LEN,
                access,
                kind | MapFlags::NORESERVE,
            )
            .unwrap()
        };
        let into = [iovec {
            iov_base: memory,
            iov_len: LEN,
        }];
        // SAFETY: the mapping lives until the completion below.
        unsafe { engine.read(transfer(slot, &into, 0, 1)) };
        assert_eq!(collect(&mut engine, 1)[0].result, 8192, "{engine}");
        // SAFETY: mapped above, read into, and used by nobody else.
        unsafe {
            let bytes = std::slice::from_raw_parts(memory.cast::<u8>(), 8193);
            assert!(bytes[..8192].iter().all(|b| *b == 7) && bytes[8192] == 0);
            munmap(memory, LEN).unwrap();
        }
    }
}

#[test]
fn errors_come_back_as_negative_numbers() {
    for mut engine in engines() {
        let readable = File::open("/dev/null").unwrap();
        let slot = engine.add_file(readable.as_raw_fd()).unwrap();
        let mut bytes = *b"x";
        let from = [segment(&mut bytes)];
        // SAFETY: the buffer lives until the completion below.
        unsafe { engine.write(transfer(slot, &from, 0, 1)) };
        assert_eq!(collect(&mut engine, 1)[0].result, -libc::EBADF);
    }
}

#[test]
fn more_operations_than_the_ring_has_entries_all_complete() {
    for mut engine in engines() {
        let disk = file();
        disk.set_len(4096).unwrap();
        let slot = engine.add_file(disk.as_raw_fd()).unwrap();
        let mut buffers = vec![[1u8; 16]; 1000];
        let segments: Vec<_> = buffers.iter_mut().map(|b| [segment(b)]).collect();
        for (token, segments) in segments.iter().enumerate() {
            // SAFETY: the buffers live until the completions below.
            unsafe { engine.read(transfer(slot, segments, 0, token as u64)) };
        }
        let mut tokens: Vec<_> = collect(&mut engine, 1000).iter().map(|c| c.token).collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..1000));
        assert!(buffers.iter().flatten().all(|&b| b == 0));
    }
}

#[test]
fn a_watch_reports_every_write_that_comes_after_a_look() {
    for mut engine in engines() {
        let bell = event();
        let slot = engine.add_file(bell.as_raw_fd()).unwrap();
        engine.watch(slot, 5);
        assert_eq!(glance(&mut engine), []);
        for _ in 0..10 {
            ring(&bell);
            let got = collect(&mut engine, 1);
            assert!(got.iter().all(|c| c.token == 5), "{engine}: {got:?}");
            assert_eq!(glance(&mut engine), [], "{engine}: rung once, heard twice");
        }
    }
}

#[test]
fn a_write_from_before_the_watch_is_reported() {
    for mut engine in engines() {
        let bell = event();
        ring(&bell);
        let slot = engine.add_file(bell.as_raw_fd()).unwrap();
        engine.watch(slot, 5);
        assert_eq!(collect(&mut engine, 1)[0].token, 5);
    }
}

#[test]
fn a_removed_watch_is_silent_and_its_slot_serves_another_file() {
    for mut engine in engines() {
        let (first, second) = (event(), event());
        for (token, bell) in [(1, &first), (2, &second)] {
            let slot = engine.add_file(bell.as_raw_fd()).unwrap();
            engine.watch(slot, token);
            glance(&mut engine);
            ring(bell);
            assert_eq!(collect(&mut engine, 1)[0].token, token);
            engine.unwatch(token);
            engine.remove_file(slot);
            glance(&mut engine);
            ring(bell);
            assert_eq!(glance(&mut engine), []);
        }
    }
}

#[test]
fn a_pipe_whose_other_end_is_gone_does_not_keep_us_awake() {
    for mut engine in engines() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let slot = engine.add_file(read.as_raw_fd()).unwrap();
        engine.watch(slot, 9);
        drop(write);
        let first = collect(&mut engine, 1);
        assert!(first.len() <= 2, "{engine}: {first:?}");
        for _ in 0..3 {
            assert_eq!(glance(&mut engine), [], "{engine}");
        }
    }
}

#[test]
fn a_signal_counts_and_never_waits() {
    for mut engine in engines() {
        let bell = event();
        let slot = engine.add_file(bell.as_raw_fd()).unwrap();
        let value = || {
            let mut bytes = [0; 8];
            rustix::io::read(&bell, &mut bytes).unwrap();
            u64::from_ne_bytes(bytes)
        };
        engine.signal(slot, true);
        engine.signal(slot, true);
        assert_eq!(glance(&mut engine), [], "a signal has no completion");
        assert_eq!(value(), 2, "{engine}");
        // Full, and made blocking behind our back.
        rustix::io::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&bell, rustix::fs::OFlags::empty()).unwrap();
        engine.signal(slot, true);
        assert_eq!(glance(&mut engine), []);
        assert_eq!(value(), u64::MAX - 1, "{engine}");

        let (read, write) = rustix::pipe::pipe().unwrap();
        let slot = engine.add_file(write.as_raw_fd()).unwrap();
        for _ in 0..20_000 {
            engine.signal(slot, false);
        }
        let mut word = [0; 8];
        rustix::io::read(&read, &mut word).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 1);
    }
}

#[test]
fn what_cannot_be_waited_for_does_not_keep_us_awake() {
    for mut engine in engines() {
        let null = File::open("/dev/null").unwrap();
        let slot = engine.add_file(null.as_raw_fd()).unwrap();
        engine.watch(slot, 3);
        for _ in 0..20 {
            glance(&mut engine);
        }
        assert_eq!(glance(&mut engine), [], "{engine}");
    }
}

#[test]
fn slots_run_out_with_an_error_and_come_back() {
    for mut engine in engines() {
        let bell = event();
        let slots: Vec<_> = (0..4)
            .map(|_| engine.add_file(bell.as_raw_fd()).unwrap())
            .collect();
        assert!(engine.add_file(bell.as_raw_fd()).is_err());
        engine.remove_file(slots[2]);
        assert_eq!(engine.add_file(bell.as_raw_fd()).unwrap(), slots[2]);
    }
}

#[test]
fn dropping_an_engine_waits_for_what_the_kernel_still_does() {
    for mut engine in engines() {
        let disk = file();
        disk.set_len(1 << 20).unwrap();
        let slot = engine.add_file(disk.as_raw_fd()).unwrap();
        let mut buffer = vec![7u8; 1 << 20];
        let into = [segment(&mut buffer)];
        // SAFETY: the engine is dropped, and with it drained, before the buffer.
        unsafe { engine.read(transfer(slot, &into, 0, 1)) };
        engine.submit(false).unwrap();
        drop(engine);
        assert!(buffer.iter().all(|&b| b == 0));
    }
}

#[test]
fn zeroes_holes_and_refusals() {
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for mut engine in engines() {
        let mut disk = file();
        disk.write_all(&[7; 3 * ZEROES]).unwrap();
        let slot = engine.add_file(disk.as_raw_fd()).unwrap();
        let extent = |offset, len, token| Extent {
            file: slot,
            offset,
            len,
            token,
        };
        engine.allocate(extent(0, 4096, 1), PUNCH);
        // No more than the buffer holds.
        engine.write_zeroes(extent(8192, 2 * ZEROES as u64, 2), 0);
        // A memory file system has no such mode, and a file no such command.
        engine.allocate(extent(0, 4096, 3), libc::FALLOC_FL_ZERO_RANGE);
        engine.discard(extent(0, 4096, 4));
        let mut done = collect(&mut engine, 4);
        done.sort_by_key(|c| c.token);
        let results: Vec<_> = done.iter().map(|c| c.result).collect();
        assert_eq!(results[..3], [0, ZEROES as i32, -libc::EOPNOTSUPP]);
        assert!(results[3] < 0, "{engine}: {results:?}");
        disk.rewind().unwrap();
        let mut bytes = Vec::new();
        disk.read_to_end(&mut bytes).unwrap();
        let zero = |n: usize| n < 4096 || (8192..8192 + ZEROES).contains(&n);
        for (n, byte) in bytes.iter().enumerate() {
            assert_eq!(*byte, if zero(n) { 0 } else { 7 }, "{engine}: byte {n}");
        }
    }
}

#[test]
fn a_ring_without_commands_refuses_them() {
    let mut engine = Engine::new(EngineKind::Auto, 8, 4).unwrap();
    engine.start().unwrap();
    if engine.is_synchronous() {
        return;
    }
    let disk = file();
    let file = engine.add_file(disk.as_raw_fd()).unwrap();
    engine.discard(Extent {
        file,
        offset: 0,
        len: 512,
        token: 1,
    });
    assert_eq!(collect(&mut engine, 1)[0].result, -libc::EACCES);
}

/// An engine that takes plain descriptors, or none.
fn plain(kind: EngineKind, descriptors: bool) -> Engine {
    let options = EngineOptions {
        kind,
        depth: 8,
        files: 4,
        commands: false,
        buffers: 0,
        threads: Some(16),
        polled: false,
        descriptors,
    };
    let mut engine = Engine::with(&options).unwrap();
    engine.start().unwrap();
    engine
}

#[test]
fn plain_descriptors_are_read_and_written_wherever_it_is_done() {
    for kind in [EngineKind::Auto, EngineKind::Sync] {
        for place in [Place::Ring, Place::Threads, Place::Here] {
            let mut engine = plain(kind, true);
            let disk = tempfile();
            let file = FileSlot::descriptor(disk.as_raw_fd(), place);
            let mut bytes = *b"some data";
            let segments = [iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            }];
            let transfer = |token, offset| Transfer {
                file,
                segments: &segments,
                offset,
                flags: 0,
                token,
            };
            let done = |token, result| [Completion { token, result }];
            // SAFETY: segments and bytes outlive the completion.
            unsafe { engine.write(transfer(1, 100)) };
            assert_eq!(collect(&mut engine, 1), done(1, 9), "{kind:?} {place:?}");
            for metadata in [false, true] {
                engine.sync(file, metadata, 2);
                assert_eq!(collect(&mut engine, 1), done(2, 0));
            }
            // SAFETY: as above.
            unsafe { engine.read(transfer(3, 105)) };
            assert_eq!(collect(&mut engine, 1), done(3, 4));
            assert_eq!(&bytes, b"data data");
            let extent = Extent {
                file,
                offset: 0,
                len: 4096,
                token: 4,
            };
            engine.allocate(extent, 0);
            assert_eq!(collect(&mut engine, 1), done(4, 0));
            assert_eq!(disk.metadata().unwrap().len(), 4096);
        }
    }
}

#[test]
fn writes_that_are_done_here_say_what_went_wrong() {
    let mut engine = plain(EngineKind::Auto, true);
    let disk = File::open("/dev/null").unwrap();
    let file = FileSlot::descriptor(disk.as_raw_fd(), Place::Here);
    let segments = [iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }];
    let transfer = Transfer {
        file,
        segments: &segments,
        offset: 0,
        flags: 0,
        token: 1,
    };
    // SAFETY: no memory is named.
    unsafe { engine.write(transfer) };
    assert_eq!(collect(&mut engine, 1)[0].result, -libc::EBADF);
}

#[test]
fn a_ring_for_registered_files_refuses_plain_descriptors() {
    let mut engine = plain(EngineKind::Auto, false);
    if engine.is_synchronous() {
        return;
    }
    let disk = tempfile();
    engine.sync(
        FileSlot::descriptor(disk.as_raw_fd(), Place::Ring),
        false,
        1,
    );
    assert_eq!(collect(&mut engine, 1)[0].result, -libc::EACCES);
}

/// A file of the disk, without a name: a memfd knows no direct or NOWAIT I/O.
fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("pericarp-engine-{:?}", Instant::now()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn a_sleep_ends_when_asked_and_a_later_end_does_not_replace_an_earlier() {
    for mut engine in engines() {
        let start = Instant::now();
        engine.wake_at(start + Duration::from_secs(60));
        engine.wake_at(start + Duration::from_millis(30));
        engine.wake_at(start + Duration::from_secs(60));
        // A timer that is replaced may end a sleep; none may sleep too long.
        while start.elapsed() < Duration::from_millis(30) {
            engine.wake_at(start + Duration::from_millis(30));
            // What does not sleep does not use it up.
            engine.submit(false).unwrap();
            engine.submit(true).unwrap();
            assert_eq!(glance_now(&mut engine), []);
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{engine}");
        // And what is long over ends it at once.
        engine.wake_at(start);
        engine.submit(true).unwrap();
    }
}

/// What is there, without looking a second time.
fn glance_now(engine: &mut Engine) -> Vec<Completion> {
    let mut got = Vec::new();
    engine.completions(&mut got);
    got
}

/// An engine with room for `buffers` pieces of memory, where this kernel has it.
fn registering(buffers: u32) -> Option<Engine> {
    let options = EngineOptions {
        kind: EngineKind::Auto,
        depth: 8,
        files: 4,
        commands: false,
        buffers,
        threads: None,
        polled: false,
        descriptors: false,
    };
    let mut engine = Engine::with(&options).unwrap();
    engine.start().unwrap();
    engine.registers_memory().then_some(engine)
}

/// Pages of a memfd, and the memfd.
fn pages(len: usize) -> (File, *mut u8) {
    let memory = file();
    memory.set_len(len as u64).unwrap();
    // SAFETY: a mapping at an address the kernel chooses.
    let at = unsafe {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        mmap(
            std::ptr::null_mut(),
            len,
            access,
            MapFlags::SHARED,
            &memory,
            0,
        )
        .unwrap()
    };
    (memory, at.cast())
}

/// Pages that were taken from the file while they were registered are those
/// that a transfer still reaches: how a test can tell, and why a guest whose
/// memory is registered must not have a balloon.
#[test]
fn registered_memory_is_what_was_there_when_it_was_registered() {
    const LEN: usize = 16384;
    let Some(mut engine) = registering(2) else {
        return;
    };
    let mut disk = file();
    disk.write_all(&[7; LEN]).unwrap();
    let slot = engine.add_file(disk.as_raw_fd()).unwrap();
    let (memory, at) = pages(2 * LEN);
    let segment = |offset: usize, len| iovec {
        // SAFETY: inside the mapping.
        iov_base: unsafe { at.add(offset).cast() },
        iov_len: len,
    };
    // SAFETY: inside the mapping, which no transfer is under way to.
    let byte = |offset: usize| unsafe { at.add(offset).read_volatile() };
    let read = |engine: &mut Engine, segments: &[iovec]| {
        // SAFETY: the mapping stays to the end.
        unsafe { engine.read(transfer(slot, segments, 0, 1)) };
        let want: usize = segments.iter().map(|s| s.iov_len).sum();
        assert_eq!(collect(engine, 1)[0].result, want as i32);
    };
    // SAFETY: the mapping stays to the end of the test.
    let first = unsafe { engine.add_buffer(at, LEN).unwrap() };
    read(&mut engine, &[segment(0, LEN)]);
    assert_eq!((byte(0), byte(LEN - 1)), (7, 7));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let forget = || fallocate(&memory, punch, 0, 2 * LEN as u64).unwrap();
    forget();
    read(&mut engine, &[segment(0, 4096)]);
    assert_eq!(byte(0), 0, "the transfer did not use what is registered");
    // Neither across the edge of a piece nor in a list.
    read(&mut engine, &[segment(LEN - 4096, 8192)]);
    assert_eq!((byte(LEN - 1), byte(LEN)), (7, 7));
    forget();
    read(&mut engine, &[segment(0, 512), segment(4096, 512)]);
    assert_eq!((byte(0), byte(4096)), (7, 7));
    // The next owner of the slot is another piece.
    forget();
    engine.remove_buffer(first);
    // SAFETY: as above.
    let second = unsafe { engine.add_buffer(at.add(LEN), LEN).unwrap() };
    read(&mut engine, &[segment(0, 4096)]);
    read(&mut engine, &[segment(LEN, 4096)]);
    assert_eq!((byte(0), byte(LEN)), (7, 7));
    // And writes come from there.
    // SAFETY: inside the mapping.
    unsafe { at.add(LEN).write_bytes(9, 4096) };
    forget();
    let from = [segment(LEN, 4096)];
    // SAFETY: as above.
    unsafe { engine.write(transfer(slot, &from, 0, 1)) };
    assert_eq!(collect(&mut engine, 1)[0].result, 4096);
    let mut bytes = [0; 4096];
    disk.rewind().unwrap();
    disk.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [9; 4096]);
    engine.remove_buffer(second);
    drop(engine);
    // SAFETY: mapped above, and the engine that used it is gone.
    unsafe { munmap(at.cast(), 2 * LEN).unwrap() };
}

#[test]
fn places_for_memory_run_out_with_an_error_and_come_back() {
    let Some(mut engine) = registering(1) else {
        return;
    };
    let (memory, at) = pages(8192);
    // SAFETY: the mapping is never undone.
    let add = |engine: &mut Engine, offset| unsafe { engine.add_buffer(at.add(offset), 4096) };
    let first = add(&mut engine, 0).unwrap();
    assert!(add(&mut engine, 4096).is_err());
    engine.remove_buffer(first);
    let second = add(&mut engine, 4096).unwrap();
    engine.remove_buffer(second);
    // What is not there cannot be pinned, and takes no place.
    memory.set_len(4096).unwrap();
    assert!(add(&mut engine, 4096).is_err());
    add(&mut engine, 0).unwrap();
}

#[test]
fn an_engine_that_was_not_asked_to_registers_no_memory() {
    for mut engine in engines() {
        assert!(!engine.registers_memory());
        let (_memory, at) = pages(4096);
        // SAFETY: the mapping is never undone.
        assert!(unsafe { engine.add_buffer(at, 4096) }.is_err());
    }
}

/// A file that cannot be polled is refused by the kernel, or served with
/// interrupts by older ones; and what cannot be polled is never tried. Whether
/// polling works takes a device that can: see the crash tests' NVMe disk.
#[test]
fn polled_transfers_complete_without_being_waited_for() {
    let [_, _, mut engine] = <[Engine; 3]>::try_from(engines()).unwrap();
    if engine.is_synchronous() {
        return;
    }
    let file = file();
    file.write_all_at(&[7; 4096], 0).unwrap();
    let slot = engine.add_file(file.as_raw_fd()).unwrap();
    engine.expect_polling(slot);
    let mut memory = [0u8; 4096];
    let segment = iovec {
        iov_base: memory.as_mut_ptr().cast(),
        iov_len: memory.len(),
    };
    let mut read = |flags, token| {
        let transfer = Transfer {
            file: slot,
            segments: std::slice::from_ref(&segment),
            offset: 0,
            flags,
            token,
        };
        // SAFETY: both outlive the completion, which is waited for.
        unsafe { engine.read(transfer) };
        let polls = engine.polls();
        let done = collect(&mut engine, 1);
        assert!(!engine.polls() && engine.patience().is_zero());
        (polls, done[0].token, done[0].result)
    };
    // No file is open for direct I/O on a memory file system.
    assert_eq!(read(0, 1), (true, 1, -libc::EOPNOTSUPP));
    assert_eq!(read(libc::RWF_DSYNC, 2), (false, 2, 4096));
    // A slot that is used again means another file.
    engine.remove_file(slot);
    let again = engine.add_file(file.as_raw_fd()).unwrap();
    assert_eq!(again, slot);
    let transfer = Transfer {
        file: again,
        segments: std::slice::from_ref(&segment),
        offset: 0,
        flags: 0,
        token: 3,
    };
    // SAFETY: as above.
    unsafe { engine.read(transfer) };
    assert!(!engine.polls());
    assert_eq!(collect(&mut engine, 1)[0].result, 4096);
}

/// More than both queues of the second ring have room for, with nothing taken
/// back meanwhile.
#[test]
fn polled_transfers_find_room() {
    const COUNT: u64 = 300;
    let [_, _, mut engine] = <[Engine; 3]>::try_from(engines()).unwrap();
    let file = file();
    file.write_all_at(&[7; 4096], 0).unwrap();
    let slot = engine.add_file(file.as_raw_fd()).unwrap();
    engine.expect_polling(slot);
    let mut memory = [0u8; 4096];
    let segment = iovec {
        iov_base: memory.as_mut_ptr().cast(),
        iov_len: memory.len(),
    };
    for token in 0..COUNT {
        let transfer = Transfer {
            file: slot,
            segments: std::slice::from_ref(&segment),
            offset: 0,
            flags: 0,
            token,
        };
        // SAFETY: both outlive the completions, which are waited for.
        unsafe { engine.read(transfer) };
    }
    let mut tokens: Vec<_> = collect(&mut engine, COUNT as usize)
        .iter()
        .map(|done| done.token)
        .collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..COUNT).collect::<Vec<_>>());
    assert!(!engine.polls());
}
