//! What all machines of this host do and cost at a moment: pods of containerd's and those of this
//! user's runs, from what their makers wrote down, the counters of their sidecars, and `/proc`.
//!
//! For `metrics`, `top` and `measure`. Nothing in a guest is asked, and nothing is changed. A sidecar
//! that does not answer in time is said to be silent; all else of its pod is seen all the same.

mod ask;
mod cgroup;
pub(crate) mod device;
mod histogram;
mod process;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use pericarp_pod::record::{self, BASE, PodRecord};
use serde_json::json;

pub(crate) use device::{Device, PARTS};
pub(crate) use histogram::Histogram;
pub(crate) use process::{Cost, Guest, Kept};

use self::{device::Answer, process::Guests};
use crate::{registry, report};

/// The roles of those that make machines.
const SHIM: &str = "shim";
const RUN: &str = "run";
/// How long all sidecars together may take to answer, and whoever has the runs' directory locked.
const LIMIT: Duration = Duration::from_secs(1);

/// A pod, or the machine of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Pod {
    pub(crate) record: PodRecord,
    /// Its shim, or its run; the machine; the sidecars.
    pub(crate) processes: Vec<Process>,
    /// None where the machine is gone.
    pub(crate) guest: Option<Guest>,
    /// Of its control group; none for a run.
    pub(crate) memory: Option<cgroup::Memory>,
    /// Those whose sidecars have answered.
    pub(crate) devices: Vec<Device>,
    /// Each control socket, and whether it has answered.
    pub(crate) controls: Vec<(String, bool)>,
}

/// A process of a pod's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Process {
    /// `shim`, `run`, `machine`, or the sidecar's program.
    pub(crate) role: String,
    /// What it serves, where there is one such process for each device.
    pub(crate) device: String,
    pub(crate) cost: Cost,
}

impl Pod {
    /// Kubernetes' namespace; empty where it has none.
    pub(crate) fn namespace(&self) -> &str {
        let split = self.record.name.split_once('/');
        split.map_or("", |(namespace, _)| namespace)
    }

    /// Its name in there, that of a run, or the id.
    pub(crate) fn name(&self) -> &str {
        let split = self.record.name.split_once('/');
        split.map_or(&self.record.name, |(_, name)| name)
    }

    /// Whether `pericarp run` has made it, and no containerd.
    pub(crate) fn is_run(&self) -> bool {
        self.record.namespace == crate::vm::record::NAMESPACE
    }

    /// Bytes that all of its processes take of the host beside the guest's memory; none where one of
    /// them may not be looked at.
    pub(crate) fn overhead(&self) -> Option<u64> {
        let each = self.processes.iter().map(|one| one.cost.proportional);
        each.sum::<Option<u64>>().filter(|bytes| *bytes > 0)
    }

    /// Whether all processes are there that its maker has written down, and the maker.
    pub(crate) fn is_whole(&self) -> bool {
        self.processes.len() == self.record.processes.len() + 1
    }
}

/// All there are, the oldest first: pods, then runs. Proportional sizes only with a place to keep
/// them. Those that are not in there cost what the guest has touched, not what the processes have: the
/// kernel goes through the guest's memory, too, in each process that maps it, and holds back whoever
/// changes that process's mappings meanwhile. That is milliseconds for a small guest, and a second for
/// one with many GiB.
pub(crate) fn look(kept: Option<&mut Kept>) -> Vec<Pod> {
    let mut found = record::all(Path::new(BASE));
    found.extend(runs());
    look_at(found, kept)
}

/// The pod of this id, all of it measured anew; none where there is none.
pub(crate) fn look_for(id: &str) -> Option<Pod> {
    let mut found = record::all(Path::new(BASE));
    found.retain(|(_, record)| record.id == id);
    look_at(found, Some(&mut Kept::default())).pop()
}

/// The machines of this user's runs. Others may keep them from being seen, but not all else.
fn runs() -> Vec<(PathBuf, PodRecord)> {
    static SAID: AtomicBool = AtomicBool::new(false);
    let all = registry::all_within(LIMIT).unwrap_or_else(|error| {
        if !SAID.swap(true, Ordering::Relaxed) {
            report::warn(&format!("runs are not seen: {error}"));
        }
        Vec::new()
    });
    let machines = all.into_iter();
    let machines = machines.filter(|entry| entry.alive && entry.record.runtime == "vm");
    machines
        .filter_map(|run| Some((run.path.clone(), PodRecord::read(&run.path)?)))
        .collect()
}

/// The same of these, each with its directory.
fn look_at(found: Vec<(PathBuf, PodRecord)>, mut kept: Option<&mut Kept>) -> Vec<Pod> {
    let mut pods: Vec<Pod> = Vec::new();
    let (mut sockets, mut whose) = (Vec::new(), Vec::new());
    for (index, (directory, record)) in found.into_iter().enumerate() {
        let names = record.devices.iter().map(|device| &device.control);
        // A name in the directory, and nothing that leads out of it.
        let names = names.filter(|name| Path::new(name).file_name() == Some(name.as_ref()));
        for name in names.collect::<BTreeSet<_>>() {
            sockets.push(directory.join(name));
            whose.push((index, name.clone()));
        }
        pods.push(with_processes(record, kept.as_deref_mut()));
    }
    let request = json!({"op": "stats", "histograms": true});
    let answers = ask::all(&sockets, &request, LIMIT);
    // One at a time: what an answer becomes is larger than its line.
    for ((index, control), line) in whose.into_iter().zip(answers) {
        let answer = line.as_deref().and_then(Answer::read);
        pods[index].hear(control, answer.as_ref());
    }
    pods
}

fn with_processes(record: PodRecord, mut kept: Option<&mut Kept>) -> Pod {
    let shim = record.shim;
    let mut pod = Pod::default();
    let role_of_maker = match record.namespace == crate::vm::record::NAMESPACE {
        true => RUN,
        false => SHIM,
    };
    let machine = record.machine();
    let guest = machine.and_then(|pid| process::guest(pid, shim));
    let guests = guest.map_or(Guests::Unknown, |(_, guests)| guests);
    pod.guest = guest.map(|(guest, _)| guest);
    pod.memory = machine
        .filter(|_| guest.is_some() && role_of_maker == SHIM)
        .and_then(cgroup::memory);
    // Whoever makes a machine has none of its memory.
    let own = [(role_of_maker, "", shim, Guests::Nothing)].into_iter();
    let others = record.processes.iter();
    let others = others.map(|one| (one.role.as_str(), one.device.as_str(), one.pid, guests));
    for (role, device, pid, guests) in own.chain(others) {
        // One that has just ended is missing until another is there.
        let Some(cost) = process::cost(pid, shim, guests, kept.as_deref_mut()) else {
            continue;
        };
        pod.processes.push(Process {
            role: role.to_owned(),
            device: device.to_owned(),
            cost,
        });
    }
    pod.record = record;
    pod
}

impl Pod {
    fn hear(&mut self, control: String, answer: Option<&Answer>) {
        if let Some(answer) = answer {
            let of_this = self.record.devices.iter();
            let of_this = of_this.filter(|device| device.control == control);
            let devices = of_this.filter_map(|device| Device::read(device, answer));
            self.devices.extend(devices);
        }
        self.controls.push((control, answer.is_some()));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
        thread,
    };

    use pericarp_pod::record::{DeviceKind, DeviceRecord, ProcessRecord};

    use super::*;

    /// A pod as it is seen, with a disk, a card and a sidecar that is silent.
    pub(crate) fn sample(reads: u64) -> Pod {
        let mut time = Histogram::default();
        let said = json!({"sum": reads * 50_000, "buckets": [[50_000, reads]]});
        time.add(&serde_json::from_value(said).unwrap());
        let class = |requests, bytes, errors| device::Class {
            requests,
            bytes,
            errors,
        };
        let disk = Device {
            id: "disk1".into(),
            volume: "data \"x\"".into(),
            classes: [("read".to_owned(), class(reads, reads * 4096, 1))].into(),
            times: [time.clone(), Histogram::default(), time.clone(), time],
            in_flight: 3,
            ..Device::default()
        };
        let card = Device {
            id: "card1".into(),
            kind: DeviceKind::Card,
            classes: [
                ("rx".to_owned(), class(10, 1000, 2)),
                ("tx".to_owned(), class(5, 500, 0)),
            ]
            .into(),
            ..Device::default()
        };
        let process = |role: &str, device: &str, mib: u64| Process {
            role: role.into(),
            device: device.into(),
            cost: Cost {
                cpu: Duration::from_millis(10 * reads),
                resident: mib << 20,
                proportional: Some(mib << 20),
            },
        };
        let named = |role: &str, device: &str| ProcessRecord {
            role: role.into(),
            device: device.into(),
            ..ProcessRecord::default()
        };
        Pod {
            record: PodRecord {
                namespace: "k8s.io".into(),
                id: "aa11".into(),
                name: "default/web".into(),
                uid: "u-1".into(),
                created: 1000,
                hypervisor: "pericarp-vmm: KVM".into(),
                vcpus: 2,
                memory: 256 << 20,
                overhead: 40 << 20,
                processes: vec![named("machine", ""), named("pericarp-block", "disk1")],
                ..PodRecord::default()
            },
            processes: vec![
                process("shim", "", 5),
                process("machine", "", 3),
                process("pericarp-block", "disk1", 2),
            ],
            guest: Some(Guest {
                cpu: Duration::from_millis(9 * reads),
                resident: Some(100 << 20),
            }),
            memory: Some(cgroup::Memory {
                used: 110 << 20,
                limit: Some(300 << 20),
            }),
            devices: vec![disk, card],
            controls: vec![("disk1.control".into(), true), ("fs.control".into(), false)],
        }
    }

    #[test]
    fn a_pod_is_seen_whose_sidecar_is_silent() {
        let name = format!("pericarp-observe-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let _silent = UnixListener::bind(dir.join("fs.control")).unwrap();
        let listener = UnixListener::bind(dir.join("block.control")).unwrap();
        let speaker = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            stream.read_line(&mut String::new()).unwrap();
            let answer = json!({"ok": true, "devices": [{"id": "disk1", "queues": [
                {"requests": {"write": {"count": 7, "bytes": 70, "errors": 0}}},
            ]}]});
            writeln!(stream.get_mut(), "{answer}").unwrap();
        });
        let device = |id: &str, control: &str| DeviceRecord {
            id: id.into(),
            control: control.into(),
            ..DeviceRecord::default()
        };
        let record = PodRecord {
            name: "web".into(),
            shim: std::process::id(),
            devices: vec![
                device("disk1", "block.control"),
                device("pod", "fs.control"),
                device("odd", "../x"),
            ],
            ..PodRecord::default()
        };
        let pods = look_at(vec![(dir.clone(), record)], Some(&mut Kept::default()));
        std::fs::remove_dir_all(&dir).unwrap();
        speaker.join().unwrap();
        let [pod] = &pods[..] else {
            panic!("{pods:?}");
        };
        assert_eq!((pod.namespace(), pod.name()), ("", "web"));
        assert_eq!(pod.devices.len(), 1, "{pod:?}");
        assert_eq!(pod.devices[0].all().requests, 7);
        let answered = [("block.control", true), ("fs.control", false)];
        assert_eq!(
            pod.controls,
            answered.map(|(name, did)| (name.to_owned(), did))
        );
        assert!(pod.is_run() && pod.processes[0].role == RUN);
        assert!(pod.overhead().is_some() && pod.is_whole());
        assert_eq!(sample(1).overhead(), Some(10 << 20));
    }
}
