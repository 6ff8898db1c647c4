//! Runs on networks: of plugins, and of a namespace that is there. All of it in a
//! namespace of the test's own, which is the host of these runs.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::network::Network;
use pericarp_tests::parts::Part;
use rustix::process::Signal;
use serde_json::json;

use super::rig::*;

/// The plugins' network.
const NAME: &str = "pods";
const GATEWAY: [u8; 4] = [10, 88, 0, 1];
const MTU: u32 = 1400;
const SECONDS: Duration = Duration::from_secs(20);

/// A host with a network of plugins, and the rig on it.
struct Host {
    network: Network,
    rig: Rig,
}

impl Host {
    fn new(test: &str, parts: &[Part]) -> Option<Self> {
        let more = [Part::PERICARP_NET, Part::Cni, Part::Iptables];
        let network = Network::empty(test, &more)?;
        let rig = Rig::new(test, parts)?;
        let host = Self { network, rig };
        let ranges = json!([
            [{"subnet": "10.88.0.0/24", "gateway": "10.88.0.1"}],
            [{"subnet": "fd88::/64", "gateway": "fd88::1"}],
        ]);
        let list = json!({
            "cniVersion": "0.4.0",
            "name": NAME,
            "plugins": [
                {
                    "type": "ptp",
                    "mtu": MTU,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": host.rig.scratch.path("addresses"),
                        "ranges": ranges,
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                    "dns": {"nameservers": ["10.88.0.1"], "search": ["pods.test"]},
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        });
        fs::create_dir(host.rig.scratch.path("networks")).unwrap();
        let file = host.rig.scratch.path("networks/10-pods.conflist");
        fs::write(file, list.to_string()).unwrap();
        Some(host)
    }

    /// A run on this host.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.rig.command(arguments);
        command.env("NETCONFPATH", self.rig.scratch.path("networks"));
        command.env("CNI_PATH", "/usr/lib/cni");
        command
    }

    /// All that a run could leave on it.
    fn state(&self) -> String {
        let said = |program: &str, words: &str| {
            let output = Command::new(program).args(words.split(' ')).output();
            let output = output.unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            format!("{program} {words}\n{text}")
        };
        let mut state = said("ip", "-o link") + &said("ip", "addr") + &said("ip", "route");
        for table in ["filter", "nat", "mangle", "raw"] {
            state += &said("iptables", &format!("-t {table} -S"));
        }
        let addresses = self.rig.scratch.path("addresses").join(NAME);
        let taken = fs::read_dir(addresses).into_iter().flatten().flatten();
        let names = taken.map(|entry| entry.file_name().to_string_lossy().into_owned());
        // What was given last is remembered.
        let mut names: Vec<_> = names.filter(|name| !name.starts_with("last")).collect();
        names.sort();
        format!("{state}{names:?}")
    }
}

/// Listens on the gateway and sends these bytes to whoever comes.
fn serve(listener: TcpListener, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&bytes).unwrap();
    })
}

fn dial(to: SocketAddr) -> TcpStream {
    let stream = poll(SECONDS, || {
        TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok()
    });
    let stream = stream.unwrap_or_else(|| panic!("{to} does not answer"));
    stream.set_read_timeout(Some(SECONDS)).unwrap();
    stream
}

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
        let served = [IpAddr::from(GATEWAY), "fd88::1".parse().unwrap()].map(|address| {
            let address = SocketAddr::from((address, 7000));
            let listener = poll(LIMIT, || TcpListener::bind(address).ok()).unwrap();
            serve(listener, bytes.clone())
        });
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

/// A namespace of a file, gone with this.
struct Place(PathBuf);

impl Place {
    fn new(path: PathBuf) -> Self {
        fs::write(&path, "").unwrap();
        let net = format!("--net={}", path.display());
        let made = Command::new("unshare").arg(net).arg("true").status();
        assert!(made.unwrap().success());
        Self(path)
    }

    /// What `program` says in it.
    fn says(&self, words: &str) -> String {
        let net = format!("--net={}", self.0.display());
        let output = Command::new("nsenter")
            .arg(net)
            .args(words.split(' '))
            .output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn all(&self) -> String {
        let links = self.says("ip -o -d link") + &self.says("ip addr") + &self.says("ip route");
        links + &self.says("tc qdisc") + &self.says("tc filter show dev eth0 ingress")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
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

#[test]
fn what_a_killed_run_left_with_plugins_is_undone_by_the_next() {
    let test = "what_a_killed_run_left_with_plugins_is_undone_by_the_next";
    let Some(host) = Host::new(test, &RUNC) else {
        return;
    };
    let image = format!("{}:ro", host.rig.image());
    let network = format!("cni:{NAME}");
    let run = |port: &str, script: &str| {
        let words = ["--runtime", "runc", "--network", &network, "-p", port];
        let more = ["--rootfs-image", &image, "--", "sh", "-c", script];
        Running::start(host.command(&[&words[..], &more].concat()))
    };
    assert_eq!(run("8080:80", "exit 3").wait().code, 3);
    let before = host.state();
    let running = run("8080:80", "echo ready; sleep 1000");
    running.wait_for("ready");
    assert_ne!(host.state(), before);
    let address: IpAddr = GATEWAY.into();
    assert!(TcpListener::bind((address, 1)).is_ok(), "the link is there");
    running.signal(Signal::KILL);
    running.wait();
    let end = Instant::now() + SECONDS;
    while !host.rig.processes("runc").is_empty() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(20));
    }
    // The same port again: were the rule of the dead one there, it would win.
    let again = run("8080:80", "echo ready; echo answer | busybox nc -l -p 80");
    again.wait_for("ready");
    let mut answer = String::new();
    let mut stream = dial(SocketAddr::from((GATEWAY, 8080)));
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer\n");
    drop(stream);
    assert_eq!(again.wait().code, 0);
    assert_eq!(host.state(), before);
    host.rig.assert_clean();
}
