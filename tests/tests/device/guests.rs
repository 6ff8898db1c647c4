//! Linux as the driver: file systems made, trimmed, discarded and zeroed under
//! User-mode Linux and in QEMU, and what that does to the host's file.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use pericarp_hypervisor::{ConsoleSpec, DiskSpec, HostFacts, MachineSpec, Wanted, select};
use pericarp_tests::bounded::{Alone, poll};
use pericarp_tests::guest::{Assets, MARK, initramfs};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::peer::{Backend, Cache, Kind};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;

use super::{MIB, options, start};

const SIZE: u64 = 256 * MIB;
/// Filled by the host before the guest comes: the last quarter.
const FULL: u64 = 192 * MIB;

/// First the raw device, then a file system on it. 64 MiB at the end were full.
const SCRIPT: &str = r#"
queue=/sys/block/vda/queue
# By path: a busybox shell would take its own, which cannot zero.
blkdiscard=$(which blkdiscard)
fstrim=$(which fstrim)
[ "$(cat $queue/discard_max_bytes)" -gt 0 ]
[ "$(cat $queue/write_zeroes_max_bytes)" -gt 0 ]
cat $queue/discard_granularity
cmp -n 4096 -i 201326592:0 /dev/vda /dev/zero >/dev/null 2>&1 && exit 3
# Half of it discarded, a quarter zeroed.
$blkdiscard -o 201326592 -l 33554432 /dev/vda
$blkdiscard -z -o 234881024 -l 16777216 /dev/vda
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M skip=192 count=48 2>/dev/null | tr -d '\000' | wc -c
# The rest is as it was.
dd if=/dev/vda bs=1M skip=240 count=16 2>/dev/null | tr -d 'Z' | wc -c
mkfs.ext4 -q -F -b 4096 /dev/vda 49152
mkdir -p disk; mount -t ext4 -o nodiscard /dev/vda disk
dd if=/dev/urandom of=disk/file bs=1M count=64 2>/dev/null
sync
rm disk/file
sync
$fstrim -v disk
umount disk
fsck.ext4 -f -n /dev/vda >fsck.log 2>&1 || { cat fsck.log; exit 1; }
dmesg | grep -i 'i/o error' && exit 1
echo space well
"#;

/// Bytes the file takes of its file system.
fn taken(path: &Path) -> u64 {
    File::open(path).unwrap().sync_all().unwrap();
    path.metadata().unwrap().blocks() * 512
}

fn disk(scratch: &Scratch) -> std::path::PathBuf {
    let path = scratch.sparse("disk", SIZE);
    let file = File::options().write(true).open(&path).unwrap();
    for at in (FULL..SIZE).step_by(MIB as usize) {
        file.write_all_at(&[b'Z'; MIB as usize], at).unwrap();
    }
    assert!(taken(&path) >= 64 * MIB);
    path
}

/// What the script must have said, and what must be left of the file.
fn judge(output: &str, backend: &Backend) {
    assert!(output.contains("space well"), "{output}");
    let lines: Vec<&str> = output.lines().map(str::trim).collect();
    let counts: Vec<_> = lines.iter().filter(|line| **line == "0").collect();
    assert_eq!(counts.len(), 2, "zeroes and the rest: {output}");
    // 16 MiB full, 16 zeroed and kept, and what an empty file system needs.
    // The 64 MiB the guest wrote and removed are not there.
    let left = taken(backend.disk());
    eprintln!("{} MiB are left", left / MIB);
    assert!(left < 56 * MIB, "{left} bytes are left of the disk");
    assert!(
        left > 30 * MIB,
        "{left} bytes: zeroed blocks were given back"
    );
}

#[test]
fn user_mode_linux_discards_trims_and_zeroes() {
    let test = "user_mode_linux_discards_trims_and_zeroes";
    if !have(test, &[Part::UserModeLinux, Part::MkfsExt4]) || !Kind::Pericarp.usable(test) {
        return;
    }
    let _alone = Alone::turn();
    for (cache, engine) in [(Cache::Direct, "auto"), (Cache::Buffered, "sync")] {
        let scratch = Scratch::new();
        let backend = start(&scratch, &disk(&scratch), &options(cache, engine));
        let report = Machine::new(&[backend.socket()], SCRIPT).run().unwrap();
        let text = format!("{}\n{}", report.output, report.console);
        assert_eq!(report.code, 0, "{text}");
        judge(&report.output, &backend);
    }
}

/// Linux on a disk with blocks of 4096 bytes.
#[test]
fn user_mode_linux_sees_the_block_size() {
    let test = "user_mode_linux_sees_the_block_size";
    if !have(test, &[Part::UserModeLinux, Part::MkfsExt4]) || !Kind::Pericarp.usable(test) {
        return;
    }
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let file = scratch.sparse("image", 64 * MIB);
    let Some(disk) = super::geometry::Loop::new(test, &file, 4096) else {
        return;
    };
    let script = "
        cat /sys/block/vda/queue/logical_block_size /sys/block/vda/size
        mkfs.ext4 -q -F /dev/vda
        mkdir disk; mount /dev/vda disk
        dd if=/dev/urandom of=disk/file bs=1M count=8 2>/dev/null
        want=$(md5sum <disk/file); umount disk; mount /dev/vda disk
        [ \"$(md5sum <disk/file)\" = \"$want\" ]
        umount disk; fsck.ext4 -f -n /dev/vda >/dev/null 2>&1; echo well";
    let backend = start(&scratch, disk.path(), &options(Cache::Direct, "auto"));
    let report = Machine::new(&[backend.socket()], script).run().unwrap();
    assert_eq!(report.code, 0, "{}\n{}", report.output, report.console);
    assert_eq!(report.output, "4096\n131072\nwell\n");
}

#[test]
fn qemu_discards_trims_and_zeroes() {
    const LIMIT: Duration = Duration::from_secs(180);
    let test = "qemu_discards_trims_and_zeroes";
    if !Kind::Pericarp.usable(test) {
        return;
    }
    let Some(assets) = Assets::for_test(test, &[Part::MkfsExt4]) else {
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let mut options = options(Cache::Direct, "auto");
    options.lifetime = LIMIT + Duration::from_secs(30);
    let mut backend = start(&scratch, &disk(&scratch), &options);
    let tools = ["mkfs.ext4", "fsck.ext4", "blkdiscard", "fstrim", "cmp"];
    let spec = MachineSpec {
        kernel: assets.kernel(),
        initramfs: initramfs(&scratch, &assets, &tools, SCRIPT).unwrap(),
        cmdline: "quiet panic=-1".into(),
        cpus: 1,
        memory: 512 << 20,
        disks: vec![DiskSpec {
            id: "disk".into(),
            socket: backend.socket().to_owned(),
            num_queues: 1,
            queue_size: 128,
        }],
        shares: Vec::new(),
        cards: Vec::new(),
        vsock: None,
        spare_slots: 0,
        console: ConsoleSpec::default(),
    };
    let choice = select(Wanted::Auto, &HostFacts::probe());
    let mut machine = choice.hypervisor().start(&spec).unwrap();
    let ended = poll(LIMIT, || machine.has_ended().then_some(()));
    let console = machine.console_lines(60).join("\n");
    assert!(ended.is_some(), "not done within {LIMIT:?}:\n{console}");
    let Some((output, code)) = console.rsplit_once(MARK) else {
        panic!("{}\n{console}\n{}", machine.death(), backend.epitaph());
    };
    assert_eq!(code.trim().lines().next(), Some("0"), "{console}");
    judge(output, &backend);
}
