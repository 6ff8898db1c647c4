//! `pericarp-block` killed again and again under verified load, and served on
//! by a successor: no request may be lost, done twice in the guest's eyes, or
//! land late. `PERICARP_CRASH_SECONDS` makes it longer than CI has time for.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::frontend::{Driver, Op, Setup};
use pericarp_tests::guest::{Assets, MARK, initramfs};
use pericarp_tests::model::Sequence;
use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS, Load};
use rustix::fs::{MemfdFlags, SealFlags, memfd_create};
use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

/// How long a test kills.
fn patience(default: u64) -> Duration {
    let named = std::env::var("PERICARP_CRASH_SECONDS").ok();
    Duration::from_secs(named.and_then(|n| n.parse().ok()).unwrap_or(default))
}

fn block(scratch: &Scratch, extra: &[&str]) -> Process {
    let mut program = command(&Part::PERICARP_BLOCK.find().unwrap());
    let path = |name: &str| scratch.path(name).display().to_string();
    program
        .arg(format!("--socket-path={}", path("s")))
        .arg(format!("--blk-file={}", path("disk")))
        .arg("--log-level=info")
        .args(extra);
    Process::start(&mut program, patience(60) + Duration::from_secs(120)).unwrap()
}

fn disk(scratch: &Scratch) {
    // Written once, or direct writes would have to allocate.
    scratch.file("disk", &vec![0; BLOCK * BLOCKS]);
}

fn setup(inflight: bool) -> Setup {
    Setup {
        queue_size: 256,
        inflight,
        ..Setup::default()
    }
}

/// Kills every 200 ms or so, now and then while the successor still recovers.
fn killed_under_load(test: &str, inflight: bool, extra: &[&str]) {
    if !have(test, &[Part::PERICARP_BLOCK]) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let record = format!("--inflight-file={}", scratch.path("record").display());
    let mut extra = extra.to_vec();
    if !inflight {
        extra.push(&record);
    }
    let mut backend = block(&scratch, &extra);
    let mut driver = Driver::connect(&wait_for(&scratch.path("s")), &setup(inflight)).unwrap();
    let mut load = Load::new(42);
    let (begin, limit) = (Instant::now(), patience(10));
    let (mut kills, mut again, mut longest) = (0, 0, Duration::ZERO);
    while begin.elapsed() < limit {
        let millis = if load.below(4) == 0 {
            load.below(8)
        } else {
            50 + load.below(250)
        };
        let ran = load.run(&mut driver, Duration::from_millis(millis));
        ran.unwrap_or_else(|e| panic!("after {kills} kills: {e}\n{}", backend.output().last(20)));
        backend.signal(Signal::KILL);
        let dead = Instant::now();
        // Every other time the successor comes before its predecessor is gone.
        if kills % 2 == 0 {
            backend.kill();
        }
        let successor = block(&scratch, &extra);
        drop(std::mem::replace(&mut backend, successor));
        // The socket may be gone for a moment, or still be the dying process's.
        let mut last = String::new();
        let connected = poll(Duration::from_secs(20), || {
            let tried = driver.reconnect(&scratch.path("s"));
            tried.map_err(|e| last = e.to_string()).ok()
        });
        assert!(connected.is_some(), "{last}\n{}", backend.output().last(20));
        longest = longest.max(dead.elapsed());
        again += usize::from(backend.output().find("done again").is_some());
        kills += 1;
    }
    let drained = load.drain(&mut driver);
    drained.unwrap_or_else(|e| panic!("at the end: {e}\n{}", backend.output().last(20)));
    std::thread::sleep(Duration::from_millis(500));
    load.compare(&scratch.path("disk")).unwrap();
    eprintln!(
        "{test}: {kills} kills, {} requests, {again} successors had some to do again, \
         longest pause {longest:?}",
        load.done
    );
    assert!(kills > 5, "{kills} kills prove little");
    // What the page cache serves is done at once: that disk is idle often.
    assert!(
        again > kills / 10,
        "{again} of {kills} successors had something to do"
    );
    backend.signal(Signal::TERM);
    let status = backend.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn killed_with_memory_that_the_front_end_keeps() {
    killed_under_load("killed_with_memory_that_the_front_end_keeps", true, &[]);
}

#[test]
fn killed_with_a_file() {
    killed_under_load("killed_with_a_file", false, &["--cache=buffered"]);
}

#[test]
fn killed_with_the_synchronous_engine() {
    killed_under_load(
        "killed_with_the_synchronous_engine",
        true,
        &["--io-engine=sync"],
    );
}

/// A clean end of a ring or a connection leaves nothing in flight behind.
#[test]
fn rings_stop_and_front_ends_come_and_go_with_a_record() {
    if !have(
        "rings_stop_and_front_ends_come_and_go_with_a_record",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    let scratch = Scratch::new();
    disk(&scratch);
    let mut backend = block(&scratch, &[]);
    let mut driver = Driver::connect(&wait_for(&scratch.path("s")), &setup(true)).unwrap();
    let mut load = Load::new(7);
    let step = Duration::from_millis(30);
    for round in 0..10 {
        load.run(&mut driver, step).unwrap();
        let base = driver.stop(0).unwrap();
        assert_eq!(
            base,
            driver.rings[0].used_idx(),
            "all that was taken is done"
        );
        driver.configure(0).unwrap();
        driver.enable(0, true).unwrap();
        load.run(&mut driver, step).unwrap();
        driver.send_memory().unwrap();
        load.run(&mut driver, step).unwrap();
        if round % 2 == 0 {
            // The connection, with the process alive.
            driver.reconnect(&scratch.path("s")).unwrap();
        }
    }
    load.drain(&mut driver).unwrap();
    load.compare(&scratch.path("disk")).unwrap();
    let text = backend.output().last(400);
    assert!(
        !text.contains("done again") && !text.contains("dropped"),
        "{text}"
    );
    // A new ring in the same record, as after a reset of the guest.
    driver.stop(0).unwrap();
    driver.rings[0].reset(128);
    driver.configure(0).unwrap();
    driver.enable(0, true).unwrap();
    driver.request(0, &Op::Flush).unwrap();
    backend.signal(Signal::TERM);
    assert_eq!(
        backend.wait(Duration::from_secs(10)).unwrap().code(),
        Some(0)
    );
}

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
    use std::os::unix::fs::PermissionsExt;
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

fn wait_for(path: &Path) -> std::path::PathBuf {
    let limit = Duration::from_secs(10);
    poll(limit, || path.exists().then_some(())).expect("a socket");
    path.to_owned()
}

/// Verified I/O for a while, then the number of rounds.
const GUEST: &str = r#"
end=$(($(cut -d. -f1 /proc/uptime) + SECONDS_HERE))
round=0
# Large reads without a check keep the disk busy where the CPU is emulated.
fio --name=busy --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=16 --rw=randread \
    --bs=1m --offset=32m --size=32m --time_based --runtime=SECONDS_HERE --eta=never \
    --output=busy.log &
busy=$!
echo fio begins
while [ "$(cut -d. -f1 /proc/uptime)" -lt $end ]; do
    round=$((round + 1))
    fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 \
        --rw=randrw --rwmixread=40 --bsrange=4k-256k --size=24m --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --verify_backlog=64 --randseed=$round --eta=never --output=fio.log ||
        { cat fio.log; dmesg | tail; exit 1; }
done
wait $busy || { cat busy.log; exit 1; }
dmesg | grep -i -e 'i/o error' -e 'blocked for more' && exit 1
echo "rounds: $round"
"#;

/// A stock kernel in QEMU, whose backend is killed every three seconds.
#[test]
fn qemu_reconnects_to_successors() {
    let test = "qemu_reconnects_to_successors";
    let parts = [
        Part::QemuSystem,
        Part::Busybox,
        Part::Fio,
        Part::PERICARP_BLOCK,
    ];
    if !have(test, &parts) {
        return;
    }
    let Some(assets) = Assets::find() else {
        skip(
            test,
            "the guest's kernel is missing (make it: cargo xtask setup)",
        );
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    scratch.sparse("disk", 64 << 20);
    let seconds = patience(20);
    let script = GUEST.replace("SECONDS_HERE", &seconds.as_secs().to_string());
    let image = initramfs(&scratch, &assets, &["fio"], &script).unwrap();
    let mut backend = block(&scratch, &[]);
    let socket = wait_for(&scratch.path("s"));
    let mut qemu = command(&Part::QemuSystem.find().unwrap());
    qemu.args(["-machine", "q35,memory-backend=mem", "-m", "512M"])
        .args(["-accel", "tcg,thread=single", "-cpu", "max"])
        .args(["-object", "memory-backend-memfd,id=mem,share=on,size=512M"])
        .args([
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(assets.kernel())
        .arg("-initrd")
        .arg(image)
        .args([
            "-append",
            "console=ttyS0 no_timer_check cryptomgr.notests quiet panic=-1",
        ])
        .arg("-chardev")
        .arg(format!(
            "socket,id=disk,path={},reconnect=1",
            socket.display()
        ))
        .args([
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=1,queue-size=128",
        ]);
    let limit = seconds * 2 + Duration::from_secs(120);
    let mut machine = Process::start(&mut qemu, limit).unwrap();
    let console = machine.output().clone();
    let begun = poll(Duration::from_secs(90), || console.find("fio begins"));
    assert!(begun.is_some(), "{}", console.last(40));
    let (mut kills, mut again, mut kept) = (0, 0, 0);
    while machine.wait(Duration::from_secs(3)).is_none() {
        if console.find(MARK).is_some() {
            continue;
        }
        again += usize::from(backend.output().find("done again").is_some());
        // Confined processes show this to root only.
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", backend.pid()));
        kept += usize::from(maps.map_or(true, |maps| maps.contains("memfd:inflight")));
        backend.kill();
        backend = block(&scratch, &[]);
        kills += 1;
    }
    let text = console.last(60);
    let code = text.rsplit_once(MARK).map(|(_, code)| code.trim());
    let code = code.and_then(|code| code.lines().next());
    assert_eq!(code, Some("0"), "{text}\n{}", backend.output().last(20));
    eprintln!(
        "{test}: {kills} kills, {again} successors had some to do again, {}",
        console.find("rounds: ").unwrap_or_default()
    );
    // An emulated guest is slow: the disk may have been idle at each kill. But
    // the front end must have kept the record, and handed it on.
    assert!(
        kills >= 3 && 2 * kept > kills,
        "{kills} kills, {kept} records"
    );
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
