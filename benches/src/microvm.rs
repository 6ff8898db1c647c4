//! The peer of a pod's start: QEMU's microvm with virtiofsd and nothing else. Used by `pod-compare`
//! and `cri-compare`.
//!
//! It has no agent, no container, no network and no control groups: its first process mounts the
//! share, changes its root to it and becomes the program. So it is the least that a sandbox of that
//! kind could take.
//!
//! A microvm has no clock that a kernel can use without KVM's. Where KVM is not backed by hardware a
//! q35 with an emulated CPU stands for it, which is what ours runs on there, too.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pericarp_tests::guest::{Assets, emulated, initramfs};
use pericarp_tests::lab::Lab;
use pericarp_tests::parts::Part;
use pericarp_tests::scratch::Scratch;

use crate::Outcome;

/// What it is called in tables.
#[must_use]
pub fn name() -> &'static str {
    match Lab::is_here() {
        true => "qemu-microvm, virtiofsd",
        false => "qemu-q35, virtiofsd",
    }
}

/// Its memory, as QEMU is told; the other's in a comparison is the same.
pub const MEMORY: &str = "512M";
/// The longest that one start may take.
const LIMIT: Duration = Duration::from_secs(120);

/// One that can be started again and again.
#[derive(Debug)]
pub struct Microvm<'a> {
    socket: PathBuf,
    assets: &'a Assets,
    image: PathBuf,
    root: PathBuf,
    line: &'static str,
}

impl<'a> Microvm<'a> {
    /// Makes its image, and the directory that it shares.
    ///
    /// # Errors
    /// When a part is missing, or a file cannot be made.
    pub fn new(scratch: &Scratch, assets: &'a Assets, line: &'static str) -> Outcome<Self> {
        let script = format!(
            "mount -t virtiofs root /mnt\n\
             mount --move /dev /mnt/dev; mount --move /proc /mnt/proc\n\
             chroot /mnt /bin/busybox echo {line}"
        );
        Ok(Self {
            socket: scratch.path("share"),
            assets,
            image: initramfs(scratch, assets, &[], &script)?,
            root: root(scratch)?,
            line,
        })
    }

    /// The directory, which is a container's root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Starts it, on KVM where that is backed by hardware; the time to its line.
    ///
    /// # Errors
    /// When it ends without a word.
    pub fn start(&self) -> Outcome<Duration> {
        let _ = fs::remove_file(&self.socket);
        let mut server = Command::new(Part::Virtiofsd.find().ok_or("virtiofsd is missing")?);
        server
            .args(["--sandbox", "chroot", "--log-level", "error"])
            .arg("--socket-path")
            .arg(&self.socket)
            .arg("--shared-dir")
            .arg(&self.root)
            .stdin(Stdio::null());
        let mut qemu = self.qemu()?;
        let begun = Instant::now();
        let mut server = server.spawn()?;
        while !self.socket.exists() && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_micros(200));
        }
        let started = first_line(name(), self.line, &mut qemu, begun);
        // How it would end is its own affair: it is not waited for, and so is no part of this.
        let total = started.and_then(|(mut child, total)| {
            child.kill()?;
            child.wait()?;
            Ok(total)
        });
        let _ = server.kill();
        let _ = server.wait();
        total
    }

    fn qemu(&self) -> Outcome<Command> {
        let mut qemu = match Lab::is_here() {
            true => self.microvm()?,
            false => emulated(self.assets, &self.image, ""),
        };
        qemu.arg("-chardev")
            .arg(format!("socket,id=share,path={}", self.socket.display()))
            .args(["-device", "vhost-user-fs-pci,chardev=share,tag=root"]);
        Ok(qemu)
    }

    fn microvm(&self) -> Outcome<Command> {
        let mut qemu = Command::new(Part::QemuSystem.find().ok_or("QEMU is missing")?);
        let machine = "microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=off,isa-serial=on,\
                       memory-backend=mem";
        qemu.args(["-machine", machine, "-accel", "kvm", "-cpu", "host"])
            .args(["-smp", "1", "-m", MEMORY, "-nodefaults", "-no-user-config"])
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=mem,share=on,size={MEMORY}"
            ))
            .args(["-no-reboot", "-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(self.assets.kernel())
            .arg("-initrd")
            .arg(&self.image)
            .args(["-append", "console=ttyS0 quiet panic=-1 cryptomgr.notests"]);
        Ok(qemu)
    }
}

/// A directory that is a container's root.
fn root(scratch: &Scratch) -> Outcome<PathBuf> {
    let root = scratch.path("container");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = Part::Busybox.find().ok_or("busybox is missing")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    Ok(root)
}

/// Starts a program and waits for a line with this in it; the rest that it says is read by nobody.
///
/// # Errors
/// When it ends without.
pub fn first_line(
    name: &str,
    wanted: &str,
    command: &mut Command,
    begun: Instant,
) -> Outcome<(Child, Duration)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("it has no output")?;
    let mut out = BufReader::new(out);
    let mut line = Vec::new();
    while out.read_until(b'\n', &mut line)? > 0 {
        if String::from_utf8_lossy(&line).contains(wanted) {
            let total = begun.elapsed();
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
            return Ok((child, total));
        }
        line.clear();
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("{name} ended without a word of its container").into())
}
