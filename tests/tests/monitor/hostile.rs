//! A guest that writes anything anywhere. The monitor lives, says how it is, and
//! ends when it is told to; a device beside the poked ones goes on.
//!
//! `PERICARP_POKE_SECONDS` has it go on for longer than the few seconds of a run.

use std::time::{Duration, Instant};

use pericarp_tests::parts::{Part, beside_us};

use crate::rig::{Rig, backend};

#[test]
fn a_guest_that_pokes_everything_harms_itself_alone() {
    let parts = [Part::PERICARP_BLOCK, Part::Ours("pericarp-poker")];
    let Some(rig) = Rig::here("a_guest_that_pokes_everything_harms_itself_alone", &parts) else {
        return;
    };
    let seconds = std::env::var("PERICARP_POKE_SECONDS").ok();
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(8);
    let (disk, socket) = (rig.scratch.sparse("disk", 16 << 20), rig.scratch.path("d"));
    let arguments = ["--blk-file", disk.to_str().unwrap(), "--cache", "buffered"];
    let mut block = backend("pericarp-block", &socket, &arguments);
    let poker = beside_us().join("pericarp-poker");
    // Whatever it does to itself: it goes on, or is reset and begins again.
    let script = "while true; do\n\
                  seed=$(head -c 8 /dev/urandom | cksum | cut -d ' ' -f 1)\n\
                  echo poking from $seed; pericarp-poker 3 $seed || true\n\
                  done";
    let image = rig.image(&[poker.to_str().unwrap()], script);
    let option = format!("id=d,socket={},queues=1", socket.display());
    let mut monitor = rig.start(&image, &["--memory", "512M", "--disk", &option]);
    monitor.wait_for("poking");
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        std::thread::sleep(Duration::from_secs(1));
        assert!(monitor.process.ended().is_none(), "{}", monitor.said());
        monitor.tell(r#"{"op":"status"}"#);
    }
    // One round at least went as far as it was meant to, in every place.
    monitor.wait_for("memory of 1, ports true");
    let lines = monitor.process.output().lines();
    let count = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
    println!(
        "{} rounds, {} came to their end",
        count("poking from"),
        count("memory of")
    );
    let stats = monitor.tell(r#"{"op":"stats"}"#);
    println!("{stats}");
    assert!(stats["exits"]["device"].as_u64() > Some(100), "{stats}");
    monitor.tell(r#"{"op":"stop"}"#);
    let status = monitor.process.wait(crate::rig::life());
    assert!(status.is_some(), "{}", monitor.said());
    let code = status.and_then(|status| status.code());
    assert_eq!(code, Some(0), "{}", monitor.said());
    assert!(block.ended().is_none(), "the backend {}", block.epitaph());
}
