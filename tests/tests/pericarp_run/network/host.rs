//! A host for these runs: a namespace that the test's thread is in, with a network of plugins, a
//! look at all that a run could leave there, and the host's half of a conversation.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::network::Network;
use pericarp_tests::parts::{Part, search_path};
use serde_json::{Value, json};

use crate::rig::*;

/// The plugins' network.
pub(crate) const NAME: &str = "pods";
pub(crate) const GATEWAY: [u8; 4] = [10, 88, 0, 1];
pub(crate) const GATEWAY6: &str = "fd88::1";
pub(crate) const MTU: u32 = 1400;
pub(crate) const SECONDS: Duration = Duration::from_secs(20);

/// A host with a network of plugins, and the rig on it.
pub(crate) struct Host {
    pub(crate) network: Network,
    pub(crate) rig: Rig,
}

/// What gives out the addresses of this network: both families, the first is the gateway's.
pub(crate) fn addresses(rig: &Rig) -> Value {
    json!({
        "type": "host-local",
        "dataDir": rig.scratch.path("addresses"),
        "ranges": [
            [{"subnet": "10.88.0.0/24", "gateway": "10.88.0.1"}],
            [{"subnet": "fd88::/64", "gateway": GATEWAY6}],
        ],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    })
}

/// The plugin that passes ports on.
pub(crate) fn ports() -> Value {
    json!({"type": "portmap", "capabilities": {"portMappings": true}})
}

impl Host {
    /// With a network of ptp and portmap.
    pub(crate) fn new(test: &str, parts: &[Part]) -> Option<Self> {
        Self::with(test, parts, |rig| {
            let dns = json!({"nameservers": ["10.88.0.1"], "search": ["pods.test"]});
            let ptp = json!({"type": "ptp", "mtu": MTU, "ipam": addresses(rig), "dns": dns});
            vec![ptp, ports()]
        })
    }

    /// With a network of these plugins.
    pub(crate) fn with(
        test: &str,
        parts: &[Part],
        plugins: impl FnOnce(&Rig) -> Vec<Value>,
    ) -> Option<Self> {
        let more = [Part::PERICARP_NET, Part::Cni, Part::Iptables, Part::Nft];
        let network = Network::empty(test, &more)?;
        let rig = Rig::new(test, parts)?;
        let plugins = plugins(&rig);
        let list = json!({"cniVersion": "0.4.0", "name": NAME, "plugins": plugins});
        fs::create_dir(rig.scratch.path("networks")).unwrap();
        let file = rig.scratch.path("networks/10-pods.conflist");
        fs::write(file, list.to_string()).unwrap();
        Some(Self { network, rig })
    }

    /// A run on this host.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.rig.command(arguments);
        command.env("NETCONFPATH", self.rig.scratch.path("networks"));
        command.env("CNI_PATH", "/usr/lib/cni");
        command
    }

    /// Starts a run of this script on the plugins' network.
    pub(crate) fn start(&self, options: &[&str], script: &str) -> Running {
        let image = format!("{}:ro", self.rig.image());
        let network = format!("cni:{NAME}");
        let common = ["--network", &network, "--rootfs-image", &image];
        let rest = ["--", "sh", "-c", script];
        Running::start(self.command(&[&common[..], options, &rest].concat()))
    }

    /// All that a run could leave on it.
    pub(crate) fn state(&self) -> String {
        let said = |program: &str, words: &str| {
            let Some(path) = search_path(program) else {
                return String::new();
            };
            let output = Command::new(path).args(words.split(' ')).output();
            let output = output.unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            // Dates, in what iptables reads from nft.
            let text = text.lines().filter(|line| !line.starts_with('#'));
            let text: Vec<&str> = text.collect();
            // Time passes for addresses that are new.
            let text = text.join("\n").replace(" tentative", "");
            format!("{program} {words}\n{text}\n")
        };
        let mut state = String::new();
        for words in ["-o link", "addr", "route", "-6 route", "rule", "netns"] {
            state += &said("ip", words);
        }
        state += &said("tc", "qdisc");
        for link in said("ip", "-o link").lines().skip(1) {
            let name = link.split([':', '@']).nth(1).unwrap_or_default().trim();
            state += &said("tc", &format!("filter show dev {name} ingress"));
        }
        // Without what its rules have counted.
        state += &said("nft", "-s list ruleset");
        for program in ["iptables", "ip6tables"] {
            for table in ["filter", "nat", "mangle", "raw"] {
                state += &said(program, &format!("-t {table} -S"));
            }
        }
        let addresses = self.rig.scratch.path("addresses").join(NAME);
        let taken = fs::read_dir(addresses).into_iter().flatten().flatten();
        let names = taken.map(|entry| entry.file_name().to_string_lossy().into_owned());
        // What was given last is remembered, and who looks takes turns.
        let mut names: Vec<_> = names.filter(|name| name.contains(['.', ':'])).collect();
        names.retain(|name| !name.starts_with("last"));
        names.sort();
        format!("{state}{names:?}")
    }

    /// The same without pods, once the kernel has told every bridge that nobody is on it.
    pub(crate) fn idle(&self) -> String {
        let alone = || bridges().iter().all(|line| line.contains("NO-CARRIER"));
        let settled = poll(SECONDS, || alone().then_some(()));
        assert!(settled.is_some(), "{:?}", bridges());
        self.state()
    }

    /// Soon it is as it was: a link goes a moment after its namespace.
    pub(crate) fn assert_state(&self, before: &str) {
        if poll(SECONDS, || (self.state() == before).then_some(())).is_none() {
            assert_eq!(self.state(), before);
        }
    }
}

/// Listens once the address is there, which comes with the first interface of a network.
pub(crate) fn listen(address: IpAddr, port: u16) -> TcpListener {
    let address = SocketAddr::from((address, port));
    let listener = poll(LIMIT, || TcpListener::bind(address).ok());
    listener.unwrap_or_else(|| panic!("{address} is nobody's"))
}

/// The next who comes, who has not for ever to do it.
pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let limit = LIMIT + Duration::from_secs(mebibytes() as u64);
    let (stream, _) = poll(limit, || listener.accept().ok()).expect("somebody who connects");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Sends these bytes to whoever comes.
pub(crate) fn serve(listener: TcpListener, bytes: Vec<u8>) -> JoinHandle<()> {
    thread::spawn(move || accept(&listener).write_all(&bytes).unwrap())
}

pub(crate) fn dial(to: SocketAddr) -> TcpStream {
    let stream = poll(SECONDS, || {
        TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok()
    });
    let stream = stream.unwrap_or_else(|| panic!("{to} does not answer"));
    stream.set_read_timeout(Some(SECONDS)).unwrap();
    stream
}

/// MiB of a transfer: `PERICARP_NETWORK_MIB`, or 16.
pub(crate) fn mebibytes() -> usize {
    let asked = std::env::var("PERICARP_NETWORK_MIB");
    asked.map_or(16, |text| text.parse().expect("a number of MiB"))
}

/// A sum that goes along with a stream.
pub(crate) struct Sum(Child);

impl Sum {
    pub(crate) fn new() -> Self {
        let program = Command::new("md5sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Self(program.unwrap())
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// As the guest's md5sum has it.
    pub(crate) fn end(self) -> String {
        let output = self.0.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // The shell takes one of the two spaces.
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// Sends so many MiB to somebody who sends them back, and sees that they come back. Their sum.
pub(crate) fn echoed(to: SocketAddr, mebibytes: usize) -> String {
    let mut stream = dial(to);
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut sending = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        let (mut sum, mut chunk) = (Sum::new(), noise(MIB as usize));
        for turn in 0..mebibytes {
            chunk[..8].copy_from_slice(&turn.to_le_bytes());
            sending.write_all(&chunk).unwrap();
            sum.add(&chunk);
        }
        sending.shutdown(Shutdown::Write).unwrap();
        sum.end()
    });
    let mut back = Sum::new();
    let mut buffer = vec![0; 1 << 16];
    while let count @ 1.. = stream.read(&mut buffer).unwrap() {
        back.add(&buffer[..count]);
    }
    let (back, sum) = (back.end(), sender.join().unwrap());
    assert_eq!(back, sum, "what came back from {to}");
    sum
}

/// What a guest does with [`Exchange`]: it takes the bytes and says their sum, and takes them
/// once more to send them on.
pub(crate) const EXCHANGE: &str = "
    exchange() {
        echo $1=$(busybox nc $2 7000 </dev/null | md5sum)
        busybox nc $2 7000 </dev/null | busybox nc $2 7001
    }";

/// The host's half, at one of its addresses.
pub(crate) struct Exchange {
    /// The sum, and when each of the two began to be sent.
    sent: JoinHandle<(String, [Instant; 2])>,
    /// The sum, and when the last byte was there.
    returned: JoinHandle<(String, Instant)>,
}

/// How it went.
#[derive(Debug)]
pub(crate) struct Exchanged {
    /// Of what was sent, which came back.
    pub(crate) sum: String,
    /// To the guest, and from it. Never shorter than it took.
    pub(crate) down: Duration,
    pub(crate) up: Duration,
}

impl Exchange {
    pub(crate) fn begin(address: IpAddr, mebibytes: usize) -> Self {
        let [down, up] = [7000, 7001].map(|port| listen(address, port));
        let sent = thread::spawn(move || {
            let turns = [(); 2].map(|()| {
                let (mut stream, mut sum) = (accept(&down), Sum::new());
                let begin = Instant::now();
                let mut chunk = noise(MIB as usize);
                for turn in 0..mebibytes {
                    // No two are the same.
                    chunk[..8].copy_from_slice(&turn.to_le_bytes());
                    stream.write_all(&chunk).unwrap();
                    sum.add(&chunk);
                }
                (sum.end(), begin)
            });
            let [(first, one), (second, two)] = turns;
            assert_eq!(first, second);
            (second, [one, two])
        });
        let returned = thread::spawn(move || {
            let (mut stream, mut sum) = (accept(&up), Sum::new());
            let mut buffer = vec![0; 1 << 16];
            while let count @ 1.. = stream.read(&mut buffer).unwrap() {
                sum.add(&buffer[..count]);
            }
            let end = Instant::now();
            (sum.end(), end)
        });
        Self { sent, returned }
    }

    /// Waits for its end.
    pub(crate) fn end(self) -> Exchanged {
        let (sum, [one, two]) = self.sent.join().unwrap();
        let (back, end) = self.returned.join().unwrap();
        assert_eq!(back, sum, "what came back");
        Exchanged {
            sum,
            down: two - one,
            up: end - two,
        }
    }
}

/// The links of this kind, by name.
pub(crate) fn links(kind: &str) -> Vec<String> {
    let name = |line: &String| Some(line.split([':', '@']).nth(1)?.trim().to_owned());
    lines_of(kind).iter().filter_map(name).collect()
}

fn bridges() -> Vec<String> {
    lines_of("bridge")
}

fn lines_of(kind: &str) -> Vec<String> {
    let ip = Part::Ip.find().unwrap();
    let shown = Command::new(ip)
        .args(["-o", "link", "show", "type", kind])
        .output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    shown.lines().map(str::to_owned).collect()
}

/// A namespace of a file, gone with this.
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn new(path: PathBuf) -> Self {
        fs::write(&path, "").unwrap();
        let net = format!("--net={}", path.display());
        let made = Command::new("unshare").arg(net).arg("true").status();
        assert!(made.unwrap().success());
        Self(path)
    }

    /// What `program` says in it.
    pub(crate) fn says(&self, words: &str) -> String {
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

    pub(crate) fn all(&self) -> String {
        let links = self.says("ip -o -d link") + &self.says("ip addr") + &self.says("ip route");
        links + &self.says("tc qdisc") + &self.says("tc filter show dev eth0 ingress")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
