//! One turn: a backend on a tap in a network of its own, and what goes through it.

use std::path::Path;
use std::time::{Duration, Instant};

use pericarp_benches::frames::{frame, large};
use pericarp_benches::{Outcome, cpu};
use pericarp_tests::bounded::poll;
use pericarp_tests::network::{HOST, Network, TAP, dotted, mac};
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

use crate::card::{Buffers, Card};
use crate::host::Host;

/// How long a backend may take to listen.
const STEP: Duration = Duration::from_secs(10);
/// A small frame, and the payload of a large one.
const SMALL: usize = 60;
pub(crate) const LARGE: usize = 64_000;
/// Packets that may be on the way to the guest.
const WINDOW: usize = 128;
const WINDOW_LARGE: usize = 4;

/// What one turn gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    pub(crate) rate: f64,
    /// CPU of the backend: microseconds of a packet, or milliseconds of a GiB.
    pub(crate) cpu: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// One turn of one target, which gets these arguments, too.
pub(crate) fn turn_apart(
    program: &Path,
    case: &str,
    length: Duration,
    more: &[String],
) -> Outcome<Turn> {
    // A thread has a network, and takes it along when it ends.
    let turn = std::thread::scope(|scope| {
        let turn = scope.spawn(|| turn(program, case, length, more).map_err(|e| e.to_string()));
        turn.join().map_err(|_| "a turn panicked")
    });
    Ok(turn??)
}

/// In a network of this thread's own.
fn turn(program: &Path, case: &str, length: Duration, more: &[String]) -> Outcome<Turn> {
    let parts = [Part::Ours("pericarp-net")];
    let network = Network::here("net-compare", &parts, 1).ok_or("it takes root and ip")?;
    let scratch = Scratch::new();
    let socket = scratch.path("net");
    let mut backend = command(program);
    if program.ends_with("vhost_user_net") {
        backend.arg("--net-backend").arg(format!(
            "ip={},mask=255.255.255.0,mac=02:00:00:00:00:02,host_mac={},socket={},num_queues=2,\
             queue_size=256,tap={TAP}",
            dotted(HOST),
            mac(pericarp_tests::network::HOST_MAC),
            socket.display()
        ));
    } else if program.ends_with("pericarp-reference-net") {
        backend.arg(&socket).arg(TAP);
    } else {
        backend.args(["--tap", TAP, "--workers", "1", "--socket-path"]);
        backend.arg(&socket).args(more);
    }
    let mut process = Process::start(&mut backend, Duration::from_secs(120))?;
    let there = poll(STEP, || {
        let gone = process.ended().is_some();
        (gone || socket.exists()).then_some(!gone)
    });
    if there != Some(true) {
        return Err(process.output().last(5).into());
    }
    poll(STEP, || Network::is_up().then_some(())).ok_or("the tap stays down")?;
    let large = case.ends_with("64k");
    let buffers = match case {
        "in-chains-64k" => Buffers::Chains,
        _ if large => Buffers::Large,
        _ => Buffers::Small,
    };
    let mut card = Card::connect(&socket, buffers)?;
    let mut host = Host::open(large, case.starts_with("echo"))?;
    let pid = process.pid();
    // Until all is warm.
    run(case, &mut card, &mut host, length / 10)?;
    let before = cpu::time(pid)?;
    let arrived = network.arrived()?;
    // Those that are back have arrived before.
    card.sent();
    let sent = card.total();
    let done = run(case, &mut card, &mut host, length)?;
    // What came back to the driver and did not come out has not been carried.
    let (arrived, sent) = (network.arrived()? - arrived, card.total() - sent);
    if arrived * 100 < sent * 99 {
        return Err(format!("of {sent} packets {arrived} came out of the tap").into());
    }
    let took = done.took.as_secs_f64();
    let spent = cpu::time(pid)?.saturating_sub(before).as_secs_f64();
    let (rate, cpu) = match large {
        true => {
            let mib = done.bytes as f64 / f64::from(1 << 20);
            (mib / took, spent * 1e3 / (mib / 1024.0))
        }
        false => (
            done.packets as f64 / took,
            spent * 1e6 / done.packets as f64,
        ),
    };
    let mut latencies = done.latencies;
    latencies.sort_unstable();
    let part = |of: usize| {
        let at = latencies.len() * of / 100;
        latencies.get(at).map_or(0.0, |nanos| *nanos as f64 / 1e3)
    };
    Ok(Turn {
        rate,
        cpu,
        p50_us: part(50),
        p99_us: part(99),
    })
}

/// What went through.
#[derive(Default)]
struct Done {
    packets: u64,
    bytes: u64,
    took: Duration,
    latencies: Vec<u64>,
}

fn run(case: &str, card: &mut Card, host: &mut Host, length: Duration) -> Outcome<Done> {
    let (out, window, bytes) = match case {
        "out-64" | "in-64" | "echo-64" => (frame(SMALL), WINDOW, SMALL),
        _ => (large(LARGE), WINDOW_LARGE, LARGE),
    };
    card.load(&out)?;
    host.load(&out);
    let (sends, receives) = match case {
        "out-64" | "out-64k" => (true, false),
        "in-64" | "in-64k" | "in-chains-64k" => (false, true),
        _ => (true, true),
    };
    let mut done = Done::default();
    // What went through while nobody looked does not count.
    card.sent();
    card.receive();
    let start = Instant::now();
    let end = start + length;
    if case == "echo-64" {
        while Instant::now() < end {
            let begin = Instant::now();
            card.send(1);
            host.receive(end + STEP)?;
            host.send(1);
            while card.receive().0 == 0 {
                if Instant::now() > end + STEP {
                    return Err("an echo did not come back".into());
                }
            }
            while card.sent() == 0 {}
            done.packets += 1;
            done.latencies.push(begin.elapsed().as_nanos() as u64);
        }
        done.took = start.elapsed();
        return Ok(done);
    }
    // Packets on the way to the guest, as far as is known: those that are lost are
    // forgotten when nothing comes any more.
    let (mut under_way, mut heard) = (0i64, Instant::now());
    let window = (window * bytes) as i64;
    let mut turns = 0u32;
    while !turns.is_multiple_of(16) || Instant::now() < end {
        turns += 1;
        if sends {
            let count = card.sent();
            done.packets += count;
            done.bytes += count * bytes as u64;
            card.send(32);
        }
        if receives {
            let (packets, payload) = card.receive();
            if packets > 0 {
                heard = Instant::now();
            } else if heard.elapsed() > Duration::from_millis(20) {
                (under_way, heard) = (0, Instant::now());
            }
            let got = if bytes == SMALL {
                packets * bytes as u64
            } else {
                payload
            };
            under_way -= got as i64;
            done.packets += packets;
            done.bytes += got;
            if under_way < window / 2 {
                let batch = if bytes == SMALL { 32 } else { 1 };
                under_way += (host.send(batch) * bytes) as i64;
            }
        }
    }
    done.took = start.elapsed();
    Ok(done)
}
