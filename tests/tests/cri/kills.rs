//! Each process of a pod, killed in each phase of its life: whatever containerd was at, it gets rid
//! of the pod, and nothing of it is left.
//!
//! What is killed when differs a little from phase to phase and run to run; each case prints what
//! came of it. Two processes that follow each other are killed in all phases together, each in every
//! other one; `PERICARP_KILLS=all` kills each in all.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_tests::cri::proto::PodSandboxState;
use pericarp_tests::cri::{container, pod};
use rustix::process::{Pid, Signal, kill_process};

use crate::stage::{IDLE, Stage, until};

/// For a process to appear that is to be killed.
const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(2);

/// What a pod's life is made of. How long after its beginning the process is killed.
const PHASES: [(Phase, Duration); 6] = [
    (Phase::Boot, Duration::ZERO),
    (Phase::Boot, Duration::from_millis(700)),
    (Phase::Create, Duration::from_millis(5)),
    (Phase::Start, Duration::from_millis(60)),
    (Phase::Exec, Duration::from_millis(100)),
    (Phase::Stop, Duration::from_millis(30)),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Boot,
    Create,
    Start,
    Exec,
    Stop,
}

/// A process by its command line and, for all but the shim, by that one as its parent.
#[derive(Clone, Copy)]
pub(crate) struct Victim {
    words: &'static str,
    is_shim: bool,
    /// A pod goes on without it, which is started again, once it runs.
    is_replaced: bool,
}

struct Seen {
    pid: Pid,
    parent: i32,
    line: String,
}

fn processes() -> Vec<Seen> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let seen = all.filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // State and parent follow the name, which is in parentheses.
        let (_, fields) = stat.rsplit_once(')')?;
        let parent = fields.split_whitespace().nth(1)?.parse().ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        Some(Seen { pid, parent, line })
    });
    seen.collect()
}

impl Victim {
    /// The process, of the node that keeps its files in `node`.
    pub(crate) fn find(self, node: &str) -> Option<Pid> {
        let all = processes();
        let serves = |seen: &&Seen| {
            let line = seen.line.trim_end();
            let call = line.ends_with(" start") || line.ends_with(" delete");
            !call && line.contains("containerd-shim-pericarp-v2 ") && line.contains(node)
        };
        let shim = all.iter().find(serves)?;
        if self.is_shim {
            return Some(shim.pid);
        }
        let child = |seen: &&Seen| {
            seen.parent == shim.pid.as_raw_nonzero().get() && seen.line.contains(self.words)
        };
        all.iter().find(child).map(|seen| seen.pid)
    }

    /// Kills it as soon as it is there and this time has passed. Whether it was ever there.
    pub(crate) fn kill(self, node: &str, after: Duration) -> bool {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            if self.find(node).is_some() {
                thread::sleep(after);
                // It may be another by then, or none.
                if let Some(pid) = self.find(node) {
                    let _ = kill_process(pid, Signal::KILL);
                    return true;
                }
            }
            thread::sleep(PAUSE);
        }
        false
    }
}

/// `first` is that of the phases, every other one of which is tried.
fn killed_in_phases(stage: &mut Stage, victim: Victim, first: usize) {
    let node = stage.node.scratch().dir().display().to_string();
    let all = std::env::var_os("PERICARP_KILLS").is_some_and(|which| which == "all");
    let phases = PHASES.into_iter().enumerate();
    for (index, (phase, after)) in phases.filter(|(index, _)| all || index % 2 == first) {
        let name = format!("phase-{index}");
        let what = match phase {
            Phase::Boot => thread::scope(|scope| {
                let killer = scope.spawn(|| victim.kill(&node, after));
                let ran = stage.node.run_pod(pod(&name), stage.subject.name);
                assert!(killer.join().unwrap(), "{} did not appear", victim.words);
                ran.map(drop).map_err(|error| error.message().to_owned())
            }),
            _ => later(stage, victim, &node, (phase, after), &name),
        };
        let lives = victim.is_replaced && phase != Phase::Boot;
        println!("{} in {phase:?} after {after:?}: {what:?}", victim.words);
        let client = stage.node.client();
        assert!(!lives || what.is_ok(), "{what:?}");
        for left in client.pods(None).unwrap() {
            let ready = || {
                let status = client.pod_status(&left.id).unwrap();
                status.state == PodSandboxState::SANDBOX_READY.into()
            };
            if lives {
                assert!(ready());
            } else {
                until("the pod is not ready", || !ready());
            }
            client.stop_pod(&left.id).unwrap();
            client.remove_pod(&left.id).unwrap();
        }
        stage.node.assert_clean();
    }
}

/// Kills it when the pod runs; what became of what was being done.
fn later(
    stage: &Stage,
    victim: Victim,
    node: &str,
    (phase, after): (Phase, Duration),
    name: &str,
) -> Result<(), String> {
    let pod = stage.pod(name);
    let config = container("idle", &IDLE);
    let prepared = match phase {
        Phase::Create => None,
        Phase::Start => Some(pod.create(&config).unwrap()),
        _ => Some(pod.start(&config).unwrap()),
    };
    thread::scope(|scope| {
        let killer = scope.spawn(|| victim.kill(node, after));
        let done = match (phase, &prepared) {
            (Phase::Start, Some(one)) => one.start(),
            (Phase::Exec, Some(one)) if victim.is_replaced => one.exec(&["sleep", "1"]).map(drop),
            (Phase::Exec, Some(one)) => one.exec(&["sleep", "1000"]).map(drop),
            (Phase::Stop, Some(one)) => one.stop(10),
            _ => pod.create(&config).map(drop),
        };
        assert!(killer.join().unwrap(), "{} was not there", victim.words);
        done.map_err(|error| error.message().to_owned())
    })
}

pub(crate) fn the_shim_is_killed_at_any_moment(stage: &mut Stage) {
    let victim = Victim {
        words: "containerd-shim-pericarp-v2",
        is_shim: true,
        is_replaced: false,
    };
    killed_in_phases(stage, victim, 0);
}

pub(crate) fn child(words: &'static str) -> Victim {
    Victim {
        words,
        is_shim: false,
        is_replaced: false,
    }
}

pub(crate) fn the_file_server_is_killed_at_any_moment(stage: &mut Stage) {
    killed_in_phases(stage, child("pericarp-fs "), 1);
}

pub(crate) fn the_network_card_is_killed_at_any_moment(stage: &mut Stage) {
    let mut card = child("pericarp-net ");
    card.is_replaced = true;
    killed_in_phases(stage, card, 0);
}

/// Killed again and again it is there again, until something else must be wrong.
pub(crate) fn a_network_card_is_started_again(stage: &mut Stage) {
    let node = stage.node.scratch().dir().display().to_string();
    let (pod, idle) = stage.idle("again");
    let card = child("pericarp-net ");
    let reaches = || {
        let ping = ["ping", "-c", "1", "-W", "1", "10.88.0.1"];
        idle.exec(&ping).is_ok_and(|output| output.code == 0)
    };
    assert!(reaches());
    for _ in 0..3 {
        let before = card.find(&node);
        assert!(card.kill(&node, Duration::ZERO));
        until("there is another", || {
            let now = card.find(&node);
            now.is_some() && now != before
        });
        until("the card carries packets again", reaches);
    }
    for _ in 0..3 {
        assert!(card.kill(&node, Duration::ZERO));
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(idle.ended().exit_code, 137);
    let reason = "a sidecar of the machine died (pericarp-net: killed by signal 9";
    assert!(stage.node.log().contains(reason), "{}", stage.node.log());
    pod.remove().unwrap();
}

pub(crate) fn the_vsock_is_killed_at_any_moment(stage: &mut Stage) {
    killed_in_phases(stage, child("pericarp-vsock "), 1);
}

pub(crate) fn the_machine_is_killed_at_any_moment(stage: &mut Stage) {
    killed_in_phases(stage, child("/initramfs "), 0);
}
