//! `--rootfs`: a directory of the host below a writable layer, in a virtual machine over virtio-fs
//! and in a container by itself. What holds for one has to hold for the other.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use pericarp_tests::parts::Part;
use rustix::fs::{CWD, FileType, Mode, Uid, XattrFlags, chown, makedev, mknodat, setxattr};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::rig::*;

pub(crate) const ROOTFS: [Part; 7] = [
    PERICARP,
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_VSOCK,
    Part::QemuSystem,
    Part::MkfsExt4,
    Part::Busybox,
];

const MACHINE: &[&str] = &[];
const CONTAINER: &[&str] = &["--runtime", "runc"];

/// `VFS_CAP_REVISION_2` with the effective bit, and CAP_CHOWN permitted (capabilities(7)).
const CAPABLE: [u8; 20] = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A list (`linux/posix_acl_xattr.h`) that lets user 1000 read a file of root's.
const LISTED: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 6, 0, 255, 255, 255, 255, // owner: rw
    2, 0, 4, 0, 232, 3, 0, 0, // user 1000: r
    4, 0, 0, 0, 255, 255, 255, 255, // group: none
    16, 0, 4, 0, 255, 255, 255, 255, // mask: r
    32, 0, 0, 0, 255, 255, 255, 255, // others: none
];

/// Fills the rig's tree with what a copy of a root file system could get wrong.
fn furnish(rig: &Rig) -> PathBuf {
    let tree = rig.tree();
    let etc = tree.join("etc");
    let mode = |path: &Path, bits| {
        fs::set_permissions(path, Permissions::from_mode(bits)).unwrap();
    };
    fs::write(etc.join("one"), "linked\n").unwrap();
    fs::hard_link(etc.join("one"), etc.join("two")).unwrap();
    symlink("/etc/one", etc.join("absolute")).unwrap();
    symlink("../etc/one", etc.join("relative")).unwrap();
    symlink("nowhere", etc.join("dangling")).unwrap();
    fs::write(etc.join("secret"), "secret\n").unwrap();
    mode(&etc.join("secret"), 0);
    fs::write(etc.join("big"), noise(3 * MIB as usize + 7)).unwrap();
    fs::create_dir(etc.join("old")).unwrap();
    fs::write(etc.join("old/file"), "moved\n").unwrap();
    fs::create_dir(tree.join("mnt")).unwrap();
    mode(&tree.join("tmp"), 0o1777);
    mode(&tree, 0o755);
    // Of a user who is not root: a program that gives up its rights gives up those of this user.
    let busybox = tree.join("bin/busybox");
    let other = tree.join("bin/busybox-other");
    fs::copy(&busybox, &other).unwrap();
    chown(&other, Some(Uid::from_raw(1234)), None).unwrap();
    mode(&other, 0o4755);
    let capable = tree.join("bin/busybox-capable");
    fs::copy(&busybox, &capable).unwrap();
    let set = |path: &Path, name: &str, value: &[u8]| {
        setxattr(path, name, value, XattrFlags::empty()).unwrap();
    };
    set(&capable, "security.capability", &CAPABLE);
    fs::write(etc.join("listed"), "listed\n").unwrap();
    mode(&etc.join("listed"), 0o600);
    set(&etc.join("listed"), "system.posix_acl_access", &LISTED);
    let node = |name: &str, kind, device| {
        mknodat(
            CWD,
            etc.join(name),
            kind,
            Mode::from_raw_mode(0o666),
            device,
        )
        .unwrap();
    };
    // The host's memory: shown, and opened by nobody.
    node("mem", FileType::CharacterDevice, makedev(1, 1));
    node("pipe", FileType::Fifo, 0);
    tree
}

/// Everything of a tree but when it was last read.
fn state(tree: &Path) -> BTreeMap<PathBuf, String> {
    let mut seen = BTreeMap::new();
    let mut pending = vec![tree.to_owned()];
    while let Some(path) = pending.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        let content = if about.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if about.is_file() {
            let bytes = fs::read(&path).unwrap();
            let sum = bytes.iter().fold(0_u64, |sum, byte| {
                sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte)
            });
            format!("{sum:x}")
        } else {
            String::new()
        };
        let line = format!(
            "{:o} {}:{} {} {} {}.{} {}.{} {content}",
            about.mode(),
            about.uid(),
            about.gid(),
            about.nlink(),
            about.size(),
            about.mtime(),
            about.mtime_nsec(),
            about.ctime(),
            about.ctime_nsec(),
        );
        seen.insert(path, line);
    }
    seen
}

const AS_ROOT: &str = r#"
    no() { "$@" 2>&1 | grep -o "$why"; }
    echo id=$(id -u):$(id -g)
    echo root=$(busybox stat -c '%a %u' /)
    echo absolute=$(cat /etc/absolute) relative=$(cat /etc/relative)
    why='No such file or directory'
    echo dangling=$(readlink /etc/dangling) $(no cat /etc/dangling)
    echo secret=$(cat /etc/secret) $(busybox stat -c %a /etc/secret)
    echo links=$(busybox stat -c %h /etc/one) $([ /etc/one -ef /etc/two ] && echo same)
    echo mem=$(busybox stat -c '%F %t,%T' /etc/mem) \
        $(head -c 1 /etc/mem > /dev/null 2>&1 && echo read || echo refused)
    echo through > /etc/pipe &
    echo pipe=$(cat /etc/pipe)
    echo below=$(ls /mnt)

    ino=$(busybox stat -c %i /etc/big)
    echo x >> /etc/big
    echo appended=$(md5sum < /etc/big) $(busybox stat -c %s /etc/big)
    [ $ino = $(busybox stat -c %i /etc/big) ] && echo number=kept
    echo changed > /etc/one
    echo one=$(cat /etc/one) two=$(cat /etc/two) $([ /etc/one -ef /etc/two ] || echo apart)
    echo again > /etc/secret
    echo secret=$(cat /etc/secret) $(busybox stat -c %a /etc/secret)
    busybox chmod 640 /etc/listed && busybox chown 5:6 /etc/listed
    echo changed=$(busybox stat -c '%a %u:%g' /etc/listed)
    why='No such file or directory'
    busybox mv /etc/old /etc/new && echo moved=$(cat /etc/new/file) $(no ls /etc/old)
    rm /etc/relative && echo removed=$(ls -a /etc | grep -c relative)
    busybox mkdir /mnt/made && touch /mnt/made/file && echo made=$(ls /mnt /mnt/made)
    busybox rm -r /etc/new && echo tree=$(ls /etc | grep -c new)
    busybox ln /etc/big /etc/bigger && echo linked=$(busybox stat -c %h /etc/big)
    busybox dd if=/dev/zero of=/filler bs=1M count=64 2> /dev/null
    echo filler=$(busybox stat -c %s /filler)
    busybox cp /bin/busybox /bin/busybox-mine && /bin/busybox-mine echo copied=runs"#;

const SEEN: &str = "\
id=0:0
root=755 0
absolute=linked relative=linked
dangling=nowhere No such file or directory
secret=secret 0
links=2 same
mem=character special file 1,1 refused
pipe=through
below=
appended=APPENDED - 3145737
number=kept
one=changed two=linked apart
secret=again 0
changed=640 5:6
moved=moved No such file or directory
removed=0
made=/mnt: made /mnt/made: file
tree=0
linked=2
filler=67108864
copied=runs
";

const AS_USER: &str = r#"
    no() { "$@" 2>&1 | grep -o "Permission denied"; }
    field() { busybox awk "{ print \$$1 }"; }
    echo id=$(id -u):$(id -g)
    echo secret=$(no cat /etc/secret)
    echo listed=$(cat /etc/listed)
    echo refused=$(no sh -c 'echo x > /etc/one')
    echo new=$(no touch /etc/x)
    echo fine > /tmp/x && echo tmp=$(cat /tmp/x)
    echo one=$(cat /etc/one)
    echo other=$(/bin/busybox-other grep ^Uid: /proc/self/status | field 4)
    echo capable=$(/bin/busybox-capable grep ^CapPrm: /proc/self/status | field 2)
    echo plain=$(grep ^CapPrm: /proc/self/status | field 2)"#;

const SEEN_BY_USER: &str = "\
id=1000:1000
secret=Permission denied
listed=listed
refused=Permission denied
new=Permission denied
tmp=fine
one=linked
other=1234
capable=0000000000000001
plain=0000000000000000
";

fn a_directory_is_a_root(rig: &Rig, how: &[&str]) {
    let tree = furnish(rig);
    let before = state(&tree);
    // What is mounted in it belongs to the host: a chroot's /proc, or the user's own files.
    let mounted = Mounted::on(&tree.join("mnt"));
    fs::write(tree.join("mnt/private"), "the host's").unwrap();
    let run = |more: &[&str], script: &str| {
        let root = ["--rootfs", tree.to_str().unwrap()];
        let line = [how, &root, more, &["--", "sh", "-c", script]].concat();
        let run = rig.run(&line, b"");
        assert_eq!(run.code, 0, "{}{}", run.text(), run.stderr);
        assert_eq!(run.stderr, "");
        rig.assert_clean_but(&tree);
        run
    };
    let mut appended = fs::read(tree.join("etc/big")).unwrap();
    appended.extend(b"x\n");
    let expected = SEEN.replace("APPENDED", &md5(rig, &appended));
    let seen = run(&[], AS_ROOT).text();
    // Nothing of it is there the next time.
    let by_user = run(&["--user", "1000:1000"], AS_USER).text();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        (lines(&seen), lines(&by_user)),
        (lines(&expected), lines(SEEN_BY_USER))
    );
    drop(mounted);
    assert_eq!(state(&tree), before, "the directory has changed");
    rig.assert_clean();
}

fn md5(rig: &Rig, bytes: &[u8]) -> String {
    let file = rig.scratch.file("appended", bytes);
    let output = Command::new(Part::Busybox.find().unwrap())
        .arg("md5sum")
        .arg(file)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

/// Memory, mounted for as long as this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn on(path: &Path) -> Self {
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("needs root, for owners, devices and mounts");
    }
    root
}

#[test]
fn a_directory_is_a_machines_root() {
    let test = "a_directory_is_a_machines_root";
    if let Some(rig) = Rig::new(test, &ROOTFS)
        && is_root()
    {
        a_directory_is_a_root(&rig, MACHINE);
    }
}

#[test]
fn a_directory_is_a_containers_root() {
    if let Some(rig) = Rig::new("a_directory_is_a_containers_root", &RUNC) {
        a_directory_is_a_root(&rig, CONTAINER);
    }
}

/// Programs that are not there or cannot be executed, found on a share.
#[test]
fn programs_of_a_directory_are_told() {
    let Some(rig) = Rig::new("programs_of_a_directory_are_told", &ROOTFS) else {
        return;
    };
    let tree = rig.tree();
    let root = ["--rootfs", tree.to_str().unwrap(), "--"];
    for (program, code, message) in [
        ("nope", 127, "'nope': no such program in the container"),
        ("/etc/not-executable", 126, "'/etc/not-executable'"),
    ] {
        let run = rig.run(&[&root[..], &[program]].concat(), b"");
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(run.stderr.contains(message), "{}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
        rig.assert_clean();
    }
}

/// As many devices as a machine can be asked for, with a directory as the root.
#[test]
fn a_directory_leaves_room_for_the_most_volumes_and_disks() {
    let test = "a_directory_leaves_room_for_the_most_volumes_and_disks";
    let Some(rig) = Rig::new(test, &ROOTFS) else {
        return;
    };
    let mut line = Vec::new();
    for number in 1..=16 {
        let host = rig.scratch.path(&format!("v{number}"));
        fs::create_dir(&host).unwrap();
        fs::write(host.join("number"), number.to_string()).unwrap();
        line.extend(["-v".to_owned(), format!("{}:/v{number}:ro", host.display())]);
    }
    for number in 1..=20 {
        let disk = rig.scratch.sparse(&format!("disk{number}"), MIB);
        line.extend(["--disk".to_owned(), disk.display().to_string()]);
    }
    let script = "for n in $(busybox seq 16); do [ $(cat /v$n/number) = $n ] || echo wrong $n; done
        echo x > /new && echo disks=$(ls /dev/pericarp | wc -l)";
    let tree = rig.tree().display().to_string();
    line.extend(["--rootfs", &tree, "--", "sh", "-c", script].map(str::to_owned));
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

/// A guest whose first process is not ours: it has the share, and means harm.
#[test]
fn a_hostile_guest_changes_nothing_of_its_root() {
    let test = "a_hostile_guest_changes_nothing_of_its_root";
    let Some(rig) = Rig::new(test, &ROOTFS) else {
        return;
    };
    if !is_root() {
        return;
    }
    let tree = furnish(&rig);
    // A volume that may be written, by the same process.
    let volume = rig.scratch.path("volume");
    fs::create_dir(&volume).unwrap();
    let before = state(&tree);
    let own = rig.scratch.path("assets");
    fs::create_dir(&own).unwrap();
    symlink(assets().join("kernel"), own.join("kernel")).unwrap();
    fs::create_dir_all(own.join("guest/bin")).unwrap();
    let busybox = Part::Busybox.find().unwrap();
    for program in ["sh", "busybox", "crun"] {
        fs::copy(&busybox, own.join("guest/bin").join(program)).unwrap();
    }
    let script = r"#!/bin/sh
        b=/bin/busybox
        for m in $($b cat /modules/order); do $b insmod /modules/$m; done
        $b mkdir /r /v /proc
        $b mount -t proc proc /proc
        $b mount -t virtiofs root /r || echo HOSTILE no mount
        $b mount -t virtiofs volume1 /v || echo HOSTILE no mount
        $b mount -o remount,rw /r || echo HOSTILE no remount
        t() { if out=$($@ 2>&1); then echo HOSTILE did $@; else echo HOSTILE refused $out; fi; }
        t $b touch /r/new
        t $b touch /r/etc/one
        t $b rm /r/etc/one
        t $b mkdir /r/dir
        t $b rmdir /r/etc/old
        t $b mv /r/etc/one /r/etc/three
        t $b ln /r/etc/one /r/etc/three
        t $b ln -s x /r/etc/three
        t $b chmod 777 /r/etc/secret
        t $b chown 5 /r/etc/secret
        t $b truncate -s 0 /r/etc/one
        t $b mknod /r/etc/disk b 8 0
        t $b dd if=/bin/sh of=/r/etc/one
        t $b dd if=/bin/sh of=/r/bin/busybox conv=notrunc
        t $b setfattr -n user.x -v 1 /r/etc/one
        t $b cp /bin/sh /r/bin/busybox-other
        t $b mv /r/etc/one /v/one
        $b ln /r/etc/one /v/link 2>/dev/null && echo HOSTILE linked
        echo written > /v/volume && echo HOSTILE volume written
        echo HOSTILE end
        exit 3
        ";
    fs::write(own.join("pericarp-agent"), script).unwrap();
    let log = rig.scratch.path("console.log");
    let run = rig.run(
        &[
            "--rootfs",
            tree.to_str().unwrap(),
            "--volume",
            &format!("{}:/v", volume.display()),
            "--assets",
            own.to_str().unwrap(),
            "--console-log",
            log.to_str().unwrap(),
            "--",
            "true",
        ],
        b"",
    );
    assert_eq!(run.code, 125, "{}", run.stderr);
    let log = fs::read_to_string(&log).unwrap();
    let said: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("HOSTILE ").map(|(_, said)| said.trim_end()))
        .collect();
    assert_eq!(said.last(), Some(&"end"), "{log}");
    assert!(said.contains(&"volume written"), "{log}");
    assert!(
        !said
            .iter()
            .any(|line| line.starts_with("did") || line.starts_with("no ")),
        "{log}"
    );
    assert!(!said.contains(&"linked"), "{log}");
    let refused = said.iter().filter(|line| line.starts_with("refused"));
    assert_eq!(refused.clone().count(), 17, "{log}");
    let by_server = refused.filter(|line| line.contains("Read-only file system"));
    assert!(by_server.count() >= 12, "{log}");
    assert_eq!(
        fs::read_to_string(volume.join("volume")).unwrap(),
        "written\n"
    );
    assert_eq!(state(&tree), before, "the directory has changed");
    rig.assert_clean();
}

#[test]
fn mistakes_with_directories_are_refused() {
    let parts = [PERICARP, Part::MkfsExt4, Part::Busybox];
    let Some(rig) = Rig::new("mistakes_with_directories_are_refused", &parts) else {
        return;
    };
    // As far as anybody looks before a run starts, with no modules for shares.
    let old = rig.scratch.path("assets");
    fs::create_dir_all(old.join("kernel/modules")).unwrap();
    fs::create_dir_all(old.join("guest/bin")).unwrap();
    for file in ["kernel/vmlinuz", "pericarp-agent", "guest/bin/crun"] {
        fs::write(old.join(file), "x").unwrap();
    }
    fs::write(old.join("kernel/modules/order"), "").unwrap();
    let pipe = rig.scratch.path("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let tree = rig.tree();
    let refused = |root: &Path, message: &str| {
        let line = ["--rootfs", root.to_str().unwrap(), "--assets"];
        let run = rig.run(
            &[&line[..], &[old.to_str().unwrap(), "--", "true"]].concat(),
            b"",
        );
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert_eq!(
            run.stderr.lines().next().unwrap(),
            format!("pericarp run: --rootfs{message}")
        );
        assert_eq!(rig.left_files(), Vec::<PathBuf>::new());
    };
    refused(
        &pipe,
        &format!(
            " '{}': is not a directory; name a directory",
            pipe.display()
        ),
    );
    refused(
        &tree,
        ": the guest's files have no 'kernel/modules/order-shares'; run `cargo xtask setup`, which \
         makes them, or `pericarp assets add`",
    );
}
