//! A `pericarp-net` on a tap, and a driver of its card that can do everything right
//! and everything wrong. For the tests beside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::{Desc, Driver, NEXT, Ring, Setup, WRITE, bit};
use pericarp_tests::network::{Network, TAP};
use pericarp_tests::parts::beside_us;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use serde_json::Value;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
};

/// After this long something hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of virtio's header.
pub(crate) const HEADER: usize = 12;

/// Both kinds of USO for the driver, and USO for the device.
pub(crate) const USO: u64 = 1 << 54 | 1 << 55 | 1 << 56;
/// What a driver of today takes, but for large packets.
pub(crate) const PLAIN: u64 =
    1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_CTRL_VQ;
/// And these.
pub(crate) const LARGE: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | USO;

/// Where packets lie in guest memory: those that come, those that go, commands.
const RECEIVED: u64 = 0x20_0000;
const SENT: u64 = 0x80_0000;
const COMMANDS: u64 = 0xc0_0000;
/// Room of each.
const STRIDE: u64 = 0x4000;

/// The program, with its tap and sockets.
pub(crate) struct Served {
    pub(crate) process: Process,
    pub(crate) scratch: Scratch,
    pub(crate) socket: PathBuf,
    control: PathBuf,
    arguments: Vec<String>,
}

impl Served {
    /// Starts it in this thread's network.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let scratch = Scratch::new();
        let (socket, control) = (scratch.path("net"), scratch.path("control"));
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let process = Self::process(&socket, &control, &arguments);
        Self {
            process,
            scratch,
            socket,
            control,
            arguments,
        }
    }

    fn process(socket: &PathBuf, control: &PathBuf, arguments: &[String]) -> Process {
        let net = beside_us().join("pericarp-net");
        let mut net = Self::options(command(&net), socket, control, arguments);
        let mut process = Process::start(&mut net, 2 * LIMIT).unwrap();
        let there = poll(LIMIT, || {
            let ended = process.ended().is_some();
            (ended || socket.exists() && control.exists()).then_some(!ended)
        });
        assert_eq!(there, Some(true), "{}", process.output().last(20));
        let up = poll(LIMIT, || Network::is_up().then_some(()));
        assert!(up.is_some(), "the tap stays down");
        process
    }

    fn options(
        mut net: Command,
        socket: &PathBuf,
        control: &PathBuf,
        arguments: &[String],
    ) -> Command {
        net.args(["--log-level", "info", "--socket-path"])
            .arg(socket)
            .arg("--control-path")
            .arg(control)
            .args(arguments);
        if !arguments.iter().any(|word| word == "--tap") {
            net.args(["--tap", TAP]);
        }
        net
    }

    /// Starts one that takes over, with another option, and with at most so many descriptors
    /// if it is said.
    pub(crate) fn successor(&self, more: &[&str], descriptors: Option<u32>) -> Process {
        let net = beside_us().join("pericarp-net");
        let net = match descriptors {
            None => command(&net),
            Some(most) => {
                let mut shell = command(Path::new("/bin/sh"));
                let script = format!("ulimit -n {most}; exec \"$0\" \"$@\"");
                shell.args(["-c", &script]).arg(net);
                shell
            }
        };
        // An option may be given once.
        let given = self.arguments.chunks(2);
        let given = given.filter(|pair| more.first() != Some(&pair[0].as_str()));
        let more = more.iter().map(|&word| word.to_owned());
        let arguments: Vec<String> = given.flatten().cloned().chain(more).collect();
        let mut net = Self::options(net, &self.socket, &self.control, &arguments);
        net.arg("--take-over").arg(&self.control);
        Process::start(&mut net, 2 * LIMIT).unwrap()
    }

    /// Has a new process take over, which is to end well.
    pub(crate) fn hand_over(&mut self) {
        let new = self.successor(&[], None);
        self.handed_to(new);
    }

    /// This process has taken over, or does so now.
    pub(crate) fn handed_to(&mut self, new: Process) {
        let mut old = std::mem::replace(&mut self.process, new);
        let code = old.wait(LIMIT).and_then(|status| status.code());
        let told = format!(
            "{}\n--\n{}",
            old.output().last(9),
            self.process.output().last(9)
        );
        assert_eq!(code, Some(0), "{told}");
        assert!(old.output().find("handed over").is_some(), "{told}");
    }

    /// Kills it, and starts another in its place.
    pub(crate) fn again(&mut self) {
        self.process.kill();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.control);
        self.process = Self::process(&self.socket, &self.control, &self.arguments);
    }

    /// Asks the control socket.
    pub(crate) fn ask(&self, request: &str) -> Value {
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// How many packets were dropped for this reason.
    pub(crate) fn dropped(&self, reason: &str) -> u64 {
        let stats = self.ask(r#"{"op":"stats"}"#);
        let count = &stats["devices"][0]["held"][reason];
        count
            .as_u64()
            .unwrap_or_else(|| panic!("{reason}: {stats}"))
    }

    /// CPU time of all its threads.
    pub(crate) fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.pid())).unwrap();
        let nanos = tasks.map(|task| {
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            let running = text.split_whitespace().next().unwrap();
            running.parse::<u64>().unwrap()
        });
        Duration::from_nanos(nanos.sum())
    }

    /// With nothing to do it does nothing: not even half of the time.
    pub(crate) fn rests(&self, when: &str) {
        let (begin, before) = (std::time::Instant::now(), self.cpu());
        std::thread::sleep(Duration::from_secs(1));
        let (took, spent) = (begin.elapsed(), self.cpu() - before);
        assert!(spent < took / 2, "{when}: {spent:?} of {took:?}");
    }

    /// It lives, and ends when it is told to.
    pub(crate) fn finish(mut self) {
        assert!(self.process.ended().is_none(), "{}", self.process.epitaph());
        self.process.signal(rustix::process::Signal::TERM);
        let status = self.process.wait(LIMIT);
        let code = status.and_then(|status| status.code());
        assert_eq!(code, Some(0), "{}", self.process.output().last(20));
    }
}

/// A packet as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) header: [u8; HEADER],
    pub(crate) frame: Vec<u8>,
    /// Chains that it took.
    pub(crate) chains: usize,
}

impl Packet {
    /// `num_buffers` as the device wrote it.
    pub(crate) fn buffers(&self) -> usize {
        usize::from(u16::from_le_bytes([self.header[10], self.header[11]]))
    }

    /// What a UDP datagram without options carries.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.frame[14 + 20 + 8..]
    }
}

/// The driver.
pub(crate) struct Card {
    pub(crate) driver: Driver,
    /// Bytes of each receive buffer, by head.
    sizes: Vec<u32>,
}

impl Card {
    /// Connects with these features and so many pairs of queues, and a control queue.
    pub(crate) fn connect(served: &Served, features: u64, pairs: u16) -> Self {
        let setup = Setup {
            queues: 2 * pairs + 1,
            queue_size: 256,
            extra: features,
            limit: LIMIT,
            ..Setup::default()
        };
        let driver = Driver::connect(&served.socket, &setup).unwrap();
        assert_eq!(driver.features & features, features, "all is offered");
        Self {
            driver,
            sizes: vec![0; 256],
        }
    }

    /// Offers one chain of these sizes, its descriptors from `head` on.
    pub(crate) fn offer(&mut self, head: u16, sizes: &[u32]) {
        let ring = &mut self.driver.rings[0];
        let mut at = RECEIVED + STRIDE * u64::from(head);
        for (n, &len) in sizes.iter().enumerate() {
            let index = head + n as u16;
            let more = if n + 1 < sizes.len() { NEXT } else { 0 };
            ring.set_desc(
                index,
                Desc {
                    addr: at,
                    len,
                    flags: WRITE | more,
                    next: index + 1,
                },
            );
            at += u64::from(len);
        }
        self.sizes[usize::from(head)] = sizes.iter().sum();
        give(ring, head);
    }

    /// Offers so many buffers of one size, from head 0 on.
    pub(crate) fn offer_many(&mut self, count: u16, size: u32) {
        for head in 0..count {
            self.offer(head, &[size]);
        }
    }

    /// Takes the next packet; `None` when none comes in time.
    pub(crate) fn receive(&mut self, limit: Duration) -> Option<Packet> {
        let mut chains = poll(limit, || self.next_chain())?;
        let header: [u8; HEADER] = chains[..HEADER].try_into().unwrap();
        let buffers = usize::from(u16::from_le_bytes([header[10], header[11]]));
        for _ in 1..buffers {
            // All of it is there at once, or this fails.
            let more = self.next_chain().expect("a packet is published whole");
            chains.extend(more);
        }
        Some(Packet {
            header,
            frame: chains.split_off(HEADER),
            chains: buffers,
        })
    }

    /// The bytes of one chain that came back.
    fn next_chain(&mut self) -> Option<Vec<u8>> {
        let used = self.driver.rings[0].take_one()?;
        let head = used.head as u16;
        assert!(used.len <= self.sizes[usize::from(head)], "{used:?}");
        let at = RECEIVED + STRIDE * u64::from(head);
        Some(self.driver.peek(at, used.len as usize).unwrap())
    }

    /// Sends what follows virtio's header, cut into descriptors of these lengths, the
    /// rest in the last; waits until it was taken.
    pub(crate) fn send(&mut self, header: [u8; HEADER], frame: &[u8], cuts: &[usize]) {
        let bytes = [&header[..], frame].concat();
        self.send_raw(&bytes, cuts, 0);
    }

    /// Sends all of these packets at once, header included, one descriptor each; they come
    /// back in their order.
    pub(crate) fn burst(&mut self, packets: &[Vec<u8>]) {
        for (index, packet) in packets.iter().enumerate() {
            let at = SENT + STRIDE * index as u64;
            self.driver.poke(at, packet).unwrap();
            let desc = Desc {
                addr: at,
                len: packet.len() as u32,
                ..Desc::default()
            };
            self.driver.rings[1].set_desc(index as u16, desc);
        }
        let ring = &mut self.driver.rings[1];
        for index in 0..packets.len() {
            ring.queue(index as u16);
        }
        ring.publish();
        ring.notify();
        let used = ring.watch(packets.len(), LIMIT).unwrap();
        let heads: Vec<usize> = used.iter().map(|used| used.head as usize).collect();
        assert_eq!(heads, (0..packets.len()).collect::<Vec<_>>());
    }

    /// Offers a frame to be sent, and does not wait for it.
    pub(crate) fn post(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER][..], frame].concat();
        self.driver.poke(SENT, &packet).unwrap();
        let ring = &mut self.driver.rings[1];
        let desc = Desc {
            addr: SENT,
            len: packet.len() as u32,
            ..Desc::default()
        };
        ring.set_desc(0, desc);
        give(ring, 0);
    }

    /// Sends any bytes as a packet; `flags` go to all its descriptors.
    pub(crate) fn send_raw(&mut self, bytes: &[u8], cuts: &[usize], flags: u16) {
        let at = SENT;
        self.driver.poke(at, bytes).unwrap();
        let ring = &mut self.driver.rings[1];
        let mut lengths = cuts.to_vec();
        let cut: usize = cuts.iter().sum();
        if bytes.len() > cut || lengths.is_empty() {
            lengths.push(bytes.len() - cut);
        }
        let mut start = at;
        for (n, &len) in lengths.iter().enumerate() {
            let more = if n + 1 < lengths.len() { NEXT } else { 0 };
            ring.set_desc(
                n as u16,
                Desc {
                    addr: start,
                    len: len as u32,
                    flags: flags | more,
                    next: n as u16 + 1,
                },
            );
            start += len as u64;
        }
        give(ring, 0);
        let used = ring.watch(1, LIMIT).unwrap();
        assert_eq!((used[0].head, used[0].len), (0, 0));
    }

    /// Gives a command; the device's answer, or `None` if it left the byte alone.
    pub(crate) fn command(&mut self, queue: usize, command: &[u8], answer: bool) -> Option<u8> {
        let (at, ack) = (COMMANDS, COMMANDS + 0x1000);
        self.driver.poke(at, command).unwrap();
        self.driver.poke(ack, &[0xaa]).unwrap();
        let ring = &mut self.driver.rings[queue];
        let len = command.len() as u32;
        let more = if answer { NEXT } else { 0 };
        let read = Desc {
            addr: at,
            len,
            flags: more,
            next: 1,
        };
        let write = Desc {
            addr: ack,
            len: 1,
            flags: WRITE,
            next: 0,
        };
        ring.set_desc(0, read);
        ring.set_desc(1, write);
        give(ring, 0);
        ring.watch(1, LIMIT).unwrap();
        let got = self.driver.peek(ack, 1).unwrap()[0];
        (got != 0xaa).then_some(got)
    }
}

/// Makes a chain available, and kicks if the device asked for it, as every driver does.
fn give(ring: &mut Ring, head: u16) {
    let before = ring.next_avail();
    ring.queue(head);
    ring.publish();
    if ring.wants_kick(before) {
        ring.notify();
    }
}

/// Bit numbers as a mask.
pub(crate) fn without(features: u64, number: u32) -> u64 {
    features & !bit(number)
}
