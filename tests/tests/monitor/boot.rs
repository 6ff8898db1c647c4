//! Guests without devices: how they start, end, and start again.

use std::time::Duration;

use crate::rig::Rig;

#[test]
fn a_stock_kernel_boots_and_powers_off() {
    for cpus in ["1", "4"] {
        let Some(rig) = Rig::here("a_stock_kernel_boots_and_powers_off", &[]) else {
            return;
        };
        let script = "uname -r; echo cpus $(grep -c ^processor /proc/cpuinfo)\n\
                      grep -q kvm-clock /sys/devices/system/clocksource/clocksource0/current_clocksource\n\
                      dmesg | grep -e 'BUG: ' -e 'APIC id mismatch' -e 'ACPI.*Error' && exit 1\n\
                      true";
        let image = rig.image(&[], script);
        let monitor = rig.start(&image, &["--cpus", cpus, "--memory", "512M"]);
        let said = monitor.finish();
        assert!(said.contains(&format!("cpus {cpus}")), "{said}");
    }
}

#[test]
fn a_guest_above_the_hole_has_all_its_memory() {
    let Some(rig) = Rig::here("a_guest_above_the_hole_has_all_its_memory", &[]) else {
        return;
    };
    let script = "[ $(awk '/MemTotal/ {print $2}' /proc/meminfo) -gt 3800000 ]";
    let image = rig.image(&[], script);
    rig.start(&image, &["--memory", "4G"]).finish();
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
    let again = pericarp_tests::bounded::poll(Duration::from_secs(90), || {
        let status = monitor.tell(r#"{"op":"status"}"#);
        (status["starts"].as_u64() >= Some(3)).then_some(())
    });
    assert!(again.is_some(), "{}", monitor.said());
    monitor.tell(r#"{"op":"stop"}"#);
    let status = monitor.process.wait(Duration::from_secs(20)).unwrap();
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
    let status = monitor.process.wait(crate::rig::life()).unwrap();
    assert_eq!(status.code(), Some(3), "{}", monitor.said());
}

#[test]
fn it_is_paused_and_goes_on_and_says_how_it_is() {
    let Some(rig) = Rig::here("it_is_paused_and_goes_on_and_says_how_it_is", &[]) else {
        return;
    };
    let script = "i=0; while [ $i -lt 8 ]; do echo tick $i; sleep 1; i=$((i+1)); done";
    let image = rig.image(&[], script);
    let mut monitor = rig.start(&image, &["--memory", "512M", "--cpus", "2"]);
    monitor.wait_for("tick 1");
    monitor.tell(r#"{"op":"pause"}"#);
    let status = monitor.tell(r#"{"op":"status"}"#);
    assert_eq!(status["state"], "paused");
    let ticks = |monitor: &crate::rig::Monitor| {
        let lines = monitor.process.output().lines();
        lines.iter().filter(|line| line.contains("tick")).count()
    };
    std::thread::sleep(Duration::from_millis(300));
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
    monitor.finish();
}

#[test]
fn it_is_small() {
    let Some(rig) = Rig::here("it_is_small", &[]) else {
        return;
    };
    let image = rig.image(&[], "echo up; sleep 100");
    let mut monitor = rig.start(&image, &["--memory", "512M", "--cpus", "2"]);
    monitor.wait_for("up");
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
    println!("resident beyond guest memory: {kib} KiB");
    assert!(kib <= 5 * 1024, "{kib} KiB");
    monitor.tell(r#"{"op":"stop"}"#);
}
