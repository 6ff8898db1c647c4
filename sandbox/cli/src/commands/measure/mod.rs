//! `pericarp measure`: what an idle pod of each profile takes of this node, and the RuntimeClasses that
//! say so.
//!
//! containerd is asked for a pod of the profile's handler, as a kubelet asks, so that all of it is there
//! that real pods have: the shim, the network, what the profile says. The pod is removed on every path,
//! and said to be left where that fails. A kubelet on the node ends sandboxes that it does not know, so
//! the pod is looked at again and again while it comes to rest, and the last look at all of it counts
//! (`looks`).

mod looks;

use std::{
    ffi::OsString,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use pericarp_config::{Config, Profile, Settings};
use pericarp_kube::cri::{
    CallError, Client,
    proto::{PodSandboxConfig, PodSandboxState},
};
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
    observe, report,
    signals::Signals,
};

use self::looks::{Looks, of_pod};

const HELP: &str = "\
Starts a pod of each profile on this node, measures what it takes of the host beside its guest's memory
when it is idle, and prints a RuntimeClass for each handler, for `kubectl apply -f -`: podFixed is that with
room for load (three times the sidecars and twice the machine's process), and what the sizing policy
adds. As root; the handlers have to be enabled (pericarp node enable). Nothing here is changed: the alarm
of `pericarp metrics` and `pericarp node manifests` know a value once the profile's key 'overhead' has it.

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
/// Between two looks meanwhile.
const LOOK: Duration = Duration::from_millis(300);
/// How long a containerd that was away has to say whether it has started a pod all the same.
const AWAY: Duration = Duration::from_secs(10);

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
    // From here on a signal ends it between two steps, and nothing stays. Before the client, which has
    // a thread.
    let mut signals = Signals::block()?;
    let client = connect(&given)?;
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
    let id = client.run_sandbox(&config, handler).map_err(|error| {
        if error.is_away() {
            remove_late(client, &config, signals);
        }
        failed(&format!("{what} cannot be started"), &error)
    })?;
    let seen = rest(client, &id, handler, signals);
    let removed = remove(client, &id);
    // What went wrong first is how this ends; that a pod is left is said in any case.
    match (seen, removed) {
        (seen, Ok(())) => seen,
        (Ok(_), Err(left)) => Err(Failure::Node(left)),
        (seen, Err(left)) => {
            report::warn(&left);
            seen
        }
    }
}

/// Removes a pod, or says what is left.
fn remove(client: &Client, id: &str) -> Result<(), String> {
    // Its removal stops what this could not.
    let _ = client.stop_sandbox(id);
    match client.remove_sandbox(id) {
        Err(error) if !error.is_not_found() => {
            let why = chain(&error);
            Err(format!(
                "the pod {id} cannot be removed: {why}; `crictl rmp -f {id}` does it"
            ))
        }
        _ => Ok(()),
    }
}

/// Removes what a containerd that has not answered may have started.
fn remove_late(client: &Client, config: &PodSandboxConfig, signals: &mut Signals) {
    let name = &config.metadata.name;
    let ours = |uid: &str, of: &str| uid == config.metadata.uid && of == name;
    let end = Instant::now() + AWAY;
    loop {
        let all = client.sandboxes(&[]);
        let is_over = Instant::now() >= end || signals.check().is_err();
        match all {
            Ok(all) => {
                let all = all.iter();
                let mut found = all
                    .filter(|one| ours(&one.metadata.uid, &one.metadata.name))
                    .peekable();
                if found.peek().is_some() {
                    for one in found {
                        if let Err(left) = remove(client, &one.id) {
                            report::warn(&left);
                        }
                    }
                    return;
                }
                if is_over {
                    return;
                }
            }
            Err(error) if is_over => {
                let why = chain(&error);
                report::warn(&format!(
                    "a pod may be left, since containerd has not said: {why}; `crictl pods --name {name}` \
                     lists it, and `crictl rmp -f ID` removes it"
                ));
                return;
            }
            Err(_) => {}
        }
        thread::sleep(LOOK);
    }
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

/// Looks at a pod while it comes to rest; the last look at all of it.
fn rest(
    client: &Client,
    id: &str,
    handler: &str,
    signals: &mut Signals,
) -> Result<Measured, Failure> {
    let end = Instant::now() + REST;
    let mut looks = Looks::default();
    loop {
        signals.check()?;
        let is_last = Instant::now() >= end;
        let pod = observe::look_for(id);
        let goes_on = looks.take(pod.map(|pod| of_pod(handler, &pod)));
        if is_last || !goes_on {
            break;
        }
        thread::sleep(LOOK);
    }
    let is_gone = || {
        let status = client.sandbox_status(id);
        status.map_or_else(
            |error| error.is_not_found(),
            |status| status.state != PodSandboxState::SANDBOX_READY.into(),
        )
    };
    looks
        .outcome(is_gone)
        .map_err(|why| Failure::Node(format!("a pod of the handler '{handler}': {why}")))
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
            "# the alarm of `pericarp metrics`, which reads no RuntimeClass, and `pericarp node manifests` \
             know it\n# once it is set: in {}, [profiles.{}], overhead = \"{overhead}M\"\n",
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
}
