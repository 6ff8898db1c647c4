//! What is mounted below a shared directory while it is served: the root file
//! systems and volumes of a pod's containers come that way.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::Setup;
use pericarp_tests::fs::wire::posix::{O_RDONLY, O_RDWR, S_IFCHR};
use pericarp_tests::fs::wire::{Body, ENTRY, ROOT, op};
use pericarp_tests::fs::{Client, Options, Server, refused};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::Part;
use pericarp_tests::process::command;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind, move_mount,
    open_tree, unmount,
};

fn options() -> Options {
    Options {
        more: &["--later-mounts"],
        shared: true,
        ..Options::default()
    }
}

/// Mounts of the server's namespace: where, and whether it tells others of what happens there.
fn mounts(pid: i32) -> Vec<(String, bool)> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let line = |line: &str| {
        let at = line.split(' ').nth(4).unwrap().to_owned();
        (at, line.contains(" shared:"))
    };
    text.lines().map(line).collect()
}

#[test]
fn mounts_come_and_go_while_a_directory_is_served() {
    let test = "mounts_come_and_go_while_a_directory_is_served";
    let Some(mut server) = Server::for_test(test, &[], options()).filter(Server::is_ours) else {
        return;
    };
    let mut c = server.client().unwrap();
    fs::create_dir_all(server.path("web/rootfs")).unwrap();
    fs::write(server.path("web/hosts"), b"").unwrap();
    let below = c.walk("web/rootfs").unwrap();
    refused(c.lookup(below.node, "file"), &[Errno::NOENT]).unwrap();

    let place = server.path("web/rootfs");
    mount("tmpfs", &place, "tmpfs", MountFlags::NODEV, c"mode=755").unwrap();
    fs::write(place.join("file"), b"of the image").unwrap();
    let outer = server.scratch.path("outer");
    fs::write(&outer, b"127.0.0.1 localhost").unwrap();
    mount_bind(&outer, server.path("web/hosts")).unwrap();

    let file = c.walk("web/rootfs/file").unwrap();
    let fh = c.open(file.node, O_RDONLY).unwrap();
    assert_eq!(c.read(file.node, fh, 0, 100).unwrap(), b"of the image");
    let hosts = c.walk("web/hosts").unwrap();
    let hosts_fh = c.open(hosts.node, O_RDONLY).unwrap();
    assert_eq!(c.read(hosts.node, hosts_fh, 0, 9).unwrap(), b"127.0.0.1");
    let top = c.walk("web/rootfs").unwrap();
    c.mkdir(top.node, "made", 0o755).unwrap();
    assert!(place.join("made").is_dir());
    // Whoever mounts here decides about devices, so the server makes none.
    let device = c.mknod(top.node, "disk", S_IFCHR | 0o600, 0x0103);
    refused(device, &[Errno::PERM]).unwrap();

    // A file that is open there keeps nobody from taking it away.
    unmount(&place, UnmountFlags::DETACH).unwrap();
    unmount(server.path("web/hosts"), UnmountFlags::DETACH).unwrap();
    let below = c.walk("web/rootfs").unwrap();
    refused(c.lookup(below.node, "file"), &[Errno::NOENT]).unwrap();
    assert_eq!(c.walk("web/hosts").unwrap().attr.size, 0);
    assert_eq!(c.read(file.node, fh, 0, 100).unwrap(), b"of the image");
}

/// A pod's file server that is killed and started again, while the host mounts more.
#[test]
fn a_successor_sees_what_is_mounted_by_then_and_later() {
    let test = "a_successor_sees_what_is_mounted_by_then_and_later";
    let options = Options {
        state: true,
        ..options()
    };
    let Some(mut server) = Server::for_test(test, &[], options).filter(Server::is_ours) else {
        return;
    };
    let setup = Setup {
        inflight: true,
        limit: Duration::from_secs(20),
        ..Client::setup()
    };
    let mut c = server.connect(&setup).unwrap();
    c.init().unwrap();
    fs::create_dir(server.path("web")).unwrap();
    let place = server.path("web");
    mount("tmpfs", &place, "tmpfs", MountFlags::NODEV, c"mode=755").unwrap();
    fs::create_dir(place.join("dir")).unwrap();
    fs::write(place.join("dir/file"), b"of the image").unwrap();
    let (dir, file) = (c.walk("web/dir").unwrap(), c.walk("web/dir/file").unwrap());
    let fh = c.open(file.node, O_RDWR).unwrap();
    let listing = c.opendir(dir.node).unwrap();
    let mut made = 0;
    for round in 1..=3 {
        // Also at the moment in which it gives up all other mounts of the host's.
        let (begin, over) = (made, AtomicBool::new(false));
        let more = |n: usize| place.join(n.to_string());
        made = thread::scope(|scope| {
            let mounting = scope.spawn(|| {
                let mut n = begin;
                while !over.load(Ordering::Relaxed) && n < begin + 2000 {
                    fs::create_dir(more(n)).unwrap();
                    mount("tmpfs", more(n), "tmpfs", MountFlags::NODEV, c"").unwrap();
                    fs::write(more(n).join("in"), b"").unwrap();
                    n += 1;
                }
                n
            });
            server.succeed();
            c.reconnect(&server.socket()).unwrap();
            over.store(true, Ordering::Relaxed);
            mounting.join().unwrap()
        });
        assert_eq!(c.read(file.node, fh, 0, 100).unwrap(), b"of the image");
        assert_eq!(c.lookup(dir.node, "file").unwrap().node, file.node);
        assert_eq!(c.getattr(dir.node).unwrap().ino, dir.attr.ino);
        assert!(!c.readdir(dir.node, listing, 0, 4096).unwrap().is_empty());
        let web = c.walk("web").unwrap();
        for n in begin..made {
            let at = c.lookup(web.node, &n.to_string()).unwrap();
            let seen = c.lookup(at.node, "in");
            assert!(seen.is_ok(), "{n} of {begin}..{made} in round {round}");
        }
    }
    eprintln!("{test}: {made} mounts");
    unmount(&place, UnmountFlags::DETACH).unwrap();
    let below = c.walk("web").unwrap();
    refused(c.lookup(below.node, "dir"), &[Errno::NOENT]).unwrap();
}

/// Looks a name up. Its node, and for how many nanoseconds name and attributes are kept.
fn kept(c: &mut Client, parent: u64, name: &str) -> (u64, u128, u128) {
    let room = u32::try_from(ENTRY).unwrap();
    let body = c.ask(op::LOOKUP, parent, Body::new().name(name), room);
    let body = body.unwrap();
    let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
    let half = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    let time = |seconds, rest| u128::from(word(seconds)) * 1_000_000_000 + u128::from(half(rest));
    (word(0), time(16, 32), time(24, 36))
}

fn known(server: &Server) -> u64 {
    server.held().unwrap().unwrap()["nodes"].as_u64().unwrap()
}

#[test]
fn names_of_other_mounts_are_not_kept_and_what_is_forgotten_can_be_unmounted() {
    let test = "names_of_other_mounts_are_not_kept_and_what_is_forgotten_can_be_unmounted";
    let options = Options {
        cache: "auto",
        control: true,
        ..options()
    };
    let Some(mut server) = Server::for_test(test, &[], options).filter(Server::is_ours) else {
        return;
    };
    let mut c = server.client().unwrap();
    let (place, hosts) = (server.path("rootfs"), server.path("hosts"));
    fs::create_dir(&place).unwrap();
    for file in [&hosts, &server.path("plain"), &server.scratch.path("outer")] {
        fs::write(file, b"").unwrap();
    }
    mount("tmpfs", &place, "tmpfs", MountFlags::NODEV, c"mode=755").unwrap();
    fs::write(place.join("file"), b"x").unwrap();
    mount_bind(server.scratch.path("outer"), &hosts).unwrap();

    let second = 1_000_000_000;
    let (plain, name, attributes) = kept(&mut c, ROOT, "plain");
    assert_eq!((name, attributes), (second, second));
    let (bound, name, attributes) = kept(&mut c, ROOT, "hosts");
    assert_eq!((name, attributes), (0, second));
    let (root, name, attributes) = kept(&mut c, ROOT, "rootfs");
    assert_eq!((name, attributes), (0, second));
    let (file, name, attributes) = kept(&mut c, root, "file");
    assert_eq!((name, attributes), (second, second));

    // Known to the guest, it is in use.
    assert_eq!(known(&server), 4);
    let plainly = UnmountFlags::empty();
    assert_eq!(unmount(&place, plainly), Err(Errno::BUSY));
    assert_eq!(unmount(&hosts, plainly), Err(Errno::BUSY));
    c.batch_forget(&[(file, 1), (root, 1), (bound, 1)]).unwrap();
    assert_eq!(known(&server), 1);
    unmount(&place, plainly).unwrap();
    unmount(&hosts, plainly).unwrap();
    assert_eq!(c.getattr(plain).unwrap().size, 0);
}

/// The same by Linux, which forgets of its own accord.
#[test]
fn a_guest_lets_go_of_a_mount_that_it_has_left() {
    const WORK: &str = r#"
[ "$(cat rootfs/file)" = inner ]
grep -q ' /mnt/work/share/rootfs virtiofs ' /proc/mounts
ls -l rootfs hosts >/dev/null
[ "$(cat hosts)" = outer ]
umount rootfs
: >left
i=0
while [ ! -e gone ]; do sleep 0.2; i=$((i + 1)); [ $i -lt 100 ]; done
[ ! -e rootfs/file ]
[ ! -s hosts ]
"#;
    let test = "a_guest_lets_go_of_a_mount_that_it_has_left";
    let options = Options {
        cache: "auto",
        control: true,
        ..options()
    };
    let server = Server::for_test(test, &[Part::UserModeLinux], options);
    let Some(mut server) = server.filter(Server::is_ours) else {
        return;
    };
    // Confined before it serves: it hears of no mount that is made on the way.
    drop(server.client().unwrap());
    let (place, hosts) = (server.path("rootfs"), server.path("hosts"));
    fs::create_dir(&place).unwrap();
    fs::write(&hosts, b"").unwrap();
    fs::write(server.scratch.path("outer"), b"outer\n").unwrap();
    mount("tmpfs", &place, "tmpfs", MountFlags::NODEV, c"mode=755").unwrap();
    fs::write(place.join("file"), b"inner\n").unwrap();
    mount_bind(server.scratch.path("outer"), &hosts).unwrap();
    thread::scope(|scope| {
        let guest = scope.spawn(|| crate::settings::linux(server.socket(), WORK));
        let left = poll(Duration::from_secs(120), || {
            (server.path("left").exists() || guest.is_finished()).then_some(())
        });
        left.unwrap();
        // Without a word from here, and not by force.
        let gone = |at| {
            let mut last = Ok(());
            poll(Duration::from_secs(5), || {
                last = unmount(at, UnmountFlags::empty());
                last.is_ok().then_some(())
            });
            last
        };
        let outcome = (gone(&place), gone(&hosts));
        fs::write(server.path("gone"), b"").unwrap();
        guest.join().unwrap();
        assert_eq!(outcome, (Ok(()), Ok(())));
    });
}

/// What is mounted later may be another machine's, whose files are written back when they are
/// closed; of others no close is told.
#[test]
fn closes_are_told_of_files_that_are_served_from_elsewhere() {
    const NO_FLUSH: u8 = 1 << 5;
    let test = "closes_are_told_of_files_that_are_served_from_elsewhere";
    if !fuse::usable(test) {
        return;
    }
    let Some(mut server) = Server::for_test(test, &[], options()).filter(Server::is_ours) else {
        return;
    };
    let mut c = server.client().unwrap();
    fs::write(server.path("file"), b"x").unwrap();
    let flags = |c: &mut Client, path: &str| {
        let node = c.walk(path).unwrap().node;
        let opened = c.ask(op::OPEN, node, Body::new().u32(O_RDWR).u32(0), 16);
        let opened = opened.unwrap();
        let fh = u64::from_le_bytes(opened[..8].try_into().unwrap());
        c.flush(node, fh).unwrap();
        c.release(node, fh).unwrap();
        opened[8] & NO_FLUSH
    };
    assert_eq!(flags(&mut c, "file"), NO_FLUSH);
    // Such a mount is its thread's, from where it is brought here.
    let (place, sub) = (server.scratch.path("store"), server.path("sub"));
    fs::create_dir(&sub).unwrap();
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let made = thread::spawn(move || {
        let store = Fuse::mount_share(&place, vec![7; 1 << 16]).unwrap();
        (store, open_tree(CWD, &place, clone).unwrap())
    });
    let (_store, tree) = made.join().unwrap();
    let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, &sub, whole).unwrap();
    drop(tree);
    assert_eq!(flags(&mut c, "sub/disk"), 0);
    assert_eq!(flags(&mut c, "file"), NO_FLUSH);
    unmount(&sub, UnmountFlags::DETACH).unwrap();
}

#[test]
fn nothing_else_of_the_host_is_followed() {
    let test = "nothing_else_of_the_host_is_followed";
    let Some(mut server) = Server::for_test(test, &[], options()).filter(Server::is_ours) else {
        return;
    };
    // Confined before it serves.
    server.client().unwrap();
    let there = mounts(server.pid());
    let mut names: Vec<&str> = there.iter().map(|(at, _)| at.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["/", "/0"], "{there:?}");
    assert!(there.iter().all(|(_, shared)| !shared), "{there:?}");
    fs::create_dir(server.path("a")).unwrap();
    mount("tmpfs", server.path("a"), "tmpfs", MountFlags::NODEV, c"").unwrap();
    assert_eq!(mounts(server.pid()).len(), 3);
    fs::create_dir(server.scratch.path("beside")).unwrap();
    let beside = server.scratch.path("beside");
    mount("tmpfs", &beside, "tmpfs", MountFlags::NODEV, c"").unwrap();
    let count = mounts(server.pid()).len();
    unmount(&beside, UnmountFlags::DETACH).unwrap();
    assert_eq!(count, 3);
}

/// What the program says to options that it refuses.
fn said_to(more: &[&str]) -> Option<String> {
    let program = Part::Ours("pericarp-fs").find()?;
    let output = command(&program)
        .args(["--socket-path", "/tmp/pericarp-later-mounts.sock"])
        .args(["--tag", "t", "--later-mounts", "--shared-dir", "/proc/self"])
        .args(more)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
    Some(said)
}

#[test]
fn a_directory_that_is_no_shared_mount_is_refused() {
    if let Some(said) = said_to(&[]) {
        assert!(said.contains("make it a shared mount"), "{said}");
    }
}

#[test]
fn what_is_mounted_later_is_not_made_read_only() {
    if let Some(said) = said_to(&["--read-only"]) {
        assert!(said.contains("--later-mounts: "), "{said}");
        assert!(said.contains("leave one of them out"), "{said}");
    }
}
