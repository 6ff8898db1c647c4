//! A stock Debian kernel in QEMU with two queues on the disk under test: a
//! file system, copies, a remount with checksums, and verified random I/O. The
//! same for pericarp-block and, first, for the peer that validates the rig.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::time::Duration;

use pericarp_hypervisor::{ConsoleSpec, DiskSpec, HostFacts, MachineSpec, Wanted, select};
use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, MARK, initramfs};
use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
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

fn work(kind: Kind, test: &str) {
    let parts = [Part::QemuSystem, Part::Busybox, Part::Fio, Part::MkfsExt4];
    if !have(test, &parts) || !kind.usable(test) {
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
    let disk = scratch.sparse("disk", 1 << 30);
    let options = Options {
        num_queues: 2,
        cache: Cache::Direct,
        lifetime: LIMIT + Duration::from_secs(30),
        ..Options::default()
    };
    let mut backend = Backend::start(kind, &scratch, &disk, &options).unwrap();
    let spec = MachineSpec {
        kernel: assets.kernel(),
        initramfs: initramfs(&scratch, &assets, SCRIPT).unwrap(),
        cmdline: "quiet panic=-1".into(),
        cpus: 2,
        memory: 768 << 20,
        disks: vec![DiskSpec {
            id: "disk".into(),
            socket: backend.socket().to_owned(),
            num_queues: 2,
            queue_size: 128,
        }],
        channels: vec![],
        spare_slots: 2,
        console: ConsoleSpec::default(),
        run_dir: scratch.dir().to_owned(),
    };
    let choice = select(Wanted::Auto, &HostFacts::probe());
    let mut machine = choice.hypervisor().start(&spec).unwrap();
    let ended = poll(LIMIT, || machine.has_ended().then_some(()));
    let console = machine.console_lines(60).join("\n");
    assert!(
        ended.is_some(),
        "the guest was not done within {LIMIT:?}:\n{console}"
    );
    let Some((_, code)) = console.rsplit_once(MARK) else {
        panic!(
            "{}\n{console}\nthe backend: {}",
            machine.death(),
            backend.epitaph()
        );
    };
    assert_eq!(code.trim().lines().next(), Some("0"), "{console}");
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
