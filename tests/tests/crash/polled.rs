//! The same with polled I/O, which takes a device with poll queues: QEMU's NVMe,
//! in a guest where this very program is run again.

use std::fs;
use std::time::Duration;

use pericarp_tests::bounded::Alone;
use pericarp_tests::guest::{Assets, emulated, exit_code, initramfs};
use pericarp_tests::parts::Part;
use pericarp_tests::process::Process;
use pericarp_tests::scratch::Scratch;
use pericarp_tests::verified::{BLOCK, BLOCKS};

use super::{disk, killed_on};

/// What the guest runs. On the bare device: writes to ext4 take interrupts.
const GUEST: &str = r#"
export PERICARP_TEST_DIR=/tmp PERICARP_CRASH_SECONDS=10 PERICARP_REQUIRE_ALL=1
PROGRAM --exact --ignored --nocapture polled::in_the_guest
"#;

/// Interrupts of the NVMe disk's I/O queues so far.
fn interrupts() -> u64 {
    let table = fs::read_to_string("/proc/interrupts").unwrap();
    let queues = table.lines().filter(|line| {
        let name = line.split_whitespace().last().unwrap_or_default();
        name.starts_with("nvme0q") && name != "nvme0q0"
    });
    let counts = queues.flat_map(|line| line.split_whitespace().skip(1));
    counts.filter_map(|word| word.parse::<u64>().ok()).sum()
}

/// A killed process's polled writes have ended before its successor does them
/// again, with memory that is registered for good measure; and no interrupt says
/// that they have.
#[test]
#[ignore = "run in a guest, by the test below"]
fn in_the_guest() {
    let scratch = Scratch::new();
    std::os::unix::fs::symlink("/dev/nvme0n1", scratch.path("disk")).unwrap();
    // Interrupts that requests brought, which are but a few of the polled ones.
    let told = |test: &str, extra: &[&str]| {
        disk(&scratch);
        fs::File::open(scratch.path("disk"))
            .unwrap()
            .sync_all()
            .unwrap();
        let before = interrupts();
        let (load, kills) = killed_on(&scratch, test, true, extra);
        let told = interrupts() - before;
        load.compare(&scratch.path("disk")).unwrap();
        eprintln!("{test}: {told} interrupts");
        // Each process looks at the disk when it starts, without polling.
        let starts = 4 * (u64::from(kills) + 1);
        (told.saturating_sub(starts), load.done / 100)
    };
    let (plain, few) = told("without polling", &[]);
    assert!(plain > few, "{plain} interrupts without polling");
    let (polled, few) = told("with polling", &["--iopoll", "--register-memory"]);
    assert!(polled <= few, "{polled} interrupts with polling");
}

#[test]
fn polled_disks_are_killed_in_a_guest() {
    let test = "polled_disks_are_killed_in_a_guest";
    let Some(assets) = Assets::for_test(test, &[Part::PERICARP_BLOCK]) else {
        return;
    };
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let ours = std::env::current_exe().unwrap();
    let block = Part::PERICARP_BLOCK.find().unwrap();
    let name = ours.file_name().unwrap().to_str().unwrap();
    let script = GUEST.replace("PROGRAM", name);
    let tools = [ours.to_str().unwrap(), block.to_str().unwrap(), "setpriv"];
    let image = initramfs(&scratch, &assets, &tools, &script).unwrap();
    let disk = scratch.sparse("nvme", (BLOCKS * BLOCK) as u64);
    let mut qemu = emulated(&assets, &image, "nvme.poll_queues=1");
    // Whoever polls needs a CPU for it.
    qemu.args(["-smp", "2"])
        .arg("-drive")
        .arg(format!(
            "file={},format=raw,if=none,id=nvme,cache=none",
            disk.display()
        ))
        .args(["-device", "nvme,serial=polled,drive=nvme,max_ioqpairs=2"]);
    let mut machine = Process::start(&mut qemu, Duration::from_secs(240)).unwrap();
    let console = machine.output().clone();
    assert!(
        machine.wait(Duration::from_secs(200)).is_some(),
        "{}",
        console.last(40)
    );
    let text = console.last(60);
    assert_eq!(exit_code(&text), Some("0"), "{text}");
    let lines = text.lines().filter(|line| line.contains("polling: "));
    lines.for_each(|line| eprintln!("{test}: {line}"));
}
