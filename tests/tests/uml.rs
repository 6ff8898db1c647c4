//! Linux's own virtio drivers at native speed, under User-mode Linux: file
//! systems and verified random I/O on every backend the kernel can talk to.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::path::PathBuf;
use std::time::Duration;

use pericarp_tests::bounded::OneCpu;
use pericarp_tests::parts::{Part, have};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::{Machine, UmlError};

const GIB: u64 = 1 << 30;
/// Bytes of files that are copied.
const REAL_BYTES: u64 = 300_000_000;

/// 300 MB of real files through the page cache of the guest, a remount, a checksum.
const FILE_SYSTEM: &str = r#"
mkfs.ext4 -q -F /dev/vda
mkdir disk; mount /dev/vda disk
mkdir disk/copy
(cd / && xargs cp --parents -t /mnt/work/disk/copy) <$list
sync
du -sm disk/copy
umount disk
# Nothing may come from this guest's cache.
echo 3 >/proc/sys/vm/drop_caches
mount /dev/vda disk
(cd / && xargs cat) <$list | md5sum >want
(cd disk/copy && xargs cat) <$list | md5sum >have
cmp want have
umount disk
fsck.ext4 -f -n /dev/vda >fsck.log 2>&1 || { cat fsck.log; exit 1; }
echo file system well
"#;

/// Random writes whose blocks carry a checksum, then verified.
const VERIFIED: &str = r#"
fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw=randrw \
    --rwmixread=50 --bs=4k --size=96m --verify=crc32c --verify_fatal=1 --do_verify=1 \
    --verify_backlog=512 --randseed=7 --output-format=terse >fio.log 2>&1 || { cat fio.log; exit 1; }
fio --name=mixed --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw=randwrite \
    --bsrange=4k-128k --offset=128m --size=96m --verify=crc32c --verify_fatal=1 --fsync=64 \
    --randseed=8 --output-format=terse >fio.log 2>&1 || { cat fio.log; exit 1; }
echo data well
"#;

/// Two devices of one machine do not get mixed up.
const TWO_DISKS: &str = r#"
[ "$(cat /sys/block/vda/size)" = 2097152 ]
[ "$(cat /sys/block/vdb/size)" = 131072 ]
[ "$(cat /sys/block/vda/ro)" = 0 ]
[ "$(cat /sys/block/vdb/ro)" = 1 ]
dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null && exit 3
cat /sys/block/vda/serial; echo
cat /sys/block/vda/queue/write_cache
"#;

/// Paths from the root of real files, [`REAL_BYTES`] of them, a line each. A guest
/// would take minutes to find them.
fn real_files() -> String {
    let mut directories: Vec<_> = ["/usr/lib", "/usr/sbin", "/usr/bin"]
        .map(PathBuf::from)
        .into();
    let (mut list, mut total) = (String::new(), 0);
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            if meta.is_dir() {
                directories.push(path);
            } else if meta.is_file() && (256 << 10..40 << 20).contains(&meta.len()) {
                let from_the_root = path.strip_prefix("/").unwrap();
                list += &format!("{}\n", from_the_root.display());
                total += meta.len();
            }
            if total > REAL_BYTES {
                return list;
            }
        }
    }
    list
}

fn usable(kind: Kind, test: &str) -> bool {
    have(test, &[Part::UserModeLinux, Part::Fio, Part::MkfsExt4]) && kind.usable(test)
}

fn work(kind: Kind, cache: Cache, test: &str) {
    if !usable(kind, test) {
        return;
    }
    let _cpu = OneCpu::turn();
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", GIB);
    let options = Options {
        cache,
        lifetime: Duration::from_secs(240),
        ..Options::default()
    };
    let mut backend = Backend::start(kind, &scratch, &disk, &options).unwrap();
    let list = scratch.file("list", real_files().as_bytes());
    let copied = format!("list={}\n{FILE_SYSTEM}", list.display());
    for (script, last) in [(&*copied, "file system well"), (VERIFIED, "data well")] {
        let begin = std::time::Instant::now();
        let report = Machine::new(&[backend.socket()], script)
            .run()
            .unwrap_or_else(|error| panic!("{error}\n{}", backend.epitaph()));
        assert_eq!(report.code, 0, "{}\n{}", report.output, report.console);
        assert!(
            report.output.trim_end().ends_with(last),
            "{}",
            report.output
        );
        let errors = report.console.contains("I/O error");
        assert!(!errors, "the kernel saw an error:\n{}", report.console);
        eprintln!(
            "{test}: {last} after {:?}: {}",
            begin.elapsed(),
            report.output.trim()
        );
    }
    assert!(backend.is_alive(), "{}", backend.epitaph());
    assert_eq!(backend.stop().unwrap().code(), Some(0));
}

#[test]
fn qemu_storage_daemon_carries_a_file_system() {
    work(
        Kind::QemuStorageDaemon,
        Cache::Direct,
        "qemu_storage_daemon_carries_a_file_system",
    );
}

#[test]
fn pericarp_carries_a_file_system() {
    work(
        Kind::Pericarp,
        Cache::Direct,
        "pericarp_carries_a_file_system",
    );
}

#[test]
fn pericarp_carries_a_file_system_through_the_page_cache() {
    work(
        Kind::Pericarp,
        Cache::Buffered,
        "pericarp_carries_a_file_system_through_the_page_cache",
    );
}

fn two_disks(kind: Kind, test: &str) {
    if !usable(kind, test) {
        return;
    }
    let _cpu = OneCpu::turn();
    let scratch = Scratch::new();
    let first = scratch.sparse("first", GIB);
    let second = scratch.sparse("second", 64 << 20);
    let options = Options {
        serial: Some("first-disk".into()),
        ..Options::default()
    };
    let first = Backend::start(kind, &scratch, &first, &options).unwrap();
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let second = Backend::start(kind, &scratch, &second, &options).unwrap();
    let machine = Machine::new(&[first.socket(), second.socket()], TWO_DISKS);
    let report = machine.run().unwrap();
    assert_eq!(report.code, 0, "{}\n{}", report.output, report.console);
    let lines: Vec<&str> = report.output.lines().collect();
    assert_eq!(lines[0], kind.serial("first-disk"));
    if kind == Kind::Pericarp {
        // Without it the kernel never flushes. QEMU's daemon says "write through".
        assert_eq!(lines[1], "write back");
    }
}

#[test]
fn qemu_storage_daemon_serves_two_disks() {
    two_disks(
        Kind::QemuStorageDaemon,
        "qemu_storage_daemon_serves_two_disks",
    );
}

#[test]
fn pericarp_serves_two_disks() {
    two_disks(Kind::Pericarp, "pericarp_serves_two_disks");
}

#[test]
fn exit_code_and_output_come_back() {
    if !have("exit_code_and_output_come_back", &[Part::UserModeLinux]) {
        return;
    }
    let report = Machine::new(&[], "echo out; echo err >&2; exit 7")
        .run()
        .unwrap();
    assert_eq!((report.code, report.output.as_str()), (7, "out\nerr\n"));
}

#[test]
fn a_panic_is_one_clear_error() {
    if !have("a_panic_is_one_clear_error", &[Part::UserModeLinux]) {
        return;
    }
    let error = Machine::new(&[], "echo c >/proc/sysrq-trigger; sleep 60")
        .run()
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, UmlError::Panic { .. }), "{text}");
    assert!(text.contains("sysrq triggered crash"), "{text}");
}

#[test]
fn a_machine_that_powers_off_early_is_one_clear_error() {
    if !have(
        "a_machine_that_powers_off_early_is_one_clear_error",
        &[Part::UserModeLinux],
    ) {
        return;
    }
    let error = Machine::new(&[], "echo o >/proc/sysrq-trigger; sleep 60")
        .run()
        .unwrap_err();
    assert!(matches!(error, UmlError::Died { .. }), "{error}");
}

#[test]
fn a_time_out_is_one_clear_error_and_leaves_no_process() {
    if !have(
        "a_time_out_is_one_clear_error_and_leaves_no_process",
        &[Part::UserModeLinux],
    ) {
        return;
    }
    let mut machine = Machine::new(&[], "echo so far; sleep 600");
    machine.memory_mib = 129;
    machine.limit = Duration::from_secs(10);
    let error = machine.run().unwrap_err();
    assert!(matches!(error, UmlError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("so far"), "{error}");
    let left = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.windows(8).any(|part| part == b"mem=129M")
        });
    assert_eq!(left.count(), 0, "processes of the machine are left");
}
