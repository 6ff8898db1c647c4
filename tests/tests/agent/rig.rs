//! A machine that runs the agent: QEMU with `pericarp-vsock` and `pericarp-block`, the initramfs
//! with crun in it, and disks made for the test.
//!
//! Made by `main`, once for a whole list of checks, because a boot takes seconds on an emulated
//! CPU.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pericarp_api::Hello;
use pericarp_api::agent::ConfigureRequest;
use pericarp_api::host::{Client, Guest};
use pericarp_tests::bounded::poll;
use pericarp_tests::guest::Assets;
use pericarp_tests::parts::{Part, have, search_path, skip};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use ttrpc::context::{self, Context};

pub(crate) const MIB: u64 = 1 << 20;
/// Longer than anything here takes on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// Of the whole machine.
const LIFETIME: Duration = Duration::from_secs(400);
/// The agent as `xtask` builds it; the tests can be pointed to another.
const AGENT: &str = "PERICARP_AGENT";
const TOOLS: &[&str] = &[
    "cat", "chmod", "dd", "echo", "grep", "head", "id", "kill", "ls", "mkdir", "md5sum", "mount",
    "nc", "nproc", "printf", "ps", "pwd", "rm", "setsid", "sh", "sleep", "stty", "sync", "tail",
    "test", "touch", "tr", "true", "tty", "uname", "wc", "yes",
];

/// The machine and what serves it. Ends with its value.
pub(crate) struct Machine {
    qemu: Process,
    vsock: Process,
    block: Process,
    /// Open as long as the agent lives.
    pub(crate) hello: UnixStream,
    pub(crate) greeting: Hello,
    pub(crate) guest: Guest,
    pub(crate) scratch: Scratch,
}

/// A disk of the machine.
pub(crate) struct Disk {
    pub(crate) serial: &'static str,
    pub(crate) file: PathBuf,
    pub(crate) read_only: bool,
}

/// A limit on one request.
pub(crate) fn limited() -> Context {
    context::with_duration(LIMIT)
}

/// True when everything the machine needs is there.
pub(crate) fn can_run(test: &str) -> bool {
    let parts = [
        Part::Ours("pericarp-vsock"),
        Part::PERICARP_BLOCK,
        Part::QemuSystem,
        Part::MkfsExt4,
        Part::Busybox,
    ];
    if !have(test, &parts) {
        return false;
    }
    let missing = [
        (search_path("crun"), "crun (install: apt package crun)"),
        (
            search_path("mkfs.erofs"),
            "mkfs.erofs (install: apt package erofs-utils)",
        ),
        (
            agent(),
            "pericarp-agent, static (make it: cargo xtask setup)",
        ),
        (
            Assets::find().map(|a| a.kernel()),
            "the guest's kernel (make it: cargo xtask setup)",
        ),
    ];
    match missing.iter().find(|(found, _)| found.is_none()) {
        Some((_, what)) => skip(test, &format!("{what} missing")),
        None => true,
    }
}

fn agent() -> Option<PathBuf> {
    let named = std::env::var_os(AGENT).map(PathBuf::from);
    let assets = Assets::find()?.kernel();
    let beside = assets.parent()?.parent()?.join("pericarp-agent");
    named
        .into_iter()
        .chain([beside])
        .find(|path| path.is_file())
}

impl Machine {
    /// Boots, with this at the end of the kernel's command line; returns when the agent has greeted.
    pub(crate) fn boot(scratch: Scratch, disks: &[Disk], cmdline: &str) -> Self {
        let initramfs = initramfs(&scratch);
        let (uds, front) = (scratch.path("vsock"), scratch.path("vsock.front"));
        let hello = UnixListener::bind(Guest::hello_socket(&uds)).unwrap();
        let mut vsock = command(&Part::Ours("pericarp-vsock").find().unwrap());
        vsock.arg("--socket-path").arg(&front);
        vsock
            .arg("--uds-path")
            .arg(&uds)
            .args(["--guest-cid", "42"]);
        let vsock = Process::start(&mut vsock, LIFETIME).unwrap();
        let mut block = command(&Part::PERICARP_BLOCK.find().unwrap());
        for disk in disks {
            let socket = scratch.path(disk.serial);
            block.arg("--device").arg(format!(
                "id={0},serial={0},socket={1},file={2},read-only={3}",
                disk.serial,
                socket.display(),
                disk.file.display(),
                if disk.read_only { "on" } else { "off" },
            ));
        }
        let block = Process::start(&mut block, LIFETIME).unwrap();
        let sockets = disks
            .iter()
            .map(|disk| scratch.path(disk.serial))
            .chain([front.clone()]);
        for socket in sockets {
            let there = poll(LIMIT, || socket.exists().then_some(()));
            let said = (block.output().last(5), vsock.output().last(5));
            assert!(there.is_some(), "{} is missing: {said:?}", socket.display());
        }

        let began = Instant::now();
        let mut qemu = Process::start(
            &mut qemu(&initramfs, cmdline, &front, &scratch, disks),
            LIFETIME,
        )
        .unwrap();
        hello.set_nonblocking(true).unwrap();
        let connection = poll(LIMIT, || {
            hello.accept().ok().or_else(|| {
                qemu.ended()
                    .map(|_| panic!("QEMU {}: {}", qemu.epitaph(), qemu.output().last(40)))
            })
        });
        let Some((mut hello, _)) = connection else {
            panic!("no greeting:\n{}", qemu.output().last(60));
        };
        hello.set_nonblocking(false).unwrap();
        hello.set_read_timeout(Some(LIMIT)).unwrap();
        let greeting = Hello::read(&mut hello).unwrap();
        println!("greeted after {:?}: {greeting:?}", began.elapsed());
        Self {
            qemu,
            vsock,
            block,
            hello,
            greeting,
            guest: Guest::new(uds),
            scratch,
        }
    }

    /// A client for the moment.
    pub(crate) fn client(&self) -> Client {
        self.guest
            .client()
            .unwrap_or_else(|error| panic!("{error}\n{}", self.console()))
    }

    /// The first request of every conversation.
    pub(crate) fn configure(&self, scratch_disk: &str) {
        let request = ConfigureRequest {
            hostname: "pod-1".into(),
            scratch_disk: scratch_disk.into(),
            ..ConfigureRequest::default()
        };
        self.client().configure(limited(), &request).unwrap();
    }

    /// The last lines of the guest's console, and of the sidecars.
    pub(crate) fn console(&self) -> String {
        format!(
            "console:\n{}\nvsock: {}\nblock: {}",
            self.qemu.output().last(60),
            self.vsock.output().last(10),
            self.block.output().last(10)
        )
    }

    /// Waits until the machine has switched itself off.
    pub(crate) fn wait_off(&mut self) {
        let ended = self.qemu.wait(LIMIT);
        assert!(ended.is_some(), "the machine runs on: {}", self.console());
        assert!(ended.unwrap().success(), "{}", self.console());
    }
}

/// The command line of `vmm/hypervisor`, with the vsock device.
fn qemu(
    initramfs: &Path,
    cmdline: &str,
    vsock: &Path,
    scratch: &Scratch,
    disks: &[Disk],
) -> Command {
    let mut command = command(&Part::QemuSystem.find().unwrap());
    command
        .args([
            "-machine",
            "q35,memory-backend=mem,sata=off,smbus=off,usb=off,graphics=off",
        ])
        .args([
            "-accel",
            // Two emulated CPUs at a time can meet a kernel that patches itself
            // half way: int3 in the middle of nowhere.
            "tcg,thread=single",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "512M",
        ])
        .args(["-object", "memory-backend-memfd,id=mem,share=on,size=512M"])
        .arg("-kernel")
        .arg(Assets::find().unwrap().kernel())
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 no_timer_check cryptomgr.notests quiet panic=-1 {cmdline}"
        ))
        .args([
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ])
        .arg("-chardev")
        .arg(format!("socket,id=vsock0,path={}", vsock.display()))
        .args(["-device", "vhost-user-vsock-pci,chardev=vsock0"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-monitor", "none"]);
    for disk in disks {
        let serial = disk.serial;
        command
            .arg("-chardev")
            .arg(format!(
                "socket,id={serial},path={}",
                scratch.path(serial).display()
            ))
            .arg("-device")
            .arg(format!("vhost-user-blk-pci,chardev={serial},num-queues=1"));
    }
    command
}

/// What the kernel unpacks: the agent, the modules, crun and its libraries.
fn initramfs(scratch: &Scratch) -> PathBuf {
    let root = scratch.path("initramfs.d");
    let modules = root.join("modules");
    fs::create_dir_all(&modules).unwrap();
    fs::create_dir_all(root.join("bin")).unwrap();
    put(&agent().unwrap(), &root.join("init"), 0o755);
    let kernel = Assets::find().unwrap().kernel();
    let from = kernel.with_file_name("modules");
    let order = fs::read_to_string(from.join("order")).unwrap();
    for name in order.lines() {
        put(&from.join(name), &modules.join(name), 0o444);
    }
    fs::write(modules.join("order"), order).unwrap();
    let crun = search_path("crun").unwrap();
    put(&crun, &root.join("bin/crun"), 0o755);
    let listed = Command::new("ldd").arg(&crun).output().unwrap();
    let libraries: BTreeSet<PathBuf> = String::from_utf8_lossy(&listed.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect();
    for library in libraries {
        let place = root.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        put(&library, &place, 0o755);
    }
    let image = scratch.path("initramfs");
    let pack = "cd \"$0\" && find . | busybox cpio -o -H newc >\"$1\" 2>/dev/null";
    run(Command::new("sh").args(["-c", pack]).arg(&root).arg(&image));
    fs::remove_dir_all(&root).unwrap();
    image
}

fn put(from: &Path, to: &Path, mode: u32) {
    fs::copy(from, to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// A root with busybox and two users, as an erofs image and as an ext4 one.
pub(crate) fn make_roots(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let tree = scratch.path("tree");
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    put(
        &Part::Busybox.find().unwrap(),
        &tree.join("bin/busybox"),
        0o755,
    );
    for tool in TOOLS {
        symlink("busybox", tree.join("bin").join(tool)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/tmp:/bin/sh\n";
    fs::write(tree.join("etc/passwd"), passwd).unwrap();
    fs::write(
        tree.join("etc/group"),
        "root:x:0:\nweb:x:33:\nlog:x:4:web\n",
    )
    .unwrap();
    fs::write(tree.join("etc/not-executable"), "text").unwrap();
    for (name, text) in [("no-format", "text"), ("no-interpreter", "#!/nowhere\n")] {
        fs::write(tree.join("etc").join(name), text).unwrap();
        fs::set_permissions(
            tree.join("etc").join(name),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
    }
    let erofs = scratch.path("root.erofs");
    let mkfs = search_path("mkfs.erofs").unwrap();
    run(Command::new(mkfs)
        .args(["-zlz4", "--all-root"])
        .args([&erofs, &tree]));
    let ext4 = ext4(scratch, "root.ext4", 24 * MIB, Some(&tree));
    fs::remove_dir_all(tree).unwrap();
    (erofs, ext4)
}

/// An ext4 image.
pub(crate) fn ext4(scratch: &Scratch, name: &str, size: u64, tree: Option<&Path>) -> PathBuf {
    let image = scratch.sparse(name, size);
    let mut mkfs = Command::new(Part::MkfsExt4.find().unwrap());
    mkfs.args(["-q", "-F", "-E", "root_owner=0:0"]);
    if let Some(tree) = tree {
        mkfs.arg("-d").arg(tree);
    }
    run(mkfs.arg(&image));
    image
}
