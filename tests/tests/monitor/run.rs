//! `pericarp run` with this monitor: the whole way from a command to its exit code.

use std::process::Command;

use pericarp_tests::lab::Lab;
use pericarp_tests::parts::{Part, beside_us};

use crate::rig::Rig;

#[test]
fn a_container_runs_in_its_own_machine() {
    let parts = [
        Part::Ours("pericarp"),
        Part::PERICARP_BLOCK,
        Part::PERICARP_FS,
        Part::PERICARP_VSOCK,
    ];
    let Some(rig) = Rig::here("a_container_runs_in_its_own_machine", &parts) else {
        return;
    };
    assert!(Lab::is_here());
    let root = rig.scratch.path("root/bin");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::copy(Part::Busybox.find().unwrap(), root.join("busybox")).unwrap();
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let output = Command::new(beside_us().join("pericarp"))
        .args(["run", "--timing", "--boot-timeout", "300"])
        .arg("--rootfs")
        .arg(rig.scratch.path("root"))
        .args(["--", "/bin/busybox", "sh", "-c"])
        .arg("/bin/busybox cat /proc/sys/kernel/random/boot_id; exit 7")
        .env("PERICARP_ASSETS", rig.assets.dir())
        .env("HOME", rig.scratch.dir())
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(output.status.code(), Some(7), "{out}\n{err}");
    assert_ne!(out.trim(), host.trim(), "{err}");
    // Which is what this host's hardware is for.
    assert!(err.contains("pericarp-vmm"), "{err}");
}
