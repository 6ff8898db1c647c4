//! The network of a run: joined before it starts, left after it has ended.
//!
//! Called by `vm` and `runc`. A namespace that we make for the plugins has no name: it is there as
//! long as this process is, and plugins find it among our descriptors. What they leave elsewhere
//! (addresses taken, rules) is written down first, so that the next run undoes it for one that was
//! killed, as it does for containers.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pericarp_api::{RESOLV_CONF, agent, network::MAX_RESOLV_CONF};
use pericarp_network::{
    AttachError, Attached, Namespace, attach,
    cni::{CniError, Dns, Invocation, List, Outcome},
    sweep,
};
use pericarp_pod::{network::message, sidecar::Card};
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    failure::{Failure, during},
    input::network::{CniPlan, NetworkPlan},
    report,
    rundir::RunDir,
    signals::Signals,
};

/// Left by a run whose network others know of.
pub(crate) const NETWORK_FILE: &str = "network.json";
/// Where a container of this run reads its resolver's configuration, and finds its namespace.
const RESOLVER: &str = "resolv.conf";
const NAMESPACE: &str = "netns";
/// Whose the nameservers are unless a network has its own.
const HOSTS_RESOLVER: &str = "/etc/resolv.conf";
/// Where systemd has those that its own asks.
const BEHIND_IT: &str = "/run/systemd/resolve/resolv.conf";
/// For a plugin that undoes what a dead run left, or one that has failed.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// For those that undo what this run did, after a signal: it may have come for the command.
const IMPATIENCE: Duration = Duration::from_secs(3);

/// The network of one run.
#[derive(Debug)]
pub(crate) struct Joined {
    namespace: Option<Namespace>,
    attached: Option<Attached>,
    made: Option<Made>,
    resolver: String,
    record: PathBuf,
    /// Plugins have not undone what they did.
    owing: bool,
    /// Where a container on this host finds the namespace.
    place: Option<PathBuf>,
}

/// What the next run has to undo for one that was killed, as it is written down.
#[derive(Debug, Serialize, Deserialize)]
enum Debt {
    Made(Box<Made>),
    /// The path of a namespace of somebody else's.
    Attached(PathBuf),
}

/// What plugins made.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Made {
    list: List,
    invocation: Invocation,
    result: Option<Value>,
}

impl Joined {
    /// Makes the network, or finds it.
    pub(crate) fn join(
        plan: NetworkPlan,
        run_dir: &RunDir,
        signals: &mut Signals,
    ) -> Result<Self, Failure> {
        let mut joined = Self {
            namespace: None,
            attached: None,
            made: None,
            resolver: String::new(),
            record: run_dir.join(NETWORK_FILE),
            owing: false,
            place: None,
        };
        match plan {
            NetworkPlan::None => {}
            NetworkPlan::Namespace(namespace, path) => {
                joined.resolver = resolver(&Dns::default(), &resolver_of(&path));
                joined.namespace = Some(namespace);
            }
            NetworkPlan::Cni(plan) => joined.make(plan, run_dir, signals)?,
        }
        Ok(joined)
    }

    fn make(
        &mut self,
        plan: CniPlan,
        run_dir: &RunDir,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let namespace =
            Namespace::unnamed().map_err(|error| Failure::Network(error.to_string()))?;
        let directory = run_dir.path().file_name().unwrap_or_default();
        let id = format!("pericarp-{}", directory.to_string_lossy());
        let invocation = Invocation {
            plugin_dirs: plan.places.plugins,
            port_mappings: plan.ports,
            ..Invocation::new(id, namespace.path())
        };
        self.namespace = Some(namespace);
        let made = Made {
            list: plan.list,
            invocation,
            result: None,
        };
        let made = self.made.insert(made);
        // Before anybody does anything that has to be undone.
        Debt::Made(Box::new(made.clone())).write(&self.record)?;
        let mut signal = None;
        let mut stop = || {
            signal = signals.check().err();
            signal.is_some()
        };
        let outcome = match made.list.add_until(&made.invocation, &mut stop) {
            Ok(outcome) => outcome,
            Err(error) => {
                // It has been undone.
                self.made = None;
                let said = || Failure::Network(error.to_string());
                return Err(signal.unwrap_or_else(said));
            }
        };
        let Outcome { dns, raw, .. } = outcome;
        made.result = Some(raw);
        Debt::Made(Box::new(made.clone())).write(&self.record)?;
        self.resolver = resolver(&dns, Path::new(HOSTS_RESOLVER));
        Ok(())
    }

    /// A card for each interface, with so many queues.
    pub(crate) fn cards(&mut self, queues: u16, run_dir: &RunDir) -> Result<Vec<Card>, Failure> {
        let Some(namespace) = &self.namespace else {
            return Ok(Vec::new());
        };
        if self.made.is_none() {
            // It stays when we are gone.
            Debt::Attached(namespace.path().to_owned()).write(&self.record)?;
        }
        let attached = attach(namespace, queues);
        let mut attached = attached.map_err(|error| Failure::Network(error.to_string()))?;
        for what in &attached.network.left_out {
            report::warn(&format!("the machine's network is without {what}"));
        }
        let cards = std::mem::take(&mut attached.cards);
        self.attached = Some(attached);
        let card = |(index, card): (usize, pericarp_network::Card)| {
            let id = format!("card{}", index + 1);
            Card {
                socket: run_dir.join(&format!("{id}.sock")),
                id,
                mac: card.mac,
                mtu: card.mtu,
                queues: card.queues,
            }
        };
        Ok(cards.into_iter().enumerate().map(card).collect())
    }

    /// What the guest is told of it.
    pub(crate) fn message(&self) -> Option<agent::Network> {
        let attached = self.attached.as_ref()?;
        let mut message = message(&attached.network);
        if self.resolver.len() > MAX_RESOLV_CONF {
            report::warn("the machine has no nameservers: there are too many of them");
        } else {
            message.resolv_conf.clone_from(&self.resolver);
        }
        Some(message)
    }

    /// Shows the container of a machine what its guest has.
    pub(crate) fn show_in_guest(&self, spec: &mut Value) {
        if (1..=MAX_RESOLV_CONF).contains(&self.resolver.len()) {
            add_mount(spec, Path::new(RESOLV_CONF));
        }
    }

    /// Puts a container on this host into it. Called where mounts are its own.
    pub(crate) fn show_here(&mut self, spec: &mut Value, run_dir: &RunDir) -> Result<(), Failure> {
        let Some(namespace) = &self.namespace else {
            return Ok(());
        };
        // The container's runtime has other processes below /proc.
        let path = run_dir.join(NAMESPACE);
        fs::write(&path, "").map_err(during("the namespace's place"))?;
        rustix::mount::mount_bind(namespace.path(), &path).map_err(during("the namespace"))?;
        self.place = Some(path.clone());
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.push(json!({"type": "network", "path": path}));
        }
        if self.made.is_none()
            && let Some(settings) = spec["linux"]["sysctl"].as_object_mut()
        {
            // It is somebody else's.
            settings.retain(|name, _| !name.starts_with("net."));
        }
        if !self.resolver.is_empty() {
            let path = run_dir.join(RESOLVER);
            fs::write(&path, &self.resolver).map_err(during("the resolver's configuration"))?;
            add_mount(spec, &path);
        }
        Ok(())
    }

    /// Leaves it as it was. What cannot be undone is said. A signal ends a plugin that keeps us.
    pub(crate) fn leave(mut self, signals: &mut Signals) {
        let begin = Instant::now();
        let mut asked = false;
        self.undo(None, &mut || {
            asked |= signals.check().is_err();
            asked && begin.elapsed() > IMPATIENCE
        });
    }

    /// What stays is the next run's to undo, which finds the record.
    fn undo(&mut self, limit: Option<Duration>, stop: &mut dyn FnMut() -> bool) {
        if let Some(place) = self.place.take() {
            // The directory could not be removed otherwise. Nobody else sees this mount.
            let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
        }
        if let Some(attached) = self.attached.take()
            && let Err(error) = attached.detach()
        {
            report::warn(&format!("the network is not as it was: {error}"));
        }
        let done = self.made.take().is_none_or(|made| {
            let mut invocation = made.invocation.clone();
            invocation.time_limit = limit.unwrap_or(invocation.time_limit);
            let (list, result) = (&made.list, made.result.as_ref());
            said(list.delete_until(&invocation, result, stop))
        });
        self.owing |= !done;
        if !self.owing {
            let _ = fs::remove_file(&self.record);
        }
    }
}

/// On the way out of a run that failed, or was stopped.
impl Drop for Joined {
    fn drop(&mut self) {
        self.undo(Some(SETTLE_LIMIT), &mut || false);
    }
}

impl Debt {
    fn write(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_vec(self).map_err(during("the record of the network"))?;
        let part = path.with_extension("part");
        fs::write(&part, text)
            .and_then(|()| fs::rename(part, path))
            .map_err(during("the record of the network"))
    }
}

/// True where it was deleted.
fn said(deleted: Result<(), CniError>) -> bool {
    if let Err(error) = &deleted {
        report::warn(&format!("the network is not removed: {error}"));
    }
    deleted.is_ok()
}

/// Undoes what a run left that was killed. Its own namespace is gone with it. False where that
/// failed, which was said.
pub(crate) fn settle(directory: &Path) -> bool {
    let Ok(text) = fs::read(directory.join(NETWORK_FILE)) else {
        return true;
    };
    match serde_json::from_slice(&text) {
        Ok(Debt::Made(made)) => {
            let made = *made;
            let invocation = Invocation {
                // All other runs wait for it.
                time_limit: SETTLE_LIMIT,
                ..made.invocation
            };
            said(made.list.delete_gone(&invocation, made.result.as_ref()))
        }
        Ok(Debt::Attached(path)) => {
            // Gone with all that was in it, perhaps, or another guest's by now.
            let swept = Namespace::open(&path).map(|namespace| sweep(&namespace));
            match swept {
                Err(_) | Ok(Ok(()) | Err(AttachError::Claimed { .. })) => true,
                Ok(Err(error)) => {
                    report::warn(&format!("{} is not as it was: {error}", path.display()));
                    false
                }
            }
        }
        // Not ours.
        Err(_) => true,
    }
}

fn add_mount(spec: &mut Value, source: &Path) {
    // A volume that is there already has the last word.
    let taken = |mount: &Value| {
        let destination = mount["destination"].as_str();
        matches!(destination, Some("/etc" | "/etc/resolv.conf"))
    };
    if let Some(mounts) = spec["mounts"].as_array_mut()
        && !mounts.iter().any(taken)
    {
        mounts.push(json!({
            "destination": "/etc/resolv.conf",
            "type": "bind",
            "source": source,
            "options": ["bind", "rprivate", "nosuid", "nodev", "noexec", "ro"],
        }));
    }
}

/// Where `ip netns` keeps the resolver's configuration of a namespace with a name; else the host's.
fn resolver_of(namespace: &Path) -> PathBuf {
    let name = namespace.file_name().unwrap_or_default();
    let own = Path::new("/etc/netns").join(name).join("resolv.conf");
    match own.is_file() {
        true => own,
        false => HOSTS_RESOLVER.into(),
    }
}

/// What containers read: as the network says, else as a file here does, without nameservers that
/// are this host's own and cannot be reached from elsewhere.
fn resolver(dns: &Dns, file: &Path) -> String {
    let mut text = String::new();
    let mut line = |key: &str, values: &[String]| {
        // One line, whatever a plugin says.
        let odd = |value: &String| value.contains(char::is_control);
        if !values.is_empty() && !values.iter().any(odd) {
            text.push_str(&format!("{key} {}\n", values.join(" ")));
        }
    };
    if !dns.nameservers.is_empty() {
        if !dns.domain.is_empty() {
            line("domain", std::slice::from_ref(&dns.domain));
        }
        line("search", &dns.search);
        line("options", &dns.options);
        for server in &dns.nameservers {
            line("nameserver", std::slice::from_ref(server));
        }
        return text;
    }
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let ours = |line: &str| {
        let server = line.trim().strip_prefix("nameserver").map(str::trim);
        let server = server.and_then(|server| server.parse::<IpAddr>().ok());
        server.is_some_and(|server| server.is_loopback())
    };
    let of_others = |text: String| -> String {
        let lines = text.lines().filter(|line| !ours(line));
        lines.flat_map(|line| [line, "\n"]).collect()
    };
    let has_servers = |text: &str| {
        let mut lines = text.lines();
        lines.any(|line| line.trim().starts_with("nameserver"))
    };
    let text = of_others(read(file));
    match has_servers(&text) {
        true => text,
        // This host asks itself, and that one asks these.
        false => of_others(read(Path::new(BEHIND_IT))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_are_the_networks_or_those_of_this_host_that_others_reach() {
        let path = std::env::temp_dir().join(format!("pericarp-resolver-{}", std::process::id()));
        fs::write(
            &path,
            "search a\nnameserver 127.0.0.53\nnameserver 10.0.0.9\n",
        )
        .unwrap();
        let none = Dns::default();
        assert_eq!(resolver(&none, &path), "search a\nnameserver 10.0.0.9\n");
        let own = Dns {
            nameservers: vec!["10.1.0.1".into(), "fd00::1".into()],
            search: vec!["svc".into(), "local".into()],
            ..Dns::default()
        };
        assert_eq!(
            resolver(&own, &path),
            "search svc local\nnameserver 10.1.0.1\nnameserver fd00::1\n"
        );
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn nameservers_are_mounted_unless_a_volume_is_there() {
        let mut spec = json!({"mounts": []});
        add_mount(&mut spec, Path::new("/x"));
        assert_eq!(spec["mounts"][0]["source"], "/x");
        assert_eq!(spec["mounts"][0]["destination"], "/etc/resolv.conf");
        for place in ["/etc", "/etc/resolv.conf"] {
            let before = json!({"mounts": [{"destination": place}]});
            let mut spec = before.clone();
            add_mount(&mut spec, Path::new("/x"));
            assert_eq!(spec, before);
        }
    }
}
