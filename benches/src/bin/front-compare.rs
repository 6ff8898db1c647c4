//! `front-compare`: the same backend behind `pericarp-vmm`, QEMU and, where it is
//! in the search path, Cloud Hypervisor, in turns, where KVM is backed by
//! hardware: requests a second of fio in the guest, and how often the guest's CPU
//! leaves it for each of them.
//!
//! ```text
//! cargo xtask lab -- target/release/front-compare --rounds 5
//! ```
//!
//! Requests are those that the backend has counted, over a time in the middle of
//! fio's. Exits are the kernel's count for the machine (`/sys/kernel/debug/kvm`);
//! those that reached the monitor are its own count, which ours alone has. The
//! disk is a file in memory: the front end is what differs. The raw numbers are
//! the last line.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::laboratory::race;
use pericarp_benches::table::median;
use pericarp_tests::bounded::poll;
use pericarp_tests::guest::{Assets, initramfs};
use pericarp_tests::parts::{Part, beside_us, search_path};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

/// A guest's whole life.
const LIFE: Duration = Duration::from_secs(300);
/// What is measured of each job, and what it runs before that.
const WINDOW: Duration = Duration::from_secs(6);
const BEFORE: Duration = Duration::from_secs(3);
const DISK: u64 = 256 << 20;
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests";
/// Where the kernel counts exits.
const COUNTS: &str = "/sys/kernel/debug/kvm";
/// fio's jobs: name and options.
const JOBS: [(&str, &str); 2] = [
    ("depth-1", "--ioengine=psync"),
    ("depth-32", "--ioengine=libaio --iodepth=32"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Pericarp,
    Qemu,
    Cloud,
}

const TARGETS: [(Target, &str); 3] = [
    (Target::Pericarp, "pericarp-vmm"),
    (Target::Qemu, "qemu-q35"),
    (Target::Cloud, "cloud-hypervisor"),
];

/// One job in one guest.
struct Run {
    target: &'static str,
    job: &'static str,
    round: usize,
    /// Requests a second.
    iops: f64,
    /// Exits of the CPU for each request, all of them.
    exits: f64,
    /// Those that the monitor saw.
    to_user: Option<f64>,
}

/// The files of one guest.
struct Place {
    scratch: Scratch,
    kernel: PathBuf,
    image: PathBuf,
}

fn main() -> ExitCode {
    race("front-compare", 5, compare)
}

fn compare(rounds: usize) -> Outcome<()> {
    if !Path::new(COUNTS).exists() {
        // An error is told by the counts that are not there.
        let _ = Command::new("mount")
            .args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"])
            .status();
    }
    let assets = Assets::find().ok_or("the guest's kernel is missing: cargo xtask setup")?;
    let scratch = Scratch::new();
    let image = initramfs(&scratch, &assets, &["fio"], &script())?;
    let place = Place {
        kernel: assets.kernel(),
        image,
        scratch,
    };
    fs::write(place.scratch.path("disk"), vec![7; DISK as usize])?;
    let mut targets = TARGETS.to_vec();
    if search_path("cloud-hypervisor").is_none() {
        println!("cloud-hypervisor is not in the search path and takes no part");
        targets.retain(|(target, _)| *target != Target::Cloud);
    }
    let mut runs = Vec::new();
    for round in 1..=rounds {
        for &(target, name) in &targets {
            runs.extend(guest(target, name, round, &place)?);
        }
    }
    report(&targets, &runs);
    Ok(())
}

/// What the guest does.
fn script() -> String {
    let time = (BEFORE + WINDOW + BEFORE).as_secs();
    let jobs = JOBS.map(|(name, options)| {
        format!(
            "echo begins {name}\n\
             fio --name={name} --filename=/dev/vda --direct=1 --rw=randread --bs=4k \
             --time_based --runtime={time} --eta=never --output=/dev/null {options}\n"
        )
    });
    jobs.concat()
}

fn monitor(target: Target, place: &Place) -> Outcome<Command> {
    let socket = place.scratch.path("disk.sock");
    let socket = socket.display();
    let (kernel, image) = (&place.kernel, &place.image);
    Ok(match target {
        Target::Pericarp => {
            let mut vmm = command(&beside_us().join("pericarp-vmm"));
            vmm.args(["--memory", "512M", "--cmdline", PARAMETERS])
                .args(["--kernel-cache", "/tmp/pericarp-kernels"])
                .arg("--disk")
                .arg(format!("id=d,socket={socket},queues=1,queue-size=128"))
                .arg("--control-path")
                .arg(place.scratch.path("vmm.control"));
            vmm.arg("--kernel")
                .arg(kernel)
                .arg("--initramfs")
                .arg(image);
            vmm
        }
        Target::Qemu => {
            let mut qemu = command(&Part::QemuSystem.find().ok_or("QEMU is missing")?);
            qemu.args(["-machine", "q35,accel=kvm,memory-backend=mem"])
                .args(["-cpu", "host", "-m", "512M", "-nodefaults"])
                .args(["-object", "memory-backend-memfd,id=mem,share=on,size=512M"])
                .args(["-no-reboot", "-display", "none", "-serial", "stdio"])
                .arg("-chardev")
                .arg(format!("socket,id=d,path={socket}"))
                .arg("-device")
                .arg("vhost-user-blk-pci,chardev=d,num-queues=1,queue-size=128")
                .arg("-kernel")
                .arg(kernel);
            qemu.arg("-initrd").arg(image).args(["-append", PARAMETERS]);
            qemu
        }
        Target::Cloud => {
            let program = search_path("cloud-hypervisor").ok_or("it was there")?;
            let mut vmm = command(&program);
            vmm.args(["--cpus", "boot=1", "--memory", "size=512M,shared=on"])
                .args(["--serial", "tty", "--console", "off"])
                .arg("--disk")
                .arg(format!(
                    "vhost_user=on,socket={socket},num_queues=1,queue_size=128"
                ))
                .args(["--cmdline", PARAMETERS])
                .arg("--kernel")
                .arg(kernel);
            vmm.arg("--initramfs").arg(image);
            vmm
        }
    })
}

fn guest(target: Target, name: &'static str, round: usize, place: &Place) -> Outcome<Vec<Run>> {
    let path = |file: &str| place.scratch.path(file);
    for stale in ["disk.sock", "block.control"] {
        let _ = fs::remove_file(path(stale));
    }
    let mut block = command(&beside_us().join("pericarp-block"));
    block
        .arg("--socket-path")
        .arg(path("disk.sock"))
        .arg("--blk-file")
        .arg(path("disk"))
        .arg("--control-path")
        .arg(path("block.control"))
        .args(["--cache", "buffered", "--read-only"]);
    let mut block = Process::start(&mut block, LIFE)?;
    poll(BEFORE * 5, || path("block.control").exists().then_some(())).ok_or("no backend")?;
    let mut process = Process::start(&mut monitor(target, place)?, LIFE)?;
    let mut runs = Vec::new();
    for (job, _) in JOBS {
        let begins = format!("begins {job}");
        let begun = poll(LIFE, || {
            let ended = process.ended().is_some();
            let begun = process.output().find(&begins).is_some();
            (ended || begun).then_some(())
        });
        begun.ok_or_else(|| format!("{name}: {}", process.output().last(20)))?;
        let run = measure((target, name), job, round, process.pid(), place)
            .map_err(|e| format!("{name}, {job}: {e}\n{}", process.output().last(20)))?;
        println!(
            "round {round}: {name}, {job}: {:.0} a second, {:.2} exits each",
            run.iops, run.exits
        );
        runs.push(run);
    }
    process.wait(LIFE);
    process.kill();
    block.kill();
    Ok(runs)
}

fn measure(
    (target, name): (Target, &'static str),
    job: &'static str,
    round: usize,
    pid: i32,
    place: &Place,
) -> Outcome<Run> {
    let before = requests(place)?;
    let busy = || (requests(place).ok()? > before + 50.0).then_some(());
    poll(BEFORE * 10, busy).ok_or("no request")?;
    std::thread::sleep(BEFORE);
    let sample = || -> Outcome<(Instant, f64, f64, Option<f64>)> {
        let to_user = (target == Target::Pericarp).then(|| to_user(place));
        Ok((
            Instant::now(),
            requests(place)?,
            exits(pid)?,
            to_user.transpose()?,
        ))
    };
    let first = sample()?;
    std::thread::sleep(WINDOW);
    let last = sample()?;
    let done = last.1 - first.1;
    if done < 1.0 {
        return Err("no request was done".into());
    }
    Ok(Run {
        target: name,
        job,
        round,
        iops: done / (last.0 - first.0).as_secs_f64(),
        exits: (last.2 - first.2) / done,
        to_user: last
            .3
            .zip(first.3)
            .map(|(last, first)| (last - first) / done),
    })
}

fn ask(control: &Path) -> Outcome<Value> {
    let mut stream = UnixStream::connect(control)?;
    writeln!(stream, r#"{{"op":"stats"}}"#)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Reads that the backend has done.
fn requests(place: &Place) -> Outcome<f64> {
    let stats = ask(&place.scratch.path("block.control"))?;
    let count = &stats["devices"][0]["queues"][0]["requests"]["read"]["count"];
    Ok(count
        .as_f64()
        .ok_or_else(|| format!("no count of reads: {stats}"))?)
}

/// Exits of the machine of this process, whose directory has the name of the thread that
/// made it.
fn exits(pid: i32) -> Outcome<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let threads: Vec<_> = threads.map(|entry| entry.file_name()).collect();
    let mut machines = fs::read_dir(COUNTS)?.flatten();
    let machine = machines.find(|entry| {
        let name = entry.file_name();
        let made_by = name.to_str().and_then(|name| name.split_once('-'));
        made_by.is_some_and(|(thread, _)| threads.iter().any(|name| name == thread))
    });
    let counts = machine.ok_or("the kernel counts nothing for it")?.path();
    Ok(fs::read_to_string(counts.join("exits"))?.trim().parse()?)
}

/// Exits that ours has seen.
fn to_user(place: &Place) -> Outcome<f64> {
    let stats = ask(&place.scratch.path("vmm.control"))?;
    let exits = stats["exits"].as_object().ok_or("no count of exits")?;
    Ok(exits.values().filter_map(Value::as_f64).sum())
}

fn report(targets: &[(Target, &str)], runs: &[Run]) {
    println!(
        "\n{:<10}{:<18}{:>9}  {:>17}{:>9}{:>12}{:>16}",
        "", "", "a second", "min .. max", "of QEMU", "exits each", "to the monitor"
    );
    for (job, _) in JOBS {
        let of = |name: &str, value: &dyn Fn(&Run) -> Option<f64>| -> Vec<f64> {
            let mine = runs
                .iter()
                .filter(|run| run.target == name && run.job == job);
            mine.filter_map(value).collect()
        };
        let base = median(of("qemu-q35", &|run| Some(run.iops)));
        for (_, name) in targets {
            let iops = of(name, &|run| Some(run.iops));
            let least = iops.iter().copied().fold(f64::INFINITY, f64::min);
            let most = iops.iter().copied().fold(0.0, f64::max);
            let exits = median(of(name, &|run| Some(run.exits)));
            let to_user = median(of(name, &|run| run.to_user));
            let to_user = if to_user.is_nan() {
                "-".to_owned()
            } else {
                format!("{to_user:.5}")
            };
            let middle = median(iops);
            println!(
                "{job:<10}{name:<18}{middle:>9.0}  {:>17}{:>9.2}{exits:>12.2}{to_user:>16}",
                format!("{least:.0} .. {most:.0}"),
                middle / base,
            );
        }
    }
    let raw = |run: &Run| {
        json!({
            "target": run.target,
            "job": run.job,
            "round": run.round,
            "iops": run.iops,
            "exits_each": run.exits,
            "exits_to_user_each": run.to_user,
        })
    };
    let results: Vec<Value> = runs.iter().map(raw).collect();
    println!("\n{}", json!({ "results": results }));
}
