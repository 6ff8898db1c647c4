//! The guest agent in a machine of its own: containers, their streams, ends and limits, driven
//! with the host's half of the protocol. One boot serves the whole list of checks.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod conversation;
mod lifecycle;
mod refusals;
mod rig;
mod streams;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::Instant;

use pericarp_tests::bounded::Alone;
use pericarp_tests::scratch::Scratch;

use crate::rig::{Disk, MIB, Machine, can_run, ext4, make_roots};

type Check = (&'static str, fn(&Machine));

const CHECKS: &[Check] = &[
    ("first", lifecycle::the_first_container),
    ("memory", lifecycle::the_agent_is_small),
    ("ends", lifecycle::ends_are_reported_as_they_were),
    ("users", lifecycle::users_are_the_containers_own),
    ("layers", lifecycle::layers_are_written_and_forgotten),
    ("plain", lifecycle::a_plain_root_keeps_what_is_written),
    ("devices", lifecycle::disks_are_shown_as_devices),
    ("orphans", lifecycle::orphans_are_reaped),
    ("kills", lifecycle::signals_reach_one_or_all),
    ("oom", lifecycle::running_out_of_memory_ends_one_container),
    (
        "whole",
        lifecycle::a_container_among_shared_processes_ends_whole,
    ),
    (
        "unwatched",
        lifecycle::the_memory_of_a_removed_container_is_watched_by_nobody,
    ),
    ("bombs", lifecycle::a_fork_bomb_leaves_the_agent_alone),
    ("apart", streams::outputs_are_apart),
    ("bulk", streams::bulk_arrives_bit_exact),
    ("closed", streams::closed_ends_hang_nothing),
    (
        "lingering",
        streams::those_left_behind_do_not_hold_the_end_up,
    ),
    ("terminal", streams::a_terminal_has_a_size),
    ("crowd", streams::twenty_at_once),
    ("programs", refusals::missing_programs_are_told),
    ("nonsense", refusals::nonsense_is_refused),
    ("strangers", refusals::streams_are_attached_once),
];

#[test]
fn the_agent_serves_a_host() {
    if !can_run("the_agent_serves_a_host") {
        return;
    }
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let (erofs, plain) = make_roots(&scratch);
    let written = ext4(&scratch, "scratch.ext4", 128 * MIB, None);
    let data = scratch.sparse("data.img", 4 * MIB);
    let disk = |serial, file: &std::path::Path, read_only| Disk {
        serial,
        file: file.to_owned(),
        read_only,
    };
    let disks = [
        disk("root", &erofs, true),
        disk("plain", &plain, false),
        disk("scratch", &written, false),
        disk("data", &data, false),
    ];
    let mut machine = Machine::boot(scratch, &disks, "");
    assert!(
        machine.greeting.kernel_ms > 0 && machine.greeting.agent_ms >= machine.greeting.kernel_ms
    );
    lifecycle::nothing_goes_before_configure(&machine);
    machine.configure("scratch");
    let only = std::env::var("PERICARP_AGENT_CHECK").ok();
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        if only.as_deref().is_some_and(|only| only != *name) {
            continue;
        }
        let began = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| check(&machine))).is_err() {
            failed.push(*name);
        }
        println!("{name}: {:?}", began.elapsed());
    }
    assert!(failed.is_empty(), "{failed:?}\n{}", machine.console());
    lifecycle::power_off_leaves_clean_disks(&mut machine);
    for image in [&written, &plain] {
        let fsck = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(image)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&fsck.stdout);
        assert!(fsck.status.success(), "{}: {said}", image.display());
        let header = Command::new("dumpe2fs")
            .arg("-h")
            .arg(image)
            .output()
            .unwrap();
        let header = String::from_utf8_lossy(&header.stdout);
        assert!(!header.contains("needs_recovery"), "{header}");
    }
    if only.is_some() {
        return;
    }
    let data = std::fs::read(&data).unwrap();
    assert_eq!(&data[..11], b"to a device");
}

/// Without a scratch disk; and then the agent cannot go on.
#[test]
fn the_agent_does_without_a_disk_and_has_last_words() {
    if !can_run("the_agent_does_without_a_disk_and_has_last_words") {
        return;
    }
    let _alone = Alone::turn();
    let scratch = Scratch::new();
    let (erofs, _) = make_roots(&scratch);
    let disks = [Disk {
        serial: "root",
        file: erofs,
        read_only: true,
    }];
    // Few threads, so that the host can make the agent run out of them.
    let mut machine = Machine::boot(scratch, &disks, "sysctl.kernel.threads-max=250");
    machine.configure("");
    lifecycle::layers_are_written_and_forgotten(&machine);
    lifecycle::last_words_are_heard(&mut machine);
}
