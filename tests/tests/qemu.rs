//! A stock Debian kernel in QEMU. Two queues on the disk under test: a file
//! system, copies, a remount with checksums, and verified random I/O; the same
//! for pericarp-block and, first, for the peer that validates the rig. Then
//! vsock in both directions, with socat at the guest's end.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use pericarp_hypervisor::{
    ConsoleSpec, DiskSpec, HostFacts, Machine, MachineSpec, VsockSpec, Wanted, select,
};
use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::peer::{Backend, Cache, Kind, Options, connect};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

/// With an emulated CPU all of it takes about a minute.
const LIMIT: Duration = Duration::from_secs(180);

const SCRIPT: &str = r#"
[ "$(ls /sys/block/vda/mq | wc -l)" = 2 ]
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt
dd if=/dev/urandom of=/tmp/part bs=1M count=50 2>/dev/null
want=$(md5sum </tmp/part)
for copy in 1 2 3 4 5 6; do cp /tmp/part /mnt/copy$copy & done
wait
sync
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda /mnt
for copy in 1 2 3 4 5 6; do [ "$(md5sum </mnt/copy$copy)" = "$want" ]; done
umount /mnt
fsck.ext4 -f -n /dev/vda >fsck.log 2>&1 || { cat fsck.log; exit 1; }
echo file system well
# Two jobs on two CPUs use both queues.
for job in 0 1; do
    taskset $((job + 1)) fio --name=verify$job --filename=/dev/vda --direct=1 \
        --ioengine=io_uring --iodepth=32 --rw=randrw --bs=4k --offset=$((job * 64))m --size=16m \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --output=fio$job.log &
    eval "pid$job=$!"
done
wait $pid0 || { cat fio0.log; exit 1; }
wait $pid1 || { cat fio1.log; exit 1; }
echo data well
dmesg | grep -i 'i/o error' && exit 1
true
"#;

const CID: u32 = 42;

/// The first connection says that the second can be made, and ends the guest.
const VSOCK_SCRIPT: &str = r#"
socat VSOCK-LISTEN:77 EXEC:cat &
[ "$(echo ready | socat -t 180 - VSOCK-CONNECT:2:52)" = done ]
"#;

/// A machine of two CPUs without any device.
fn machine(assets: &Assets, initramfs: PathBuf) -> MachineSpec {
    MachineSpec {
        kernel: assets.kernel(),
        initramfs,
        cmdline: "quiet panic=-1".into(),
        cpus: 2,
        memory: 768 << 20,
        disks: vec![],
        shares: Vec::new(),
        cards: Vec::new(),
        vsock: None,
        spare_slots: 2,
        console: ConsoleSpec::default(),
    }
}

fn start(spec: &MachineSpec) -> Machine {
    let choice = select(Wanted::Auto, &HostFacts::probe());
    choice.hypervisor().start(spec).unwrap()
}

/// Waits for the end of the script, which must have succeeded; gives the console.
fn succeeded(machine: &mut Machine, backend: impl FnOnce() -> String) -> String {
    let ended = poll(LIMIT, || machine.has_ended().then_some(()));
    let console = machine.console_lines(60).join("\n");
    assert!(
        ended.is_some(),
        "the guest was not done within {LIMIT:?}:\n{console}"
    );
    let Some(code) = exit_code(&console) else {
        panic!("{}\n{console}\nthe backend: {}", machine.death(), backend());
    };
    assert_eq!(code, "0", "{console}");
    console
}

fn work(kind: Kind, test: &str) {
    if !kind.usable(test) {
        return;
    }
    let Some(assets) = Assets::for_test(test, &[Part::Fio, Part::MkfsExt4]) else {
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", 1 << 30);
    let options = Options {
        num_queues: 2,
        cache: Cache::Direct,
        lifetime: LIMIT + Duration::from_secs(30),
        ..Options::default()
    };
    let mut backend = Backend::start(kind, &scratch, &disk, &options).unwrap();
    let tools = ["fio", "mkfs.ext4", "fsck.ext4"];
    let initramfs = initramfs(&scratch, &assets, &tools, SCRIPT).unwrap();
    let mut machine = start(&MachineSpec {
        disks: vec![DiskSpec {
            id: "disk".into(),
            socket: backend.socket().to_owned(),
            num_queues: 2,
            queue_size: 128,
        }],
        ..machine(&assets, initramfs)
    });
    let console = succeeded(&mut machine, || backend.epitaph());
    assert!(
        console.contains("file system well") && console.contains("data well"),
        "{console}"
    );
    assert!(backend.is_alive(), "{}", backend.epitaph());
    assert_eq!(backend.stop().unwrap().code(), Some(0));
}

#[test]
fn qemu_storage_daemon_carries_a_guest() {
    work(
        Kind::QemuStorageDaemon,
        "qemu_storage_daemon_carries_a_guest",
    );
}

#[test]
fn pericarp_carries_a_guest() {
    work(Kind::Pericarp, "pericarp_carries_a_guest");
}

#[test]
fn vsock_carries_a_guest() {
    let parts = [Part::Socat, Part::PERICARP_VSOCK];
    let Some(assets) = Assets::for_test("vsock_carries_a_guest", &parts) else {
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let mut program = command(&Part::PERICARP_VSOCK.find().unwrap());
    program.arg("--socket-path").arg(scratch.path("front"));
    program.arg("--uds-path").arg(scratch.path("host"));
    program.arg(format!("--guest-cid={CID}"));
    let mut backend = Process::start(&mut program, LIMIT + Duration::from_secs(30)).unwrap();
    let listener = UnixListener::bind(scratch.path("host_52")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let bound = poll(Duration::from_secs(10), || {
        scratch.path("front").exists().then_some(())
    });
    assert!(bound.is_some(), "{}", backend.output().last(10));
    let initramfs = initramfs(&scratch, &assets, &["socat"], VSOCK_SCRIPT).unwrap();
    let mut machine = start(&MachineSpec {
        vsock: Some(VsockSpec {
            id: "vsock".into(),
            socket: scratch.path("front"),
            guest_cid: CID,
        }),
        ..machine(&assets, initramfs)
    });

    let dialled = poll(LIMIT, || {
        let stream = listener.accept().ok().map(|(stream, _)| Some(stream));
        stream.or_else(|| machine.has_ended().then_some(None))
    });
    let Some(mut first) = dialled.flatten() else {
        panic!(
            "no connection from the guest: {}\n{}",
            backend.epitaph(),
            machine.console_lines(60).join("\n")
        );
    };
    first.set_nonblocking(false).unwrap();
    first.set_read_timeout(Some(LIMIT)).unwrap();
    let mut word = [0; 6];
    first.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ready\n");

    // The guest's listener may come up a moment after its dialler.
    let mut answer = [0; 3];
    let dialled = poll(LIMIT, || {
        let mut stream = connect(&scratch.path("host")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"CONNECT 77\n").unwrap();
        stream.read_exact(&mut answer).ok().map(|()| stream)
    });
    let mut second = dialled.expect("the guest listens");
    assert_eq!(&answer, b"OK ");
    while answer[2] != b'\n' {
        second.read_exact(&mut answer[2..]).unwrap();
    }
    let sent: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        let mut writer = second.try_clone().unwrap();
        let sent = &sent;
        scope.spawn(move || {
            writer.write_all(sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        second.read_to_end(&mut back).unwrap();
    });
    assert!(back == sent, "{} of {} bytes", back.len(), sent.len());

    first.write_all(b"done\n").unwrap();
    drop(first);
    succeeded(&mut machine, || backend.epitaph());
    assert!(backend.ended().is_none(), "{}", backend.epitaph());
}
