//! The plugins that nodes have: ptp, portmap, bridge, macvlan, and bandwidth behind ptp. Bytes go both
//! ways over both families and are compared by their sums, and iperf3 sends as many both ways;
//! `PERICARP_NETWORK_MIB` says how many.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::parts::{Part, search_path};
use serde_json::json;

use super::host::*;
use super::iperf::{self, SERVE, both_ways};
use crate::rig::*;

/// The sum of so many bytes of a word, repeated.
fn repeated(word: &str, len: usize) -> String {
    let mut sum = Sum::new();
    let line = format!("{word}\n").repeat((64 << 10) / (word.len() + 1));
    let mut left = len;
    while left > 0 {
        let now = left.min(line.len());
        sum.add(&line.as_bytes()[..now]);
        left -= now;
    }
    sum.end()
}

/// What the kernel has counted of IPv4 in this thread's namespace.
fn packets(what: &str) -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = table.lines().filter(|line| line.starts_with("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == what).unwrap();
    value.parse().unwrap()
}

/// Takes part in an exchange over each family. What they were is in the run's values.
fn exchange(mebibytes: usize) -> [Exchanged; 2] {
    let addresses = [IpAddr::from(GATEWAY), GATEWAY6.parse().unwrap()];
    let both = addresses.map(|address| Exchange::begin(address, mebibytes));
    both.map(Exchange::end)
}

const BOTH: &str = "exchange four 10.88.0.1; exchange six fd88::1";
const LINK: &str = r"busybox ip -o link show eth0 | sed 's/.*mtu \([0-9]*\).*/mtu=\1/'";

fn assert_exchanged(name: &str, run: &Ended, exchanged: &[Exchanged; 2]) {
    let seen = run.values();
    for (key, one) in ["four", "six"].into_iter().zip(exchanged) {
        assert_eq!(seen.get(key), Some(&one.sum), "{key} in {}", run.text());
        println!("{name}: {key}: to the machine and back, {one:?}");
    }
}

/// A machine with iperf3 in it.
fn parts(more: &[Part]) -> Vec<Part> {
    [&VM[..], &[Part::Iperf3], more].concat()
}

#[test]
fn a_machine_sends_through_ptp_and_ports_of_the_host() {
    let test = "a_machine_sends_through_ptp_and_ports_of_the_host";
    let Some(host) = Host::new(test, &parts(&[Part::Runc])) else {
        return;
    };
    // The plugins' chains of rules stay.
    let ports = ["-p", "8080:80", "-p", "5202:5201"];
    let first = host.start(&[&["--runtime", "runc"][..], &ports].concat(), "exit 0");
    let first = first.wait();
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = host.idle();
    let script = format!(
        "{EXCHANGE}; {LINK}; {BOTH}
        {SERVE}
        busybox nc -ll -p 80 -e /bin/cat &
        echo ready; busybox nc -l -p 82; exit 0"
    );
    let running = host.start(&ports, &script);
    let exchanged = exchange(mebibytes());
    running.wait_for("ready");
    let machine = |port: u16| SocketAddr::from(([10, 88, 0, 3], port));
    both_ways("ptp", machine(iperf::PORT), mebibytes());
    let port_of_host = |port: u16| SocketAddr::from((GATEWAY, port));
    both_ways("portmap", port_of_host(5202), mebibytes());
    let sum = echoed(port_of_host(8080), mebibytes());
    println!(
        "portmap: to the machine and back, {} MiB: {sum}",
        mebibytes()
    );
    drop(dial(machine(82)));
    let run = running.wait();
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_exchanged("ptp", &run, &exchanged);
    assert_eq!(run.values()["mtu"], MTU.to_string());
    host.assert_state(&before);
    host.rig.assert_clean();
}

#[test]
fn a_machine_and_a_container_share_a_bridge() {
    let test = "a_machine_and_a_container_share_a_bridge";
    let host = Host::with(test, &parts(&[Part::Runc]), |rig| {
        let ipam = addresses(rig);
        let bridge = json!({"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true, "ipam": ipam});
        vec![bridge, ports()]
    });
    let Some(host) = host else { return };
    // The bridge and the plugins' chains of rules stay.
    let first = host.start(&["--runtime", "runc"], "exit 0").wait();
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = host.idle();
    // What the guest's CPU sums up for the container, too.
    let bytes = mebibytes().min(64) * MIB as usize;
    let script = format!(
        "{EXCHANGE}; {LINK}; {BOTH}
        busybox nc -ll -p 80 -e /bin/md5sum &
        busybox nc -ll -p 81 -e /bin/sh -c 'yes machine | head -c {bytes}' &
        {SERVE}
        echo ready; busybox nc -l -p 82; exit 0"
    );
    let running = host.start(&[], &script);
    let exchanged = exchange(mebibytes());
    running.wait_for("ready");
    // The first address was that of the run before.
    let machine = |port: u16| SocketAddr::from(([10, 88, 0, 3], port));
    for port in [80, 81] {
        drop(dial(machine(port)));
    }
    both_ways("bridge", machine(iperf::PORT), mebibytes());
    let script = format!(
        "to() {{ yes container | head -c {bytes} | busybox nc $1 80; }}
        echo to4=$(to 10.88.0.3)
        echo to6=$(to fd88::3)
        echo from4=$(busybox nc 10.88.0.3 81 </dev/null | md5sum)
        echo from6=$(busybox nc fd88::3 81 </dev/null | md5sum)"
    );
    let container = host.start(&["--runtime", "runc"], &script).wait();
    assert_eq!(container.code, 0, "{}", container.stderr);
    let seen = container.values();
    for (key, word) in [
        ("to4", "container"),
        ("to6", "container"),
        ("from4", "machine"),
        ("from6", "machine"),
    ] {
        let sum = repeated(word, bytes);
        assert_eq!(seen.get(key), Some(&sum), "{key} in {}", container.text());
    }
    drop(dial(machine(82)));
    let run = running.wait();
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_exchanged("bridge", &run, &exchanged);
    assert_eq!(run.values()["mtu"], "1500");
    host.assert_state(&before);
    host.rig.assert_clean();
}

#[test]
fn a_machine_has_a_macvlan_with_large_packets() {
    let test = "a_machine_has_a_macvlan_with_large_packets";
    let host = Host::with(test, &parts(&[]), |rig| {
        vec![json!({"type": "macvlan", "master": "wire0", "mtu": 9000, "ipam": addresses(rig)})]
    });
    let Some(host) = host else { return };
    // The host is at the other end of the wire: a macvlan does not reach what it stands on.
    for words in [
        "link add wire0 mtu 9000 type veth peer name wire1 mtu 9000",
        "link set wire0 up",
        "link set wire1 up",
        "addr add 10.88.0.1/24 dev wire1",
        "addr add fd88::1/64 dev wire1 nodad",
    ] {
        host.network.ip(words);
    }
    let before = host.idle();
    let script =
        format!("{EXCHANGE}; {LINK}; {BOTH}; {SERVE} echo ready; busybox nc -l -p 82; exit 0");
    let running = host.start(&[], &script);
    let exchanged = exchange(mebibytes());
    running.wait_for("ready");
    // One packet of 9,000 bytes each way, and no pieces of one.
    let ping = Command::new(Part::Busybox.find().unwrap())
        .args(["ping", "-c", "1", "-W", "20", "-s", "8972", "10.88.0.2"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ping.stdout).into_owned();
    assert!(ping.status.success(), "{said}");
    assert!(said.contains("8980 bytes from 10.88.0.2"), "{said}");
    for what in ["ReasmReqds", "FragCreates"] {
        assert_eq!(packets(what), 0, "{what}");
    }
    let machine = |port: u16| SocketAddr::from(([10, 88, 0, 2], port));
    both_ways("macvlan", machine(iperf::PORT), mebibytes());
    drop(dial(machine(82)));
    let run = running.wait();
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_exchanged("macvlan", &run, &exchanged);
    assert_eq!(run.values()["mtu"], "9000");
    host.assert_state(&before);
    host.rig.assert_clean();
}

#[test]
fn limits_of_the_plugin_bandwidth_hold_for_a_machine() {
    /// What may come at once, in bits.
    const BURST: u64 = 1_000_000;
    let test = "limits_of_the_plugin_bandwidth_hold_for_a_machine";
    // Bits a second, to the machine and from it. Who sends much has not for ever.
    let [to, from] = [80_000_000, 40_000_000].map(|rate| rate * (1 + mebibytes() as u64 / 100));
    let host = Host::with(test, &parts(&[]), |rig| {
        let limits = json!({
            "type": "bandwidth",
            "ingressRate": to, "ingressBurst": BURST,
            "egressRate": from, "egressBurst": BURST,
        });
        vec![json!({"type": "ptp", "ipam": addresses(rig)}), limits]
    });
    let Some(host) = host else { return };
    let before = host.state();
    let script =
        format!("{EXCHANGE}; echo ready; {BOTH}; {SERVE} echo over; busybox nc -l -p 82; exit 0");
    let running = host.start(&[], &script);
    let four = Exchange::begin(GATEWAY.into(), mebibytes());
    let six = Exchange::begin(GATEWAY6.parse().unwrap(), mebibytes());
    running.wait_for("ready");
    // What comes from the pod is limited on its way into an interface of its own.
    let shown = Command::new(search_path("tc").unwrap())
        .arg("qdisc")
        .output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    for link in links("veth").into_iter().chain(links("ifb")) {
        let tbf = |line: &&str| line.contains(" tbf ") && line.contains(&link);
        assert_eq!(shown.lines().filter(tbf).count(), 1, "{link}: {shown}");
    }
    assert_eq!((links("veth").len(), links("ifb").len()), (1, 1));
    let exchanged = [four.end(), six.end()];
    running.wait_for("over");
    let machine = |port: u16| SocketAddr::from(([10, 88, 0, 2], port));
    let streamed = both_ways("bandwidth", machine(iperf::PORT), mebibytes());
    drop(dial(machine(82)));
    let run = running.wait();
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_exchanged("bandwidth", &run, &exchanged);
    // No machine is too slow for this: more time is no failure.
    let least = |bytes: u64, rate: u64| {
        let bits = (bytes * 8).saturating_sub(BURST);
        Duration::from_secs_f64(bits as f64 / rate as f64)
    };
    let all = mebibytes() as u64 * MIB;
    for one in &exchanged {
        assert!(one.down >= least(all, to), "{one:?}");
        assert!(one.up >= least(all, from), "{one:?}");
    }
    for (one, rate) in streamed.iter().zip([to, from]) {
        assert!(one.took >= least(one.bytes, rate), "{one:?} at {rate}");
    }
    host.assert_state(&before);
    host.rig.assert_clean();
}
