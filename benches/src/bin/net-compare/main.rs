//! `net-compare`: `pericarp-net` beside Cloud Hypervisor's `vhost_user_net`, where it is
//! in the search path, in turns, each on a tap in a network of its own. As root:
//!
//! ```text
//! target/release/net-compare --rounds 5
//! ```
//!
//! One thread plays the guest's driver and the host's other end, so that a busy
//! backend has a CPU for itself on a machine with two. What the guest sends goes to an
//! address that the host has not, so that it ends where the tap hands it over; what it
//! gets comes from a packet socket. Driver and sender look instead of being called,
//! as a guest under load does; the backend is kicked where it asks for it.
//!
//! CPU is that of the backend's threads, which includes the host's network stack as
//! far as the kernel runs it in a write to the tap. The raw numbers go to `--json`.

mod card;
mod host;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pericarp_benches::table::median;
use pericarp_benches::{Outcome, cpu, turns};
use pericarp_tests::bounded::poll;
use pericarp_tests::network::{HOST, Network, TAP, dotted, mac};
use pericarp_tests::parts::{Part, beside_us, search_path};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

use card::{Buffers, Card};
use host::{Host, frame, large};

const HELP: &str = "\
net-compare: pericarp-net beside Cloud Hypervisor's vhost_user_net, as root

  --rounds N     how often each target has its turn (default 5)
  --seconds N    length of one turn (default 2)
  --case C       only this case; may be repeated
  --json PATH    where the raw numbers go
";

/// Cases, and what their rate counts.
const CASES: [(&str, &str); 6] = [
    ("out-64", "packets/s"),
    ("in-64", "packets/s"),
    ("out-64k", "MiB/s"),
    ("in-64k", "MiB/s"),
    ("both-64k", "MiB/s"),
    ("echo-64", "echoes/s"),
];
const TARGETS: [&str; 2] = ["pericarp-net", "vhost_user_net"];

/// How long a backend may take to listen.
const STEP: Duration = Duration::from_secs(10);
/// A small frame, and the payload of a large one.
const SMALL: usize = 60;
const LARGE: usize = 64_000;
/// Packets that may be on the way to the guest.
const WINDOW: usize = 128;
const WINDOW_LARGE: usize = 4;

/// What one turn gave.
#[derive(Debug, Clone, Copy)]
struct Turn {
    rate: f64,
    /// CPU of the backend: microseconds of a packet, or milliseconds of a GiB.
    cpu: f64,
    p50_us: f64,
    p99_us: f64,
}

struct Wanted {
    rounds: usize,
    seconds: u64,
    cases: Vec<String>,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match wanted() {
        Ok(Some(wanted)) => match compare(&wanted) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("net-compare: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(None) => {
            let names: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
            println!("{HELP}\nCases: {}", names.join(", "));
            ExitCode::SUCCESS
        }
        Err(mistake) => {
            eprintln!("net-compare: {mistake}");
            ExitCode::from(2)
        }
    }
}

fn wanted() -> Result<Option<Wanted>, String> {
    use lexopt::prelude::*;
    let mut wanted = Wanted {
        rounds: 5,
        seconds: 2,
        cases: Vec::new(),
        json: None,
    };
    let mut parser = lexopt::Parser::from_env();
    let text = |e: lexopt::Error| format!("{e}; see --help");
    while let Some(argument) = parser.next().map_err(text)? {
        let name = match argument {
            Long(name) => name.to_owned(),
            Short('h') => return Ok(None),
            other => return Err(text(other.unexpected())),
        };
        if name == "help" {
            return Ok(None);
        }
        let value = parser.value().and_then(|v| v.string()).map_err(text)?;
        let number = || {
            let number = value.parse().ok().filter(|n| (1..=100).contains(n));
            number.ok_or_else(|| format!("--{name} {value:?}: not a number from 1 to 100"))
        };
        match name.as_str() {
            "rounds" => wanted.rounds = number()?,
            "seconds" => wanted.seconds = number()? as u64,
            "json" => wanted.json = Some(value.into()),
            "case" if CASES.iter().any(|(case, _)| *case == value) => wanted.cases.push(value),
            "case" => return Err(format!("--case {value:?}: unknown; see --help")),
            _ => return Err(format!("--{name}: unknown option; see --help")),
        }
    }
    Ok(Some(wanted))
}

fn compare(wanted: &Wanted) -> Outcome<()> {
    let mut raw = Vec::new();
    for (case, unit) in CASES {
        if !wanted.cases.is_empty() && !wanted.cases.iter().any(|name| name == case) {
            continue;
        }
        let mut results: Vec<Vec<Turn>> = vec![Vec::new(); TARGETS.len()];
        for _ in 0..wanted.rounds {
            for (target, turns) in TARGETS.iter().zip(&mut results) {
                let Some(program) = find(target) else {
                    continue;
                };
                let (case, seconds) = (case.to_owned(), wanted.seconds);
                // A thread has a network, and takes it along when it ends.
                let turn = std::thread::spawn(move || {
                    turn(&program, &case, Duration::from_secs(seconds)).map_err(|e| e.to_string())
                });
                turns.push(turn.join().map_err(|_| "a turn panicked")??);
            }
        }
        raw.push(table(case, unit, &results));
    }
    if let Some(path) = &wanted.json {
        let text = json!({"bench": "net-compare", "rounds": wanted.rounds,
            "seconds": wanted.seconds, "cases": raw});
        turns::write(path, &format!("{text:#}\n"))?;
    }
    Ok(())
}

fn find(target: &str) -> Option<PathBuf> {
    match target {
        "pericarp-net" => Some(beside_us().join(target)).filter(|path| path.is_file()),
        other => search_path(other),
    }
}

/// Prints what all targets did in a case; the same as raw numbers.
fn table(case: &str, unit: &str, results: &[Vec<Turn>]) -> Value {
    let large = unit == "MiB/s";
    let cost = if large { "ms/GiB" } else { "us/packet" };
    println!(
        "\n{case:<16} {unit:>12} {:>23} {cost:>12} {:>9} {:>9}",
        "min .. max", "p50 us", "p99 us"
    );
    let mut raw = serde_json::Map::new();
    let mut medians = Vec::new();
    for (target, turns) in TARGETS
        .iter()
        .zip(results)
        .filter(|(_, turns)| !turns.is_empty())
    {
        let of = |what: fn(&Turn) -> f64| median(turns.iter().map(what).collect());
        let (rate, cpu) = (of(|t| t.rate), of(|t| t.cpu));
        let rates = turns.iter().map(|t| t.rate);
        let (least, most) = rates.fold((f64::MAX, 0.0f64), |(low, high), rate| {
            (low.min(rate), high.max(rate))
        });
        println!(
            "{target:<16} {rate:>12.0} {least:>10.0} .. {most:>9.0} {cpu:>12.2} {:>9.1} {:>9.1}",
            of(|t| t.p50_us),
            of(|t| t.p99_us)
        );
        medians.push((rate, cpu));
        let turns = turns
            .iter()
            .map(|t| json!({"rate": t.rate, "cpu": t.cpu, "p50_us": t.p50_us, "p99_us": t.p99_us}));
        raw.insert((*target).to_owned(), turns.collect());
    }
    if let [(rate, cpu), (other, others)] = medians[..] {
        println!(
            "{:<16} {:>12.2} {:>36.2}",
            "ratio",
            rate / other,
            cpu / others
        );
    }
    json!({"case": case, "unit": unit, "cpu": cost, "targets": raw})
}

/// One turn of one target, in a network of this thread's own.
fn turn(program: &Path, case: &str, length: Duration) -> Outcome<Turn> {
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
    } else {
        backend.args(["--tap", TAP, "--workers", "1", "--socket-path"]);
        backend.arg(&socket);
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
    let buffers = if large {
        Buffers::Large
    } else {
        Buffers::Small
    };
    let mut card = Card::connect(&socket, buffers)?;
    let mut host = Host::open(large, case.starts_with("echo"))?;
    let pid = process.pid();
    // Until all is warm.
    run(case, &mut card, &mut host, length / 10)?;
    let before = cpu::time(pid)?;
    let begin = Instant::now();
    let (arrived, sent) = (network.arrived()?, card.total());
    let done = run(case, &mut card, &mut host, length)?;
    // What came back to the driver and did not come out has not been carried.
    let (arrived, sent) = (network.arrived()? - arrived, card.total() - sent);
    if arrived * 100 < sent * 99 {
        return Err(format!("of {sent} packets {arrived} came out of the tap").into());
    }
    let took = begin.elapsed().as_secs_f64();
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
        "in-64" | "in-64k" => (false, true),
        _ => (true, true),
    };
    let mut done = Done::default();
    let end = Instant::now() + length;
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
    Ok(done)
}
