//! Runs on networks: of plugins, and of a namespace that is there. All of it in a
//! namespace of the test's own, which is the host of these runs.

mod ends;
mod host;
mod iperf;
mod kinds;
mod load;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::Command;

use pericarp_tests::parts::Part;
use rustix::process::Signal;

use super::rig::*;
use host::*;

#[test]
fn a_machine_is_on_a_network_of_plugins() {
    let test = "a_machine_is_on_a_network_of_plugins";
    let Some(host) = Host::new(test, &VM) else {
        return;
    };
    let script = r"
        busybox ip -o link show eth0 | sed 's/.*mtu \([0-9]*\).*/mtu=\1/'
        busybox ip -o -4 addr show eth0 | sed 's/.*inet \([^ ]*\).*/four=\1/'
        busybox ip -o -6 addr show eth0 scope global | sed 's/.*inet6 \([^ ]*\).*/six=\1/'
        busybox ip route | grep default | sed 's/^/route=/'
        busybox ip -6 route | grep default | sed 's/^/route6=/'
        grep nameserver /etc/resolv.conf | sed 's/^/resolver=/'
        echo search=$(grep search /etc/resolv.conf)
        echo sum=$(busybox nc 10.88.0.1 7000 < /dev/null | md5sum)
        echo sum6=$(busybox nc fd88::1 7000 < /dev/null | md5sum)
        echo ready
        busybox nc -l -p 80 -e /bin/cat
        exit 0";
    let image = format!("{}:ro", host.rig.image());
    let network = format!("cni:{NAME}");
    let arguments = [
        "--network",
        &network,
        "-p",
        "8080:80",
        "--rootfs-image",
        &image,
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut first = None;
    // The plugins keep chains of rules that the first run makes.
    for round in 0..2 {
        let running = Running::start(host.command(&arguments));
        // The gateway's addresses come with the first interface.
        let bytes = noise(8 * MIB as usize);
        let sum = md5(&host.rig, &bytes);
        let served = [IpAddr::from(GATEWAY), "fd88::1".parse().unwrap()]
            .map(|address| serve(listen(address, 7000), bytes.clone()));
        running.wait_for("ready");
        for thread in served {
            thread.join().unwrap();
        }
        let mut stream = dial(SocketAddr::from((GATEWAY, 8080)));
        stream.write_all(b"through a port of the host").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).unwrap();
        assert_eq!(back, "through a port of the host");
        drop(stream);
        let run = running.wait();
        assert_eq!(run.code, 0, "{}", run.stderr);
        let seen = run.values();
        let is = |key: &str, value: &str| {
            let have = seen.get(key).map(String::as_str);
            assert_eq!(have, Some(value), "{key} in\n{}{}", run.text(), run.stderr);
        };
        is("mtu", &MTU.to_string());
        is("four", &format!("10.88.0.{}/24", 2 + round));
        is("six", &format!("fd88::{}/64", 2 + round));
        assert!(seen["route"].contains("via 10.88.0.1"), "{}", seen["route"]);
        assert!(seen["route6"].contains("via fd88::1"), "{}", seen["route6"]);
        is("resolver", "nameserver 10.88.0.1");
        is("search", "search pods.test");
        is("sum", &format!("{sum} -"));
        is("sum6", &format!("{sum} -"));
        host.rig.assert_clean();
        let state = host.state();
        if let Some(first) = first.replace(state.clone()) {
            assert_eq!(state, first);
        }
    }
}

fn md5(rig: &Rig, bytes: &[u8]) -> String {
    let file = rig.scratch.file("noise", bytes);
    let sum = Command::new("md5sum").arg(file).output().unwrap();
    let text = String::from_utf8(sum.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// A pod in a namespace on a bridge.
fn pod(host: &Host, name: &str, number: u8) -> Place {
    let place = Place::new(host.rig.scratch.path(name));
    let (path, link) = (place.0.display(), format!("v{number}"));
    let ip = |words: String| host.network.ip(&words);
    ip(format!(
        "link add {link} type veth peer name eth0 netns {path}"
    ));
    ip(format!("link set {link} master pods0"));
    ip(format!("link set {link} up"));
    place.says("ip link set lo up");
    // An address that is tried out first looks another way a second later.
    place.says("ip link set eth0 addrgenmode none");
    place.says("ip link set eth0 up");
    place.says(&format!("ip addr add 10.89.0.{number}/24 dev eth0"));
    place.says("ip route add default via 10.89.0.1");
    place
}

#[test]
fn a_machine_and_a_container_meet_in_namespaces_of_others() {
    let test = "a_machine_and_a_container_meet_in_namespaces_of_others";
    let Some(host) = Host::new(test, &[&VM[..], &[Part::Runc]].concat()) else {
        return;
    };
    host.network.ip("link add pods0 type bridge");
    host.network.ip("link set pods0 up");
    host.network.ip("addr add 10.89.0.1/24 dev pods0");
    let (machine, container) = (pod(&host, "machine", 2), pod(&host, "container", 3));
    let before = (machine.all(), container.all());
    let image = format!("{}:ro", host.rig.image());
    let of = |place: &Place| format!("netns:{}", place.0.display());
    let script =
        "echo ready; busybox nc -l -p 80 -e /bin/cat; busybox nc 10.89.0.1 7000 </dev/null";
    let greet = || {
        let listener = TcpListener::bind(SocketAddr::from(([10, 89, 0, 1], 7000))).unwrap();
        serve(listener, b"from the host\n".to_vec())
    };
    let greeted = greet();
    let network = of(&machine);
    let common = ["--network", &network, "--rootfs-image", &image];
    let words = [&common[..], &["--", "sh", "-c", script]].concat();
    let running = Running::start(host.command(&words));
    running.wait_for("ready");
    let network = of(&container);
    let script = "echo back=$(echo to the machine | busybox nc -w 20 10.89.0.2 80)";
    let common = ["--runtime", "runc", "--network", &network];
    let more = ["--rootfs-image", &image, "--", "sh", "-c", script];
    let ended = Running::start(host.command(&[&common[..], &more].concat())).wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(ended.text(), "back=to the machine\n", "{}", ended.stderr);
    let run = running.wait();
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.text(), "ready\nfrom the host\n");
    greeted.join().unwrap();
    // A run that is killed leaves what it did to the link, and the next one undoes it.
    let network = of(&machine);
    let common = ["--network", &network, "--rootfs-image", &image, "--"];
    let forever = "echo ready; while :; do sleep 1; done";
    let words = [&common[..], &["sh", "-c", forever]].concat();
    let running = Running::start(host.command(&words));
    running.wait_for("ready");
    running.signal(Signal::KILL);
    running.wait();
    assert_ne!(machine.all(), before.0);
    let greeted = greet();
    let words = [
        &common[..],
        &["sh", "-c", "busybox nc 10.89.0.1 7000 </dev/null"],
    ]
    .concat();
    let run = Running::start(host.command(&words)).wait();
    assert_eq!(run.text(), "from the host\n", "{}", run.stderr);
    greeted.join().unwrap();
    assert_eq!((machine.all(), container.all()), before);
    drop((machine, container));
    host.rig.assert_clean();
}
