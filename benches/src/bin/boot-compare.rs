//! `boot-compare`: how long a stock kernel takes from the start of its monitor to
//! the first line of user space, where KVM is backed by hardware: ours, QEMU's
//! machines and Cloud Hypervisor in turns, with the same kernel, initramfs, CPU
//! and memory.
//!
//! ```text
//! cargo xtask lab -- target/release/boot-compare --rounds 10
//! ```
//!
//! Cloud Hypervisor takes part if it is in the search path: once with the bzImage
//! that all others get, once with the kernel that it unpacks to, which spares the
//! guest that work as ours does, and once with that and memory that backends can
//! share, as ours is and as its own vhost-user devices need it.
//!
//! The raw numbers are the last line that it prints, since there is no place for a file
//! in the laboratory.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::laboratory::{millis, print_raw, race, range};
use pericarp_benches::table::median;
use pericarp_tests::guest::{Assets, pack};
use pericarp_tests::parts::{Part, beside_us, search_path};
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

/// What user space says first.
const LINE: &str = "user-space-is-there";
/// The longest that a boot may take.
const LIMIT: Duration = Duration::from_secs(120);
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests";
const MEMORY: &str = "512M";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Pericarp,
    Cloud,
    CloudUnpacked,
    CloudShared,
    Microvm,
    Q35,
}

const TARGETS: [(Target, &str); 6] = [
    (Target::Pericarp, "pericarp-vmm"),
    (Target::CloudShared, "cloud-hypervisor, shared"),
    (Target::CloudUnpacked, "cloud-hypervisor, unpacked"),
    (Target::Cloud, "cloud-hypervisor"),
    (Target::Microvm, "qemu-microvm"),
    (Target::Q35, "qemu-q35"),
];
/// What Cloud Hypervisor is called.
const CLOUD: &str = "cloud-hypervisor";
/// Where ours keeps what it unpacked, in the directory of a run.
const KERNELS: &str = "kernels";

/// One boot.
struct Boot {
    target: &'static str,
    round: usize,
    /// From the start of the program to the first line.
    total: Duration,
    /// Of it, until the guest was entered, where the monitor says.
    set_up: Option<Duration>,
    /// Of it, in the kernel, by its own clock, which begins a little after it does.
    kernel: Option<Duration>,
    /// KiB that are resident and not the guest's memory, where that can be told.
    resident: Option<u64>,
}

fn main() -> ExitCode {
    race("boot-compare", 10, compare)
}

fn compare(rounds: usize) -> Outcome<()> {
    let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
    let scratch = Scratch::new();
    let image = initramfs(&scratch)?;
    let mut boots = Vec::new();
    let mut targets = TARGETS.to_vec();
    if search_path(CLOUD).is_none() {
        println!("{CLOUD} is not in the search path and takes no part");
        targets.retain(|(target, _)| !target.is_cloud());
    }
    // The first boots of each are for the caches.
    for round in 0..=rounds {
        for &(target, name) in &targets {
            let boot = boot(target, name, round, &scratch, &assets.kernel(), &image)?;
            println!("round {round}: {name}: {:.0} ms", millis(boot.total));
            if round > 0 {
                boots.push(boot);
            }
        }
    }
    report(&targets, &boots);
    Ok(())
}

impl Target {
    fn is_cloud(self) -> bool {
        matches!(self, Self::Cloud | Self::CloudUnpacked | Self::CloudShared)
    }
}

/// The kernel that ours unpacked before: it comes first in each round.
fn unpacked(kernels: &Path) -> Outcome<PathBuf> {
    let kept = fs::read_dir(kernels)?.flatten().map(|entry| entry.path());
    let mut kept = kept.filter(|path| path.extension().is_some_and(|kind| kind == "elf"));
    Ok(kept.next().ok_or("pericarp-vmm has kept no kernel")?)
}

/// A first process that says so and switches off.
fn initramfs(scratch: &Scratch) -> Outcome<PathBuf> {
    let root = scratch.path("root");
    for dir in ["bin", "dev", "proc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy(
        Part::Busybox.find().ok_or("busybox is missing")?,
        root.join("bin/busybox"),
    )?;
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mount -t devtmpfs dev /dev\n\
         /bin/busybox mount -t proc proc /proc\n\
         read up rest </proc/uptime\n\
         echo {LINE} $up >/dev/console\n\
         /bin/busybox sleep 1\n\
         /bin/busybox poweroff -f\n"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    Ok(pack(scratch, &root)?)
}

fn command(target: Target, scratch: &Scratch, kernel: &Path, image: &Path) -> Outcome<Command> {
    if target == Target::Pericarp {
        let mut vmm = Command::new(beside_us().join("pericarp-vmm"));
        vmm.args(["--cpus", "1", "--memory", MEMORY, "--cmdline", PARAMETERS])
            .arg("--kernel")
            .arg(kernel)
            .arg("--initramfs")
            .arg(image)
            .arg("--kernel-cache")
            .arg(scratch.path(KERNELS))
            .arg("--control-path")
            .arg(scratch.path("control"));
        return Ok(vmm);
    }
    if target.is_cloud() {
        let mut vmm = Command::new(search_path(CLOUD).ok_or("it was there")?);
        vmm.arg("--kernel")
            .arg(match target {
                Target::Cloud => kernel.to_owned(),
                _ => unpacked(&scratch.path(KERNELS))?,
            })
            .arg("--initramfs")
            .arg(image)
            .args(["--cmdline", PARAMETERS, "--cpus", "boot=1"])
            .arg("--memory")
            .arg(match target {
                Target::CloudShared => format!("size={MEMORY},shared=on"),
                _ => format!("size={MEMORY}"),
            })
            .args(["--serial", "tty", "--console", "off"]);
        return Ok(vmm);
    }
    let machine = match target {
        Target::Microvm => "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on",
        _ => "q35,sata=off,smbus=off,usb=off,vmport=off,graphics=off",
    };
    let mut qemu = Command::new(Part::QemuSystem.find().ok_or("QEMU is missing")?);
    qemu.args(["-machine", machine, "-accel", "kvm", "-cpu", "host"])
        .args(["-smp", "1", "-m", MEMORY, "-nodefaults", "-no-user-config"])
        .args(["-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(image)
        .args(["-append", PARAMETERS]);
    Ok(qemu)
}

fn boot(
    target: Target,
    name: &'static str,
    round: usize,
    scratch: &Scratch,
    kernel: &Path,
    image: &Path,
) -> Outcome<Boot> {
    let control = scratch.path("control");
    let mut command = command(target, scratch, kernel, image)?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let begun = Instant::now();
    let mut child = command.spawn()?;
    let seen = child.stdout.take().map(|console| {
        let mut lines = BufReader::new(console).lines();
        let up = lines.find_map(|line| {
            let up = line.ok()?.split_once(LINE)?.1.trim().to_owned();
            Some(Duration::from_secs_f64(up.parse().ok()?))
        });
        (up, begun.elapsed(), lines)
    });
    let (total, kernel, resident, set_up) = match &seen {
        Some((Some(up), total, _)) => (
            *total,
            Some(*up),
            resident(&child, target),
            (target == Target::Pericarp)
                .then(|| set_up(&control))
                .flatten(),
        ),
        _ => {
            let _ = child.kill();
            return Err(format!("{name} did not boot").into());
        }
    };
    // What it still says is read, so that it can end.
    if let Some((_, _, lines)) = seen {
        lines.for_each(drop);
    }
    wait(&mut child);
    Ok(Boot {
        target: name,
        round,
        total,
        set_up,
        kernel,
        resident,
    })
}

fn wait(child: &mut Child) {
    let end = Instant::now() + LIMIT;
    while Instant::now() < end && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// When the guest was entered, as the monitor says.
fn set_up(control: &Path) -> Option<Duration> {
    let mut stream = UnixStream::connect(control).ok()?;
    writeln!(stream, r#"{{"op":"stats"}}"#).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    let stats: Value = serde_json::from_str(&line).ok()?;
    Some(Duration::from_micros(stats["entered-us"].as_u64()?))
}

/// KiB resident but for mappings of guest memory: ours is a file with that name;
/// QEMU's is the one anonymous mapping of its size.
fn resident(child: &Child, target: Target) -> Option<u64> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id())).ok()?;
    let mut guest = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Rss:"), Some(size)) => {
                let size: u64 = size.parse().ok()?;
                kib += if guest { 0 } else { size };
            }
            (Some("Size:"), Some(size)) if target != Target::Pericarp => {
                guest = size.parse::<u64>().ok()? == 512 << 10;
            }
            (Some(range), Some(_)) if range.contains('-') && !range.ends_with(':') => {
                guest = target == Target::Pericarp && line.contains("memfd:guest");
            }
            _ => {}
        }
    }
    Some(kib)
}

fn report(targets: &[(Target, &str)], boots: &[Boot]) {
    let of = |name: &str, value: &dyn Fn(&Boot) -> Option<f64>| -> Vec<f64> {
        let mine = boots.iter().filter(|boot| boot.target == name);
        mine.filter_map(value).collect()
    };
    let total = |name: &str| of(name, &|boot| Some(millis(boot.total)));
    let base = median(total("qemu-q35"));
    println!(
        "\n{:<28}{:>7}  {:>16}{:>8}{:>11}{:>11}{:>14}",
        "", "ms", "min .. max", "of q35", "set-up ms", "kernel ms", "resident KiB"
    );
    for (_, name) in targets {
        let totals = total(name);
        let set_up = median(of(name, &|boot| boot.set_up.map(millis)));
        let resident = median(of(name, &|boot| boot.resident.map(|kib| kib as f64)));
        let kernel = median(of(name, &|boot| boot.kernel.map(millis)));
        let set_up = if set_up.is_nan() {
            "-".to_owned()
        } else {
            format!("{set_up:.0}")
        };
        println!(
            "{name:<28}{:>7.0}  {:>16}{:>8.2}{set_up:>11}{kernel:>11.0}{resident:>14.0}",
            median(totals.clone()),
            range(&totals),
            median(totals) / base,
        );
    }
    let raw = |boot: &Boot| {
        json!({
            "target": boot.target,
            "round": boot.round,
            "total_ms": millis(boot.total),
            "set_up_ms": boot.set_up.map(millis),
            "kernel_ms": boot.kernel.map(millis),
            "resident_kib": boot.resident,
        })
    };
    let results: Vec<Value> = boots.iter().map(raw).collect();
    print_raw(&results);
}
