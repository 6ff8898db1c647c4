//! `pericarp node serve`: a thin Kubernetes-shaped interface over containerd, for kubectl on one
//! machine; and `pericarp kubeconfig`, which says how to reach it.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use pericarp_config::Config;
use pericarp_hypervisor::HostFacts;
use pericarp_kube::{
    certificates::{self, Certificates, Kubeconfig},
    http::{Server, Settings},
    node::{Node, NodeSettings},
    store::{Kind, Store},
};
use pericarp_node::manifest::overhead;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::{
    commands::{
        Refusal,
        notes::Notes,
        print,
        reader::{Given, Grammar},
        violations,
    },
    failure::Failure,
    input::problem::Problem,
    signals::Signals,
};

const HELP: &str = "\
Serves a thin Kubernetes-shaped interface over this machine's containerd, for an unmodified kubectl:
pods, runtime classes, config maps, secrets, namespaces, events and the node itself. It does not
schedule, there is no cluster, and no controllers: pods are what you apply. Pods and all objects stay
when it is stopped, and it goes on with them when it is started again.
Whoever has its kubeconfig can do everything on this node that root can.

Usage: pericarp node serve [OPTIONS]
       pericarp kubeconfig > FILE      then `kubectl --kubeconfig FILE get pods`

Options:
      --name NAME               of this instance; several may run beside each other [local]
      --listen ADDRESS:PORT     where clients come [127.0.0.1:6443]
      --containerd-socket FILE  [/run/containerd/containerd.sock]
      --state-dir DIRECTORY     objects, keys, logs and volumes [/var/lib/pericarp/node/NAME]
      --node-name NAME          as pods and `kubectl get nodes` have it; no two instances on one
                                containerd may share it [the host's, and NAME unless that is local]
      --cgroup-parent PATH      the control group that all pods' are in [/pericarp-NAME]
      --config FILE             our configuration [/etc/pericarp/config.toml, if it is there]: there
                                will be a RuntimeClass for each of its handlers
      --verbose                 say every request that is refused
  -h, --help                    show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp node serve",
    help: HELP,
    flags: &[(' ', "verbose")],
    options: &[
        (' ', "name", false),
        (' ', "listen", false),
        (' ', "containerd-socket", false),
        (' ', "state-dir", false),
        (' ', "node-name", false),
        (' ', "cgroup-parent", false),
        (' ', "config", false),
    ],
    ends_at_operand: false,
};

const KUBECONFIG_HELP: &str = "\
Prints what kubectl needs to reach `pericarp node serve` on this machine, with a client certificate
of its own that is valid for a year. It holds a key: whoever reads it can do everything on this node.

Usage: pericarp kubeconfig [OPTIONS] > FILE

Options:
      --name NAME            of the instance [local]
      --state-dir DIRECTORY  as it was given to `pericarp node serve` [/var/lib/pericarp/node/NAME]
  -h, --help                 show this text
";

const KUBECONFIG: Grammar = Grammar {
    command: "pericarp kubeconfig",
    help: KUBECONFIG_HELP,
    flags: &[],
    options: &[(' ', "name", false), (' ', "state-dir", false)],
    ends_at_operand: false,
};

const USUAL_NAME: &str = "local";
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);
/// Where containerd listens unless it was told otherwise.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
const STATE: &str = "/var/lib/pericarp/node";
/// In the state directory: where it listens, for `pericarp kubeconfig`.
const ADDRESS: &str = "address";
const KEYS: &str = "pki";
const NODE_NAME: &str = "node-name";

/// The name of an instance, which becomes that of directories and of a control group.
fn name(given: &Given, problems: &mut Vec<Problem>) -> String {
    let name = given.value("name").unwrap_or(USUAL_NAME);
    dns_label("--name", name, problems);
    name.to_owned()
}

fn dns_label(option: &str, name: &str, problems: &mut Vec<Problem>) {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.len() > 63 || !name.chars().all(inner) || name.starts_with('-') || name.ends_with('-') {
        let rule = "is not made of up to 63 lower case letters, digits and '-'";
        let cure = "choose another name";
        problems.push(Problem::new(option, name.to_owned(), rule, cure));
    }
}

fn absolute(
    given: &Given,
    option: &'static str,
    usual: String,
    problems: &mut Vec<Problem>,
) -> PathBuf {
    let path = given.value(option).map_or(usual, str::to_owned);
    if !path.starts_with('/') {
        let rule = "is no absolute path, which containerd needs";
        let option = format!("--{option}");
        problems.push(Problem::new(
            &option,
            path.clone(),
            rule,
            "begin it with '/'",
        ));
    }
    PathBuf::from(path)
}

pub(crate) fn serve(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(operand) = given.operands.first() {
        let rule = "is not expected here";
        let cure = "see `pericarp node serve --help`";
        return Err(Problem::new("ARGUMENT", operand.clone(), rule, cure).into());
    }
    let mut problems = Vec::new();
    let name = name(&given, &mut problems);
    let listen = match given.value("listen").map(str::parse) {
        None => LISTEN,
        Some(Ok(address)) => address,
        Some(Err(_)) => {
            let value = given.value("listen").unwrap_or_default().to_owned();
            let rule = "is no address with a port";
            let cure = "give one such as 127.0.0.1:6443 or [::1]:6443";
            problems.push(Problem::new("--listen", value, rule, cure));
            LISTEN
        }
    };
    let socket = absolute(&given, "containerd-socket", SOCKET.into(), &mut problems);
    let state = absolute(
        &given,
        "state-dir",
        format!("{STATE}/{name}"),
        &mut problems,
    );
    let usual = format!("/pericarp-{name}");
    let cgroup_parent = absolute(&given, "cgroup-parent", usual, &mut problems);
    let said = given.value("node-name");
    if let Some(said) = said {
        dns_label("--node-name", said, &mut problems);
    }
    let config = match Config::load(given.value("config").map(Path::new)) {
        Ok(config) => Some(config),
        Err(all) => {
            if let Refusal::Input(more) = violations(all) {
                problems.extend(more);
            }
            None
        }
    };
    let Some(config) = config.filter(|_| problems.is_empty()) else {
        return Err(Refusal::Input(problems));
    };
    // Before there are threads, all of which inherit it.
    let mut signals = Signals::block()?;
    super::words::begin(given.flag("verbose"));
    allow_files();
    make_private(&state)?;
    // The kernel's own name of it, by which it tells where something is mounted.
    let state = fs::canonicalize(&state).map_err(|error| failure(&error))?;
    let node_name = node_name(&state, said, || match name == USUAL_NAME {
        true => host_name(),
        // It tells the pods of instances apart.
        false => format!("{}-{name}", host_name()),
    })?;
    let store = Store::open(&state.join("objects.redb")).map_err(|error| failure(&error))?;
    let keys = state.join(KEYS);
    let certificates = Certificates::open(&keys, &name, listen.ip(), &node_name)
        .map_err(|error| failure(&error))?;
    runtime_classes(&store, &config)?;
    let node = Node::start(NodeSettings {
        store: store.clone(),
        socket,
        state: state.clone(),
        name: node_name.clone(),
        address: None,
        cgroup_parent: cgroup_parent.display().to_string(),
        version: concat!("v", env!("CARGO_PKG_VERSION"), "-pericarp").to_owned(),
        chronicle: Arc::new(Notes),
    })
    .map_err(|error| failure(&error))?;
    let settings = Settings {
        store,
        node,
        node_name,
        machines: config.handlers().map(|(name, _)| name.to_owned()).collect(),
        certificates,
    };
    let server = Server::bind(listen, settings).map_err(|error| failure(&error))?;
    let address = server.address().map_err(|error| failure(&error))?;
    let reached = reached_at(address);
    fs::write(state.join(ADDRESS), format!("{reached}\n")).map_err(|error| failure(&error))?;
    eprintln!("pericarp node serve: {name} listens at {address}");
    let (stop, stopped) = io::pipe().map_err(|error| failure(&error))?;
    std::thread::spawn(move || {
        wait_for_end(&mut signals);
        drop(stopped);
    });
    server.run(stop).map_err(|error| failure(&error))?;
    eprintln!("pericarp node serve: {name} has ended; its pods go on");
    Ok(0)
}

/// Returns when the process is asked to end.
fn wait_for_end(signals: &mut Signals) {
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        while let Some(signal) = signals.next() {
            if [libc::SIGINT, libc::SIGTERM, libc::SIGQUIT].contains(&libc::c_int::from(signal)) {
                return;
            }
        }
    }
}

/// An error and all that caused it, in one line.
fn failure(error: &dyn std::error::Error) -> Refusal {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    Failure::Node(line).into()
}

fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .to_lowercase();
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let name: String = name.chars().filter(|c| inner(*c)).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { "localhost" } else { name }.to_owned()
}

/// As many open files as may be: each client and each stream has some.
pub(super) fn allow_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Without it there is room for fewer clients.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// The node's name, which is kept: pods are found again by it, whatever the machine is called by
/// then.
fn node_name(
    state: &Path,
    said: Option<&str>,
    usual: impl FnOnce() -> String,
) -> Result<String, Refusal> {
    let file = state.join(NODE_NAME);
    match (fs::read_to_string(&file), said) {
        (Ok(kept), Some(said)) if kept.trim() != said => {
            let rule = format!(
                "is another than '{}', by which its pods are known",
                kept.trim()
            );
            let cure = "leave it out, or give another --state-dir";
            Err(Problem::new("--node-name", said.to_owned(), rule, cure).into())
        }
        (Ok(kept), _) => Ok(kept.trim().to_owned()),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            let name = said.map_or_else(usual, str::to_owned);
            let new = state.join("node-name.new");
            let written = fs::write(&new, format!("{name}\n"));
            let kept = written.and_then(|()| fs::rename(&new, &file));
            kept.map_err(|error| failure(&error))?;
            Ok(name)
        }
        (Err(error), _) => Err(failure(&error)),
    }
}

/// What is in it are keys and secrets.
fn make_private(state: &Path) -> Result<(), Refusal> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(state);
    let made = made.and_then(|()| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(state, fs::Permissions::from_mode(0o700))
    });
    made.map_err(|error| {
        let value = state.display().to_string();
        let rule = format!("cannot be used: {error}");
        let cure = "run it as root, or give another directory";
        Problem::new("--state-dir", value, rule, cure).into()
    })
}

/// Where a client on this machine finds it.
fn reached_at(address: SocketAddr) -> SocketAddr {
    let mut reached = address;
    if address.ip().is_unspecified() {
        reached.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    reached
}

/// A class for each handler of ours, unless there is one.
fn runtime_classes(store: &Store, config: &Config) -> Result<(), Refusal> {
    let host = HostFacts::probe();
    for (handler, profile) in config.handlers() {
        if store.get(Kind::RuntimeClass, "", handler).is_some() {
            continue;
        }
        let mib = overhead(profile.settings(), &host);
        let class = json!({
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {
                "name": handler,
                "labels": {"app.kubernetes.io/part-of": "pericarp"},
            },
            "handler": handler,
            "overhead": {"podFixed": {"memory": format!("{mib}Mi")}},
        });
        store
            .create(Kind::RuntimeClass, class)
            .map_err(|error| failure(&error))?;
    }
    Ok(())
}

pub(crate) fn kubeconfig(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = KUBECONFIG.read(arguments)?;
    if let Some(operand) = given.operands.first() {
        let rule = "is not expected here";
        let cure = "see `pericarp kubeconfig --help`";
        return Err(Problem::new("ARGUMENT", operand.clone(), rule, cure).into());
    }
    let mut problems = Vec::new();
    let name = name(&given, &mut problems);
    let state = absolute(
        &given,
        "state-dir",
        format!("{STATE}/{name}"),
        &mut problems,
    );
    if !problems.is_empty() {
        return Err(Refusal::Input(problems));
    }
    let never = || {
        let rule = "has never been served here";
        let cure = format!("start `pericarp node serve --name {name}` first");
        Refusal::from(Problem::new("--name", name.clone(), rule, cure))
    };
    let address = match fs::read_to_string(state.join(ADDRESS)) {
        Ok(address) => address,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(never()),
        Err(error) => {
            let value = state.display().to_string();
            let rule = format!("cannot be read: {error}");
            let problem = Problem::new("--state-dir", value, rule, "run it as root");
            return Err(problem.into());
        }
    };
    let made = certificates::kubeconfig(&state.join(KEYS), &name, address.trim());
    match made.map_err(|error| failure(&error))? {
        Kubeconfig::Text(text) => print(&text)?,
        Kubeconfig::NeverServed => return Err(never()),
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(line: &[&str]) -> Vec<String> {
        match serve(line.iter().map(OsString::from).collect()) {
            Err(Refusal::Input(problems)) => problems.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_node_keeps_its_name() {
        let state = std::env::temp_dir().join(format!("pericarp-name-{}", std::process::id()));
        fs::create_dir_all(&state).unwrap();
        let name = |said, usual: &str| node_name(&state, said, || usual.to_owned());
        let all = [name(None, "one"), name(None, "two"), name(Some("one"), "")];
        let other = name(Some("two"), "");
        fs::remove_dir_all(&state).unwrap();
        for name in all {
            assert_eq!(name.unwrap(), "one");
        }
        match other {
            Err(Refusal::Input(problems)) => {
                let said = problems[0].to_string();
                assert!(said.contains("is another than 'one'"), "{said}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wrong_options_are_named_before_anything_is_made() {
        let all = problems(&[
            "--name",
            "A_b",
            "--listen",
            "6443",
            "--state-dir",
            "x",
            "--node-name",
            "-",
        ]);
        assert_eq!(all.len(), 4, "{all:?}");
        assert!(
            all[0].starts_with("--name 'A_b': is not made of"),
            "{all:?}"
        );
        assert!(all[1].starts_with("--listen '6443': is no address with a port"));
        let one = problems(&["--nam", "a"]);
        assert_eq!(one, ["'--nam': unknown option; did you mean '--name'?"]);
        assert_eq!(
            problems(&["x"])[0],
            "ARGUMENT 'x': is not expected here; see `pericarp node serve --help`"
        );
    }

    #[test]
    fn clients_of_this_machine_reach_what_listens_everywhere() {
        for (listens, reached) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("10.0.0.1:1", "10.0.0.1:1"),
        ] {
            assert_eq!(reached_at(listens.parse().unwrap()).to_string(), reached);
        }
    }
}
