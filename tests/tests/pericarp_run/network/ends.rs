//! How networks end: with a run, after a run that was killed, in the middle of a plugin's work, and
//! before anything was done. Containers of runc, which are quick; nothing here depends on a machine.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use super::host::*;
use crate::rig::*;

const RUNC_RUNS: [&str; 2] = ["--runtime", "runc"];

/// A run with a port is killed; the next one, with the same port, has a clean host.
fn killed(test: &str, plugins: impl FnOnce(&Rig) -> Vec<Value>) {
    let Some(host) = Host::with(test, &RUNC, plugins) else {
        return;
    };
    let run = |script: &str| host.start(&["--runtime", "runc", "-p", "8080:80"], script);
    assert_eq!(run("exit 3").wait().code, 3);
    let before = host.idle();
    let running = run("echo ready; sleep 1000");
    running.wait_for("ready");
    let during = host.state();
    assert_ne!(during, before);
    // The rules that a plugin finds again only by the pod's interface.
    let rules = |state: &str| state.matches("MASQUERADE").count();
    assert!(rules(&during) > rules(&before), "{during}");
    let address: IpAddr = GATEWAY.into();
    assert!(TcpListener::bind((address, 1)).is_ok(), "the link is there");
    running.signal(Signal::KILL);
    running.wait();
    let end = Instant::now() + SECONDS;
    while !host.rig.processes("runc").is_empty() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(20));
    }
    // The same port again: were the rule of the dead one there, it would win.
    let again = run("echo ready; echo answer | busybox nc -l -p 80");
    again.wait_for("ready");
    let mut answer = String::new();
    let mut stream = dial(SocketAddr::from((GATEWAY, 8080)));
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer\n");
    drop(stream);
    let again = again.wait();
    assert_eq!((again.code, again.stderr.as_str()), (0, ""));
    host.assert_state(&before);
    host.rig.assert_clean();
}

#[test]
fn what_a_killed_run_left_with_plugins_is_undone_by_the_next() {
    let test = "what_a_killed_run_left_with_plugins_is_undone_by_the_next";
    killed(test, |rig| {
        vec![
            json!({"type": "ptp", "ipMasq": true, "ipam": addresses(rig)}),
            ports(),
        ]
    });
}

#[test]
fn what_a_killed_run_left_on_a_bridge_is_undone_by_the_next() {
    let test = "what_a_killed_run_left_on_a_bridge_is_undone_by_the_next";
    killed(test, |rig| {
        let ipam = addresses(rig);
        let limits = json!({
            "type": "bandwidth",
            "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
            "egressRate": 80_000_000, "egressBurst": 8_000_000,
        });
        let bridge = json!({
            "type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true, "ipam": ipam,
        });
        vec![bridge, limits, ports()]
    });
}

/// `PERICARP_NETWORK_CYCLES` says how many, 3 otherwise.
#[test]
fn runs_one_after_the_other_leave_nothing() {
    let test = "runs_one_after_the_other_leave_nothing";
    let Some(host) = Host::new(test, &RUNC) else {
        return;
    };
    let cycles = std::env::var("PERICARP_NETWORK_CYCLES");
    let cycles: usize = cycles.map_or(3, |count| count.parse().expect("a number of cycles"));
    let mut before = None;
    for number in 0..=cycles {
        let run = host.start(&["--runtime", "runc", "-p", "8080:80"], "ls /sys/class/net");
        let run = run.wait();
        assert_eq!(run.code, 0, "{number}: {}", run.stderr);
        host.assert_state(before.get_or_insert_with(|| host.idle()));
    }
    host.rig.assert_clean();
}

/// A plugin of these words.
fn plugin(rig: &Rig, name: &str, words: &str) {
    let bin = rig.scratch.path("bin");
    fs::create_dir_all(&bin).unwrap();
    let path = bin.join(name);
    fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\n{words}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What is in the file once it is there.
fn number(file: &Path) -> Pid {
    let read = || fs::read_to_string(file).ok()?.trim().parse().ok();
    Pid::from_raw(poll(LIMIT, read).expect("a process id")).unwrap()
}

fn assert_gone(pid: Pid) {
    let gone = || {
        let state = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        // One that nobody has waited for yet has ended, too.
        let there = state.is_ok_and(|stat| !stat.contains(") Z "));
        (!there).then_some(())
    };
    assert!(poll(SECONDS, gone).is_some(), "{pid:?} goes on");
}

#[test]
fn a_plugin_that_hangs_ends_with_its_run() {
    let test = "a_plugin_that_hangs_ends_with_its_run";
    let Some(host) = Host::with(test, &RUNC, |_| vec![json!({"type": "slow"})]) else {
        return;
    };
    let (pid, log) = (host.rig.scratch.path("pid"), host.rig.scratch.path("log"));
    let words = format!(
        "echo $CNI_COMMAND >>{}; [ $CNI_COMMAND = DEL ] && exit 0; echo $$ >{}; exec sleep 1000",
        log.display(),
        pid.display()
    );
    plugin(&host.rig, "slow", &words);
    let before = host.state();
    let start = || {
        let image = format!("{}:ro", host.rig.image());
        let network = format!("cni:{NAME}");
        let common = ["--network", &network, "--rootfs-image", &image];
        let rest = ["--", "true"];
        let mut command = host.command(&[&common[..], &RUNC_RUNS, &rest].concat());
        command.env("CNI_PATH", host.rig.scratch.path("bin"));
        let _ = fs::remove_file(&pid);
        Running::start(command)
    };
    // A plugin has a minute; who wants to go does not wait for it.
    let running = start();
    let slow = number(&pid);
    let begin = Instant::now();
    running.signal(Signal::INT);
    let run = running.wait();
    assert_eq!(run.code, 130, "{}", run.stderr);
    assert_eq!(run.stderr, "pericarp: ended by signal 2\n");
    assert!(begin.elapsed() < SECONDS, "{:?}", begin.elapsed());
    assert_gone(slow);
    assert_eq!(fs::read_to_string(&log).unwrap(), "ADD\nDEL\n");
    host.rig.assert_clean();
    // One that is killed takes it along, and the next run undoes what it did.
    let running = start();
    let slow = number(&pid);
    running.signal(Signal::KILL);
    running.wait();
    assert_gone(slow);
    fs::remove_file(&log).unwrap();
    plugin(
        &host.rig,
        "slow",
        &format!("echo $CNI_COMMAND >>{}; echo '{{}}'", log.display()),
    );
    let run = start().wait();
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_eq!(fs::read_to_string(&log).unwrap(), "DEL\nADD\nDEL\n");
    host.assert_state(&before);
    host.rig.assert_clean();
}

#[test]
fn what_a_plugin_did_not_undo_is_the_next_runs() {
    let test = "what_a_plugin_did_not_undo_is_the_next_runs";
    let Some(host) = Host::with(test, &RUNC, |_| vec![json!({"type": "moody"})]) else {
        return;
    };
    let log = host.rig.scratch.path("log");
    let run = |answer: &str| {
        let words = format!(
            "echo $CNI_COMMAND $CNI_CONTAINERID >>{}; {answer}",
            log.display()
        );
        plugin(&host.rig, "moody", &words);
        let image = format!("{}:ro", host.rig.image());
        let network = format!("cni:{NAME}");
        let common = ["--network", &network, "--rootfs-image", &image];
        let rest = ["--", "true"];
        let mut command = host.command(&[&common[..], &RUNC_RUNS, &rest].concat());
        command.env("CNI_PATH", host.rig.scratch.path("bin"));
        Running::start(command).wait()
    };
    let first = run("[ $CNI_COMMAND = ADD ] && echo '{}'");
    assert_eq!(first.code, 0);
    assert!(
        first.stderr.contains("the network is not removed"),
        "{}",
        first.stderr
    );
    let second = run("echo '{}'");
    assert_eq!((second.code, second.stderr.as_str()), (0, ""));
    let log = fs::read_to_string(&log).unwrap();
    let calls: Vec<_> = log
        .lines()
        .filter_map(|line| line.split_once(' '))
        .collect();
    let commands: Vec<_> = calls.iter().map(|call| call.0).collect();
    assert_eq!(commands, ["ADD", "DEL", "DEL", "ADD", "DEL"]);
    assert_eq!(calls[2].1, calls[0].1, "{log}");
    host.rig.assert_clean();
}

#[test]
fn networks_that_cannot_be_are_refused_before_anything_is_done() {
    let test = "networks_that_cannot_be_are_refused_before_anything_is_done";
    let parts = [&VM[..], &[Part::Runc]].concat();
    let Some(host) = Host::with(test, &parts, |rig| {
        vec![json!({"type": "absent", "ipam": addresses(rig)})]
    }) else {
        return;
    };
    // Something to lose.
    for words in [
        "link add wire0 type veth peer name wire1",
        "link set wire0 addrgenmode none up",
        "link set wire1 addrgenmode none up",
        "addr add 10.88.0.1/24 dev wire0",
        "route add 10.99.0.0/16 via 10.88.0.2",
    ] {
        host.network.ip(words);
    }
    let networks = host.rig.scratch.path("networks");
    let of = |name: &str, kind: Value| {
        let mut config = kind;
        config["name"] = json!(name);
        config["cniVersion"] = json!("1.0.0");
        fs::write(networks.join(format!("{name}.conf")), config.to_string()).unwrap();
    };
    of("lost", json!({"type": "ptp", "ipam": {"type": "nobody"}}));
    let fifo = networks.join("00-pipe.conf");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let before = host.state();
    let refused = |network: &str, runtime: &str, words: &[&str]| {
        let image = format!("{}:ro", host.rig.image());
        let common = ["--network", network, "--runtime", runtime];
        let rest = ["--rootfs-image", &image, "--", "true"];
        let run = Running::start(host.command(&[&common[..], &rest].concat())).wait();
        assert_eq!(run.code, 2, "{network}: {}", run.stderr);
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{network}: {}", run.stderr);
        }
    };
    for runtime in ["vm", "runc"] {
        refused(
            "host",
            runtime,
            &["--network 'host': ", "host's own network"],
        );
        refused(
            "netns:/proc/self/ns/net",
            runtime,
            &["(hostNetwork), which no guest can have"],
        );
        let absent = "the CNI plugin absent is in none of /usr/lib/cni: install it";
        refused(&format!("cni:{NAME}"), runtime, &[absent]);
        let nobody = "the CNI plugin nobody is in none of /usr/lib/cni: install it";
        refused("cni:lost", runtime, &[nobody]);
        refused(
            "cni:other",
            runtime,
            &["has the name other", "00-pipe.conf is none: "],
        );
    }
    // This test is in a namespace of its own, and the host's first process is not; some hosts keep
    // that one's from everybody.
    let first = fs::read_link("/proc/1/ns/net");
    let word = match &first {
        Ok(_) => "(hostNetwork), which no guest can have",
        Err(_) => "cannot be opened",
    };
    assert_ne!(first.ok(), fs::read_link("/proc/thread-self/ns/net").ok());
    refused("netns:/proc/1/ns/net", "runc", &[word]);
    assert_eq!(host.state(), before);
    host.rig.assert_clean();
}
