//! `pericarp-fs` killed again and again under a mixed load, and served on by a
//! successor: what a guest knows stays, what it asked for is done once, and what
//! it has open is open. `PERICARP_CRASH_SECONDS` makes it longer than CI has time
//! for.

pub(crate) mod actor;

use std::time::{Duration, Instant};

use pericarp_tests::frontend::Setup;
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::wire::posix::{O_APPEND, O_RDWR};
use pericarp_tests::fs::{Client, Options, Server};
use pericarp_tests::model::Sequence;
use rustix::io::Errno;

use actor::Actor;

/// Directories, each with somebody who does one thing after another in it.
const ACTORS: u16 = 24;

fn patience(default: u64) -> Duration {
    let named = std::env::var("PERICARP_CRASH_SECONDS").ok();
    Duration::from_secs(named.and_then(|n| n.parse().ok()).unwrap_or(default))
}

fn kept(records: bool, engine: &'static str) -> Options {
    Options {
        state: true,
        records,
        engine,
        lifetime: patience(60) + Duration::from_secs(120),
        ..Options::default()
    }
}

/// A session whose front end keeps requests in flight, where the file does not.
fn session(server: &mut Server, records: bool) -> Client {
    let setup = Setup {
        inflight: !records,
        limit: Duration::from_secs(20),
        ..Client::setup()
    };
    let mut client = server.connect(&setup).unwrap();
    client.init().unwrap();
    client
}

/// `relieved`: every other time it is not killed, and hands over to its successor.
fn killed_under_load(test: &str, options: Options, relieved: bool, seconds: u64) {
    let records = options.records;
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    let mut client = session(&mut server, records);
    let mut actors: Vec<Actor> = (0..ACTORS)
        .map(|slot| {
            let name = format!("actor-{slot}");
            let dir = client.mkdir(ROOT, &name, 0o755).unwrap();
            Actor::new(slot, dir.node, server.path(&name))
        })
        .collect();
    let mut random = Sequence::new(5);
    let (begin, limit) = (Instant::now(), patience(seconds));
    let (mut kills, mut relieves, mut again, mut done) = (0, 0, 0, 0u64);
    for actor in &mut actors {
        actor.begin(&mut client).unwrap();
    }
    client.go();
    let mut idle = 0;
    while idle < actors.len() {
        let running = begin.elapsed() < limit;
        // Now and then while the successor still recovers.
        let millis = match random.below(4) {
            0 => random.below(5),
            _ => 5 + random.below(120),
        };
        let end = Instant::now() + Duration::from_millis(millis);
        let mut quiet = Instant::now();
        while idle < actors.len() && (!running || Instant::now() < end) {
            let come = client.come().unwrap();
            if come.is_empty() {
                assert!(
                    quiet.elapsed() < Duration::from_secs(20),
                    "nothing comes after {kills} kills: {}",
                    server.epitaph()
                );
                std::thread::sleep(Duration::from_micros(20));
                continue;
            }
            quiet = Instant::now();
            for (slot, answer) in come {
                let actor = &mut actors[usize::from(slot)];
                actor.end(&answer).unwrap_or_else(|wrong| {
                    panic!("after {kills} kills: {wrong}\n{}", server.epitaph())
                });
                done += 1;
                if begin.elapsed() < limit {
                    actor.begin(&mut client).unwrap();
                } else {
                    idle += 1;
                }
            }
            client.go();
        }
        if running && relieved && relieves < kills {
            server.hand_over();
            relieves += 1;
        } else if running {
            server.succeed();
            client.reconnect(&server.socket()).unwrap_or_else(|wrong| {
                panic!("after {kills} kills: {wrong}\n{}", server.epitaph())
            });
            kills += 1;
            again += u32::from(server.said("done again"));
        }
    }
    for actor in &mut actors {
        actor.compare();
    }
    eprintln!(
        "{test}: {kills} kills and {relieves} hand-overs, {done} requests, {again} successors \
         had some to do again"
    );
    assert!(kills > 5, "{kills} kills prove little");
    assert!(again > kills / 10, "{again} of {kills} had something to do");
    assert_eq!(server.stop().unwrap().code(), Some(0));
}

#[test]
fn killed_with_memory_that_the_front_end_keeps() {
    let test = "killed_with_memory_that_the_front_end_keeps";
    killed_under_load(test, kept(false, ""), false, 8);
}

#[test]
fn killed_and_handed_over_in_turns() {
    for records in [false, true] {
        let options = Options {
            control: true,
            ..kept(records, "")
        };
        killed_under_load("killed_and_handed_over_in_turns", options, true, 5);
    }
}

#[test]
fn killed_with_a_file_and_the_synchronous_engine() {
    let test = "killed_with_a_file_and_the_synchronous_engine";
    killed_under_load(test, kept(true, "sync"), false, 5);
}

/// What is lost, and what is not: as the manual says.
#[test]
fn a_kill_takes_files_without_a_name_and_nothing_else() {
    let test = "a_kill_takes_files_without_a_name_and_nothing_else";
    let Some(mut server) = Server::for_test(test, &[], kept(false, "")) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    let mut c = session(&mut server, false);
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let (kept, kept_fh) = c.create(dir.node, "kept", 0o600, O_RDWR).unwrap();
    let (gone, gone_fh) = c.create(dir.node, "gone", 0o600, O_RDWR).unwrap();
    let log = c.create(dir.node, "log", 0o600, O_RDWR | O_APPEND);
    let (log, log_fh) = log.unwrap();
    let listing = c.opendir(dir.node).unwrap();
    c.write(kept.node, kept_fh, 0, b"before").unwrap();
    c.file_flags = O_RDWR | O_APPEND;
    c.write(log.node, log_fh, 0, b"one ").unwrap();
    c.file_flags = O_RDWR;
    c.unlink(dir.node, "gone").unwrap();
    c.rename((ROOT, "dir"), (ROOT, "moved"), 0).unwrap();
    for round in 0..3 {
        server.succeed();
        c.reconnect(&server.socket()).unwrap();
        assert_eq!(c.read(kept.node, kept_fh, 0, 100).unwrap(), b"before");
        assert_eq!(c.lookup(dir.node, "kept").unwrap().node, kept.node);
        assert_eq!(c.getattr(dir.node).unwrap().ino, dir.attr.ino);
        assert!(!c.readdir(dir.node, listing, 0, 4096).unwrap().is_empty());
        c.file_flags = O_RDWR | O_APPEND;
        c.write(log.node, log_fh, 0, b"more ").unwrap();
        c.file_flags = O_RDWR;
        let lost = c.getattr(gone.node).unwrap_err();
        assert_eq!(lost.errno(), Some(Errno::STALE));
        let lost = c.read(gone.node, gone_fh, 0, 1).unwrap_err();
        assert_eq!(lost.errno(), Some(Errno::BADF), "round {round}");
    }
    let text = std::fs::read(server.path("moved/log")).unwrap();
    assert_eq!(text, b"one more more more ");
    c.forget(kept.node, 4).unwrap();
    c.release(kept.node, kept_fh).unwrap();
    let forgotten = c.getattr(kept.node).unwrap_err();
    assert_eq!(forgotten.errno(), Some(Errno::STALE));
    // A guest that mounts anew has nothing.
    c.init().unwrap();
    let stale = c.getattr(dir.node).unwrap_err();
    assert_eq!(stale.errno(), Some(Errno::STALE));
    // A connection that ends is no end of the guest.
    let found = c.lookup(ROOT, "moved").unwrap();
    c.reconnect(&server.socket()).unwrap();
    assert_eq!(c.getattr(found.node).unwrap().ino, dir.attr.ino);
}
