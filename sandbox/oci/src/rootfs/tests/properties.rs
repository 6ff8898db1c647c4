//! Tests of what files get beside their content, as root and as a plain user.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};

use super::*;

/// What `properties` looks at, in an order in which each could spoil another.
fn with_properties() -> Builder {
    use entry::{device, dir, fifo, file, hard_link, symlink};
    layers(&[
        &[
            dir("./").mode(0o751).at(5),
            dir("closed").mode(0o500).owner(1, 2).at(7),
            file("closed/secret", "s").mode(0o000).at(8),
            dir("open").at(3),
            file("open/x", "x"),
        ],
        &[
            file("suid", "s").mode(0o6755).owner(3, 4).at(9),
            file("capable", "c").owner(5, 6).xattr(
                "security.capability",
                b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            ),
            file("marked", "m")
                .xattr("user.note", b"n\n=")
                .xattr("trusted.overlay.opaque", b"y"),
            symlink("link", "/nowhere").owner(7, 8).at(10),
            fifo("pipe").mode(0o640),
            device("null", 1, 3),
            hard_link("again", "suid"),
            dir("sticky").mode(0o1777).at(4),
            file("sticky/f", "late").at(11),
            file("closed/late", "l").mode(0o400),
            dir("open").mode(0o700).at(12),
        ],
    ])
}

fn properties(root: &Path, rights: Rights) {
    let meta = |name: &str| root.join(name).symlink_metadata().unwrap();
    let mode = |name: &str| meta(name).permissions().mode() & 0o7777;
    let privileged = rights == Rights::Root;
    let own = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let owner = |uid: u32, gid: u32| if privileged { (uid, gid) } else { own };
    for (name, expected_mode, expected_owner, mtime) in [
        (".", 0o751, owner(0, 0), 5),
        ("closed", 0o500, owner(1, 2), 7),
        (
            "closed/secret",
            if privileged { 0 } else { 0o400 },
            owner(0, 0),
            8,
        ),
        ("open", 0o700, owner(0, 0), 12),
        ("suid", 0o6755, owner(3, 4), 9),
        ("sticky", 0o1777, owner(0, 0), 4),
        ("sticky/f", 0o644, owner(0, 0), 11),
        ("link", 0o777, owner(7, 8), 10),
        ("capable", 0o644, owner(5, 6), 1_000_000_000),
        ("pipe", 0o640, owner(0, 0), 1_000_000_000),
    ] {
        let meta = meta(name);
        assert_eq!(mode(name), expected_mode, "{name}");
        assert_eq!((meta.uid(), meta.gid()), expected_owner, "{name}");
        assert_eq!(meta.mtime(), mtime, "{name}");
    }
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!(meta("again").ino(), meta("suid").ino());
    assert_eq!(meta("suid").nlink(), 2);
}

#[test]
fn as_root_everything_is_the_images() {
    if !is_root() {
        return skip("as_root_everything_is_the_images", "needs root");
    }
    let dir = Dir::new("root");
    let (root, report) = unpack_to(&dir, &with_properties(), Rights::Root).unwrap();
    properties(&root, Rights::Root);
    let null = root.join("null").symlink_metadata().unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    let mut value = [0; 64];
    let length =
        rustix::fs::lgetxattr(root.join("capable"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(
        &value[..length],
        b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    let kept = rustix::fs::lgetxattr(root.join("marked"), "user.note", &mut value[..]);
    let user_note_left_out = u64::from(kept.is_err());
    assert_eq!(
        report.left_out,
        LeftOut {
            devices: 0,
            xattrs: 1 + user_note_left_out
        }
    );
    assert_eq!(report.entries, 16);
}

#[test]
fn a_time_beyond_all_times_does_no_harm() {
    let dir = Dir::new("time");
    let mut late = entry::file("late", "");
    late.mtime = (1 << 62, 999_999_999);
    let all = layers(&[&[late, entry::dir("d").at(u64::MAX >> 2)]]);
    let (root, report) = unpack_to(&dir, &all, Rights::User).unwrap();
    assert_eq!(report.newest, 1 << 40);
    assert!(root.join("late").metadata().unwrap().mtime() > 4_000_000_000);
}

#[test]
fn a_plain_user_gets_what_it_may_have() {
    const NAME: &str = "rootfs::tests::properties::a_plain_user_gets_what_it_may_have";
    if is_root() {
        if !program_is_there(NAME, "setpriv", "util-linux") {
            return;
        }
        // The build directory may be closed to others: the program is taken elsewhere.
        let dir = Dir::new("user-program");
        let program = dir.path().join("tests");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let output = Command::new("setpriv")
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--bounding-set=-all",
            ])
            .arg(&program)
            .args([NAME, "--exact", "--nocapture"])
            .current_dir("/")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{errors}"
        );
        return;
    }
    assert_eq!(Rights::of_this_process(), Rights::User);
    let dir = Dir::new("user");
    let (root, report) = unpack_to(&dir, &with_properties(), Rights::User).unwrap();
    properties(&root, Rights::User);
    assert!(!root.join("null").exists());
    assert_eq!(report.left_out.devices, 1);
    assert!(report.left_out.xattrs >= 2);
    // Its own directories that it may not write to are no obstacle.
    remove(&root).unwrap();
    assert!(!root.exists());
}

/// What umoci makes of an image with everything in it. The by-hand check of the demo's image does
/// the same on a large one.
#[test]
fn umoci_unpacks_the_same_tree() {
    use entry::{dir, file, hard_link, symlink};
    const NAME: &str = "umoci_unpacks_the_same_tree";
    if !is_root() || !program_is_there(NAME, "umoci", "umoci") {
        return;
    }
    let dir_path = Dir::new("umoci");
    let mut builder = with_properties()
        .packed_layer(
            &[
                dir("usr"),
                dir("usr/bin"),
                symlink("bin", "usr/bin"),
                file("usr/bin/tool", "1").mode(0o4755),
                hard_link("usr/bin/tool2", "usr/bin/tool"),
                dir("gone"),
                file("gone/a", "1"),
                dir("opaque"),
                file("opaque/a", "1"),
            ],
            "gzip",
        )
        .layer(&[
            file(".wh.gone", ""),
            dir("opaque"),
            file("opaque/.wh..wh..opq", ""),
            file("opaque/b", "2"),
            file("usr/bin/other", "2"),
            dir("usr/bin"),
        ]);
    let mut manifest = builder.manifest();
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "it"});
    builder.index(&serde_json::json!([manifest]));
    let image = builder.open(&dir_path).unwrap();
    let ours = dir_path.path().join("ours");
    unpack(&image, &ours, Rights::Root, &Limits::default(), &never).unwrap();
    let layout = dir_path.path().join("layout");
    builder.write_layout(&layout);
    let theirs = dir_path.path().join("theirs");
    let output = Command::new("umoci")
        .arg("raw")
        .arg("unpack")
        .arg("--image")
        .arg(format!("{}:it", layout.display()))
        .arg(&theirs)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // umoci leaves the root's own time as its work made it.
    for root in [&ours, &theirs] {
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        File::open(root).unwrap().set_times(times).unwrap();
    }
    let (ours, theirs) = (archived(&ours), archived(&theirs));
    assert!(
        ours == theirs,
        "ours:\n{}theirs:\n{}",
        listed(&ours),
        listed(&theirs)
    );
}
