//! `pericarp run` with this monitor: the whole way from a command to its exit code.

use std::fs;
use std::process::Command;

use pericarp_tests::audit::{self, Audit, Pod};
use pericarp_tests::bounded::poll;
use pericarp_tests::guest::programs;
use pericarp_tests::lab::Lab;
use pericarp_tests::parts::{Part, beside_us};
use pericarp_tests::process::Process;
use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{Rig, life};

const PARTS: [Part; 4] = [
    Part::Ours("pericarp"),
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_VSOCK,
];

/// `pericarp run` of busybox, with its directory as the root.
fn run(rig: &Rig, options: &[&str], script: &str) -> Command {
    assert!(Lab::is_here());
    let root = rig.scratch.path("root/bin");
    fs::create_dir_all(&root).unwrap();
    fs::create_dir(rig.scratch.path("root/tmp")).unwrap();
    fs::copy(Part::Busybox.find().unwrap(), root.join("busybox")).unwrap();
    // Debian's busybox has none.
    programs(&rig.scratch.path("root"), &["flock"]).unwrap();
    let mut command = Command::new(beside_us().join("pericarp"));
    command
        .args(["run", "--boot-timeout", "300"])
        .args(options)
        .arg("--rootfs")
        .arg(rig.scratch.path("root"))
        .args(["--", "/bin/busybox", "sh", "-c", script])
        .env("PERICARP_ASSETS", rig.assets.dir())
        .env("HOME", rig.scratch.dir());
    command
}

#[test]
fn a_container_runs_in_its_own_machine() {
    let Some(rig) = Rig::here("a_container_runs_in_its_own_machine", &PARTS) else {
        return;
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let script = "/bin/busybox cat /proc/sys/kernel/random/boot_id; exit 7";
    let output = run(&rig, &["--timing"], script).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(output.status.code(), Some(7), "{out}\n{err}");
    assert_ne!(out.trim(), host.trim(), "{err}");
    // Which is what this host's hardware is for.
    assert!(err.contains("pericarp-vmm"), "{err}");
}

#[test]
fn a_pod_of_the_monitors_is_held_as_promised() {
    let test = "a_pod_of_the_monitors_is_held_as_promised";
    let Some(rig) = Rig::here(test, &PARTS) else {
        return;
    };
    let volume = rig.scratch.path("data");
    fs::create_dir(&volume).unwrap();
    let volume = format!("{}:/data", volume.display());
    let script = "echo ready; while :; do /bin/busybox sleep 1; done";
    let mut run = Process::start(&mut run(&rig, &["-v", &volume], script), life()).unwrap();
    let ready = poll(life(), || {
        let ready = run.output().find("ready").is_some();
        (ready || run.ended().is_some()).then_some(ready)
    });
    assert_eq!(ready, Some(true), "{}", run.output().last(20));
    let pods = audit::running().unwrap();
    let of_ours = |pod: &Pod| pod.first.pid == run.pid();
    let pod = pods.into_iter().find(of_ours).expect("the pod");
    let audits = [Audit::of(pod).unwrap()];
    println!("{}", audit::table(&audits));
    assert_eq!(audits[0].looser(), Vec::<String>::new());
    let mut found = audits[0].findings.iter();
    assert!(found.any(|found| found.member.program == "pericarp-vmm"));
}

const AGAIN: &str = "(pericarp-fs: killed by signal 9); it was started again";

/// Holds a file, a directory, a listing and a lock open, and writes and reads until it is told to
/// stop.
const WORK: &str = r#"
/bin/busybox --install -s /bin
cd /data
exec 3>>log 4<big 6<many 9>lock
flock -n 9
mkfifo /tmp/names
find many -type f >/tmp/names &
exec 5</tmp/names
read first <&5
echo ready
n=0
while [ ! -e stop ]; do
    n=$((n + 1))
    echo line $n >&3
    dd if=/dev/urandom of=part bs=64k count=4 2>/dev/null
    want=$(md5sum <part)
    cp part copy
    [ "$(md5sum <copy)" = "$want" ] || exit 3
    mv copy kept
    rm part
    echo round $n
done
echo "$want" >sum
[ "$(wc -l <log)" = $n ] || exit 4
[ "$(wc -l <&5)" = 599 ] || exit 5
flock -n lock true && exit 6
[ "$(md5sum <&4)" = "$(md5sum <big)" ] || exit 7
[ "$(ls /proc/self/fd/6/ | wc -l)" = 600 ] || exit 8
dmesg | grep -i 'i/o error' && exit 9
echo done $n
"#;

#[test]
fn a_file_server_that_is_killed_is_replaced_under_the_container() {
    const KILLS: usize = 4;
    let test = "a_file_server_that_is_killed_is_replaced_under_the_container";
    let Some(rig) = Rig::here(test, &PARTS) else {
        return;
    };
    let data = rig.scratch.path("data");
    fs::create_dir_all(data.join("many")).unwrap();
    let big: Vec<u8> = (0..1_000_000_u32).map(|n| (n * 7 / 3) as u8).collect();
    fs::write(data.join("big"), &big).unwrap();
    for n in 0..600 {
        // More than the kernel asks for at once, and than a pipe holds.
        fs::write(data.join(format!("many/{n:0>200}")), "").unwrap();
    }
    let volume = format!("{}:/data", data.display());
    let mut command = run(&rig, &["-v", &volume], WORK);
    let mut run = Process::start(&mut command, life()).unwrap();
    let said = |run: &mut Process, text: &str, times: usize| {
        let seen = poll(life(), || {
            let ended = run.ended().is_some();
            let lines = run.output().lines();
            let seen = lines.iter().filter(|line| line.contains(text)).count() >= times;
            (seen || ended).then_some(seen)
        });
        assert_eq!(seen, Some(true), "{text}: {}", run.output().last(40));
    };
    said(&mut run, "ready", 1);
    for kills in 1..=KILLS {
        said(&mut run, "round ", kills * 2);
        kill_process(server_of(run.pid()).unwrap(), Signal::KILL).unwrap();
        said(&mut run, AGAIN, kills);
    }
    said(&mut run, "round ", (KILLS + 1) * 2);
    fs::write(data.join("stop"), "").unwrap();
    let status = run.wait(life());
    let code = status.and_then(|status| status.code());
    run.kill();
    let lines = run.output().lines();
    assert_eq!(code, Some(0), "{}", lines.join("\n"));
    // On the host's side it is the same.
    let log = fs::read_to_string(data.join("log")).unwrap();
    let wanted: String = (1..=log.lines().count())
        .map(|n| format!("line {n}\n"))
        .collect();
    assert_eq!(log, wanted);
    assert!(lines.contains(&format!("done {}", log.lines().count())));
    let sum = Command::new("md5sum")
        .stdin(fs::File::open(data.join("kept")).unwrap())
        .output()
        .unwrap();
    assert_eq!(sum.stdout, fs::read(data.join("sum")).unwrap());
}

/// The file server that this process has started.
fn server_of(parent: i32) -> Option<Pid> {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(children).ok()?;
    children.split_whitespace().find_map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let pid = pid.parse().ok().and_then(Pid::from_raw)?;
        (name.trim() == "pericarp-fs").then_some(pid)
    })
}
