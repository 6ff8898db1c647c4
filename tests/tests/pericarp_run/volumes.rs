//! `--volume`: directories of the host that the command sees, in a virtual machine over virtio-fs
//! and in a container as bind mounts. What holds for one has to hold for the other.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use pericarp_tests::parts::Part;

use super::rig::*;

pub(crate) const VOLUMES: [Part; 7] = [
    PERICARP,
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
    Part::MkfsExt4,
    Part::Busybox,
];

fn directory(rig: &Rig, name: &str) -> PathBuf {
    let path = rig.scratch.path(name);
    fs::create_dir(&path).unwrap();
    path
}

fn volume(host: &Path, guest: &str) -> String {
    format!("{}:{guest}", host.display())
}

/// Runs a command that reads and changes what it is shown, and looks at the host's side.
fn directories_are_shared(rig: &Rig, how: &[&str]) {
    let data = directory(rig, "data");
    let inner = directory(rig, "inner");
    // What a list of options could take for the end of a value.
    let protected = directory(rig, "protected,read-only=off");
    fs::create_dir(data.join("in ner")).unwrap();
    fs::write(data.join("from-host"), "host\n").unwrap();
    fs::set_permissions(data.join("from-host"), Permissions::from_mode(0o4751)).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        chown(data.join("from-host"), Some(1234), Some(1235)).unwrap();
        // Changing the owner takes that bit away.
        fs::set_permissions(data.join("from-host"), Permissions::from_mode(0o4751)).unwrap();
    }
    // More than a request holds.
    let noise = noise(3 * MIB as usize + 7);
    fs::write(data.join("noise"), &noise).unwrap();
    fs::write(protected.join("file"), "kept\n").unwrap();
    let kept = protected.join("file");
    fs::set_permissions(&kept, Permissions::from_mode(0o666)).unwrap();

    let script = r#"
        echo uid=$(id -u)
        echo read=$(cat /data/from-host)
        echo seen=$(ls -ln /data/from-host | awk '{ print $1, $3, $4 }')
        cat /data/noise > /data/copy
        echo guest > /data/from-guest
        busybox chmod 2640 /data/from-guest
        busybox mkdir -m 710 /data/made && echo deep > /data/made/deep
        busybox ln -s from-guest /data/link
        busybox mv /data/made/deep /data/moved
        echo nested > '/data/in ner/file'
        echo protected=$(cat /kept/file)
        for act in 'touch /kept/new' 'rm /kept/file' 'busybox mkdir /kept/d' 'busybox chmod 600 /kept/file'; do
            echo refused=$($act 2>&1 | grep -c 'Read-only file system')
        done
        (echo changed > /kept/file) 2>/dev/null || echo write=refused
        cat /kept/file"#;
    let image = rig.image();
    let volumes = [
        volume(&inner, "/data/in ner:rw"),
        volume(&data, "/data"),
        volume(&protected, "/kept:ro"),
    ];
    let mut line = how.to_vec();
    for volume in &volumes {
        line.extend(["--volume", volume]);
    }
    line.extend(["--rootfs-image", &image, "--", "sh", "-c", script]);
    let run = rig.run(&line, b"");
    assert_eq!(run.code, 0, "{}{}", run.text(), run.stderr);
    assert_eq!(run.stderr, "");
    let text = run.text();
    let seen = run.values();
    let is = |key: &str, value: &str| {
        assert_eq!(
            seen.get(key).map(String::as_str),
            Some(value),
            "{key}: {text}"
        );
    };
    is("uid", "0");
    is("read", "host");
    if is_root {
        is("seen", "-rwsr-x--x 1234 1235");
    }
    is("protected", "kept");
    is("write", "refused");
    assert_eq!(text.matches("refused=1").count(), 4, "{text}");
    assert!(text.ends_with("\nkept\n"), "{text}");

    let read = |name: &str| fs::read_to_string(data.join(name)).unwrap();
    assert_eq!(read("from-guest"), "guest\n");
    let made = fs::metadata(data.join("from-guest")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o2640);
    assert_eq!(made.uid(), rustix::process::geteuid().as_raw());
    let made = fs::metadata(data.join("made")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o710);
    assert!(fs::read(data.join("copy")).unwrap() == noise);
    assert_eq!(read("moved"), "deep\n");
    assert_eq!(fs::read_dir(data.join("made")).unwrap().count(), 0);
    assert_eq!(
        fs::read_link(data.join("link")).unwrap(),
        Path::new("from-guest")
    );
    // The inner one lay over the outer one.
    assert_eq!(fs::read_dir(data.join("in ner")).unwrap().count(), 0);
    let nested = fs::read_to_string(inner.join("file")).unwrap();
    assert_eq!(nested, "nested\n");
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept\n");
    assert_eq!(fs::read_dir(&protected).unwrap().count(), 1);
    rig.assert_clean();
}

#[test]
fn directories_are_shared_with_a_machine() {
    if let Some(rig) = Rig::new("directories_are_shared_with_a_machine", &VOLUMES) {
        directories_are_shared(&rig, &[]);
    }
}

#[test]
fn directories_are_shared_with_a_container() {
    if let Some(rig) = Rig::new("directories_are_shared_with_a_container", &RUNC) {
        directories_are_shared(&rig, &["--runtime", "runc"]);
    }
}

/// Whoever may start a machine may share what is theirs; the server is this user, whatever
/// the guest's ids.
#[test]
fn a_plain_user_shares_a_directory() {
    const USER: u32 = 54321;
    let Some(rig) = Rig::new("a_plain_user_shares_a_directory", &VOLUMES) else {
        return;
    };
    if !rustix::process::geteuid().is_root() {
        // Then all the others are this test.
        return;
    }
    let data = directory(&rig, "data");
    fs::write(data.join("from-host"), "host\n").unwrap();
    fs::create_dir_all(rig.scratch.path("cache")).unwrap();
    let theirs = ["", "data", "data/from-host", "cache", "root.img"];
    for path in theirs.map(|name| rig.scratch.dir().join(name)) {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    let script = "cat /data/from-host; echo guest > /data/made; busybox mkdir /data/dir
        busybox chmod 750 /data/dir; busybox chown 1:1 /data/made 2> /dev/null || echo kept";
    let (image, volume) = (rig.image(), volume(&data, "/data"));
    let line = [
        "-v",
        &volume,
        "--rootfs-image",
        &image,
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut command = rig.command(&line);
    command.uid(USER).gid(USER);
    let run = rig.feed(command, &[], b"");
    assert_eq!(
        (run.code, run.text().as_str()),
        (0, "host\nkept\n"),
        "{}",
        run.stderr
    );
    for name in ["made", "dir"] {
        let made = fs::metadata(data.join(name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (USER, USER), "{name}");
    }
    assert_eq!(fs::read_to_string(data.join("made")).unwrap(), "guest\n");
    rig.assert_clean();
}

/// QEMU's bus has a place for all that may be asked for at once.
#[test]
fn the_most_volumes_and_disks_fit() {
    let Some(rig) = Rig::new("the_most_volumes_and_disks_fit", &VOLUMES) else {
        return;
    };
    let mut line = Vec::new();
    for number in 1..=16 {
        let host = directory(&rig, &format!("v{number}"));
        fs::write(host.join("number"), number.to_string()).unwrap();
        line.extend(["-v".to_owned(), volume(&host, &format!("/v{number}"))]);
    }
    for number in 1..=20 {
        let disk = rig.scratch.sparse(&format!("disk{number}"), MIB);
        line.extend(["--disk".to_owned(), disk.display().to_string()]);
    }
    let script = "for n in $(busybox seq 16); do [ $(cat /v$n/number) = $n ] || echo wrong $n; done
        echo disks=$(ls /dev/pericarp | wc -l)";
    let image = rig.image();
    line.extend(["--rootfs-image", &image, "--", "sh", "-c", script].map(str::to_owned));
    let line: Vec<&str> = line.iter().map(String::as_str).collect();
    let run = rig.run(&line, b"");
    assert_eq!(
        (run.code, run.text().as_str()),
        (0, "disks=20\n"),
        "{}",
        run.stderr
    );
    rig.assert_clean();
}

#[test]
fn a_killed_file_server_is_one_error() {
    let Some(rig) = Rig::new("a_killed_file_server_is_one_error", &VOLUMES) else {
        return;
    };
    let data = directory(&rig, "data");
    let running = rig.start_ready(&[
        "--volume",
        &volume(&data, "/data"),
        "--rootfs-image",
        &rig.image(),
        "--",
        "sh",
        "-c",
        "exec 2> /dev/null; echo ready; while :; do echo x >> /data/x; done",
    ]);
    rig.kill("pericarp-fs");
    let run = running.wait();
    assert_eq!(run.code, 125);
    let start = "pericarp: a sidecar of the machine died (pericarp-fs: killed by signal 9";
    assert!(run.stderr.starts_with(start), "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    rig.assert_clean();
}

#[test]
fn mistakes_with_volumes_are_refused() {
    let parts = [PERICARP, Part::MkfsExt4, Part::Busybox];
    let Some(rig) = Rig::new("mistakes_with_volumes_are_refused", &parts) else {
        return;
    };
    // As far as anybody looks before a run starts.
    let assets = rig.scratch.path("assets");
    fs::create_dir_all(assets.join("kernel/modules")).unwrap();
    fs::create_dir_all(assets.join("guest/bin")).unwrap();
    for file in ["kernel/vmlinuz", "pericarp-agent", "guest/bin/crun"] {
        fs::write(assets.join(file), "x").unwrap();
    }
    fs::write(assets.join("kernel/modules/order"), "").unwrap();
    let shares = assets.join("kernel/modules/order-shares");
    fs::write(&shares, "").unwrap();
    let data = directory(&rig, "data");
    let data = data.display();
    let file = rig.scratch.file("file", b"x");
    let file = file.display();
    let missing = rig.scratch.path("missing");
    let missing = missing.display();
    let loops = rig.scratch.path("loop");
    symlink(&loops, &loops).unwrap();
    let loops = loops.display();
    let image = rig.image();
    let refused = |values: &[String], message: &str| {
        let mut line = vec!["--rootfs-image", &image, "--assets"];
        line.push(assets.to_str().unwrap());
        for value in values {
            line.extend(["--volume", value]);
        }
        let run = rig.run(&[&line[..], &["--", "true"]].concat(), b"");
        assert_eq!(run.code, 2, "{values:?}: {}", run.stderr);
        assert_eq!(run.text(), "", "{values:?}");
        let start = format!("pericarp run: --volume{message}");
        assert!(run.stderr.starts_with(&start), "{values:?}: {}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{values:?}: {}", run.stderr);
        assert_eq!(rig.left_files(), Vec::<PathBuf>::new(), "{values:?}");
    };
    for (value, message) in [
        (
            format!("{data}"),
            "names no place for the command; write".into(),
        ),
        (
            ":/data".into(),
            "names no directory of this host; write".to_owned(),
        ),
        (
            format!("{missing}:/data"),
            format!("'{missing}' does not exist; make"),
        ),
        (
            format!("{file}:/data"),
            format!("'{file}' is not a directory; name"),
        ),
        (
            format!("{loops}:/data"),
            format!("'{loops}' cannot be looked at (Too many levels of symbolic links"),
        ),
        (
            format!("{data}:data"),
            "the command's path 'data' is not an absolute path; write HOST:GUEST or".into(),
        ),
        (
            format!("{data}:/"),
            "the command's path '/' is the container's root; name".into(),
        ),
        (
            format!("{data}:/a/../b"),
            "the command's path '/a/../b' has an empty part, '.', '..' or a slash at its end"
                .into(),
        ),
        (
            format!("{data}:/proc/x"),
            "the command's path '/proc/x' lies in the container's own /proc; choose".into(),
        ),
        (
            format!("{data}:/data:r"),
            "has the unknown access 'r'; use ro or rw".into(),
        ),
        (
            format!("{data}:x:/data"),
            "has a colon in a path; name a symbolic link to the directory".into(),
        ),
    ] {
        refused(
            std::slice::from_ref(&value),
            &format!(" '{value}': {message}"),
        );
    }
    let twice = [format!("{data}:/data"), format!("{data}:/data")];
    refused(
        &twice,
        &format!(
            " '{}': there is another volume at '/data'; give each",
            twice[1]
        ),
    );
    let many: Vec<String> = (0..17).map(|n| format!("{data}:/v{n}")).collect();
    refused(
        &many,
        ": there are 17 volumes, and a container takes 16; use fewer",
    );
    fs::remove_file(shares).unwrap();
    refused(
        &many[..1],
        ": the guest's files have no 'kernel/modules/order-shares'; run `cargo xtask setup`, which \
         makes them",
    );
}
