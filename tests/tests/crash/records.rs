//! Whose a record is: files of another owner, and memory that lies.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Driver, Op};
use pericarp_tests::model::Sequence;
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::fs::{FlockOperation, MemfdFlags, SealFlags, flock, memfd_create};
use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::{block, disk, setup, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

fn ends_with(scratch: &Scratch, extra: &[&str], words: &[&str]) {
    let mut second = block(scratch, extra);
    let status = second.wait(Duration::from_secs(20)).expect("it is refused");
    second.kill();
    let text = second.output().last(20);
    assert_eq!(status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn a_file_has_one_owner_and_keeps_its_devices() {
    if !have(
        "a_file_has_one_owner_and_keeps_its_devices",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let record = scratch.path("record");
    let option = format!("--inflight-file={}", record.display());
    let device = |name: &str| {
        let path = |name: &str| scratch.path(name).display().to_string();
        format!(
            "--device=id={name},socket={},file={}",
            path(name),
            path("disk")
        )
    };
    let start = |name: &str| {
        let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
        program.arg(device(name)).arg(&option);
        Process::start(&mut program, Duration::from_secs(60)).unwrap()
    };
    let mut first = start("a");
    drop(pericarp_tests::peer::connect(&wait_for(&scratch.path("a"))).unwrap());
    assert_eq!(
        record.metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    let refused = |name: &str, word: &str| {
        let mut other = start(name);
        let status = other.wait(Duration::from_secs(20)).expect("it is refused");
        other.kill();
        let text = other.output().last(20);
        assert_eq!(
            (status.code(), text.lines().count()),
            (Some(2), 1),
            "{text}"
        );
        assert!(
            text.contains("--inflight-file") && text.contains(word),
            "{text}"
        );
    };
    refused("b", "live");
    first.signal(Signal::TERM);
    assert_eq!(first.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    let before = std::fs::read(&record).unwrap();
    refused("b", "other file");
    assert_eq!(std::fs::read(&record).unwrap(), before);
    // Files that are something else stay as they are.
    let text = scratch.file("text", b"not a record");
    let option = |path: &Path| format!("--inflight-file={}", path.display());
    ends_with(&scratch, &[&option(&text)], &["--inflight-file", "text"]);
    assert_eq!(std::fs::read(&text).unwrap(), b"not a record");
    ends_with(&scratch, &[&option(scratch.dir())], &["no regular file"]);
    let link = scratch.path("link");
    std::os::unix::fs::symlink(&text, &link).unwrap();
    ends_with(&scratch, &[&option(&link)], &["no regular file"]);
    let nowhere = scratch.path("no/record");
    ends_with(&scratch, &[&option(&nowhere)], &["cannot be opened"]);
}

/// Memory for records that is none, or that is full of lies.
#[test]
fn records_that_lie_are_refused_or_dropped() {
    if !have(
        "records_that_lie_are_refused_or_dropped",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let mut backend = block(&scratch, &[]);
    let socket = wait_for(&scratch.path("s"));
    let connect = || Driver::connect(&socket, &setup(true)).unwrap();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let regular = File::options()
        .read(true)
        .write(true)
        .open(scratch.path("disk"))
        .unwrap();
    let memory = |len: u64| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("lies", flags).unwrap());
        file.set_len(len).unwrap();
        file
    };
    let sealed = memory(1 << 20);
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    let unsealable = File::from(memfd_create("lies", MemfdFlags::CLOEXEC).unwrap());
    unsealable.set_len(1 << 20).unwrap();
    let noise = memory(1 << 20);
    noise
        .write_all_at(&Sequence::new(3).bytes(1 << 20), 0)
        .unwrap();
    let short = memory(4096);
    let bad = [
        ("a pipe", pipe.as_fd()),
        ("a file", regular.as_fd()),
        ("a short memfd", short.as_fd()),
        ("a read-only memfd", sealed.as_fd()),
        ("a memfd that may shrink", unsealable.as_fd()),
        ("noise", noise.as_fd()),
    ];
    for (name, fd) in bad {
        let mut driver = connect();
        let (inflight, _) = driver.inflight.take().unwrap();
        let set = driver.frontend.set_inflight_fd(&inflight, fd.as_raw_fd());
        assert!(set.is_err(), "{name}");
        // The ring goes on, with the record that it has.
        driver
            .request(0, &Op::Flush)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    // A good size, and every other field wrong.
    let mut driver = connect();
    let (inflight, memory) = driver.inflight.take().unwrap();
    for (queues, size, offset) in [
        (2, 256, 0),
        (1, 0, 0),
        (1, 2048, 0),
        (1, 256, 1),
        (1, 128, 0),
        (1, 256, u64::MAX - 4095),
    ] {
        let wrong = VhostUserInflight {
            num_queues: queues,
            queue_size: size,
            mmap_offset: offset,
            ..inflight
        };
        let set = driver.frontend.set_inflight_fd(&wrong, memory.as_raw_fd());
        assert!(set.is_err(), "{queues} {size} {offset}");
    }
    for (queues, size) in [(0, 256), (2, 256), (1, 0), (1, 2048), (u16::MAX, u16::MAX)] {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        assert!(
            driver.frontend.get_inflight_fd(&wanted).is_err(),
            "{queues} {size}"
        );
    }
    driver.request(0, &Op::Flush).unwrap();
    // Noise behind a good header, again and again, under a ring that starts.
    let mut sequence = Sequence::new(11);
    for round in 0..200 {
        let len = inflight.mmap_size as usize - 128;
        let mut noise = sequence.bytes(len);
        if round % 2 == 0 {
            // Flags that are none would drop it all at once.
            noise.iter_mut().for_each(|byte| *byte &= 1);
        }
        memory.write_all_at(&noise, 128).unwrap();
        driver
            .frontend
            .set_inflight_fd(&inflight, memory.as_raw_fd())
            .unwrap();
        let _ = driver.request(0, &Op::Flush);
    }
    drop(driver);
    connect().request(0, &Op::Flush).unwrap();
    assert!(backend.ended().is_none(), "{}", backend.epitaph());
}

/// A dead process's ring holds the lock until its last I/O ended. Here the test
/// holds it, for as long as it likes: nothing may be done meanwhile.
#[test]
fn a_successor_waits_for_the_lock() {
    if !have("a_successor_waits_for_the_lock", &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let mut backend = block(&scratch, &[]);
    let socket = wait_for(&scratch.path("s"));
    let mut driver = Driver::connect(&socket, &setup(true)).unwrap();
    driver.request(0, &Op::Flush).unwrap();
    backend.kill();
    let (_, memory) = driver.inflight.as_ref().unwrap();
    let ours = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let lock = File::options().read(true).write(true).open(ours).unwrap();
    let taken = poll(LIMIT, || {
        flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()
    });
    assert!(taken.is_some(), "the dead process keeps its lock");
    // Offered to nobody: whoever serves the ring next does it.
    let data = vec![7; 4096];
    let chain = driver.prepare(0, &Op::Write { sector: 0, data }).unwrap();
    driver.place(0, 0, &chain);
    driver.rings[0].queue(0);
    driver.rings[0].publish();
    let successor = block(&scratch, &[]);
    let content = || std::fs::read(scratch.path("disk")).unwrap()[..4096].to_vec();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let tried = poll(LIMIT, || driver.reconnect(&socket).ok());
            tried.expect("a successor");
            driver.rings[0].wait(1, LIMIT).unwrap();
        });
        let told = poll(LIMIT, || successor.output().find("waiting for the I/O"));
        let early = connecting.is_finished() || content() != [0; 4096];
        flock(&lock, FlockOperation::Unlock).unwrap();
        connecting.join().unwrap();
        assert!(!early && told.is_some(), "it did not wait");
    });
    assert!(content() == [7; 4096]);
}
