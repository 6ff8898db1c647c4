//! `link-calls`: what a packet costs between a pod's interface and whoever serves its
//! card, by the way it takes: a tap that `tc` redirects to and from, as pods have it;
//! the same with NAPI (`IFF_NAPI`); and a packet socket on the interface itself, without
//! a tap. As root:
//!
//! ```text
//! target/release/link-calls --json links.json
//! ```
//!
//! Each way has a veth pair of its own, whose other end is in another namespace: there a
//! packet socket sends what comes in, and nobody wants what goes out. One thread does all
//! of it, some packets out, then some in, which are read after the last has been sent: the
//! kernel does its part in these calls. Time on a clock, the sender's included, medians of
//! so many rounds that take turns.
#![expect(unsafe_code)]
// UNSAFETY: packet sockets, and reads and writes by number, with arrays of ours.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use libc::{ifreq, sockaddr_ll};
use pericarp_benches::frames::{HEADER, frame, large};
use pericarp_benches::table::median;
use pericarp_benches::{Outcome, turns};
use pericarp_net::{Host, Tap};
use pericarp_tests::network::Network;
use serde_json::json;

const ROUNDS: usize = 9;
/// `if_packet.h`: the size of virtio's header, and not to be shown what was sent.
const PACKET_VNET_HDR_SZ: c_int = 24;
const PACKET_IGNORE_OUTGOING: c_int = 23;
/// Room for a burst in a socket, bytes.
const ROOM: c_int = 256 << 20;
/// How long a packet may be on its way.
const LATE: Duration = Duration::from_millis(500);

/// What carries packets between the interface and us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Tap,
    NapiTap,
    Socket,
}

const WAYS: [(Way, &str); 3] = [
    (Way::Tap, "tap"),
    (Way::NapiTap, "tap, NAPI"),
    (Way::Socket, "packet socket"),
];

/// A way that is open: our end, and the other end of the pod's interface.
struct Link {
    ours: OwnedFd,
    far: OwnedFd,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let json = match (words.next().as_deref(), words.next()) {
        (None, _) => None,
        (Some("--json"), Some(path)) => Some(PathBuf::from(path)),
        _ => {
            eprintln!("link-calls: takes --json PATH and nothing else");
            return ExitCode::from(2);
        }
    };
    match measure(json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("link-calls: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(json: Option<PathBuf>) -> Outcome<()> {
    let links = WAYS
        .iter()
        .map(|&(way, _)| std::thread::spawn(move || Link::new(way).map_err(|e| e.to_string())))
        .map(|thread| thread.join().map_err(|_| "a link could not be made")?)
        .collect::<Result<Vec<_>, String>>()?;
    let mut raw = Vec::new();
    println!("ns of a packet                      out                          in");
    for (size, packet, burst) in [(60, frame(60), 2000), (64_000, large(64_000), 200)] {
        let mut times = vec![(Vec::new(), Vec::new()); WAYS.len()];
        // The first round warms up.
        for round in 0..=ROUNDS {
            for (link, (out, back)) in links.iter().zip(&mut times) {
                let turn = (link.send(&packet, burst)?, link.receive(&packet, burst)?);
                if round > 0 {
                    out.push(turn.0);
                    back.push(turn.1);
                }
            }
        }
        for ((_, name), (out, back)) in WAYS.iter().zip(times) {
            let cell = |times: &[f64]| {
                let low = times.iter().copied().fold(f64::MAX, f64::min);
                let high = times.iter().copied().fold(0.0, f64::max);
                format!("{:.0} ({low:.0} .. {high:.0})", median(times.to_vec()))
            };
            let (tells_out, tells_back) = (cell(&out), cell(&back));
            println!("{size:>6} {name:<14} {tells_out:>26} {tells_back:>26}");
            raw.push(json!({"bytes": size, "way": name, "out_ns": out, "in_ns": back}));
        }
    }
    if let Some(path) = json {
        let text = json!({"bench": "link-calls", "rounds": ROUNDS, "cases": raw});
        turns::write(&path, &format!("{text:#}\n"))?;
    }
    Ok(())
}

impl Link {
    /// Makes the pair of interfaces and opens both ends; on a thread of its own, which is
    /// in the pod's namespace from then on.
    fn new(way: Way) -> Outcome<Self> {
        let pod = Network::empty("link-calls", &[]).ok_or("it takes root and ip")?;
        let (tell, told) = channel();
        let (go, wait) = channel::<()>();
        let far = std::thread::spawn(move || -> Result<OwnedFd, String> {
            let host = Network::empty("link-calls", &[]).ok_or("it takes root and ip")?;
            let _ = tell.send(rustix::thread::gettid());
            wait.recv().map_err(|_| "the pair was not made")?;
            host.ip("link set v1 addrgenmode none");
            host.ip("link set v1 up");
            let socket = packet_socket("v1", false);
            socket.map_err(|e| format!("a packet socket on the far end: {e}"))
        });
        let host = told.recv()?.as_raw_nonzero();
        pod.ip(&format!("link add v0 type veth peer name v1 netns {host}"));
        pod.ip("link set v0 addrgenmode none");
        go.send(())?;
        let far = far.join().map_err(|_| "the far end could not be made")??;
        pod.ip("link set v0 up");
        let ours = match way {
            Way::Socket => {
                // The pod's own kernel is to have none of it.
                run("nft", "add table netdev pod")?;
                run(
                    "nft",
                    "add chain netdev pod in { type filter hook ingress device v0 priority 0; policy drop; }",
                )?;
                packet_socket("v0", true)?
            }
            _ => tap(&pod, way == Way::NapiTap)?,
        };
        Ok(Self { ours, far })
    }

    /// Sends so many to the far end; nanoseconds of one.
    fn send(&self, packet: &[u8], count: usize) -> Outcome<f64> {
        let begin = Instant::now();
        for _ in 0..count {
            write(&self.ours, packet)?;
        }
        Ok(begin.elapsed().as_nanos() as f64 / count as f64)
    }

    /// The far end sends so many, and we read them; nanoseconds of one.
    fn receive(&self, packet: &[u8], count: usize) -> Outcome<f64> {
        let mut room = vec![0; 1 << 17];
        let begin = Instant::now();
        for _ in 0..count {
            write(&self.far, packet)?;
        }
        let mut missing = count;
        while missing > 0 {
            // SAFETY: an array of ours with its length.
            let got = unsafe {
                libc::read(
                    self.ours.as_raw_fd(),
                    room.as_mut_ptr().cast::<c_void>(),
                    room.len(),
                )
            };
            if got == packet.len() as isize {
                missing -= 1;
            } else if got >= 0 {
                return Err(format!("a packet of {got} bytes for {}", packet.len()).into());
            } else if begin.elapsed() > LATE {
                return Err(format!("{missing} of {count} packets did not arrive").into());
            }
        }
        Ok(begin.elapsed().as_nanos() as f64 / count as f64)
    }
}

/// A tap that takes large packets whole, beside the pod's interface, each of which gets
/// what comes in at the other.
fn tap(pod: &Network, napi: bool) -> Outcome<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if napi {
        flags |= libc::IFF_NAPI;
    }
    // SAFETY: a structure of numbers.
    let mut request: ifreq = unsafe { zeroed() };
    request.ifr_name[0] = b't' as _;
    request.ifr_name[1] = b'0' as _;
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: TUNSETIFF takes this structure.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error().into());
    }
    pod.ip("link set t0 addrgenmode none");
    pod.ip("link set t0 txqueuelen 65000");
    pod.ip("link set t0 up");
    for (from, to) in [("v0", "t0"), ("t0", "v0")] {
        run("tc", &format!("qdisc add dev {from} ingress"))?;
        let words = format!(
            "filter add dev {from} parent ffff: protocol all u32 match u32 0 0 \
             action mirred egress redirect dev {to}"
        );
        run("tc", &words)?;
    }
    let tap = Tap::adopt(&[tun.into_raw_fd()])?;
    tap.set_header(HEADER)?;
    tap.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6)?;
    let queue = tap.queues().first().ok_or("a tap without queues")?;
    Ok(queue.try_clone()?)
}

/// Runs a program of the system's with these words.
fn run(program: &str, words: &str) -> Outcome<()> {
    let words = words.split(' ').filter(|word| !word.is_empty());
    let output = Command::new(program).args(words).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}", said.trim()).into())
}

/// A packet socket on this interface with virtio's header before each packet; `hears`
/// where it is to get what comes in.
fn packet_socket(name: &str, hears: bool) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    set(
        &socket,
        libc::SOL_PACKET,
        PACKET_VNET_HDR_SZ,
        HEADER as c_int,
    )?;
    set(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM)?;
    set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, ROOM)?;
    let name = format!("{name}\0");
    // SAFETY: a structure of numbers.
    let mut address: sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    // SAFETY: a string that ends with a zero.
    address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr().cast()) } as c_int;
    address.sll_protocol = if hears {
        (libc::ETH_P_ALL as u16).to_be()
    } else {
        0
    };
    // SAFETY: an address of this length.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<sockaddr_ll>() as u32,
        )
    };
    match bound {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(socket: &OwnedFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: a number of four bytes.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast::<c_void>(),
            4,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write(to: &OwnedFd, packet: &[u8]) -> Outcome<()> {
    // SAFETY: an array of ours with its length.
    let wrote = unsafe { libc::write(to.as_raw_fd(), packet.as_ptr().cast(), packet.len()) };
    match wrote {
        1.. => Ok(()),
        _ => Err(io::Error::last_os_error().into()),
    }
}
