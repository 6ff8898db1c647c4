//! Namespaces, taps and filters, with a pod and a node that the tests make: two namespaces
//! and a pair of interfaces between them. Takes root.

mod pod;

use std::{
    fs::File,
    io::{Read, Write},
    net::IpAddr,
    path::PathBuf,
    time::Duration,
};

use pericarp_network::{
    Address, ApplyError, AttachError, Attached, Interface, Namespace, NamespaceError, Neighbour,
    Network, Route, SurveyError, apply, attach, cni, survey, sweep,
};
use pericarp_tests::{bounded::poll, parts};
use pod::{Pod, Space};
use serde_json::json;

const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];
const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 9, 1];

fn parsed(ip: &str) -> IpAddr {
    ip.parse().expect("an address")
}

fn address(ip: &str, prefix: u8) -> Address {
    Address {
        ip: parsed(ip),
        prefix,
        peer: None,
        broadcast: None,
        scope: 0,
    }
}

fn route(interface: &str, to: &str, prefix: u8) -> Route {
    let six = to.contains(':');
    Route {
        interface: interface.into(),
        destination: (parsed(to), prefix),
        gateway: None,
        source: None,
        scope: if six { 0 } else { 253 },
        metric: six.then_some(1024),
        mtu: None,
        onlink: false,
    }
}

fn via(interface: &str, to: &str, prefix: u8, gateway: &str) -> Route {
    Route {
        gateway: Some(parsed(gateway)),
        scope: 0,
        ..route(interface, to, prefix)
    }
}

fn here(space: &Space) -> Result<Network, SurveyError> {
    space.run(survey)
}

/// A guest's half: the same cards under other names.
fn guest(test: &str, cards: &[(&str, [u8; 6])]) -> Option<Space> {
    let space = Space::new(test)?;
    for (place, (name, mac)) in cards.iter().enumerate() {
        space.ip(&format!(
            "link add {name} address {} type veth peer name other{place}",
            pod::mac(*mac)
        ));
    }
    Some(space)
}

#[test]
fn a_survey_says_what_is_there() {
    let Some(pod) = Pod::new("a_survey_says_what_is_there") else {
        return;
    };
    // The routes that the plugin ptp makes, and what other plugins do.
    for words in [
        "link set eth0 mtu 1450",
        "addr add 10.9.0.2/24 brd 10.9.0.255 dev eth0",
        "addr add 10.9.1.2 peer 10.9.1.1/32 dev eth0",
        "-6 addr add fd00:9::2/64 dev eth0 nodad",
        "-6 addr add fd00:9::3/64 dev eth0 nodad",
        "route del 10.9.0.0/24 dev eth0",
        "route add 10.9.0.1 dev eth0 scope link src 10.9.0.2",
        "route add 10.9.0.0/24 via 10.9.0.1 dev eth0 src 10.9.0.2",
        "route add default via 10.9.0.1 dev eth0 mtu 1400",
        "route add default via 169.254.1.1 dev eth0 onlink metric 7",
        "route add 10.8.0.0/16 via inet6 fe80::1 dev eth0",
        "-6 route add default via fe80::1 dev eth0 mtu 1390",
        "neigh add 10.9.0.1 lladdr 02:00:00:00:09:01 dev eth0 nud permanent",
        "-6 neigh add fe80::1 lladdr 02:00:00:00:09:01 dev eth0 nud permanent",
        "neigh add 10.9.0.7 lladdr 02:00:00:00:09:07 dev eth0 nud stale",
        // And what a guest does without.
        "route add 10.7.0.0/16 nexthop via 10.9.0.1 dev eth0 nexthop via 10.9.1.1 dev eth0",
        "route add blackhole 10.6.0.0/16",
        "route add 10.5.0.0/16 via 10.9.0.1 table 100",
        "rule add from 10.9.0.2 table 100 priority 50",
    ] {
        pod.inside.ip(words);
    }
    let found = here(&pod.inside).unwrap();
    let expected = Network {
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: MAC,
            mtu: 1450,
            addresses: vec![
                Address {
                    broadcast: Some([10, 9, 0, 255].into()),
                    ..address("10.9.0.2", 24)
                },
                Address {
                    peer: Some([10, 9, 1, 1].into()),
                    ..address("10.9.1.2", 32)
                },
                address("fd00:9::2", 64),
                address("fd00:9::3", 64),
            ],
        }],
        routes: vec![
            Route {
                source: Some(parsed("10.9.0.2")),
                ..route("eth0", "10.9.0.1", 32)
            },
            Route {
                source: Some(parsed("10.9.1.2")),
                ..route("eth0", "10.9.1.1", 32)
            },
            Route {
                metric: Some(256),
                ..route("eth0", "fd00:9::", 64)
            },
            Route {
                mtu: Some(1400),
                ..via("eth0", "0.0.0.0", 0, "10.9.0.1")
            },
            Route {
                metric: Some(7),
                onlink: true,
                ..via("eth0", "0.0.0.0", 0, "169.254.1.1")
            },
            via("eth0", "10.8.0.0", 16, "fe80::1"),
            Route {
                source: Some(parsed("10.9.0.2")),
                ..via("eth0", "10.9.0.0", 24, "10.9.0.1")
            },
            Route {
                mtu: Some(1390),
                ..via("eth0", "::", 0, "fe80::1")
            },
        ],
        neighbours: vec![
            Neighbour {
                interface: "eth0".into(),
                ip: parsed("10.9.0.1"),
                mac: NODE_MAC,
            },
            Neighbour {
                interface: "eth0".into(),
                ip: parsed("fe80::1"),
                mac: NODE_MAC,
            },
        ],
        left_out: [
            "the route to 10.5.0.0/16: is in table 100",
            "the route to 10.6.0.0/16: is of type blackhole",
            "the route to 10.7.0.0/16: has several gateways",
            "the IPv4 rule with priority 50: the guest has the default rules only",
        ]
        .map(String::from)
        .to_vec(),
    };
    let mut sorted = found.clone();
    // The order of tables is the kernel's affair.
    sorted.left_out[..3].sort();
    assert_eq!(sorted, expected, "{found:#?}");

    // A guest makes the same of it, and says the same.
    let Some(guest) = guest("a_survey_says_what_is_there", &[("enp0s4", MAC)]) else {
        return;
    };
    guest.run(|| apply(&found)).unwrap();
    let again = here(&guest).unwrap();
    let wanted = Network {
        left_out: Vec::new(),
        ..found.clone()
    };
    assert_eq!(again, wanted);
    // Once more changes nothing.
    guest.run(|| apply(&found)).unwrap();
    assert_eq!(here(&guest).unwrap(), wanted);
}

#[test]
fn addresses_without_their_routes_stay_so() {
    let Some(pod) = Pod::new("addresses_without_their_routes_stay_so") else {
        return;
    };
    pod.inside.ip("addr add 10.9.0.2/24 dev eth0 noprefixroute");
    pod.inside.ip("addr add 10.9.2.2/24 dev eth0 metric 300");
    pod.inside
        .ip("-6 addr add fd00:9::2/64 dev eth0 nodad noprefixroute");
    pod.inside.ip("-6 addr add fe80::9/64 dev eth0 nodad");
    let found = here(&pod.inside).unwrap();
    assert_eq!(found.interfaces[0].addresses.len(), 4);
    assert_eq!(found.routes.len(), 1, "{:?}", found.routes);
    assert_eq!(found.routes[0].metric, Some(300));
    let Some(guest) = guest("addresses_without_their_routes_stay_so", &[("card", MAC)]) else {
        return;
    };
    guest.run(|| apply(&found)).unwrap();
    assert_eq!(here(&guest).unwrap(), found);
}

#[test]
fn names_are_swapped() {
    let Some(space) = guest("names_are_swapped", &[("eth1", MAC), ("eth0", NODE_MAC)]) else {
        return;
    };
    space.ip("link set eth1 up");
    let interface = |name: &str, mac, last| Interface {
        name: name.into(),
        mac,
        mtu: 1500,
        addresses: vec![address(&format!("10.9.{last}.2"), 24)],
    };
    let mut network = Network {
        interfaces: vec![interface("eth0", MAC, 0), interface("eth1", NODE_MAC, 1)],
        routes: vec![route("eth1", "10.9.1.0", 24)],
        ..Network::default()
    };
    space.run(|| apply(&network)).unwrap();
    assert_eq!(here(&space).unwrap(), network);
    // A name of somebody who is not in the list.
    network.interfaces[0].name = "other0".into();
    let taken = space.run(|| apply(&network)).unwrap_err();
    assert!(matches!(taken, ApplyError::Taken { .. }), "{taken}");
    // A route that the kernel does not take.
    network.interfaces[0].name = "eth0".into();
    network.routes = vec![via("eth1", "10.0.0.0", 8, "192.0.2.1")];
    let refused = space.run(|| apply(&network)).unwrap_err().to_string();
    let (what, answer) = refused.split_at("the route 10.0.0.0/8 via 192.0.2.1 dev eth1: ".len());
    assert_eq!(what, "the route 10.0.0.0/8 via 192.0.2.1 dev eth1: ");
    assert!(answer.contains("os error"), "{refused}");
    network.routes[0].interface = "eth7".into();
    let unknown = space.run(|| apply(&network)).unwrap_err();
    assert!(matches!(unknown, ApplyError::Unknown { .. }), "{unknown}");
    // A card that does not come.
    network.interfaces[1].mac = [2, 0, 0, 0, 9, 9];
    let missing = space.run(|| apply(&network)).unwrap_err().to_string();
    for part in ["eth1: ", "02:00:00:00:09:09", "eth0 (02:00:00:00:09:02)"] {
        assert!(missing.contains(part), "{missing}");
    }
}

#[test]
fn a_card_may_come_late() {
    let Some(space) = Space::new("a_card_may_come_late") else {
        return;
    };
    let network = Network {
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: MAC,
            mtu: 1500,
            addresses: Vec::new(),
        }],
        ..Network::default()
    };
    std::thread::scope(|scope| {
        let applied = scope.spawn(|| space.run(|| apply(&network)));
        std::thread::sleep(Duration::from_millis(200));
        space.ip(&format!(
            "link add late address {} type veth peer name other",
            pod::mac(MAC)
        ));
        applied.join().unwrap().unwrap();
    });
    assert_eq!(here(&space).unwrap(), network);
}

/// An ARP request of the guest for the node, after the header of the tap.
fn question() -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &MAC, &[8, 6]].concat();
    let kinds = [0, 1, 8, 0, 6, 4, 0, 1];
    let arp = [&kinds[..], &MAC, &[10, 9, 0, 2], &[0; 6], &[10, 9, 0, 1]].concat();
    let mut frame = [&[0; 10][..], &ethernet, &arp].concat();
    frame.resize(70, 0);
    frame
}

/// The node's answer to it, from any of the queues.
fn answered(queues: &mut [File]) -> bool {
    let found = poll(Duration::from_secs(5), || {
        let mut frame = [0; 2048];
        for queue in &mut *queues {
            while let Ok(length) = queue.read(&mut frame) {
                let frame = &frame[10..length];
                if frame.get(..14) == Some(&[&MAC[..], &NODE_MAC, &[8, 6]].concat()) {
                    return Some(frame[20..22] == [0, 2]);
                }
            }
        }
        None
    });
    found.unwrap_or_default()
}

fn queues(attached: &mut Attached) -> Vec<File> {
    let cards = std::mem::take(&mut attached.cards);
    let queues = cards.into_iter().flat_map(|card| card.queues);
    queues.map(File::from).collect()
}

#[test]
fn frames_pass_both_ways_and_nothing_stays() {
    let Some(pod) = Pod::new("frames_pass_both_ways_and_nothing_stays") else {
        return;
    };
    pod.inside.ip("link set eth0 mtu 9000");
    let before = pod.inside.snapshot();
    for pairs in [1, 3] {
        let mut attached = attach(&pod.inside.namespace, pairs).unwrap();
        let card = &attached.cards[0];
        assert_eq!(
            (card.interface.as_str(), card.mac, card.mtu),
            ("eth0", MAC, 9000)
        );
        assert_eq!(card.queues.len(), usize::from(pairs));
        assert_eq!(attached.network, here(&pod.inside).unwrap());
        let shown = pod.inside.ip("-d link show pericarp0");
        for part in [
            "mtu 9000",
            "qlen 10000",
            "tun type tap pi off vnet_hdr on",
            "UP",
        ] {
            assert!(shown.contains(part), "no {part}: {shown}");
        }
        assert_eq!(
            pod.inside.ip("addr show pericarp0").matches("inet").count(),
            0
        );
        let mut queues = queues(&mut attached);
        queues[0].write_all(&question()).unwrap();
        assert!(answered(&mut queues), "{pairs} pairs");
        // The node has seen who asked.
        let neighbours = pod.node.ip("neigh show dev node0");
        assert!(neighbours.contains("02:00:00:00:09:02"), "{neighbours}");
        attached.detach().unwrap();
        assert_eq!(
            pod.inside.snapshot(),
            before,
            "while somebody has the queues"
        );
        assert!(queues[0].write_all(&question()).is_err());
    }
    drop(attach(&pod.inside.namespace, 1).unwrap());
    assert_eq!(pod.inside.snapshot(), before);
}

#[test]
fn leftovers_are_replaced_and_living_guests_are_not() {
    let Some(pod) = Pod::new("leftovers_are_replaced_and_living_guests_are_not") else {
        return;
    };
    let before = pod.inside.snapshot();
    // As after a kill: the taps have gone with their queues, the filters are there.
    let mut killed = attach(&pod.inside.namespace, 1).unwrap();
    drop(queues(&mut killed));
    killed.leave();
    assert_ne!(pod.inside.snapshot(), before);
    let mut second = attach(&pod.inside.namespace, 1).unwrap();
    let mut held = queues(&mut second);
    held[0].write_all(&question()).unwrap();
    assert!(answered(&mut held));
    // While one guest has it, another cannot.
    let third = attach(&pod.inside.namespace, 1).unwrap_err();
    assert!(matches!(third, AttachError::Claimed { .. }), "{third}");
    held[0].write_all(&question()).unwrap();
    assert!(answered(&mut held));
    let swept = sweep(&pod.inside.namespace).unwrap_err();
    assert!(matches!(swept, AttachError::Claimed { .. }), "{swept}");
    // Nor while its backend outlives who made it, unless somebody says that it is over.
    second.leave();
    let fourth = attach(&pod.inside.namespace, 1).unwrap_err();
    assert!(matches!(fourth, AttachError::InUse { .. }), "{fourth}");
    sweep(&pod.inside.namespace).unwrap();
    assert_eq!(pod.inside.snapshot(), before);
    sweep(&pod.inside.namespace).unwrap();
}

#[test]
fn filters_of_others_survive() {
    let Some(pod) = Pod::new("filters_of_others_survive") else {
        return;
    };
    let filter = "filter add dev eth0 ingress protocol ip u32 match ip dst 192.0.2.1/32 \
                  action mirred egress redirect dev lo";
    for qdisc in ["clsact", "ingress"] {
        pod.inside.tc(&format!("qdisc add dev eth0 {qdisc}"));
        pod.inside.tc(&filter.replace("ingress", "ingress prio 5"));
        let before = pod.inside.snapshot();
        let mut attached = attach(&pod.inside.namespace, 1).unwrap();
        let mut held = queues(&mut attached);
        held[0].write_all(&question()).unwrap();
        assert!(answered(&mut held));
        attached.detach().unwrap();
        assert_eq!(pod.inside.snapshot(), before);
        // Killed, and swept by a successor.
        let mut killed = attach(&pod.inside.namespace, 1).unwrap();
        drop(queues(&mut killed));
        killed.leave();
        attach(&pod.inside.namespace, 1).unwrap().detach().unwrap();
        assert_eq!(pod.inside.snapshot(), before);
        pod.inside.tc(&format!("qdisc del dev eth0 {qdisc}"));
    }
    // Filters that come to our qdisc keep it.
    let attached = attach(&pod.inside.namespace, 1).unwrap();
    pod.inside.tc(&filter.replace("ingress", "ingress prio 5"));
    attached.detach().unwrap();
    let shown = pod.inside.tc("filter show dev eth0 ingress");
    assert!(
        shown.contains("pref 5 ") && !shown.contains("pref 28773"),
        "{shown}"
    );
    // And one at our priority is left alone.
    pod.inside
        .tc(&filter.replace("ingress", "ingress prio 28773"));
    let before = pod.inside.snapshot();
    let refused = attach(&pod.inside.namespace, 1).unwrap_err();
    assert!(matches!(refused, AttachError::Priority { .. }), "{refused}");
    assert_eq!(pod.inside.snapshot(), before);
}

#[test]
fn all_or_nothing() {
    let Some(pod) = Pod::new("all_or_nothing") else {
        return;
    };
    // The second tap cannot be made.
    pod.inside.ip("link add net1 type veth peer name other1");
    pod.inside.ip("link set net1 up");
    pod.inside
        .ip("link add pericarp1 type veth peer name other2");
    let before = pod.inside.snapshot();
    let refused = attach(&pod.inside.namespace, 1).unwrap_err();
    assert!(matches!(refused, AttachError::Tap { .. }), "{refused}");
    assert!(refused.to_string().contains("pericarp1"), "{refused}");
    assert_eq!(pod.inside.snapshot(), before);
    pod.inside.ip("link del pericarp1");
    let two = attach(&pod.inside.namespace, 1).unwrap();
    let names: Vec<_> = two
        .cards
        .iter()
        .map(|card| card.interface.as_str())
        .collect();
    assert_eq!(names, ["eth0", "net1"]);
    drop(two);
    for place in 2..17 {
        pod.inside
            .ip(&format!("link add net{place} type veth peer name o{place}"));
        pod.inside.ip(&format!("link set net{place} up"));
    }
    let many = attach(&pod.inside.namespace, 1).unwrap_err();
    assert!(matches!(many, AttachError::TooMany { count: 17 }), "{many}");
}

#[test]
fn ports_and_interfaces_without_frames_are_named() {
    let Some(pod) = Pod::new("ports_and_interfaces_without_frames_are_named") else {
        return;
    };
    for words in [
        "link add br0 type bridge",
        "link set br0 up",
        "link add port0 type veth peer name other",
        "link set port0 master br0 up",
        "link add up0 link eth0 type macvlan",
        "link set up0 up",
        "tuntap add tun0 mode tun",
        "link set tun0 up",
    ] {
        pod.inside.ip(words);
    }
    let found = here(&pod.inside).unwrap();
    let names: Vec<_> = found.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["eth0", "br0"]);
    let mut left_out = found.left_out;
    left_out.sort();
    let expected = [
        "port0: is a port of br0, which has its frames",
        "tun0: has no Ethernet addresses, and no others for the guest",
        "up0: stands on eth0, whose frames all go to the guest: have the guest make it",
    ];
    assert_eq!(left_out, expected);
    pod.inside.ip("addr add 10.9.3.2/24 dev tun0");
    let before = pod.inside.snapshot();
    let refused = attach(&pod.inside.namespace, 1).unwrap_err().to_string();
    assert!(
        refused.starts_with("tun0: has addresses, but no Ethernet addresses"),
        "{refused}"
    );
    assert_eq!(pod.inside.snapshot(), before);
    pod.inside.ip("link del tun0");
    pod.inside
        .ip(&format!("link set br0 address {}", pod::mac(MAC)));
    let refused = here(&pod.inside).unwrap_err();
    assert!(matches!(refused, SurveyError::SameMac { .. }), "{refused}");
}

#[test]
fn a_namespace_without_interfaces_is_a_network() {
    let Some(space) = Space::new("a_namespace_without_interfaces_is_a_network") else {
        return;
    };
    space.ip("link set lo up");
    let attached = attach(&space.namespace, 1).unwrap();
    assert!(attached.cards.is_empty());
    assert_eq!(attached.network, Network::default());
    space.run(|| apply(&attached.network)).unwrap();
    attached.detach().unwrap();
}

#[test]
fn namespaces_are_made_and_removed() {
    if !pod::possible("namespaces_are_made_and_removed") {
        return;
    }
    let directory = std::env::temp_dir().join(format!("pericarp-netns-{}", std::process::id()));
    let path = directory.join("deep/one");
    let made = Namespace::create(&path).unwrap();
    let again = Namespace::create(&path).unwrap_err();
    assert!(matches!(again, NamespaceError::Exists { .. }), "{again}");
    // A shared mount, as ip netns makes it.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let deep = format!(" {} ", path.parent().unwrap().display());
    let line = mounts.lines().find(|line| line.contains(&deep)).unwrap();
    assert!(line.contains(" shared:"), "{line}");
    let opened = Namespace::open(&path).unwrap();
    assert_eq!(opened.run(|| 7).unwrap(), 7);
    made.remove().unwrap();
    assert!(!path.exists());
    // It lasts as long as somebody has it.
    assert!(opened.run(survey).unwrap().is_ok());
    assert!(matches!(
        opened.remove(),
        Err(NamespaceError::Change { .. })
    ));
    rustix::mount::unmount(path.parent().unwrap(), rustix::mount::UnmountFlags::DETACH).unwrap();
    std::fs::remove_dir_all(directory).unwrap();
    // A directory that is there is left as it is.
    let plain = std::env::temp_dir().join(format!("pericarp-plain-{}", std::process::id()));
    Namespace::create(&plain).unwrap().remove().unwrap();
    let threads = opened_twice();
    assert_eq!(threads, "different");
}

/// The plugins of the node, where there are some.
#[test]
fn real_plugins_make_a_network_that_a_guest_can_have() {
    let test = "real_plugins_make_a_network_that_a_guest_can_have";
    let dirs = ["/usr/lib/cni", "/opt/cni/bin"].map(PathBuf::from);
    let installed = |plugin: &str| dirs.iter().any(|dir| dir.join(plugin).is_file());
    if !["ptp", "bridge", "host-local"].into_iter().all(installed) {
        let why = "no CNI plugins (install: apt package containernetworking-plugins)";
        parts::skip(test, why);
        return;
    }
    let (Some(node), Some(inside)) = (Space::new(test), Space::new(test)) else {
        return;
    };
    node.ip("link set lo up");
    let dir = std::env::temp_dir().join(format!("pericarp-plugins-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (net, kind) in ["ptp", "bridge"].into_iter().enumerate() {
        let config = json!({
            "cniVersion": "1.0.0", "name": kind, "type": kind, "mtu": 1440,
            "bridge": "cni9", "isGateway": true,
            "dns": {"nameservers": ["10.9.9.9"]},
            "ipam": {
                "type": "host-local", "dataDir": dir.join("leases"),
                "ranges": [[{"subnet": format!("10.9.{net}.0/24")}], [{"subnet": format!("fd00:{net}::/64")}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        });
        std::fs::write(dir.join(format!("{kind}.conf")), config.to_string()).unwrap();
        let list = cni::find(&dir, kind).unwrap();
        let invocation = cni::Invocation {
            plugin_dirs: dirs.to_vec(),
            ..cni::Invocation::new("pod-1", inside.namespace.path())
        };
        let outcome = node.run(|| list.add(&invocation)).unwrap();
        let mut attached = attach(&inside.namespace, 1).unwrap();
        let network = attached.network.clone();
        let [eth0] = &network.interfaces[..] else {
            panic!("{network:?}");
        };
        let found: Vec<_> = eth0.addresses.iter().map(|a| (a.ip, a.prefix)).collect();
        assert_eq!(found, outcome.addresses);
        assert_eq!((eth0.name.as_str(), eth0.mtu), ("eth0", 1440));
        assert_eq!(outcome.dns.nameservers, ["10.9.9.9"]);
        assert_eq!(network.left_out, [""; 0]);
        let defaults = network
            .routes
            .iter()
            .filter(|route| route.destination.1 == 0);
        assert_eq!(defaults.count(), 2, "{:?}", network.routes);
        // A guest says the same.
        let Some(guest) = guest(test, &[("card", eth0.mac)]) else {
            return;
        };
        guest.run(|| apply(&network)).unwrap();
        assert_eq!(here(&guest).unwrap(), network, "{kind}");
        drop(queues(&mut attached));
        attached.detach().unwrap();
        for _ in 0..2 {
            node.run(|| list.delete(&invocation, Some(&outcome.raw)))
                .unwrap();
            assert!(here(&inside).unwrap().interfaces.is_empty());
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// A namespace is that of the thread only for as long as the closure runs.
fn opened_twice() -> &'static str {
    let name = || std::fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
    let before = name();
    let Some(space) = Space::new("namespaces_are_made_and_removed") else {
        return "skipped";
    };
    let inside = space.run(name);
    assert_eq!(name(), before);
    if inside == before {
        "same"
    } else {
        "different"
    }
}
