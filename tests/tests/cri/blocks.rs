//! Disks of the node in pods: raw block volumes, which a container has as a device, and volumes that
//! a storage driver leaves to the guest (Kata's `direct-volume`), which is mounted there. The disks
//! are loop devices on images.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use pericarp_tests::cri::proto::{ContainerConfig, Device, Mount};
use pericarp_tests::cri::{Disk, Pod, container, pod};
use pericarp_tests::parts::{Part, have};

use crate::kills::child;
use crate::stage::{IDLE, Stage, script, until};

const SIZE: u64 = 64 << 20;

pub(crate) fn disk(stage: &Stage, name: &str) -> Option<Disk> {
    Disk::new(stage.node.scratch(), name, SIZE)
}

fn with(name: &str, devices: Vec<Device>) -> ContainerConfig {
    let mut config = container(name, &IDLE);
    config.devices = devices;
    config
}

/// A raw block volume is a device at its path, as the pod's containers may use it.
pub(crate) fn a_block_volume_is_a_device(stage: &mut Stage) {
    let Some(disk) = disk(stage, "block") else {
        return;
    };
    let pod = stage.pod("block");
    let all = vec![disk.device("/dev/xvda", "mrw")];
    let writer = pod.start(&with("writer", all)).unwrap();
    let stat = "stat -c '%F %u %g' /dev/xvda; blockdev --getsize64 /dev/xvda";
    assert_eq!(
        writer.shell(stat),
        format!("block special file 0 0\n{SIZE}")
    );
    writer.shell(
        "yes written | head -c 65536 | dd of=/dev/xvda bs=4k iflag=fullblock conv=fsync 2>/dev/null",
    );
    let seen = fs::read(&disk.image).unwrap();
    assert_eq!(seen[..65536], b"written\n".repeat(8192)[..]);
    assert!(seen[65536..].iter().all(|byte| *byte == 0));

    // The others of the pod have the same one; who may only read cannot write.
    let other = vec![
        disk.device("/dev/disks/reading", "r"),
        disk.device("/data/disk", "mrw"),
    ];
    let reader = pod.start(&with("reader", other)).unwrap();
    assert_eq!(reader.shell("head -n 1 /data/disk"), "written");
    // Both devices are the same one, and so are their rules.
    assert_eq!(reader.shell("head -n 1 /dev/disks/reading"), "written");
    writer.shell("printf changed | dd of=/dev/xvda conv=fsync,notrunc 2>/dev/null");
    assert_eq!(reader.shell("head -c 7 /data/disk"), "changed");

    // One that is started again has it again.
    writer.stop(10).unwrap();
    writer.remove().unwrap();
    let again = vec![disk.device("/dev/xvdb", "mrw")];
    let again = pod.start(&with("again", again)).unwrap();
    assert_eq!(again.shell("head -c 7 /dev/xvdb"), "changed");
    pod.remove().unwrap();

    let pod = stage.pod("reading");
    let read = vec![disk.device("/dev/xvda", "r")];
    let reader = pod.start(&with("reader", read)).unwrap();
    assert_eq!(reader.shell("head -c 7 /dev/xvda"), "changed");
    let tried = reader.exec(&script("echo x > /dev/xvda")).unwrap();
    assert!(
        tried.error().contains("Operation not permitted"),
        "{}",
        tried.error()
    );
    if stage.subject.own_kernel {
        // Nor does its kernel.
        assert_eq!(reader.shell("cat /sys/block/vd*/ro"), "1");
        let more = vec![disk.device("/dev/xvda", "mrw")];
        let refused = pod.start(&with("more", more)).unwrap_err();
        let said = "linux.devices: /dev/xvda: another container of the pod may only read it";
        assert!(refused.message().contains(said), "{refused}");
    }
    pod.remove().unwrap();
    assert!(disk.is_free());
}

/// What is given away is there again once nobody has it, also while the pod stays.
pub(crate) fn a_disk_comes_and_goes_with_its_containers(stage: &mut Stage) {
    let (Some(one), Some(two)) = (disk(stage, "one"), disk(stage, "two")) else {
        return;
    };
    let pod = stage.pod("coming");
    // More often than there are places.
    for round in 0..10 {
        let name = format!("round-{round}");
        let both = vec![one.device("/dev/one", "mrw"), two.device("/dev/two", "r")];
        let made = pod.start(&with(&name, both)).unwrap();
        let write = format!("echo {round} | dd of=/dev/one bs=512 conv=sync,fsync 2>/dev/null");
        made.shell(&format!("{write}; head -c 1 /dev/two | wc -c"));
        made.remove().unwrap();
        assert_eq!(fs::read(&one.image).unwrap()[0], b'0' + round);
    }
    let devices = with("none", Vec::new());
    let none = pod.start(&devices).unwrap();
    assert_eq!(none.shell("ls /sys/block | grep -c vd || true"), "0");
    assert!(one.is_free() && two.is_free());

    let mut odd = Device::new();
    odd.host_path = "/dev/zero".into();
    odd.container_path = "/dev/odd".into();
    odd.permissions = "rwm".into();
    let refused = pod.start(&with("odd", vec![odd])).unwrap_err();
    let said = "linux.devices: \"/dev/odd\" is the host's, which no guest can have";
    assert!(refused.message().contains(said), "{refused}");
}

/// A privileged container has its guest, and of the host what its pod names: also where containerd hands
/// it all devices of the host.
pub(crate) fn a_privileged_container_has_what_its_pod_names(stage: &mut Stage) {
    let (Some(named), Some(other)) = (disk(stage, "named"), disk(stage, "other")) else {
        return;
    };
    let image = fs::File::options().write(true).open(&named.image).unwrap();
    image.write_all_at(b"named", 0).unwrap();
    let seen = |stage: &Stage, name: &str| -> String {
        let mut config = pod(name);
        let linux = config.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().privileged = true;
        let pod = stage.node.run_pod(config, stage.subject.name).unwrap();
        let mut config = with("one", vec![named.device("/dev/xvda", "mrw")]);
        let linux = config.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().privileged = true;
        let one = pod.start(&config).unwrap();
        let said = one.shell(
            "head -c 5 /dev/xvda 2>/dev/null || echo none; ls /dev; ls /sys/block | grep vd; \
             mknod /dev/its c 1 11; dd if=/dev/its of=/dev/null count=1 2>/dev/null && echo its kernel; true",
        );
        let host = Path::new(&other.node)
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        assert!(said.lines().all(|line| line != host), "{said}");
        pod.remove().unwrap();
        said
    };
    let said = seen(stage, "usual");
    assert!(said.starts_with("named"), "{said}");
    // As an operator has it who did not call `pericarp node enable`.
    let config = stage.node.scratch().path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let without: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("privileged_without_host_devices"))
        .collect();
    fs::write(&config, without.join("\n")).unwrap();
    stage.node.restart();
    let said = seen(stage, "handed");
    println!("{said}");
    assert!(said.ends_with("its kernel"), "{said}");
    assert!(named.is_free() && other.is_free());
}

/// What serves a disk may be killed while it is used.
pub(crate) fn a_block_server_is_started_again(stage: &mut Stage) {
    let Some(disk) = disk(stage, "killed") else {
        return;
    };
    let node = stage.node.scratch().dir().display().to_string();
    let pod = stage.pod("killed");
    let work = "
        dd if=/dev/urandom of=/part bs=64k count=16 2>/dev/null
        want=$(md5sum < /part)
        while [ ! -e /stop ]; do
            dd if=/part of=/dev/xvda bs=64k oflag=direct 2>/dev/null || echo failed
            seen=$(dd if=/dev/xvda bs=64k count=16 iflag=direct 2>/dev/null | md5sum)
            [ \"$seen\" = \"$want\" ] || echo other
            echo round >> /rounds
        done
        echo done";
    let mut config = with("worker", vec![disk.device("/dev/xvda", "mrw")]);
    config.command = script(work).map(str::to_owned).to_vec();
    let worker = pod.start(&config).unwrap();
    let rounds = || -> u32 {
        let rounds = worker.shell("cat /rounds 2>/dev/null | wc -l");
        rounds.parse().unwrap()
    };
    let server = child("pericarp-block ");
    until("it works", || rounds() > 0);
    for _ in 0..3 {
        let (before, done) = (server.find(&node), rounds());
        assert!(server.kill(&node, Duration::ZERO));
        until("there is another", || {
            let now = server.find(&node);
            now.is_some() && now != before
        });
        until("it goes on", || rounds() > done + 1);
    }
    worker.shell("touch /stop");
    assert_eq!(worker.ended().exit_code, 0);
    let log = worker.log_until(|log| !log.is_empty());
    let said: Vec<_> = log.iter().map(|line| line.text.trim()).collect();
    assert_eq!(said, ["done"]);
    worker.remove().unwrap();

    // Not without end.
    let mut config = with("idle", vec![disk.device("/dev/xvda", "mrw")]);
    config.metadata.mut_or_insert_default().attempt = 1;
    let idle = pod.start(&config).unwrap();
    for _ in 0..6 {
        assert!(server.kill(&node, Duration::ZERO));
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(idle.ended().exit_code, 137);
    let reason = "a sidecar of the machine died (pericarp-block: killed by signal 9";
    assert!(stage.node.log().contains(reason), "{}", stage.node.log());
    pod.remove().unwrap();
    assert!(disk.is_free());
}

/// The directory that a kubelet names, and what a storage driver says of it.
fn direct(stage: &Stage, name: &str, said: &str) -> (PathBuf, Mount) {
    let volume = stage.node.scratch().path(name);
    fs::create_dir(&volume).unwrap();
    let encoded = Command::new("sh")
        .args(["-c", "printf %s \"$1\" | base64 -w 0 | tr +/ -_", "sh"])
        .arg(&volume)
        .output()
        .unwrap();
    let encoded = String::from_utf8(encoded.stdout).unwrap();
    let place = stage
        .node
        .root()
        .join("run/kata-containers/shared/direct-volumes")
        .join(encoded);
    fs::create_dir_all(&place).unwrap();
    let file = place.join("mountInfo.json");
    fs::write(&file, said).unwrap();
    let mut mount = Mount::new();
    mount.host_path = volume.display().to_string();
    mount.container_path = "/data".into();
    (file, mount)
}

fn mounting<'n>(
    pod: &Pod<'n>,
    name: &str,
    mount: &Mount,
) -> Result<pericarp_tests::cri::Container<'n>, pericarp_tests::cri::CallError> {
    let mut config = container(name, &IDLE);
    config.mounts = vec![mount.clone()];
    pod.start(&config)
}

pub(crate) fn ext4(path: &Path) {
    let done = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(path)
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

fn xfs(path: &Path) {
    let program = Part::MkfsXfs.find().unwrap();
    let done = Command::new(program).args(["-q", "-f"]).arg(path).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// A file of the file system, read without a mount.
pub(crate) fn read(image: &Path, file: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {file}")])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn a_direct_volume_is_mounted_in_the_guest(stage: &mut Stage) {
    if !have("a_direct_volume", &[Part::MkfsExt4]) {
        return;
    }
    let Some(disk) = disk(stage, "direct") else {
        return;
    };
    ext4(&disk.image);
    let said = format!(
        r#"{{"volume-type": "block", "device": "{}", "fstype": "ext4", "options": ["noatime"],
            "metadata": {{"fsGroup": "77", "fsGroupChangePolicy": "OnRootMismatch"}}}}"#,
        disk.node
    );
    let (_, mount) = direct(stage, "volume", &said);
    let pod = stage.pod("direct");
    let one = mounting(&pod, "one", &mount).unwrap();
    let seen = one.shell("grep ' /data ' /proc/mounts | cut -d ' ' -f 1-4");
    assert!(
        seen.contains("/data ext4 rw,") && seen.contains("noatime"),
        "{seen}"
    );
    assert_eq!(one.shell("stat -c '%g %a' /data"), "77 2775");
    one.shell("echo words > /data/file");
    // On the host nothing is mounted, and the volume's directory stays as it was.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&disk.node), "{mounts}");
    assert_eq!(
        fs::read_dir(stage.node.scratch().path("volume"))
            .unwrap()
            .count(),
        0
    );

    // The other containers of the pod have the same file system.
    let mut reading = mount.clone();
    reading.readonly = true;
    let two = mounting(&pod, "two", &reading).unwrap();
    assert_eq!(two.shell("cat /data/file"), "words");
    let tried = two.exec(&script("echo x > /data/other")).unwrap();
    assert!(
        tried.error().contains("Read-only file system"),
        "{}",
        tried.error()
    );
    one.shell("mkfifo /data/line; (echo said > /data/line) >/dev/null 2>&1 &");
    assert_eq!(two.shell("timeout 20 cat /data/line"), "said");
    let raw = vec![disk.device("/dev/xvda", "mrw")];
    let refused = pod.start(&with("raw", raw)).unwrap_err();
    assert!(
        refused.message().contains("two would write to one disk"),
        "{refused}"
    );

    one.remove().unwrap();
    two.shell("cat /data/file");
    two.remove().unwrap();
    // Written back with the last container, while the pod stays.
    assert_eq!(read(&disk.image, "file"), "words\n");
    let again = mounting(&pod, "again", &mount).unwrap();
    again.shell("echo more >> /data/file");
    // And with the pod.
    pod.remove().unwrap();
    assert_eq!(read(&disk.image, "file"), "words\nmore\n");
    assert!(disk.is_free());
}

/// An image is as good as a device; what is wrong with such a file is said, and nothing is left.
pub(crate) fn a_direct_volume_may_be_an_image_and_its_file_must_be_right(stage: &mut Stage) {
    if !have(
        "a_direct_volume_may_be_an_image",
        &[Part::MkfsExt4, Part::MkfsXfs],
    ) {
        return;
    }
    let (image, empty) = (
        stage.node.scratch().sparse("image", SIZE),
        stage.node.scratch().sparse("empty", SIZE),
    );
    ext4(&image);
    let of = |device: &Path, more: &str| {
        let device = device.display();
        format!(r#"{{"volume-type": "block", "device": "{device}", "fstype": "ext4"{more}}}"#)
    };
    let (file, mount) = direct(stage, "volume", &of(&image, r#", "options": ["ro"]"#));
    let pod = stage.pod("image");
    let one = mounting(&pod, "one", &mount).unwrap();
    let tried = one.exec(&script("echo x > /data/file")).unwrap();
    assert!(
        tried.error().contains("Read-only file system"),
        "{}",
        tried.error()
    );
    assert_eq!(one.shell("cat /sys/block/vd*/ro"), "1");
    one.remove().unwrap();

    for (index, (said, why)) in [
        ("{".to_owned(), "mountInfo.json: is no JSON"),
        (
            of(&image, r#", "volume-type": "spdkvol""#),
            "mountInfo.json: volume-type: 'spdkvol' is none of ours: block is",
        ),
        (
            of(&image, r#", "fstype": "zfs""#),
            "mountInfo.json: fstype: 'zfs' is not known to the guest's kernel: ext4, xfs are",
        ),
        (
            of(Path::new("/dev/zero"), ""),
            "mountInfo.json: device: /dev/zero: is neither a block device nor an image file",
        ),
        (
            of(Path::new("/no/where"), ""),
            "mountInfo.json: device: /no/where: No such file",
        ),
        (
            of(&empty, ""),
            "holds no ext4 file system that can be mounted so",
        ),
        (
            of(&image, r#", "options": ["no-such-option"]"#),
            "holds no ext4 file system that can be mounted so",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(&file, said).unwrap();
        let refused = mounting(&pod, &format!("wrong-{index}"), &mount).unwrap_err();
        let said = refused.message();
        assert!(said.contains(why) && !said.contains('\n'), "{said}");
    }
    // XFS, whose module comes with the disk; one that holds something else.
    let other = stage.node.scratch().sparse("xfs", 512 << 20);
    xfs(&other);
    let of_xfs = |device: &Path| of(device, r#", "fstype": "xfs""#);
    fs::write(&file, of_xfs(&image)).unwrap();
    let refused = mounting(&pod, "ext4-as-xfs", &mount).unwrap_err();
    let said = "holds no xfs file system that can be mounted so";
    assert!(refused.message().contains(said), "{refused}");
    fs::write(&file, of_xfs(&other)).unwrap();
    let two = mounting(&pod, "two", &mount).unwrap();
    let kind = two.shell("grep ' /data ' /proc/mounts | cut -d ' ' -f 3");
    assert_eq!(kind, "xfs");
    two.shell("echo words > /data/file");
    two.remove().unwrap();
    let three = mounting(&pod, "three", &mount).unwrap();
    assert_eq!(three.shell("cat /data/file"), "words");
    three.remove().unwrap();

    // A pod goes on.
    fs::write(&file, of(&image, "")).unwrap();
    let last = mounting(&pod, "last", &mount).unwrap();
    last.shell("echo words > /data/file");
    pod.remove().unwrap();
    assert_eq!(read(&image, "file"), "words\n");
}
