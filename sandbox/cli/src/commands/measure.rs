//! `pericarp measure`: what an idle pod of each profile takes of this node, and the RuntimeClasses that
//! say so.
//!
//! containerd is asked for a pod of the profile's handler, as a kubelet asks, so that all of it is there
//! that real pods have: the shim, the network, what the profile says. The pod is removed on every path.

use std::{
    ffi::OsString,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use pericarp_config::{Config, Profile, Settings};
use pericarp_kube::cri::{CallError, Client, proto::PodSandboxConfig};
use pericarp_node::manifest::{runtime_classes, with_processes};
use pericarp_pod::{
    overhead::{MIB, with_room},
    record::MACHINE,
};
use serde_json::{Value, json};

use crate::{
    commands::{
        Refusal, print,
        reader::{Given, Grammar},
        serve, violations,
    },
    failure::Failure,
    input::problem::Problem,
    observe::{self, Pod},
    signals::Signals,
};

const HELP: &str = "\
Starts a pod of each profile on this node, measures what it takes of the host beside its guest's memory
when it is idle, and prints a RuntimeClass for each handler, for `kubectl apply -f -`: podFixed is that with
room for load (three times the sidecars and twice the machine's process), and what the sizing policy
adds. As root; the handlers have to be enabled (pericarp node enable).

Usage: pericarp measure [OPTIONS]

Options:
      --containerd-socket FILE  [/run/containerd/containerd.sock]
      --config FILE             our configuration [/etc/pericarp/config.toml, if it is there]
      --json                    one JSON object, with each process
  -h, --help                    show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp measure",
    help: HELP,
    flags: &[(' ', "json")],
    options: &[(' ', "containerd-socket", false), (' ', "config", false)],
    ends_at_operand: false,
};

/// How long a pod has to come to rest.
const REST: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(100);

/// What was measured of a profile.
#[derive(Debug)]
struct Measured {
    profile: String,
    hypervisor: String,
    /// Each process with its bytes.
    processes: Vec<(String, u64)>,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    let config = Config::load(given.value("config").map(Path::new)).map_err(violations)?;
    let client = connect(&given)?;
    // From here on a signal ends it between two steps, and nothing stays.
    let mut signals = Signals::block()?;
    let mut all = Vec::new();
    for profile in config.profiles() {
        all.push(measure(&client, profile, &mut signals)?);
    }
    print(&match given.flag("json") {
        true => as_json(&config, &all).to_string() + "\n",
        false => text(&config, &all),
    })?;
    Ok(0)
}

fn connect(given: &Given) -> Result<Client, Refusal> {
    let socket = given.value("containerd-socket").unwrap_or(serve::SOCKET);
    let client =
        Client::connect(Path::new(socket)).map_err(|error| failed("containerd", &error))?;
    client.version().map_err(|error| {
        let rule = format!("cannot be used: {}", chain(&error));
        let cure = "start containerd, or give its socket; as root";
        Problem::new("--containerd-socket", socket.to_owned(), rule, cure)
    })?;
    Ok(client)
}

/// An error and all that caused it.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}

fn failed(what: &str, error: &CallError) -> Failure {
    Failure::Node(format!("{what}: {}", chain(error)))
}

/// Boots a pod of the profile, looks at it, and removes it.
fn measure(client: &Client, profile: &Profile, signals: &mut Signals) -> Result<Measured, Failure> {
    let handler = profile.name();
    let what = format!("a pod of the handler '{handler}'");
    let config = sandbox(handler);
    let id = client
        .run_sandbox(&config, handler)
        .map_err(|error| failed(&format!("{what} cannot be started"), &error))?;
    let seen = rest(signals).and_then(|()| look(&id, &what));
    let removed = client
        .stop_sandbox(&id)
        .and_then(|()| client.remove_sandbox(&id));
    let pod = seen?;
    removed.map_err(|error| failed(&format!("{what} cannot be removed ({id})"), &error))?;
    of_pod(handler, &pod).ok_or_else(|| {
        Failure::Node(format!(
            "{what}: the memory of its processes may not be read; run it as root"
        ))
    })
}

/// The least that a pod is, as a kubelet asks for it.
fn sandbox(handler: &str) -> PodSandboxConfig {
    let mut config = PodSandboxConfig::new();
    let name = format!("pericarp-measure-{}", std::process::id());
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name = format!("{name}-{handler}");
    metadata.namespace = "default".into();
    metadata.uid = name;
    config.hostname = "measure".into();
    config
}

fn rest(signals: &mut Signals) -> Result<(), Failure> {
    let end = Instant::now() + REST;
    while Instant::now() < end {
        signals.check()?;
        thread::sleep(LOOK);
    }
    signals.check()
}

fn look(id: &str, what: &str) -> Result<Pod, Failure> {
    let all = observe::look(true)?;
    let found = all.into_iter().find(|pod| pod.record.id == id);
    found.ok_or_else(|| {
        Failure::Node(format!(
            "{what}: is in no machine of ours; `pericarp node enable` has containerd know the handler"
        ))
    })
}

fn of_pod(profile: &str, pod: &Pod) -> Option<Measured> {
    let processes = pod.processes.iter();
    let processes = processes.map(|one| Some((one.role.clone(), one.cost.proportional?)));
    Some(Measured {
        profile: profile.to_owned(),
        hypervisor: pod.record.hypervisor.clone(),
        processes: processes.collect::<Option<_>>()?,
    })
}

impl Measured {
    fn sum(&self, machine: bool) -> u64 {
        let some = self.processes.iter();
        let some = some.filter(|(role, _)| (role == MACHINE) == machine);
        some.map(|(_, bytes)| bytes).sum()
    }

    /// What all of them may take under load.
    fn overhead(&self) -> u64 {
        with_room(self.sum(false), self.sum(true))
    }
}

/// What was measured for a handler: its profile's.
fn overhead_of(config: &Config, all: &[Measured], handler: &str) -> u64 {
    let profile = config.profile(handler).map(Profile::name);
    let profile = profile.unwrap_or_default();
    let measured = all.iter().find(|one| one.profile == profile);
    measured.map_or(0, Measured::overhead)
}

fn text(config: &Config, all: &[Measured]) -> String {
    let mut text = String::new();
    for one in all {
        let (sum, overhead) = (one.sum(true) + one.sum(false), one.overhead() / MIB);
        text += &format!(
            "# {}: an idle pod takes {} beside its guest ({})\n",
            one.profile,
            mib(sum),
            one.hypervisor
        );
        for (role, bytes) in &one.processes {
            text += &format!("#   {role:16} {:>10}\n", mib(*bytes));
        }
        text += &format!(
            "# so that nodes say it, too: in {}, [profiles.{}], overhead = \"{overhead}M\"\n",
            pericarp_config::DEFAULT_PATH,
            one.profile,
        );
    }
    let fixed = |handler: &str, settings: &Settings| {
        with_processes(settings, overhead_of(config, all, handler))
    };
    text + &runtime_classes(config, fixed, None)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

fn as_json(config: &Config, all: &[Measured]) -> Value {
    let profile = |one: &Measured| {
        let processes = one.processes.iter();
        let processes = processes.map(|(role, bytes)| json!({"process": role, "bytes": bytes}));
        json!({
            "profile": one.profile,
            "hypervisor": one.hypervisor,
            "processes": processes.collect::<Vec<_>>(),
            "measured": one.sum(true) + one.sum(false),
            "overhead": one.overhead(),
        })
    };
    let handlers = config.handlers().map(|(handler, profile)| {
        let processes = overhead_of(config, all, handler);
        let mib = with_processes(profile.settings(), processes);
        json!({"handler": handler, "podFixed": {"memory": format!("{mib}Mi")}})
    });
    json!({
        "profiles": all.iter().map(profile).collect::<Vec<_>>(),
        "handlers": handlers.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::tests::sample;

    #[test]
    fn what_was_measured_becomes_classes() {
        let config = Config::default();
        let all = [of_pod("pericarp", &sample(1)).unwrap()];
        // 5 MiB of the shim and 2 of the disk's server, three times; 3 of the machine, twice.
        assert_eq!(all[0].overhead(), 27 * MIB);
        let text = text(&config, &all);
        assert!(text.starts_with("# pericarp: an idle pod takes 10.0 MiB beside its guest ("));
        assert!(text.contains("#   pericarp-block      2.0 MiB\n"), "{text}");
        assert!(
            text.contains("[profiles.pericarp], overhead = \"27M\"\n"),
            "{text}"
        );
        // With what the policy adds, for each handler that means the profile.
        assert_eq!(text.matches("    memory: 2075Mi\n").count(), 4, "{text}");
        let said = as_json(&config, &all);
        assert_eq!(said["profiles"][0]["measured"], 10 * MIB);
        assert_eq!(said["handlers"][3]["podFixed"]["memory"], "2075Mi");
    }

    #[test]
    fn a_process_that_may_not_be_looked_at_is_no_measure() {
        let mut pod = sample(1);
        pod.processes[1].cost.proportional = None;
        assert!(of_pod("x", &pod).is_none());
    }
}
