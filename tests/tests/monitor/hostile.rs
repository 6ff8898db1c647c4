//! A guest that writes anything anywhere. The monitor lives, says how it is, and
//! ends when it is told to; a device beside the poked ones goes on.
//!
//! `PERICARP_POKE_SECONDS` has it go on for longer than the few seconds of a run.

use pericarp_tests::parts::{Part, beside_us};

use crate::rig::{Rig, backend};

#[test]
fn a_guest_that_pokes_everything_harms_itself_alone() {
    let parts = [Part::PERICARP_BLOCK, Part::Ours("pericarp-poker")];
    let Some(rig) = Rig::here("a_guest_that_pokes_everything_harms_itself_alone", &parts) else {
        return;
    };
    let seconds = std::env::var("PERICARP_POKE_SECONDS").unwrap_or("6".to_owned());
    let (disk, socket) = (rig.scratch.sparse("disk", 16 << 20), rig.scratch.path("d"));
    let arguments = ["--blk-file", disk.to_str().unwrap(), "--cache", "buffered"];
    let mut block = backend("pericarp-block", &socket, &arguments);
    let poker = beside_us().join("pericarp-poker");
    let script = format!("echo poking; pericarp-poker {seconds} 7; echo done");
    let image = rig.image(&[poker.to_str().unwrap()], &script);
    let option = format!("id=d,socket={},queues=1", socket.display());
    let mut monitor = rig.start(
        &image,
        &["--memory", "512M", "--no-reboot", "--disk", &option],
    );
    monitor.wait_for("poking");
    monitor.wait_for("poked");
    let stats = monitor.tell(r#"{"op":"stats"}"#);
    println!("{stats}");
    assert!(stats["exits"]["device"].as_u64() > Some(100), "{stats}");
    monitor.tell(r#"{"op":"stop"}"#);
    let status = monitor.process.wait(crate::rig::life());
    assert!(status.is_some(), "{}", monitor.said());
    // The guest may have switched itself off meanwhile.
    assert!(
        matches!(status.and_then(|s| s.code()), Some(0 | 3)),
        "{}",
        monitor.said()
    );
    assert!(block.ended().is_none(), "the backend {}", block.epitaph());
}
