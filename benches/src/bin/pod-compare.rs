//! `pod-compare`: how long it takes from the start of everything that a pod needs to the first
//! line of the program in its container, where KVM is backed by hardware: `pericarp run` in
//! a machine, runc from the same program and the same directory, and QEMU's microvm
//! with virtiofsd and that directory, in turns.
//!
//! ```text
//! cargo xtask lab -- target/release/pod-compare --rounds 10
//! ```
//!
//! What stands for microvm has no agent, no container and no control groups: its first process
//! mounts the share, changes its root to it and becomes the program. So it is the least that a
//! sandbox of that kind could take, and more is asked of ours.
//!
//! The raw numbers are the last line that it prints, since there is no place for a file
//! in the laboratory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::laboratory::{millis, print_raw, race, range};
use pericarp_benches::table::median;
use pericarp_tests::guest::{Assets, initramfs};
use pericarp_tests::parts::{Part, beside_us};
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

/// What the program says.
const LINE: &str = "the-container-is-there";
/// The longest that one start may take.
const LIMIT: Duration = Duration::from_secs(120);
const MEMORY: &str = "512M";
const RUNC: &str = "runc";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Machine,
    Microvm,
    Runc,
}

const TARGETS: [(Target, &str); 3] = [
    (Target::Machine, "pericarp run"),
    (Target::Microvm, "qemu-microvm, virtiofsd"),
    (Target::Runc, "runc"),
];

/// One start.
struct Start {
    target: &'static str,
    round: usize,
    /// To the first line.
    total: Duration,
    /// From there until all of it has ended, where that is its own doing.
    end: Option<Duration>,
    /// What ours says of its phases, in ms.
    phases: BTreeMap<String, f64>,
}

fn main() -> ExitCode {
    race("pod-compare", 10, compare)
}

fn compare(rounds: usize) -> Outcome<()> {
    let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
    let scratch = Scratch::new();
    let root = root(&scratch)?;
    let script = format!(
        "mount -t virtiofs root /mnt\n\
         mount --move /dev /mnt/dev; mount --move /proc /mnt/proc\n\
         chroot /mnt /bin/busybox echo {LINE}"
    );
    let image = initramfs(&scratch, &assets, &[], &script)?;
    let bundle = bundle(&scratch, &root)?;
    let mut starts = Vec::new();
    // The first starts of each are for the caches.
    for round in 0..=rounds {
        for (target, name) in TARGETS {
            let start = match target {
                Target::Machine => ours(name, round, &scratch, &assets, &root)?,
                Target::Microvm => microvm(name, round, &scratch, &assets, &image, &root)?,
                Target::Runc => runc(name, round, &bundle)?,
            };
            println!("round {round}: {name}: {:.0} ms", millis(start.total));
            if round > 0 {
                starts.push(start);
            }
        }
    }
    report(&starts);
    Ok(())
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

/// What runc starts: as its own example, with our program and directory.
fn bundle(scratch: &Scratch, root: &Path) -> Outcome<PathBuf> {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        // A laboratory has none.
        let groups = ["-t", "cgroup2", "none", "/sys/fs/cgroup"];
        let mounted = Command::new("mount").args(groups).status()?;
        mounted
            .success()
            .then_some(())
            .ok_or("control groups cannot be mounted")?;
    }
    let bundle = scratch.path("bundle");
    fs::create_dir_all(&bundle)?;
    let made = Command::new(RUNC)
        .arg("spec")
        .current_dir(&bundle)
        .status()?;
    made.success()
        .then_some(())
        .ok_or("runc makes no example")?;
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(["/bin/busybox", "echo", LINE]);
    config["root"]["path"] = root.to_string_lossy().into();
    fs::write(file, config.to_string())?;
    Ok(bundle)
}

fn runc(name: &'static str, round: usize, bundle: &Path) -> Outcome<Start> {
    let mut command = Command::new(RUNC);
    command.arg("--root").arg(bundle.join("state"));
    // The laboratory's root is one by chroot, which cannot be exchanged.
    command.args(["run", "--no-pivot", "container"]);
    command.current_dir(bundle);
    let begun = Instant::now();
    let (mut child, total) = first_line(name, &mut command, begun)?;
    wait(name, &mut child)?;
    Ok(Start {
        target: name,
        round,
        total,
        end: Some(begun.elapsed() - total),
        phases: BTreeMap::new(),
    })
}

fn ours(
    name: &'static str,
    round: usize,
    scratch: &Scratch,
    assets: &Assets,
    root: &Path,
) -> Outcome<Start> {
    let mut command = Command::new(beside_us().join("pericarp"));
    command
        .args(["run", "--json", "--rootfs"])
        .arg(root)
        .args(["--", "/bin/busybox", "echo", LINE])
        .env("PERICARP_ASSETS", assets.dir())
        .env("HOME", scratch.dir())
        .stderr(Stdio::piped());
    let begun = Instant::now();
    let (mut child, total) = first_line(name, &mut command, begun)?;
    let mut said = String::new();
    if let Some(mut words) = child.stderr.take() {
        words.read_to_string(&mut said)?;
    }
    wait(name, &mut child)?;
    let end = said.lines().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line["event"] == "end").then_some(line)
    });
    let phases = end.as_ref().and_then(|end| end["phases_ms"].as_object());
    let phases = phases
        .into_iter()
        .flatten()
        .map(|(name, ms)| (name.clone(), ms.as_f64().unwrap_or(f64::NAN)))
        .collect();
    Ok(Start {
        target: name,
        round,
        total,
        end: Some(begun.elapsed() - total),
        phases,
    })
}

fn microvm(
    name: &'static str,
    round: usize,
    scratch: &Scratch,
    assets: &Assets,
    image: &Path,
    root: &Path,
) -> Outcome<Start> {
    let socket = scratch.path("share");
    let _ = fs::remove_file(&socket);
    let mut server = Command::new(Part::Virtiofsd.find().ok_or("virtiofsd is missing")?);
    server
        .args(["--sandbox", "chroot", "--log-level", "error"])
        .arg("--socket-path")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(root)
        .stdin(Stdio::null());
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
        .arg("-chardev")
        .arg(format!("socket,id=share,path={}", socket.display()))
        .args(["-device", "vhost-user-fs-pci,chardev=share,tag=root"])
        .arg("-kernel")
        .arg(assets.kernel())
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS0 quiet panic=-1 cryptomgr.notests"]);
    let begun = Instant::now();
    let mut server = server.spawn()?;
    while !socket.exists() && begun.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_micros(200));
    }
    let started = first_line(name, &mut qemu, begun);
    // How it would end is its own affair: it is not waited for, and so is no part of this.
    let total = started.and_then(|(mut child, total)| {
        child.kill()?;
        child.wait()?;
        Ok(total)
    });
    let _ = server.kill();
    let _ = server.wait();
    Ok(Start {
        target: name,
        round,
        total: total?,
        end: None,
        phases: BTreeMap::new(),
    })
}

/// Starts a program and waits for the line; the rest that it says is read by nobody.
fn first_line(name: &str, command: &mut Command, begun: Instant) -> Outcome<(Child, Duration)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("it has no output")?;
    let mut out = BufReader::new(out);
    let mut line = Vec::new();
    while out.read_until(b'\n', &mut line)? > 0 {
        if String::from_utf8_lossy(&line).contains(LINE) {
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

fn wait(name: &str, child: &mut Child) -> Outcome<()> {
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!("{name} did not end").into())
}

fn report(starts: &[Start]) {
    let of = |name: &str, value: &dyn Fn(&Start) -> f64| -> Vec<f64> {
        let mine = starts.iter().filter(|start| start.target == name);
        mine.map(value).collect()
    };
    let total = |name: &str| of(name, &|start| millis(start.total));
    let base = median(total(TARGETS[1].1));
    println!(
        "\n{:<26}{:>8}  {:>16}{:>12}{:>10}",
        "", "ms", "min .. max", "of microvm", "end ms"
    );
    for (_, name) in TARGETS {
        let totals = total(name);
        let end = median(of(name, &|start| start.end.map_or(f64::NAN, millis)));
        println!(
            "{name:<26}{:>8.0}  {:>16}{:>12.2}{:>10}",
            median(totals.clone()),
            range(&totals),
            median(totals) / base,
            if end.is_nan() {
                "-".into()
            } else {
                format!("{end:.0}")
            },
        );
    }
    let mine = starts.iter().filter(|start| start.target == TARGETS[0].1);
    let mut phases: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (phase, ms) in mine.flat_map(|start| &start.phases) {
        phases.entry(phase).or_default().push(*ms);
    }
    println!("\nphases of ours, ms");
    for (phase, times) in phases {
        println!("  {phase:<12}{:>8.0}", median(times));
    }
    let raw = |start: &Start| {
        json!({
            "target": start.target,
            "round": start.round,
            "total_ms": millis(start.total),
            "end_ms": start.end.map(millis),
            "phases_ms": start.phases,
        })
    };
    let results: Vec<Value> = starts.iter().map(raw).collect();
    print_raw(&results);
}
