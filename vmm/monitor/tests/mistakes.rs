//! What an operator gets wrong: exit code 2, a line for each mistake, and nothing made.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;

use pericarp_tests::scratch::Scratch;

/// Exit code and lines of stderr.
fn run(arguments: &[&str]) -> (Option<i32>, Vec<String>) {
    let mut vmm = Command::new(env!("CARGO_BIN_EXE_pericarp-vmm"));
    let output = vmm.args(arguments).output().unwrap();
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    (
        output.status.code(),
        lines.lines().map(str::to_owned).collect(),
    )
}

#[test]
fn each_mistake_has_its_line_and_nothing_is_made() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    let (kernel, nothing, dead) = (path("kernel"), path("nothing"), path("dead"));
    let (serial, control) = (path("serial"), path("control"));
    // A plain kernel, by its first bytes.
    fs::write(&kernel, [&b"\x7fELF"[..], &[0; 4096]].concat()).unwrap();
    drop(UnixListener::bind(&dead).unwrap());
    let made = [
        "--serial",
        &serial,
        "--control-path",
        &control,
        "--kernel-cache",
        "none",
    ];
    let disk = |socket: &str| format!("id=d,socket={socket}");
    let (missing, dead) = (disk(&nothing), disk(&dead));
    for (arguments, wanted) in [
        (vec!["--kernel", &nothing], "--kernel"),
        (
            vec!["--kernel", &kernel, "--initramfs", &nothing],
            "--initramfs",
        ),
        (
            vec!["--kernel", &kernel, "--initramfs", "/dev/null"],
            "--initramfs",
        ),
        (vec!["--kernel", &kernel, "--kaslr"], "--kernel"),
        (vec!["--kernel", &kernel, "--disk", &missing], "socket"),
        (vec!["--kernel", &kernel, "--disk", &dead], "socket"),
        (vec!["--kernel", &kernel, "--memory", "1"], "--memory"),
        (vec!["--config", &nothing], "--config"),
    ] {
        let (code, lines) = run(&[&arguments[..], &made].concat());
        assert_eq!(code, Some(2), "{arguments:?}: {lines:?}");
        let told = lines
            .iter()
            .any(|line| line.starts_with(&format!("pericarp-vmm: {wanted}")));
        assert!(told, "{arguments:?}: {lines:?}");
        for name in ["serial", "control"] {
            assert!(!scratch.path(name).exists(), "{arguments:?} made {name}");
        }
    }
    let (code, lines) = run(&["--cpus", "0", "--memory", "1", "--nonsense", "x"]);
    assert_eq!((code, lines.len()), (Some(2), 4), "{lines:?}");
}
