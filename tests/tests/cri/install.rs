//! A node is prepared by what an image brings along, as a pod of the DaemonSet does it, and forgets it.
//!
//! The node is this machine with directories of its own where something is written. What is installed
//! there is then run with that as its root. That pods run where `node enable` was called is what all
//! other cases show.

use std::fs;
use std::process::Command;

use pericarp_tests::guest::Assets;
use pericarp_tests::parts::{Part, beside_us, have, skip};
use pericarp_tests::scratch::Scratch;

/// Makes the node in `$1` and calls `$2`, with what a pod's command and its hook say, there.
const SCRIPT: &str = r#"set -e
host=$1; pericarp=$2
mount --make-rprivate /
mount --rbind / "$host"
for place in opt var/lib etc/containerd etc/pericarp; do
    if [ -d "$host/$place" ]; then mount -t tmpfs node "$host/$place"; fi
done
mkdir -p "$host/etc/containerd"
echo 'version = 2' > "$host/etc/containerd/config.toml"
"$pericarp" node install --host="$host" --ready-file="$3"
echo "--- programs"; ls "$host/opt/pericarp/bin"
echo "--- guest"; ls "$host/var/lib/pericarp/assets/versions"
echo "--- enabled"; cat "$host/etc/containerd/config.toml"
"$pericarp" node install --host="$host" 2>&1 | sed 's/^/again: /'
"$pericarp" node uninstall --host="$host"
echo "--- disabled"; cat "$host/etc/containerd/config.toml"
ls "$host/opt/pericarp/bin/pericarp-net"
"#;

#[test]
fn a_node_installs_what_an_image_has_and_forgets_it() {
    let test = "a_node_installs_what_an_image_has_and_forgets_it";
    let ours = ["containerd-shim-pericarp-v2", "pericarp-vmm"].map(Part::Ours);
    if !have(
        test,
        &[&[Part::Unshare, Part::Containerd][..], &ours].concat(),
    ) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        skip(test, "takes root, for mounts");
        return;
    }
    let Some(assets) = Assets::find() else {
        let why = "the guest's files are missing (make them: cargo xtask setup)";
        skip(test, why);
        return;
    };
    let scratch = Scratch::new();
    let host = scratch.path("host");
    fs::create_dir(&host).unwrap();
    let output = Command::new(Part::Unshare.find().unwrap())
        .args(["--mount", "sh", "-c", SCRIPT, "sh"])
        .arg(&host)
        .arg(beside_us().join("pericarp"))
        .arg(scratch.path("ready"))
        .env("PERICARP_ASSETS", assets.dir())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(scratch.path("ready").is_file());
    let part = |name: &str| {
        let begin = said.split_once(&format!("--- {name}\n")).unwrap().1;
        begin.split("--- ").next().unwrap()
    };
    assert!(
        part("programs")
            .lines()
            .any(|line| line == "pericarp-block"),
        "{said}"
    );
    assert_eq!(part("guest").lines().count(), 1, "{said}");
    let path = "runtime_path = \"/opt/pericarp/bin/containerd-shim-pericarp-v2\"\n";
    assert!(part("enabled").contains(path), "{said}");
    for line in [
        "again: /opt/pericarp/bin: is as it should be",
        "again: guest files: ",
    ] {
        assert!(part("enabled").contains(line), "{said}");
    }
    assert!(part("disabled").starts_with("version = 2\n/"), "{said}");
}
