//! Networks that come and go by the dozen leave nothing: no link, qdisc, filter, rule, address or
//! open descriptor. Alone in its process, whose descriptors it counts. `PERICARP_NETWORK_CYCLES`
//! says how many of each kind, 4 otherwise.

#[expect(dead_code, reason = "pods with a node are for the other tests")]
mod pod;

use std::{fs, path::Path, process::Command, time::Duration};

use pericarp_network::{Namespace, attach, cni};
use pericarp_tests::{
    bounded::poll,
    parts::{Part, have, search_path},
};
use pod::Space;
use serde_json::{Value, json};

/// Plugins in front of these, for everything that they can leave.
fn configuration(first: Value) -> Value {
    let limits = json!({
        "type": "bandwidth",
        "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
        "egressRate": 80_000_000, "egressBurst": 8_000_000,
    });
    let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    json!({"cniVersion": "0.4.0", "name": first["type"], "plugins": [first, limits, ports]})
}

/// What was looked at, and what was there.
type State = Vec<(String, String)>;

/// What `program` says in the node's namespace, if it is there.
fn said(node: &Space, program: &str, words: &str) -> (String, String) {
    let name = format!("{program} {words}");
    let Some(path) = search_path(program) else {
        return (name, String::new());
    };
    let mut command = Command::new(path);
    command.args(words.split_whitespace());
    let output = node
        .run(|| command.output())
        .expect("a program that starts");
    let text = String::from_utf8_lossy(&output.stdout);
    // Dates, in what iptables reads from nft.
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    (name, lines.collect::<Vec<_>>().join("\n"))
}

/// All that could stay behind, in the node's namespace and in this process.
fn state(node: &Space, addresses: &Path) -> State {
    let mut state = vec![("links and filters".to_owned(), node.snapshot())];
    for words in ["-o link", "route", "-6 route", "rule", "netns"] {
        state.push(said(node, "ip", words));
    }
    for link in node.ip("-o link").lines() {
        let name = link.split([':', '@']).nth(1).expect("a name").trim();
        for side in ["root", "ingress"] {
            state.push(said(node, "tc", &format!("filter show dev {name} {side}")));
        }
    }
    // Without what its rules have counted.
    state.push(said(node, "nft", "-s list ruleset"));
    for program in ["iptables", "ip6tables"] {
        for table in ["filter", "nat", "mangle", "raw"] {
            state.push(said(node, program, &format!("-t {table} -S")));
        }
    }
    let taken = fs::read_dir(addresses).into_iter().flatten().flatten();
    let taken = taken.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut taken: Vec<_> = taken.filter(|name| !name.starts_with("last")).collect();
    taken.sort();
    state.push(("addresses taken".to_owned(), taken.join("\n")));
    let open = fs::read_dir("/proc/self/fd")
        .expect("descriptors")
        .flatten();
    let mut open: Vec<String> = open
        .map(|entry| {
            let to = fs::read_link(entry.path()).unwrap_or_default();
            format!("{} {}", entry.file_name().to_string_lossy(), to.display())
        })
        // The one that reads them.
        .filter(|line| !line.contains("/proc/"))
        .collect();
    open.sort();
    state.push(("open descriptors".to_owned(), open.join("\n")));
    state
}

/// How much of everything there was.
fn counted(state: &State) -> String {
    let count =
        |(what, text): &(String, String)| format!("  {what}: {} lines", text.lines().count());
    state.iter().map(count).collect::<Vec<_>>().join("\n")
}

#[test]
fn networks_that_come_and_go_leave_nothing() {
    let test = "networks_that_come_and_go_leave_nothing";
    if !have(test, &[Part::Ip, Part::Cni, Part::Iptables, Part::Nft]) {
        return;
    }
    let Some(node) = Space::new(test) else {
        return;
    };
    let cycles = std::env::var("PERICARP_NETWORK_CYCLES");
    let cycles: usize = cycles.map_or(4, |count| count.parse().expect("a number of cycles"));
    node.ip("link set lo up");
    node.ip("link add up0 type veth peer name up1");
    node.ip("link set up0 up");
    node.ip("link set up1 up");
    let dir = std::env::temp_dir().join(format!("pericarp-cycles-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    for (net, kind) in ["ptp", "bridge", "macvlan"].into_iter().enumerate() {
        let mut first = json!({
            "type": kind, "ipMasq": true, "mtu": 1440,
            "ipam": {
                "type": "host-local", "dataDir": dir.join("leases"),
                "ranges": [[{"subnet": format!("10.7.{net}.0/24")}], [{"subnet": format!("fd07:{net}::/64")}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        });
        match kind {
            "bridge" => {
                first["bridge"] = json!("cni7");
                first["isGateway"] = json!(true);
            }
            "macvlan" => first["master"] = json!("up0"),
            _ => {}
        }
        let mut config = configuration(first);
        if kind == "macvlan" {
            // The others want an end in the node's namespace.
            config["plugins"]
                .as_array_mut()
                .expect("plugins")
                .truncate(1);
        }
        fs::write(dir.join(format!("{kind}.conflist")), config.to_string()).expect("a file");
        let list = cni::find(&dir, kind).expect("a network");
        let cycle = |number: usize| {
            let namespace = Namespace::unnamed().expect("a namespace");
            let mut invocation = cni::Invocation::new(format!("pod-{number}"), namespace.path());
            invocation.plugin_dirs = vec!["/usr/lib/cni".into(), "/opt/cni/bin".into()];
            if list.maps_ports() {
                invocation.port_mappings = vec![cni::PortMapping {
                    host_port: 8080,
                    container_port: 80,
                    protocol: cni::Protocol::Tcp,
                    host_ip: None,
                }];
            }
            let outcome = node.run(|| list.add(&invocation));
            let outcome = outcome.unwrap_or_else(|error| panic!("{kind}, {number}: {error}"));
            assert_eq!(outcome.addresses.len(), 2, "{kind}: {:?}", outcome.raw);
            let attached = attach(&namespace, 2).expect("a guest");
            assert_eq!(attached.cards.len(), 1);
            // Once: to look takes longer than a network.
            let during = (number == 1).then(|| state(&node, &dir.join("leases").join(kind)));
            attached.detach().expect("no guest");
            // Every other one as after a kill: what was in its namespace is gone first.
            let deleted = if number.is_multiple_of(2) {
                node.run(|| list.delete(&invocation, Some(&outcome.raw)))
            } else {
                drop(namespace);
                node.run(|| list.delete_gone(&invocation, Some(&outcome.raw)))
            };
            deleted.unwrap_or_else(|error| panic!("{kind}, {number}: {error}"));
            during
        };
        // Bridges and chains of rules are made by the first, to stay.
        cycle(0);
        let alone = || {
            let bridges = node.ip("-o link show type bridge");
            bridges.lines().all(|line| line.contains("NO-CARRIER"))
        };
        // The kernel tells a bridge a moment later that nobody is on it.
        let alone = poll(Duration::from_secs(10), || alone().then_some(()));
        assert!(alone.is_some(), "{kind}: somebody is on the bridge");
        let before = state(&node, &dir.join("leases").join(kind));
        for number in 1..=cycles {
            let during = cycle(number);
            assert_ne!(during.as_ref(), Some(&before), "{kind}: nothing was there");
            if let Some(during) = during {
                println!("{kind}, while a network is there:\n{}", counted(&during));
            }
        }
        // A link goes a moment after its namespace.
        let clean = poll(Duration::from_secs(10), || {
            (state(&node, &dir.join("leases").join(kind)) == before).then_some(())
        });
        let after = state(&node, &dir.join("leases").join(kind));
        if clean.is_none() {
            assert_eq!(after, before, "{kind}");
        }
        println!(
            "{kind}, as before after {cycles} networks:\n{}",
            counted(&after)
        );
    }
    fs::remove_dir_all(dir).expect("to be removed");
}
