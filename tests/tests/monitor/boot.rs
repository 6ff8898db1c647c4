//! Guests without devices: how they start, end, and start again.

use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::lab::Lab;
use pericarp_tests::parts::{Part, beside_us, skip};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::rig::{Monitor, Rig, backend, life};

#[test]
fn a_stock_kernel_boots_and_powers_off() {
    for (cpus, memory) in [
        ("1", ["--memory", "512M", "--prefault", "0"]),
        ("4", ["--memory", "256M", "--prefault", "2"]),
    ] {
        let Some(rig) = Rig::here("a_stock_kernel_boots_and_powers_off", &[]) else {
            return;
        };
        let huge = memory[3] != "0" && huge_pages(128);
        let script = "uname -r; echo cpus $(grep -c ^processor /proc/cpuinfo)\n\
                      grep -q kvm-clock /sys/devices/system/clocksource/clocksource0/current_clocksource\n\
                      dmesg | grep -e 'BUG: ' -e 'APIC id mismatch' -e 'ACPI.*Error' && exit 1\n\
                      true";
        let image = rig.image(&[], script);
        let mut options = vec!["--cpus", cpus];
        options.extend(memory);
        options.extend(huge.then_some("--huge-pages"));
        let said = rig.start(&image, &options).finish();
        assert!(said.contains(&format!("cpus {cpus}")), "{said}");
    }
}

/// Whether the host has so many huge pages to give. A laboratory that was made for the tests
/// makes some.
fn huge_pages(count: u32) -> bool {
    if Lab::is_made() {
        std::fs::write("/proc/sys/vm/nr_hugepages", count.to_string()).unwrap();
    }
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = memory
        .lines()
        .find_map(|l| l.strip_prefix("HugePages_Free:"));
    let free: u32 = free.unwrap().trim().parse().unwrap();
    if free < count {
        println!("not with huge pages: this host has set aside {free} of {count}");
    }
    assert!(free >= count || !Lab::is_made(), "{memory}");
    free >= count
}

#[test]
fn a_guest_above_the_hole_has_all_its_memory() {
    let Some(rig) = Rig::here("a_guest_above_the_hole_has_all_its_memory", &[]) else {
        return;
    };
    // Less of it is quicker: all is set up at the start.
    let script = "[ $(awk '/MemTotal/ {print $2}' /proc/meminfo) -gt 3050000 ]";
    let image = rig.image(&[], script);
    rig.start(&image, &["--memory", "3200M"]).finish();
}

#[test]
fn a_guest_that_reboots_starts_again_with_clean_memory() {
    let Some(rig) = Rig::here("a_guest_that_reboots_starts_again_with_clean_memory", &[]) else {
        return;
    };
    // Nothing survives but the host's count of starts.
    let image = rig.image(&[], "echo up; sleep 1; reboot -f; sleep 100");
    let mut monitor = rig.start(&image, &["--memory", "512M"]);
    monitor.wait_for("up");
    let again = poll(life(), || {
        let status = monitor.tell(r#"{"op":"status"}"#);
        (status["starts"].as_u64() >= Some(3)).then_some(())
    });
    assert!(again.is_some(), "{}", monitor.said());
    monitor.tell(r#"{"op":"stop"}"#);
    let status = monitor.process.wait(life()).unwrap();
    assert_eq!(status.code(), Some(0), "{}", monitor.said());
}

#[test]
fn a_panic_is_a_reset_and_ends_the_machine_where_that_is_wanted() {
    let Some(rig) = Rig::here(
        "a_panic_is_a_reset_and_ends_the_machine_where_that_is_wanted",
        &[],
    ) else {
        return;
    };
    let image = rig.image(&[], "echo c >/proc/sysrq-trigger; sleep 100");
    let mut monitor = rig.start(&image, &["--memory", "512M", "--no-reboot"]);
    let status = monitor.process.wait(life()).unwrap();
    assert_eq!(status.code(), Some(3), "{}", monitor.said());
}

#[test]
fn it_is_small_is_paused_and_goes_on_and_says_how_it_is() {
    let test = "it_is_small_is_paused_and_goes_on_and_says_how_it_is";
    let Some(rig) = Rig::here(test, &[]) else {
        return;
    };
    let script = "while true; do echo tick; sleep 1; done";
    let image = rig.image(&[], script);
    let mut monitor = rig.start(&image, &["--memory", "512M", "--cpus", "2"]);
    monitor.wait_for("tick");
    let kib = resident_kib(&monitor);
    println!("resident beyond guest memory: {kib} KiB");
    assert!(kib <= 5 * 1024, "{kib} KiB");
    monitor.tell(r#"{"op":"pause"}"#);
    let status = monitor.tell(r#"{"op":"status"}"#);
    assert_eq!(status["state"], "paused");
    let ticks = |monitor: &Monitor| {
        let lines = monitor.process.output().lines();
        lines.iter().filter(|line| line.contains("tick")).count()
    };
    // What it said before is still on its way to us.
    std::thread::sleep(Duration::from_secs(1));
    let before = ticks(&monitor);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(ticks(&monitor), before, "{}", monitor.said());
    monitor.tell(r#"{"op":"resume"}"#);
    let stats = monitor.tell(r#"{"op":"stats"}"#);
    assert!(
        stats["entered-us"].as_u64() < stats["age-us"].as_u64(),
        "{stats}"
    );
    assert_eq!(monitor.ask(r#"{"op":"fly"}"#)["ok"], false);
    let more = poll(life(), || (ticks(&monitor) > before + 1).then_some(()));
    assert!(more.is_some(), "{}", monitor.said());
    monitor.tell(r#"{"op":"stop"}"#);
}

/// What the monitor itself takes, without the guest's memory.
fn resident_kib(monitor: &Monitor) -> u64 {
    // Behind setpriv, which has become the monitor.
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", monitor.process.pid())).unwrap();
    let mut guest = false;
    let mut kib = 0;
    for line in smaps.lines() {
        if line.contains('-') && line.split_whitespace().count() >= 5 {
            guest = line.contains("memfd:guest");
        }
        if let Some(size) = line.strip_prefix("Rss:")
            && !guest
        {
            let size = size.trim().trim_end_matches(" kB").trim();
            kib += size.parse::<u64>().unwrap();
        }
    }
    kib
}

/// Debian's older kernel, its drivers in modules, by either entry.
#[test]
fn an_older_kernel_boots_and_so_does_one_that_unpacks_itself() {
    let test = "an_older_kernel_boots_and_so_does_one_that_unpacks_itself";
    let Some(mut rig) = Rig::here(test, &[Part::PERICARP_BLOCK]) else {
        return;
    };
    rig.assets = rig.assets.older();
    if !rig.assets.kernel().is_file() {
        skip(
            test,
            "the older kernel is missing (make it: cargo xtask setup)",
        );
        return;
    }
    let script = "uname -r; dd if=/dev/vda bs=4k count=16 iflag=direct 2>/dev/null | md5sum\n\
                  awk '$3 == \"_text\" {print \"text at\", $1}' /proc/kallsyms";
    let image = rig.image(&[], script);
    let (disk, socket) = (rig.scratch.sparse("disk", 1 << 20), rig.scratch.path("d"));
    let arguments = ["--blk-file", disk.to_str().unwrap(), "--cache", "buffered"];
    let _backend = backend("pericarp-block", &socket, &arguments);
    let option = format!("id=d,socket={}", socket.display());
    let linked = |kaslr: Option<&str>| {
        let mut options = vec!["--memory", "512M", "--cpus", "2", "--disk", &option];
        options.extend(kaslr);
        let said = rig.start(&image, &options).finish();
        assert!(said.contains("6.1.0-"), "{said}");
        // Of 64 KiB of zeroes.
        assert!(said.contains("fcd6bcb56c1689fcef28b57c22475bad"), "{said}");
        said.contains("text at ffffffff81000000")
    };
    assert!(linked(None));
    // One start in 500 finds it there by chance.
    assert!(!linked(Some("--kaslr")) || !linked(Some("--kaslr")));
}

#[test]
fn a_terminal_is_the_guests_and_is_given_back() {
    let Some(rig) = Rig::here("a_terminal_is_the_guests_and_is_given_back", &[]) else {
        return;
    };
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap();
    let mut options = std::fs::File::options();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let terminal = options.open(path.to_str().unwrap()).unwrap();
    let canonical = || {
        let modes = tcgetattr(&terminal).unwrap().local_modes;
        modes.contains(LocalModes::ICANON)
    };
    assert!(canonical());
    let mut child = std::process::Command::new(beside_us().join("pericarp-vmm"))
        .arg("--kernel")
        .arg(rig.assets.kernel())
        .args(["--kernel-cache", "/tmp/pericarp-kernels"])
        .stdin(terminal.try_clone().unwrap())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let taken = poll(life(), || (!canonical()).then_some(()));
    let _ = kill_process(Pid::from_child(&child), Signal::TERM);
    let ended = poll(life(), || child.try_wait().unwrap());
    let _ = child.kill();
    assert!(taken.is_some());
    assert_eq!(ended.and_then(|status| status.code()), Some(0));
    assert!(canonical());
}
