//! What a kubelet mounts into containers: directories that it writes, and files of them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use pericarp_tests::cri::log::Line;
use pericarp_tests::cri::{container, mount};

use crate::stage::{IDLE, Stage, script, until};

/// Writes as a kubelet does: all files of a version in a directory of its own, and one link that
/// is changed in one step. A projected volume of a ConfigMap, a Secret, and what the pod is.
fn publish(volume: &Path, version: u32, key: &str) {
    let name = format!("..version-{version}");
    let files = volume.join(&name);
    fs::create_dir_all(files.join("secret")).unwrap();
    fs::write(files.join("key"), key).unwrap();
    fs::write(files.join("secret/token"), format!("token of {key}")).unwrap();
    let mode = fs::Permissions::from_mode(0o440);
    fs::set_permissions(files.join("secret/token"), mode).unwrap();
    chown(files.join("secret/token"), Some(0), Some(77)).unwrap();
    fs::write(files.join("labels"), "app=\"reader\"\n").unwrap();
    symlink(&name, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if version == 1 {
        for entry in ["key", "secret", "labels"] {
            symlink(format!("..data/{entry}"), volume.join(entry)).unwrap();
        }
    } else {
        fs::remove_dir_all(volume.join(format!("..version-{}", version - 1))).unwrap();
    }
}

/// Says what inotify says of a directory: moves into it. busybox has no program for that.
const WATCHER: &str = "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path \
    /usr/lib/x86_64-linux-gnu /usr/bin/perl -e '$| = 1; $fd = syscall(294, 0); \
    $dir = $ARGV[0]; syscall(254, $fd, $dir, 0x80); open($f, \"<&=\", $fd); print \"watches\\n\"; \
    while (sysread($f, $event, 4096)) { print unpack(\"x16 Z*\", $event), \"\\n\" }' /etc/settings";

pub(crate) fn a_config_map_changes_under_the_container(stage: &mut Stage) {
    // Known by its place, too.
    let volumes = stage.node.scratch().path("pods/uid/volumes");
    let volume = volumes.join("kubernetes.io~projected/settings");
    fs::create_dir_all(&volume).unwrap();
    publish(&volume, 1, "first");
    let pod = stage.pod("config");
    let mut config = container("reader", &IDLE);
    config.mounts = vec![mount(&volume, "/etc/settings", true)];
    let reader = pod.start(&config).unwrap();
    let read = "cat /etc/settings/key; echo; cat /etc/settings/secret/token /etc/settings/labels";
    let all = |key: &str| format!("{key}\ntoken of {key}app=\"reader\"");
    assert_eq!(reader.shell(read), all("first"));
    let stat = "stat -L -c '%a %u %g' /etc/settings/secret/token";
    assert_eq!(reader.shell(stat), "440 0 77");
    let output = reader.exec(&["touch", "/etc/settings/x"]).unwrap();
    assert!(
        output.error().contains("Read-only file system"),
        "{}",
        output.error()
    );
    // A program that waits for changes is told of them.
    let mut watcher = container("watcher", &script(WATCHER));
    watcher.mounts = vec![
        mount(&volume, "/etc/settings", true),
        mount(Path::new("/usr"), "/usr", true),
    ];
    let watcher = pod.start(&watcher).unwrap();
    watcher.log_until(|log| log.iter().any(|line| line.text == "watches"));
    for version in 2..5 {
        let key = format!("version {version}");
        publish(&volume, version, &key);
        let told = |line: &&Line| line.text == "..data";
        let times = version as usize - 1;
        watcher.log_until(|log| log.iter().filter(told).count() >= times);
        until("the new version is seen", || {
            reader.shell(read) == all(&key)
        });
    }
    assert_eq!(reader.shell(stat), "440 0 77");
    // A later container of the pod has it, too.
    config.metadata.mut_or_insert_default().name = "later".into();
    let later = pod.start(&config).unwrap();
    assert_eq!(
        later.shell("cat /etc/settings/key; ls -a /etc/settings | wc -l"),
        "version 47"
    );
}

/// A volume is one thing for all containers of a pod, with all that files are for besides their
/// contents.
pub(crate) fn containers_meet_in_a_volume(stage: &mut Stage) {
    let volume = stage.node.scratch().path("meeting");
    fs::create_dir(&volume).unwrap();
    let pod = stage.pod("meeting");
    let start = |name: &str| {
        let mut config = container(name, &IDLE);
        config.mounts = vec![mount(&volume, "/v", false)];
        pod.start(&config).unwrap()
    };
    let (mut one, two) = (start("one"), start("two"));
    for again in [false, true] {
        if again {
            // A container that comes later finds what one that stayed has.
            one.stop(20).unwrap();
            one.remove().unwrap();
            one = start("again");
        }
        two.shell("rm -f /v/line; mkfifo /v/line; (echo said > /v/line) >/dev/null 2>&1 &");
        assert_eq!(one.shell("timeout 20 cat /v/line"), "said");
    }
}

pub(crate) fn directories_and_single_files_are_mounted(stage: &mut Stage) {
    let scratch = stage.node.scratch();
    let shared = scratch.path("empty-dir");
    fs::create_dir_all(shared.join("sub/deep")).unwrap();
    let file = scratch.file("hosts", b"10.0.0.1 elsewhere\n");
    // What a kubelet makes of a subPath: a mount of a part of the volume, file or directory.
    let parts = scratch.path("pods/uid/volume-subpaths/empty-dir/reader");
    fs::create_dir_all(parts.join("0")).unwrap();
    fs::write(parts.join("1"), "").unwrap();
    fs::write(shared.join("sub/deep/one"), "a single file\n").unwrap();
    for (from, to) in [("sub/deep", "0"), ("sub/deep/one", "1")] {
        let (from, to) = (shared.join(from), parts.join(to));
        let words = [
            "mount",
            "--bind",
            from.to_str().unwrap(),
            to.to_str().unwrap(),
        ];
        stage.node.run(&words);
    }
    let pod = stage.pod("volumes");
    let mut config = container("writer", &IDLE);
    config.mounts = vec![
        mount(&shared, "/shared", false),
        mount(&file, "/etc/hosts", false),
    ];
    let writer = pod.start(&config).unwrap();
    // A subPath is a directory of the volume; a mount may be below another.
    config = container("reader", &IDLE);
    config.mounts = vec![
        mount(&shared.join("sub"), "/part", true),
        mount(&shared, "/all", true),
        mount(&shared.join("sub/deep"), "/all/sub/deep", false),
        mount(&parts.join("0"), "/bound", false),
        mount(&parts.join("1"), "/etc/one", false),
    ];
    let reader = pod.start(&config).unwrap();
    writer.shell("echo words > /shared/sub/file && chmod 640 /shared/sub/file");
    assert_eq!(
        reader.shell("cat /part/file; stat -c %a /part/file"),
        "words\n640"
    );
    assert_eq!(reader.exec(&["rm", "/part/file"]).unwrap().code, 1);
    reader.shell("echo back > /all/sub/deep/file");
    assert_eq!(writer.shell("cat /shared/sub/deep/file"), "back");
    assert_eq!(
        fs::read_to_string(shared.join("sub/deep/file")).unwrap(),
        "back\n"
    );
    assert_eq!(
        reader.shell("cat /bound/file /etc/one; echo more >> /etc/one"),
        "back\na single file"
    );
    assert_eq!(
        writer.shell("cat /shared/sub/deep/one"),
        "a single file\nmore"
    );
    writer.shell("echo 10.0.0.2 there >> /etc/hosts");
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "10.0.0.1 elsewhere\n10.0.0.2 there\n"
    );

    let mut config = container("wrong", &IDLE);
    config.mounts = vec![mount(&scratch.path("not/there"), "/x", true)];
    let made = pod.create(&config).and_then(|one| one.start());
    // containerd makes what is missing; that is what it has always done for hostPath.
    assert!(made.is_ok(), "{made:?}");
    assert!(scratch.path("not/there").is_dir());
    pod.remove().unwrap();
    for part in ["0", "1"] {
        stage
            .node
            .run(&["umount", parts.join(part).to_str().unwrap()]);
    }
}
