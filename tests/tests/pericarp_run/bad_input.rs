//! Command lines of `pericarp run` that cannot work: one line for each mistake,
//! exit code 2, nothing created.

use std::fs;
use std::path::PathBuf;

use pericarp_tests::parts::Part;

use super::rig::*;

#[test]
fn bad_input_is_refused_with_one_line_each() {
    let name = "bad_input_is_refused_with_one_line_each";
    let Some(rig) = Rig::new(name, &[PERICARP, Part::MkfsExt4, Part::Busybox]) else {
        return;
    };
    let image = rig.image();
    let file = |name: &str, bytes: &[u8]| rig.scratch.file(name, bytes).display().to_string();
    let (empty, odd) = (file("empty", b""), file("odd", &[0; 700]));
    let tree = rig.tree().display().to_string();
    let missing = rig.scratch.path("missing").display().to_string();
    let hollow = rig.scratch.path("hollow").display().to_string();
    fs::create_dir(&hollow).unwrap();
    let disk = ["--rootfs-image", image.as_str()];
    let with = |more: &[&str]| -> Vec<String> {
        let line = [&disk[..], more, &["--", "true"]].concat();
        line.into_iter().map(str::to_owned).collect()
    };
    let root = |option: &str, value: &str| -> Vec<String> {
        [option, value, "--", "true"].map(str::to_owned).to_vec()
    };
    let cases: Vec<(Vec<String>, String)> = vec![
        (
            root("--rootfs-image", &missing),
            format!("--rootfs-image '{missing}': no such file; check the path"),
        ),
        (
            root("--rootfs-image", &tree),
            format!(
                "--rootfs-image '{tree}': is a directory; name an image file, or use '--rootfs' \
                 for a directory"
            ),
        ),
        (
            root("--rootfs-image", &empty),
            format!("--rootfs-image '{empty}': is empty; make a file system in it, with mkfs.ext4"),
        ),
        (
            root("--rootfs-image", &odd),
            format!(
                "--rootfs-image '{odd}': its size of 700 bytes is not a multiple of 512; round it \
                 up with `truncate --size %512`"
            ),
        ),
        (
            root("--rootfs", &hollow),
            format!("--rootfs '{hollow}': is empty; name a directory with a root file system"),
        ),
        (
            root("--rootfs", &missing),
            format!("--rootfs '{missing}': no such directory; check the path"),
        ),
        (
            root("--rootfs", &odd),
            format!(
                "--rootfs '{odd}': is a file of 700 bytes, not a directory; use '--rootfs-image' \
                 for a disk image"
            ),
        ),
        (
            with(&["--cpus", "0"]),
            "--cpus '0': is less than 0.01 CPUs".into(),
        ),
        (
            with(&["--cpus", "-1"]),
            "--cpus '-1': is less than 0.01 CPUs".into(),
        ),
        (
            with(&["--cpus", "nan"]),
            "--cpus 'nan': is not a number".into(),
        ),
        (
            with(&["--cpus", "1e9"]),
            "--cpus '1e9': is not a number".into(),
        ),
        (
            with(&["--cpus", "100000"]),
            "--cpus '100000': is more than the".into(),
        ),
        (
            with(&["--memory", "1M"]),
            "--memory '1M': is less than 8 MiB, which a command needs at least; write a number \
             and a unit, such as 512M or 1.5G"
                .into(),
        ),
        (
            with(&["--memory", "512Q"]),
            "--memory '512Q': has the unknown unit 'Q'".into(),
        ),
        (
            with(&["--memory", "500T"]),
            "--memory '500T': the machine would have 2 GiB + 512000 GiB, and this host has".into(),
        ),
        (
            with(&["--memory", "1G", "--memory", "2G"]),
            "--memory '2G': is given twice; leave one out".into(),
        ),
        (
            with(&["--runtime", "docker"]),
            "--runtime 'docker': no such runtime; use vm or runc".into(),
        ),
        (
            with(&["--memroy", "1G"]),
            "'--memroy': unknown option; did you mean '--memory'?".into(),
        ),
        (
            with(&["--disk", &image]),
            format!(
                "--disk '{image}': is used twice in this run; leave one out, or use ':ro' for both"
            ),
        ),
        (
            with(&["--boot-timeout", "0"]),
            "--boot-timeout '0': is out of range; write seconds from 0.1 to 3600".into(),
        ),
        (
            with(&["--assets", &missing]),
            format!(
                "--assets '{missing}': no such directory; the guest's files are not there; run \
                 `cargo xtask setup`, which makes them"
            ),
        ),
        (
            disk.map(str::to_owned).to_vec(),
            "COMMAND: there is no command to run; put it after '--'".into(),
        ),
    ];
    assert!(cases.len() >= 15);
    for (line, message) in cases {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let run = rig.run(&line, b"");
        assert_eq!(run.code, 2, "{line:?}: {}", run.stderr);
        assert_eq!(run.text(), "", "{line:?}");
        // Where the guest's files are missing too, that is a second line.
        let said: Vec<&str> = run
            .stderr
            .lines()
            .filter(|text| !text.contains("PERICARP_ASSETS"))
            .collect();
        assert_eq!(said.len(), 1, "{line:?}: {}", run.stderr);
        let start = format!("pericarp run: {message}");
        assert!(said[0].starts_with(&start), "{line:?}: {}", said[0]);
        assert_eq!(rig.left_files(), Vec::<PathBuf>::new(), "{line:?}");
    }
}
