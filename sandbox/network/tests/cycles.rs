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

/// What `program` says in the node's namespace, if it is there.
fn said(node: &Space, program: &str, words: &str) -> String {
    let Some(path) = search_path(program) else {
        return String::new();
    };
    let mut command = Command::new(path);
    command.args(words.split_whitespace());
    let output = node
        .run(|| command.output())
        .expect("a program that starts");
    let text = String::from_utf8_lossy(&output.stdout);
    // Dates, in what iptables reads from nft.
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let lines: Vec<&str> = lines.collect();
    format!("{program} {words}\n{}\n", lines.join("\n"))
}

/// All that could stay behind, in the node's namespace and in this process.
fn state(node: &Space, addresses: &Path) -> String {
    let mut state = node.snapshot();
    for words in ["-o link", "route", "-6 route", "rule", "netns"] {
        state += &said(node, "ip", words);
    }
    state += &said(node, "nft", "list ruleset");
    for program in ["iptables", "ip6tables"] {
        for table in ["filter", "nat", "mangle", "raw"] {
            state += &said(node, program, &format!("-t {table} -S"));
        }
    }
    let taken = fs::read_dir(addresses).into_iter().flatten().flatten();
    let mut taken: Vec<_> = taken.map(|entry| entry.file_name()).collect();
    taken.retain(|name| !name.to_string_lossy().starts_with("last"));
    taken.sort();
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
    format!("{state}{taken:?}\n{}\n", open.join("\n"))
}

#[test]
fn networks_that_come_and_go_leave_nothing() {
    let test = "networks_that_come_and_go_leave_nothing";
    if !have(test, &[Part::Ip, Part::Cni, Part::Iptables]) {
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
        }
        // A link goes a moment after its namespace.
        let clean = poll(Duration::from_secs(10), || {
            (state(&node, &dir.join("leases").join(kind)) == before).then_some(())
        });
        if clean.is_none() {
            assert_eq!(
                state(&node, &dir.join("leases").join(kind)),
                before,
                "{kind}"
            );
        }
    }
    fs::remove_dir_all(dir).expect("to be removed");
}
