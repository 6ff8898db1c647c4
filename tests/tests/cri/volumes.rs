//! What a kubelet mounts into containers: directories that it writes, and files of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use pericarp_tests::cri::container;
use pericarp_tests::cri::proto::Mount;

use crate::stage::{IDLE, Stage, until};

fn mount(from: &Path, to: &str, readonly: bool) -> Mount {
    let mut mount = Mount::new();
    mount.host_path = from.display().to_string();
    mount.container_path = to.into();
    mount.readonly = readonly;
    mount
}

/// Writes as a kubelet does: all files of a version in a directory of its own, and one link that
/// is changed in one step.
fn publish(volume: &Path, version: u32, key: &str) {
    let name = format!("..version-{version}");
    fs::create_dir(volume.join(&name)).unwrap();
    fs::write(volume.join(&name).join("key"), key).unwrap();
    symlink(&name, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if version == 1 {
        symlink("..data/key", volume.join("key")).unwrap();
    } else {
        fs::remove_dir_all(volume.join(format!("..version-{}", version - 1))).unwrap();
    }
}

pub(crate) fn a_config_map_changes_under_the_container(stage: &mut Stage) {
    let volume = stage.node.scratch().path("config-map");
    fs::create_dir(&volume).unwrap();
    publish(&volume, 1, "first");
    let pod = stage.pod("config");
    let mut config = container("reader", &IDLE);
    config.mounts = vec![mount(&volume, "/etc/settings", true)];
    let reader = pod.start(&config).unwrap();
    assert_eq!(reader.shell("cat /etc/settings/key"), "first");
    let output = reader.exec(&["touch", "/etc/settings/x"]).unwrap();
    assert!(
        output.error().contains("Read-only file system"),
        "{}",
        output.error()
    );
    for version in 2..5 {
        publish(&volume, version, &format!("version {version}"));
        until("the new version is seen", || {
            let seen = reader.exec(&["cat", "/etc/settings/key"]).unwrap();
            seen.text() == format!("version {version}")
        });
    }
    // A later container of the pod has it, too.
    config.metadata.mut_or_insert_default().name = "later".into();
    let later = pod.start(&config).unwrap();
    assert_eq!(
        later.shell("cat /etc/settings/key; ls -a /etc/settings | wc -l"),
        "version 45"
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
}
