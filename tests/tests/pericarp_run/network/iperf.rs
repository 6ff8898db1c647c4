//! iperf3 through a machine's network. The server is in the guest; the host says which way it goes.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use serde_json::Value;

use super::host::mebibytes;
use crate::rig::*;

/// What a guest does until it ends.
pub(crate) const SERVE: &str = "iperf3 -s >/dev/null 2>&1 &";
/// Where it does so.
pub(crate) const PORT: u16 = 5201;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// A stream of bytes that was carried.
#[derive(Debug)]
pub(crate) struct Carried {
    /// By the receiver's own count.
    pub(crate) bytes: u64,
    /// Never shorter than it took.
    pub(crate) took: Duration,
}

/// Sends so many MiB to a guest and has it send as many, by way of what is named. Says what iperf3
/// says of both.
pub(crate) fn both_ways(name: &str, to: SocketAddr, mebibytes: usize) -> [Carried; 2] {
    [("to", false), ("from", true)].map(|(way, back)| {
        let carried = poll(LIMIT, || match once(to, mebibytes, back) {
            Err(why) if is_early(&why) => {
                thread::sleep(PAUSE);
                None
            }
            end => Some(end),
        });
        let carried = carried.expect("a server");
        let carried = carried.unwrap_or_else(|why| panic!("{name}, {way} the machine: {why}"));
        println!(
            "{name}: iperf3 {way} the machine: {} bytes in {:?}",
            carried.bytes, carried.took
        );
        carried
    })
}

/// The server is not there yet, or still busy with the client before.
fn is_early(why: &str) -> bool {
    ["refused", "busy", "timed out"]
        .iter()
        .any(|word| why.contains(word))
}

fn once(to: SocketAddr, count: usize, back: bool) -> Result<Carried, String> {
    let mut client = command(&Part::Iperf3.find().unwrap());
    client
        .args(["-J", "-i", "0", "--connect-timeout", "5000"])
        .args(["-c", &to.ip().to_string(), "-p", &to.port().to_string()])
        .args(["-n", &format!("{count}M")]);
    if back {
        client.arg("-R");
    }
    let limit = LIMIT + Duration::from_secs(mebibytes() as u64);
    let begin = Instant::now();
    let mut process = Process::start(&mut client, limit).unwrap();
    process.wait(limit);
    let took = begin.elapsed();
    let text = process.output().lines().join("\n");
    let report = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(report).map_err(|error| format!("{error}: {text}"))?;
    if let Some(why) = report["error"].as_str() {
        return Err(why.to_owned());
    }
    let of = |end: &str| {
        let bytes = report["end"][end]["bytes"].as_u64();
        bytes.ok_or_else(|| format!("no bytes in {end}: {text}"))
    };
    let (sent, bytes) = (of("sum_sent")?, of("sum_received")?);
    // The end of a test does not wait for what is on its way.
    match sent >= count as u64 * MIB && bytes > 0 {
        true => Ok(Carried { bytes, took }),
        false => Err(format!("{sent} bytes sent, {bytes} received: {text}")),
    }
}
