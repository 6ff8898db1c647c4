//! iperf3, whose server is in the guest: the host says what is sent which way, and both
//! ends' numbers come back to it.

use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_tests::network::{GUEST, dotted};
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use serde_json::Value;

/// What a datagram carries.
const PAYLOAD: u64 = 64;
/// Bytes of a GiB.
const GIB: f64 = (1u64 << 30) as f64;
/// A connection that is not there by then is tried again.
const CONNECT_MS: &str = "2000";
/// How much longer than asked for a run may take.
const OVER: Duration = Duration::from_secs(60);

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Load {
    /// A stream of bytes, as fast as it goes.
    Stream,
    /// Datagrams, so many a second, or as many as go.
    Datagrams(Option<u64>),
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Carried {
    /// GiB that arrived, or datagrams.
    pub(crate) amount: f64,
    /// Of these in a second.
    pub(crate) rate: f64,
    /// Sent in a second.
    pub(crate) offered: f64,
}

/// Sends for so many seconds, from the guest or to it. What iperf3 says when it cannot
/// is the inner error: a server that is not there yet, or between two clients.
pub(crate) fn run(load: Load, from_guest: bool, seconds: u64) -> Outcome<Result<Carried, String>> {
    let program = Part::Iperf3.find().ok_or("iperf3 is missing")?;
    let mut client = command(&program);
    client
        .args(["-J", "-i", "0", "--connect-timeout", CONNECT_MS, "-c"])
        .arg(dotted(GUEST))
        .args(["-t", &seconds.to_string()]);
    if from_guest {
        client.arg("-R");
    }
    match load {
        // The same on both ends: machines differ in what they begin with.
        Load::Stream => client.args(["-C", "cubic"]),
        Load::Datagrams(rate) => {
            let bits = rate.unwrap_or(0) * PAYLOAD * 8;
            client.args(["-u", "-l", &PAYLOAD.to_string(), "-b", &bits.to_string()])
        }
    };
    let limit = Duration::from_secs(seconds) + OVER;
    let mut process = Process::start(&mut client, limit)?;
    process.wait(limit);
    process.kill();
    let text = process.output().lines().join("\n");
    Ok(read(&text, load))
}

/// Reads its report.
fn read(text: &str, load: Load) -> Result<Carried, String> {
    let object = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(object).map_err(|e| format!("{e}: {text}"))?;
    if let Some(error) = report["error"].as_str() {
        return Err(error.to_owned());
    }
    let of = |end: &str, name: &str| {
        let number = report["end"][end][name].as_f64();
        number.ok_or_else(|| format!("no {name} in {end}: {text}"))
    };
    let (got, sent) = match load {
        Load::Stream => {
            let bytes = |end: &str| of(end, "bytes").map(|bytes| bytes / GIB);
            (bytes("sum_received")?, bytes("sum_sent")?)
        }
        Load::Datagrams(_) => {
            let lost = of("sum_received", "lost_packets")?;
            let seen = of("sum_received", "packets")?;
            (seen - lost, of("sum_sent", "packets")?)
        }
    };
    let rate = got / of("sum_received", "seconds")?;
    let offered = sent / of("sum_sent", "seconds")?;
    // Nothing, or no time for it.
    if !(got > 0.0 && rate.is_finite() && offered.is_finite()) {
        return Err("nothing arrived".to_owned());
    }
    Ok(Carried {
        amount: got,
        rate,
        offered,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_what_counts() {
        let text = r#"warning
            {"end": {"sum_sent": {"seconds": 2.0, "bytes": 4294967296, "packets": 500},
            "sum_received": {"seconds": 2.0, "bytes": 2147483648, "packets": 450,
                "lost_packets": 50}}}"#;
        let stream = read(text, Load::Stream).unwrap();
        assert!((stream.amount - 2.0).abs() < 1e-9 && (stream.rate - 1.0).abs() < 1e-9);
        assert!((stream.offered - 2.0).abs() < 1e-9);
        let datagrams = read(text, Load::Datagrams(None)).unwrap();
        assert!((datagrams.amount - 400.0).abs() < 1e-9);
        assert!((datagrams.rate - 200.0).abs() < 1e-9);
        assert!((datagrams.offered - 250.0).abs() < 1e-9);
    }

    #[test]
    fn a_server_that_is_not_there_is_told() {
        let text = r#"{"end": {}, "error": "unable to connect to server"}"#;
        let error = read(text, Load::Stream).unwrap_err();
        assert_eq!(error, "unable to connect to server");
        assert!(read("Killed", Load::Stream).is_err());
        assert!(read(r#"{"end": {}}"#, Load::Stream).is_err());
    }
}
