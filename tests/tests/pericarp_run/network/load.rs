//! Much at once on one machine, and what befalls it meanwhile: a thousand connections, a link
//! that goes down and comes back, and its card's server, which is killed until it stays dead.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use pericarp_tests::bounded::poll;
use pericarp_tests::parts::Part;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use super::host::*;
use crate::rig::*;

const CONNECTIONS: usize = 1000;
/// At a time: the listener in the guest starts a program for each.
const DIALLERS: usize = 4;
/// How often something befalls a stream of bytes, and how many come between two times.
const TIMES: usize = 3;
const PART: usize = 2 * MIB as usize;
/// What serves the card.
const NET: &str = "pericarp-net";
/// How often that may die within a minute.
const DEATHS: usize = 5;

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

/// Sends a stream of bytes, and has something befall it a few times: `hit` comes before the first
/// bytes of a part, `mend` when those are under way. Returns the sum of its bytes.
fn befallen(listener: TcpListener, mut hit: impl FnMut(usize), mut mend: impl FnMut()) -> String {
    let (reached, wait) = mpsc::channel();
    let (go, going) = mpsc::channel();
    let sender = thread::spawn(move || {
        let (mut stream, mut sum) = (accept(&listener), Sum::new());
        let part = noise(PART);
        for turn in 0..=TIMES {
            if turn > 0 {
                reached.send(()).unwrap();
                going.recv().unwrap();
            }
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
    for turn in 1..=TIMES {
        wait.recv_timeout(LIMIT).unwrap();
        hit(turn);
        go.send(()).unwrap();
        wait.recv_timeout(LIMIT).unwrap();
        mend();
    }
    sender.join().unwrap()
}

/// The host's end of the pod's link goes down and up.
fn flap_under_traffic(host: &Host, listener: TcpListener) -> String {
    let links = links("veth");
    let [link] = &links[..] else {
        panic!("{links:?}");
    };
    let set = |state| host.network.ip(&format!("link set {link} {state}"));
    befallen(listener, |_| set("down"), || set("up"))
}

/// Kills what serves the card, and returns when there is another, or the run has ended.
fn kill_the_card(host: &Host, running: &mut Running) -> bool {
    let before = host.rig.processes(NET);
    assert_eq!(before.len(), 1, "{before:?}");
    host.rig.kill(NET);
    let another = poll(LIMIT, || {
        let now = host.rig.processes(NET);
        let ended = running.child.try_wait().unwrap().is_some();
        let lives = now.len() == 1 && now != before;
        (ended || lives).then_some(!ended)
    });
    another.expect("another card, or an end")
}

/// It is killed a few times while bytes go to the guest and come back, and all of them do.
fn kill_under_traffic(host: &Host, running: &mut Running, [down, up]: [TcpListener; 2]) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let returned = thread::spawn(move || {
        let (mut stream, mut sum) = (accept(&up), Sum::new());
        let mut buffer = vec![0; 1 << 16];
        while let read @ 1.. = stream.read(&mut buffer).unwrap() {
            sum.add(&buffer[..read]);
            counted.fetch_add(read, Ordering::Relaxed);
        }
        sum.end()
    });
    // Some of them are on their way.
    let hit = |turn| {
        let wanted = turn * PART - PART / 2;
        let there = poll(LIMIT, || {
            (count.load(Ordering::Relaxed) >= wanted).then_some(())
        });
        assert!(there.is_some(), "{turn}: bytes no longer come back");
        assert!(kill_the_card(host, running), "{turn}");
    };
    let sum = befallen(down, hit, || {});
    assert_eq!(returned.join().unwrap(), sum, "what came back");
    assert_eq!(count.load(Ordering::Relaxed), (TIMES + 1) * PART);
}

#[test]
fn a_busy_machine_keeps_its_connections_whatever_befalls_its_card() {
    let test = "a_busy_machine_keeps_its_connections_whatever_befalls_its_card";
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
        busybox nc 10.88.0.1 7003 </dev/null | busybox nc 10.88.0.1 7004
        sleep 1000";
    let mut running = host.start(&[], script);
    let [flapping, down, up] = [7002, 7003, 7004].map(|port| listen(GATEWAY.into(), port));
    running.wait_for("ready");
    a_thousand_connections(SocketAddr::from(([10, 88, 0, 3], 80)));
    let sum = flap_under_traffic(&host, flapping);
    running.wait_for(&format!("flapped={sum}\n"));
    kill_under_traffic(&host, &mut running, [down, up]);
    let again = &mut dial(SocketAddr::from(([10, 88, 0, 3], 80)));
    talk(again, "hello once more\n");
    // Killed again and again it is there again, until something else must be wrong.
    let end = Instant::now() + LIMIT;
    while kill_the_card(&host, &mut running) {
        assert!(Instant::now() < end, "it is started for ever");
    }
    let run = running.wait();
    assert_eq!(run.code, 125, "{}", run.text());
    let death = "pericarp: a sidecar of the machine died (pericarp-net: killed by signal 9";
    let lines: Vec<&str> = run.stderr.lines().collect();
    let (last, others) = lines.split_last().expect("an end that is said");
    // What dies before it serves anybody is counted and not said.
    assert!(others.len() >= TIMES, "{}", run.stderr);
    for line in others {
        assert!(line.starts_with(death), "{line}");
        assert!(line.ends_with("; it was started again"), "{line}");
    }
    let often = format!(", {} times within 60 s", DEATHS + 1);
    assert!(last.starts_with(death) && last.ends_with(&often), "{last}");
    host.assert_state(&before);
    host.rig.assert_clean();
}
