//! `packet-calls`: what one packet costs the thread that reads it from a tap or writes it
//! to one, by a call for each or through a ring for many. As root:
//!
//! ```text
//! target/release/packet-calls --json packets.json
//! ```
//!
//! The tap's queue is filled first and then read empty, so that nothing waits. What is
//! written goes to an address that the host has not. CPU time of the thread, medians of
//! seven rounds that take turns.
#![expect(unsafe_code)]
// UNSAFETY: the engine reads and writes memory of this program, through raw segments.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use libc::iovec;
use pericarp_benches::table::median;
use pericarp_benches::{Outcome, turns};
use pericarp_net::{Host, Tap};
use pericarp_tests::network::{GUEST, HOST, Network, TAP, datagram, dotted};
use pericarp_uring::{Engine, EngineKind, FileSlot, Transfer};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

const ROUNDS: usize = 7;
/// Packets of a round; the queue of the tap has room for them.
const PACKETS: usize = 20_000;
/// Virtio's header.
const HEADER: usize = 12;
/// Through the ring: so many at a time.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Payloads.
const SIZES: [usize; 2] = [18, 1400];

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let json = match (words.next().as_deref(), words.next()) {
        (None, _) => None,
        (Some("--json"), Some(path)) => Some(PathBuf::from(path)),
        _ => {
            eprintln!("packet-calls: takes --json PATH and nothing else");
            return ExitCode::from(2);
        }
    };
    match measure(json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("packet-calls: {error}");
            ExitCode::FAILURE
        }
    }
}

/// CPU time of this thread, nanoseconds.
fn clock() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

fn measure(json: Option<PathBuf>) -> Outcome<()> {
    let network = Network::here("packet-calls", &[], 1).ok_or("it takes root and ip")?;
    network.ip(&format!("link set {TAP} txqueuelen 65000"));
    let tap = Tap::open(TAP, 1)?;
    tap.set_header(HEADER)?;
    let tap: &OwnedFd = tap.queues().first().ok_or("a tap without queues")?;
    let mut engine = Engine::new(EngineKind::Uring, 64, 4)?;
    engine.start()?;
    let file = engine.add_file(tap.as_raw_fd())?;
    let mut raw = Vec::new();
    println!("ns of a packet        a call   ring, {BATCHES:?} at a time");
    for size in SIZES {
        for writes in [false, true] {
            let mut costs = vec![Vec::new(); 1 + BATCHES.len()];
            for _ in 0..ROUNDS {
                for (way, costs) in costs.iter_mut().enumerate() {
                    if !writes {
                        fill(size)?;
                    }
                    let batch = way.checked_sub(1).map(|index| BATCHES[index]);
                    costs.push(round(&mut engine, file, writes, batch, size)?);
                }
            }
            let what = if writes { "write" } else { "read" };
            let medians: Vec<f64> = costs.iter().map(|costs| median(costs.clone())).collect();
            println!(
                "{what:<5} {:>5} bytes {:>11.0} {:>9.0?}",
                size + 42,
                medians[0],
                &medians[1..]
            );
            raw.push(
                json!({"what": what, "bytes": size + 42, "call_ns": costs[0],
                "ring_ns": BATCHES.iter().zip(&costs[1..])
                    .map(|(batch, costs)| json!({"batch": batch, "ns": costs}))
                    .collect::<Vec<_>>()}),
            );
        }
    }
    if let Some(path) = json {
        let text =
            json!({"bench": "packet-calls", "rounds": ROUNDS, "packets": PACKETS, "cases": raw});
        turns::write(&path, &format!("{text:#}\n"))?;
    }
    Ok(())
}

/// Fills the tap's queue.
fn fill(size: usize) -> Outcome<()> {
    let socket = UdpSocket::bind((dotted(HOST), 0))?;
    let packet = vec![7; size];
    for _ in 0..PACKETS {
        socket.send_to(&packet, (dotted(GUEST), 9))?;
    }
    Ok(())
}

/// Moves all packets of a round, through the ring if there is a batch; what one costs.
fn round(
    engine: &mut Engine,
    file: FileSlot,
    writes: bool,
    batch: Option<usize>,
    size: usize,
) -> Outcome<f64> {
    let mut frame = [vec![0; HEADER], datagram(9, &vec![7; size])].concat();
    // To nobody here.
    frame[HEADER + 5] = 9;
    if !writes {
        frame.resize(65_562, 0);
    }
    let segments = [iovec {
        iov_base: frame.as_mut_ptr().cast(),
        iov_len: frame.len(),
    }];
    let mut completions = Vec::new();
    let (mut done, begin) = (0, clock());
    while done < PACKETS {
        let Some(batch) = batch else {
            // SAFETY: the segment is ours, and lives as long as the call.
            let result = unsafe {
                match writes {
                    true => engine.write_now(file, &segments),
                    false => engine.read_now(file, &segments),
                }
            };
            if result <= 0 {
                return Err(format!("after {done} packets: {result}").into());
            }
            done += 1;
            continue;
        };
        for token in 0..batch.min(PACKETS - done) {
            let transfer = Transfer {
                file,
                segments: &segments,
                offset: u64::MAX,
                flags: libc::RWF_NOWAIT,
                token: token as u64,
            };
            // SAFETY: the segment is ours and outlives the completions below.
            unsafe {
                match writes {
                    true => engine.write(transfer),
                    false => engine.read(transfer),
                }
            }
        }
        engine.submit(true)?;
        engine.completions(&mut completions);
        if let Some(failed) = completions.iter().find(|c| c.result <= 0) {
            return Err(format!("after {done} packets: {}", failed.result).into());
        }
        done += completions.len();
        completions.clear();
    }
    Ok((clock() - begin) / PACKETS as f64)
}
