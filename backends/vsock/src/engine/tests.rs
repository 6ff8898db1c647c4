//! Any packets in any order, and what the engine keeps afterwards.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::packet::MAX_PAYLOAD;

/// A directory with a socket that answers for port 1, and an engine on it.
struct Rig {
    dir: std::path::PathBuf,
    neighbour: UnixListener,
    engine: Engine,
}

impl Rig {
    fn new(limit: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-vsock-{}-{serial}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("p")).unwrap();
        let neighbour = UnixListener::bind(dir.join("p_1")).unwrap();
        neighbour.set_nonblocking(true).unwrap();
        let prefix = format!("{}/p_", dir.display());
        let engine = Engine::new(3, listener, prefix, limit).unwrap();
        Self {
            dir,
            neighbour,
            engine,
        }
    }

    fn dial(&self) -> UnixStream {
        UnixStream::connect(self.dir.join("p")).unwrap()
    }

    fn packets(&mut self) -> Vec<Header> {
        let mut data = vec![0; MAX_PAYLOAD];
        std::iter::from_fn(|| self.engine.next_packet(&mut data)).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn packet(op: u16, guest: u32, host: u32) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: STREAM,
        op,
        buf_alloc: 4096,
        ..Header::default()
    }
}

#[test]
fn guests_get_three_quarters_and_hosts_the_rest() {
    let mut rig = Rig::new(8);
    for guest in 0..10 {
        rig.engine.receive(&packet(op::REQUEST, guest, 1), &[]);
    }
    let answers = rig.packets();
    let count = |op| answers.iter().filter(|packet| packet.op == op).count();
    assert_eq!((count(op::RESPONSE), count(op::RST)), (6, 4));
    // Two places are left for three; the third gets its turn when one is free.
    let hosts: Vec<UnixStream> = (0..3).map(|_| rig.dial()).collect();
    rig.engine.host_events();
    assert_eq!(rig.engine.connections.len(), 8);
    assert!(rig.engine.listener_waits);
    rig.engine.receive(&packet(op::RST, 0, 1), &[]);
    assert_eq!(rig.engine.connections.len(), 8);
    drop(hosts);
}

#[test]
fn the_dead_do_not_wait_in_line() {
    let mut rig = Rig::new(8);
    for guest in 0..1000 {
        rig.engine.receive(&packet(op::REQUEST, guest, 1), &[]);
        rig.engine.receive(&packet(op::RST, guest, 1), &[]);
        let _ = rig.neighbour.accept();
    }
    assert!(rig.engine.line.is_empty() && rig.engine.connections.is_empty());
}

#[test]
fn patience_ends() {
    let mut rig = Rig::new(100);
    let silent = rig.dial();
    let mut asking = rig.dial();
    std::io::Write::write_all(&mut asking, b"CONNECT 9\n").unwrap();
    // Accepted first, heard then.
    rig.engine.host_events();
    rig.engine.host_events();
    assert_eq!(rig.packets()[0].op, op::REQUEST);
    let now = Instant::now();
    rig.engine.expire(now + Duration::from_secs(4));
    assert_eq!(rig.engine.connections.len(), 2);
    rig.engine.expire(now + Duration::from_secs(6));
    assert_eq!(rig.engine.connections.len(), 1, "the silent one is gone");
    rig.engine.expire(now + Duration::from_secs(11));
    assert_eq!(rig.engine.connections.len(), 0);
    assert_eq!(rig.packets()[0].op, op::RST, "the guest is told");
    drop(silent);
}

#[test]
fn a_closed_connection_is_drained_for_a_while() {
    let mut rig = Rig::new(100);
    rig.engine.receive(&packet(op::REQUEST, 5, 1), &[]);
    // No event of the socket yet: it is not known to be writable.
    let data = Header {
        len: 5,
        ..packet(op::RW, 5, 1)
    };
    rig.engine.receive(&data, b"bytes");
    let end = Header {
        flags: shutdown::BOTH,
        ..packet(op::SHUTDOWN, 5, 1)
    };
    rig.engine.receive(&end, &[]);
    assert_eq!(rig.engine.connections.len(), 1);
    assert!(rig.engine.by_ports.is_empty(), "the port is free again");
    assert_eq!(rig.engine.from_guest, 0);
    rig.engine.expire(Instant::now() + Duration::from_secs(29));
    assert_eq!(rig.engine.connections.len(), 1);
    rig.engine.host_events();
    assert_eq!(rig.engine.connections.len(), 0, "written and done");
    let (mut host, _) = rig.neighbour.accept().unwrap();
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut host, &mut all).unwrap();
    assert_eq!(all, b"bytes");
}

fn any_packet() -> impl Strategy<Value = (Header, u16)> {
    let cid = prop_oneof![8 => Just(3u64), 1 => any::<u64>()];
    let to = prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()];
    let op = prop_oneof![9 => 0u16..9, 1 => any::<u16>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let numbers = (any::<u32>(), any::<u32>(), 0u32..5);
    (cid, to, 0u32..6, 0u32..3, op, kind, numbers, 0u16..5000).prop_map(
        |(src_cid, dst_cid, src_port, port, op, kind, (buf_alloc, fwd_cnt, flags), len)| {
            let dst_port = if port == 2 { FIRST_PORT } else { port };
            let header = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len: u32::from(len),
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            (header, len)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No packets bring it down, past its limits, or out of step with itself.
    #[test]
    fn any_packets_in_any_order(
        steps in proptest::collection::vec((any_packet(), 0u8..8), 1..300),
    ) {
        let mut rig = Rig::new(8);
        let mut hosts = Vec::new();
        let data = vec![0; 5000];
        for ((header, len), other) in steps {
            if header.op == 0xffff {
                rig.engine.receive_malformed(&header);
            } else {
                rig.engine.receive(&header, &data[..usize::from(len)]);
            }
            match other {
                0 => {
                    let mut host = rig.dial();
                    let _ = std::io::Write::write_all(&mut host, b"CONNECT 4\n");
                    hosts.push(host);
                }
                1 => rig.engine.host_events(),
                2 => drop(rig.packets()),
                3 => hosts.extend(rig.neighbour.accept().map(|(host, _)| host)),
                4 => drop(hosts.pop()),
                _ => {}
            }
            let engine = &rig.engine;
            prop_assert!(engine.connections.len() <= 8);
            prop_assert!(engine.line.len() <= 8);
            let from_guest = engine
                .by_ports
                .values()
                .filter(|token| engine.connections[token].from_guest)
                .count();
            prop_assert_eq!(engine.from_guest, from_guest);
            for (ports, token) in &engine.by_ports {
                prop_assert_eq!(engine.connections[token].ports, *ports);
            }
        }
        rig.engine.reset();
        prop_assert!(rig.engine.by_ports.is_empty() && rig.engine.resets.is_empty());
    }
}
