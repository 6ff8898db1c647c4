//! Much at once on one machine, and what befalls it meanwhile: a thousand connections, a link
//! that goes down and comes back, and the end of its card's server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;

use pericarp_tests::parts::Part;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use super::host::*;
use crate::rig::*;

const CONNECTIONS: usize = 1000;
/// At a time: the listener in the guest starts a program for each.
const DIALLERS: usize = 4;
const FLAPS: usize = 3;

/// This process has a descriptor for each of them.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(4096, |most| most.min(4096));
    let raised = Rlimit {
        current: limit.current.max(Some(wanted)),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// Says this over the connection, and hears it back.
fn talk(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(String::from_utf8(back).unwrap(), text);
}

/// All open at the same time, each with words of its own.
fn a_thousand_connections(to: SocketAddr) {
    let diallers: Vec<_> = (0..DIALLERS)
        .map(|dialler| {
            thread::spawn(move || {
                let mut streams = Vec::new();
                for number in (dialler..CONNECTIONS).step_by(DIALLERS) {
                    let mut stream = dial(to);
                    talk(&mut stream, &format!("hello from {number}\n"));
                    streams.push((number, stream));
                }
                streams
            })
        })
        .collect();
    let streams = diallers.into_iter().map(|dialler| dialler.join().unwrap());
    let mut streams: Vec<_> = streams.flatten().collect();
    assert_eq!(streams.len(), CONNECTIONS);
    for (number, stream) in streams.iter_mut().rev() {
        talk(stream, &format!("{number} is still there\n"));
    }
}

/// The host's end of the pod's link goes down and up in the middle of a transfer, which goes on.
/// Returns the sum of its bytes.
fn flap_under_traffic(host: &Host, listener: std::net::TcpListener) -> String {
    let links = links("veth");
    let [link] = &links[..] else {
        panic!("{links:?}");
    };
    let (reached, wait) = mpsc::channel();
    let (go, going) = mpsc::channel();
    let sender = thread::spawn(move || {
        let (mut stream, mut sum) = (accept(&listener), Sum::new());
        let part = noise(2 * MIB as usize);
        for turn in 0..=FLAPS {
            if turn > 0 {
                reached.send(()).unwrap();
                going.recv().unwrap();
            }
            // The first of these are under way while there is no way.
            for piece in part.chunks(4096) {
                stream.write_all(piece).unwrap();
                sum.add(piece);
                if turn > 0 && piece.as_ptr() == part.as_ptr() {
                    reached.send(()).unwrap();
                }
            }
        }
        sum.end()
    });
    for _ in 0..FLAPS {
        wait.recv_timeout(LIMIT).unwrap();
        host.network.ip(&format!("link set {link} down"));
        go.send(()).unwrap();
        wait.recv_timeout(LIMIT).unwrap();
        host.network.ip(&format!("link set {link} up"));
    }
    sender.join().unwrap()
}

#[test]
fn a_busy_machine_keeps_its_connections_until_its_card_dies() {
    let test = "a_busy_machine_keeps_its_connections_until_its_card_dies";
    let host = Host::with(test, &[&VM[..], &[Part::Runc]].concat(), |rig| {
        let ipam = addresses(rig);
        vec![json!({"type": "bridge", "bridge": "pods0", "isGateway": true, "ipam": ipam})]
    });
    let Some(host) = host else { return };
    allow_descriptors();
    let first = host.start(&["--runtime", "runc"], "exit 0").wait();
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = host.idle();
    let script = "
        busybox nc -ll -p 80 -e /bin/cat &
        echo ready
        echo flapped=$(busybox nc 10.88.0.1 7002 </dev/null | md5sum)
        busybox nc 10.88.0.1 7003 </dev/zero";
    let running = host.start(&[], script);
    let [down, up] = [7002, 7003].map(|port| listen(GATEWAY.into(), port));
    running.wait_for("ready");
    a_thousand_connections(SocketAddr::from(([10, 88, 0, 3], 80)));
    let sum = flap_under_traffic(&host, down);
    let mut stream = accept(&up);
    running.wait_for(&format!("flapped={sum}\n"));
    // A card's state is in the guest's memory and the server's; the machine ends with the latter.
    let mut bytes = vec![0; MIB as usize];
    stream.read_exact(&mut bytes).unwrap();
    host.rig.kill("pericarp-net");
    let run = running.wait();
    assert_eq!(run.code, 125, "{}", run.text());
    let line = "pericarp: a sidecar of the machine died (pericarp-net: killed by signal 9";
    assert!(run.stderr.starts_with(line), "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    host.assert_state(&before);
    host.rig.assert_clean();
}
