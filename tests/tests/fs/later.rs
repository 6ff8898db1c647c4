//! What is mounted below a shared directory while it is served: the root file
//! systems and volumes of a pod's containers come that way.

use std::fs;

use pericarp_tests::fs::wire::posix::{O_RDONLY, S_IFCHR};
use pericarp_tests::fs::{Options, Server, refused};
use pericarp_tests::parts::Part;
use pericarp_tests::process::command;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

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

#[test]
fn a_directory_that_is_no_shared_mount_is_refused() {
    let Some(program) = Part::Ours("pericarp-fs").find() else {
        return;
    };
    let output = command(&program)
        .args([
            "--socket-path",
            "/tmp/pericarp-later-mounts.sock",
            "--tag",
            "t",
            "--later-mounts",
        ])
        .args(["--shared-dir", "/proc/self"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("make it a shared mount"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
