//! Volumes that are held to limits of their own: to so much in a second, and to a size. Whether the
//! rates are kept to is the backends' matter, in the suite `control`; here they have to reach them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use pericarp_tests::cri::{Pod, container, mount, pod};
use pericarp_tests::parts::{Part, have};
use serde_json::{Value, json};

use crate::blocks::disk;
use crate::stage::{IDLE, Stage, script};

/// Asks what serves a pod's devices, at its control socket.
fn ask(stage: &Stage, pod: &Pod<'_>, socket: &str, question: &Value) -> Value {
    let directory = stage.node.root().join("run/pericarp/k8s.io").join(&pod.id);
    // Its path is longer than a socket's may be.
    let directory = fs::File::open(directory).unwrap();
    let path = format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd());
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .write_all(format!("{question}\n").as_bytes())
        .unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

pub(crate) fn volumes_are_held_to_limits_of_their_own(stage: &mut Stage) {
    let (Some(disk), true) = (
        disk(stage, "held-disk"),
        have("volumes_are_held", &[Part::MkfsExt4]),
    ) else {
        return;
    };
    let volumes = stage.node.scratch().path("pods/uid/volumes");
    let of = |plugin: &str, name: &str| {
        let volume = volumes.join(format!("kubernetes.io~{plugin}")).join(name);
        fs::create_dir_all(&volume).unwrap();
        volume
    };
    let (held, free) = (of("empty-dir", "held"), of("empty-dir", "free"));
    let memory = of("empty-dir", "memory");
    let place = memory.to_str().unwrap();
    stage
        .node
        .run(&["mount", "-t", "tmpfs", "-o", "size=1m", "memory", place]);
    let slow = of("csi", "slow").join("mount");
    fs::create_dir(&slow).unwrap();
    fs::write(slow.join("file"), "words").unwrap();

    let mut config = pod("held");
    for (name, value) in [
        ("slow.iops", "500"),
        ("slow.bandwidth", "3M"),
        ("xvda.iops", "700"),
        ("held.size-limit", "8M"),
        ("held.bandwidth", "40M"),
        ("memory.size-limit", "1M"),
        ("other.size-limit", "9M"),
    ] {
        let name = format!("io.pericarp/volume.{name}");
        config.annotations.insert(name, value.into());
    }
    let pod = stage.node.run_pod(config, stage.subject.name).unwrap();
    let with = |name: &str, mounts: &[(&Path, &str)]| {
        let mut config = container(name, &IDLE);
        let mounts = mounts.iter().map(|(from, to)| mount(from, to, false));
        config.mounts = mounts.collect();
        config
    };
    // An emptyDir alone has a size.
    let refused = pod.start(&with("no", &[(&of("csi", "other"), "/x")]));
    let refused = refused.unwrap_err();
    let said = "io.pericarp/volume.other.size-limit: that volume is no emptyDir";
    assert!(refused.message().contains(said), "{refused}");

    let all = [
        (held.as_path(), "/held"),
        (&free, "/free"),
        (&memory, "/memory"),
        (&slow, "/slow"),
    ];
    let mut one = with("one", &all);
    one.devices = vec![disk.device("/dev/xvda", "mrw")];
    let one = pod.start(&one).unwrap();
    assert_eq!(
        one.shell("cat /slow/file; head -c 1 /dev/xvda | wc -c"),
        "words1"
    );
    let limits = |socket: &str, device: &str| {
        let question = json!({"op": "limits", "device": device});
        ask(stage, &pod, socket, &question)["limits"].clone()
    };
    let rates = |iops: u64, bandwidth: u64| json!({"iops": iops, "iops-burst": 0, "bandwidth": bandwidth, "bandwidth-burst": 0});
    assert_eq!(limits("fs.control", "pod"), rates(0, 0));
    // The first share is for the first name, in case that volume is no disk.
    assert_eq!(limits("fs.control", "volume2"), rates(500, 3 << 20));
    assert_eq!(limits("disk2.control", "disk2"), rates(700, 0));
    assert_eq!(limits("disk1.control", "disk1"), rates(0, 40 << 20));
    // What is read there goes that way, and not with the others.
    let stats = ask(
        stage,
        &pod,
        "fs.control",
        &json!({"op": "stats", "device": "volume2"}),
    );
    let requests = stats["devices"][0]["queues"].to_string();
    assert!(requests.contains("\"requests\":"), "{requests}");
    // It can be changed while the pod runs.
    let faster = json!({"op": "limits", "device": "volume2", "iops": 900});
    assert_eq!(
        ask(stage, &pod, "fs.control", &faster)["limits"]["iops"],
        900
    );

    // What is full is full, and nothing else is.
    let fill = |place: &str, megabytes: u64| {
        let write = format!(
            "dd if=/dev/zero of={place}/fill bs=64k count={}",
            megabytes * 16
        );
        let output = one.exec(&script(&write)).unwrap();
        assert!(
            output.error().contains("No space left"),
            "{}",
            output.error()
        );
        let size = one.shell(&format!("stat -c %s {place}/fill"));
        size.parse::<u64>().unwrap()
    };
    let written = fill("/held", 9);
    assert!((6 << 20..=8 << 20).contains(&written), "{written}");
    assert!(fill("/memory", 2) <= 1 << 20);
    one.shell("dd if=/dev/zero of=/free/more bs=64k count=160 2>/dev/null; echo x > /slow/other");
    one.shell("rm /held/fill && echo kept > /held/kept");
    // The next container has it, with the owner and the mode of the kubelet's directory.
    let two = pod.start(&with("two", &[(&held, "/held")])).unwrap();
    let seen = two.shell("cat /held/kept; stat -c '%a %u' /held; ls -A /held");
    assert_eq!(seen, "kept\n755 0\nkept");
    // On the host it is one file.
    let names = fs::read_dir(&held).unwrap().flatten();
    let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    assert_eq!(names, [".pericarp-volume.img"]);

    // A part of it that a kubelet has made on the host is one of the image.
    let part = stage
        .node
        .scratch()
        .path("pods/uid/volume-subpaths/held/c/0");
    fs::create_dir_all(&part).unwrap();
    fs::create_dir_all(held.join("sub/deep")).unwrap();
    let (from, to) = (held.join("sub/deep"), part.to_str().unwrap());
    let words = ["mount", "--bind", from.to_str().unwrap(), to];
    stage.node.run(&words);
    let three = pod.start(&with("part", &[(&part, "/part")])).unwrap();
    three.shell("echo in it > /part/file");
    assert_eq!(two.shell("cat /held/sub/deep/file"), "in it");
    assert_eq!(fs::read_dir(&from).unwrap().count(), 0);
    pod.remove().unwrap();
    for place in [place, to] {
        stage.node.run(&["umount", place]);
    }
}
