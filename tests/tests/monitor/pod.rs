//! containerd, and a container of it in a machine of this monitor: what the file server's death is to
//! a pod, whose share follows the mounts of the host. Containers come from `ctr`, with a directory as
//! their root and without a network: the laboratory has no drivers for more.

use std::fs;
use std::path::Path;
use std::process::Command;

use pericarp_tests::bounded::poll;
use pericarp_tests::oci;
use pericarp_tests::parts::{Part, beside_us};
use pericarp_tests::process::{Process, command};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{Rig, life};

const KILLS: usize = 3;

/// Writes and reads with files open all the time, until it sees what is mounted last.
const WORK: &str = r#"
cd /data
exec 3>>log 4<given
echo ready
n=0
while [ ! -e later3/in ]; do
    n=$((n + 1))
    echo line $n >&3
    dd if=/dev/urandom of=part bs=64k count=2 2>/dev/null
    want=$(md5sum <part)
    mv part kept
    [ "$(md5sum <kept)" = "$want" ] || exit 3
    echo round $n
done
for n in 1 2 3; do [ "$(cat later$n/in)" = "mount $n" ] || exit 4; done
[ "$(cat <&4)" = "from the host" ] || exit 5
[ "$(wc -l <log)" -gt 3 ] || exit 6
echo changed >/etc/made || exit 7
echo done
"#;

fn lines_with(process: &Process, text: &str) -> usize {
    let lines = process.output().lines();
    lines.iter().filter(|line| line.contains(text)).count()
}

fn says(process: &mut Process, node: &Process, text: &str, times: usize) {
    let seen = poll(life(), || {
        let ended = process.ended().is_some();
        let seen = lines_with(process, text) >= times;
        (seen || ended).then_some(seen)
    });
    let said = || [process.output().last(20), node.output().last(40)].join("\n");
    assert_eq!(seen, Some(true), "{text}: {}", said());
}

/// The only file server in the laboratory, while one runs.
fn server() -> Option<Pid> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        (name.trim() == "pericarp-fs").then(|| Pid::from_raw(pid))?
    })
}

#[test]
fn a_pod_outlives_its_file_server() {
    let parts = [
        Part::Ours("containerd-shim-pericarp-v2"),
        Part::PERICARP_BLOCK,
        Part::PERICARP_FS,
        Part::PERICARP_VSOCK,
        Part::Containerd,
        Part::Ctr,
    ];
    let Some(rig) = Rig::here("a_pod_outlives_its_file_server", &parts) else {
        return;
    };
    let (tree, data) = (rig.scratch.path("tree"), rig.scratch.path("data"));
    oci::busybox(&tree, oci::ALL_TOOLS);
    fs::create_dir(&data).unwrap();
    mount_bind(&data, &data).unwrap();
    mount_change(&data, MountPropagationFlags::SHARED).unwrap();
    for n in 1..=KILLS {
        fs::create_dir(data.join(format!("later{n}"))).unwrap();
    }
    fs::write(data.join("given"), "from the host\n").unwrap();
    let handler = rig.scratch.path("pericarp.toml");
    let text = "[profiles.pericarp]\nannotations = [\"memory\"]\nboot-timeout = 200\n";
    fs::write(&handler, text).unwrap();
    let (socket, mut node) = containerd(&rig);

    let ctr = Part::Ctr.find().unwrap();
    let mut run = command(&ctr);
    run.arg("-a").arg(&socket).args(["run", "--rm"]);
    run.args(["--runtime", "io.containerd.pericarp.v2"])
        .arg("--runtime-config-path")
        .arg(format!("{}#pericarp", handler.display()))
        .args(["--annotation", "io.pericarp/memory=256M"])
        .arg("--mount")
        .arg(format!(
            "type=bind,src={},dst=/data,options=rbind:rslave:rw",
            data.display()
        ))
        .arg("--rootfs")
        .arg(&tree)
        .args(["box", "/bin/sh", "-c", WORK]);
    let mut run = Process::start(&mut run, life()).unwrap();
    says(&mut run, &node, "ready", 1);
    for kills in 1..=KILLS {
        says(&mut run, &node, "round ", kills * 2);
        kill_process(server().unwrap(), Signal::KILL).unwrap();
        // While there is none, or while another gives up all else of the host's.
        let place = data.join(format!("later{kills}"));
        mount("later", &place, "tmpfs", MountFlags::NODEV, c"").unwrap();
        fs::write(place.join("in"), format!("mount {kills}\n")).unwrap();
        says(&mut node, &run, "it was started again", kills);
    }
    let status = run.wait(life());
    let code = status.and_then(|status| status.code());
    run.kill();
    let said = [run.output().last(20), node.output().last(40)].join("\n");
    assert_eq!(code, Some(0), "{said}");
    assert!(lines_with(&run, "done") == 1, "{said}");
    assert_eq!(
        fs::read_to_string(tree.join("etc/made")).unwrap(),
        "changed\n"
    );
    assert_eq!(server(), None);
    assert!(!Path::new("/run/pericarp/default").exists());
    node.kill();
}

/// Starts it; where it listens.
fn containerd(rig: &Rig) -> (std::path::PathBuf, Process) {
    let path = |name: &str| rig.scratch.path(name).display().to_string();
    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = \"{}\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{}\"\n",
        path("root"),
        path("c.sock"),
        path("opt")
    );
    let file = rig.scratch.path("containerd.toml");
    fs::write(&file, config).unwrap();
    let mut programs = std::env::var("PATH").unwrap();
    programs.insert_str(0, &format!("{}:", beside_us().display()));
    let mut containerd = command(&Part::Containerd.find().unwrap());
    containerd
        .arg("--config")
        .arg(&file)
        .env("PATH", programs)
        .env("PERICARP_ASSETS", rig.assets.dir());
    let node = Process::start(&mut containerd, 3 * life()).unwrap();
    let socket = rig.scratch.path("c.sock");
    let ctr = Part::Ctr.find().unwrap();
    let answers = poll(life(), || {
        let mut asked = Command::new(&ctr);
        asked.arg("-a").arg(&socket).arg("version");
        let output = asked.output().unwrap();
        output.status.success().then_some(())
    });
    assert!(answers.is_some(), "{}", node.output().last(20));
    (socket, node)
}
