//! `pericarp-fs` on a file system that fails: the guest gets the very error that the
//! host's kernel gave, counts are what was moved, and all is well once the store is.
//! Transfers through both engines, other calls on the threads that make them.

use std::fmt::Debug;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pericarp_tests::bounded::poll;
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::{Client, TAG, Wrong as Refusal, refused};
use pericarp_tests::fuse::{self, Fuse, Operation, Wrong};
use pericarp_tests::model::Sequence;
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::io::Errno;

const LIMIT: Duration = Duration::from_secs(20);
const SIZE: usize = 1 << 20;
const ALL: std::ops::Range<u64> = 0..u64::MAX;

struct Rig {
    guest: Client,
    server: Process,
    store: Fuse,
    content: Vec<u8>,
    node: u64,
    fh: u64,
    name: String,
    _scratch: Scratch,
}

/// The test with each engine, on a store that has one direct transfer at a time and on
/// one that has many.
fn in_every_way(test: &str, act: impl Fn(&mut Rig)) {
    with_engines(&["uring", "sync"], test, act);
}

/// The same with these engines.
fn with_engines(engines: &[&str], test: &str, act: impl Fn(&mut Rig)) {
    if !fuse::usable(test) || !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    for shared in [false, true] {
        for engine in engines {
            let mut rig = Rig::new(shared, engine);
            act(&mut rig);
            rig.is_healthy();
        }
    }
}

impl Rig {
    fn new(shared: bool, engine: &str) -> Self {
        let scratch = Scratch::new();
        let content = Sequence::new(6).bytes(SIZE);
        let (dir, socket) = (scratch.path("dir"), scratch.path("fs.sock"));
        let store = match shared {
            true => Fuse::mount_share(&dir, content.clone()),
            false => Fuse::mount(&dir, content.clone()),
        };
        let store = store.unwrap();
        store.behaviour.allocates.store(true, SeqCst);
        let mut server = command(&Part::PERICARP_FS.find().unwrap());
        server.arg("--socket-path").arg(&socket);
        server.arg("--shared-dir").arg(dir).args(["--tag", TAG]);
        server.args(["--io-engine", engine]);
        let mut server = Process::start(&mut server, 3 * LIMIT).unwrap();
        let there = poll(LIMIT, || {
            let ended = server.ended().is_some();
            (ended || socket.exists()).then_some(!ended)
        });
        assert_eq!(there, Some(true), "{}", server.output().last(9));
        let mut guest = Client::connect(&socket, &Client::setup()).unwrap();
        guest.init().unwrap();
        let node = guest.lookup(ROOT, "disk").unwrap().node;
        let fh = guest.open(node, 2).unwrap();
        Self {
            guest,
            server,
            store,
            content,
            node,
            fh,
            name: format!("{engine}, shared {shared}"),
            _scratch: scratch,
        }
    }

    fn plan(&self, operation: Operation, times: u32, wrong: Wrong) {
        let faults = &self.store.behaviour.faults;
        faults.plan(operation, ALL, times, wrong);
    }

    /// Each of these errors arrives, and the same call works after it.
    fn passes_on<T: Debug>(
        &mut self,
        operation: Operation,
        act: impl Fn(&mut Client, u64, u64) -> Result<T, Refusal>,
    ) {
        for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT] {
            self.plan(operation, 1, Wrong::Errno(errno.raw_os_error()));
            let answer = act(&mut self.guest, self.node, self.fh);
            let name = &self.name;
            refused(answer, &[errno]).unwrap_or_else(|e| panic!("{name}: {operation:?}: {e}"));
            let again = act(&mut self.guest, self.node, self.fh);
            again.unwrap_or_else(|e| panic!("{name}: {operation:?} again: {e}"));
        }
    }

    fn write(&mut self, at: usize, data: &[u8]) -> Result<u32, Refusal> {
        let written = self.guest.write(self.node, self.fh, at as u64, data)?;
        let part = written as usize;
        self.content[at..at + part].copy_from_slice(&data[..part]);
        Ok(written)
    }

    fn read(&mut self, at: usize, len: usize) -> Vec<u8> {
        let read = self.guest.read(self.node, self.fh, at as u64, len as u32);
        let bytes = read.unwrap_or_else(|e| panic!("{}: {e}", self.name));
        assert!(bytes == self.content[at..at + bytes.len()], "{}", self.name);
        bytes
    }

    /// With the store well again everything works, and nothing else has changed.
    fn is_healthy(&mut self) {
        let happened = self.store.behaviour.faults.heal();
        assert!(happened > 0, "{}: nothing went wrong", self.name);
        assert_eq!(self.write(4096, &[0x42; 4096]).unwrap(), 4096);
        for at in (0..SIZE).step_by(1 << 16) {
            assert_eq!(self.read(at, 1 << 16).len(), 1 << 16, "{}", self.name);
        }
        self.guest.fsync(self.node, self.fh).unwrap();
        assert!(
            self.store.behaviour.content() == self.content,
            "{}",
            self.name
        );
        assert!(self.server.ended().is_none(), "{}", self.server.epitaph());
    }
}

#[test]
fn the_hosts_errors_reach_the_guest() {
    in_every_way("the_hosts_errors_reach_the_guest", |rig| {
        rig.passes_on(Operation::Read, |guest, node, fh| {
            guest.read(node, fh, 0, 4096)
        });
        let same = rig.content[..4096].to_vec();
        rig.passes_on(Operation::Write, move |guest, node, fh| {
            guest.write(node, fh, 0, &same)
        });
        rig.passes_on(Operation::Sync, |guest, node, fh| guest.fsync(node, fh));
        rig.passes_on(Operation::Close, |guest, node, fh| guest.flush(node, fh));
        rig.passes_on(Operation::Attributes, |guest, node, _| {
            guest.truncate(node, SIZE as u64)
        });
        rig.passes_on(Operation::Space, |guest, node, _| guest.statfs(node));
        rig.passes_on(Operation::Lookup, |guest, _, _| {
            match guest.lookup(ROOT, "elsewhere") {
                // There is none, as the store says where it says anything.
                Err(Refusal::Refused(Errno::NOENT)) => Ok(()),
                other => other.map(drop),
            }
        });
        rig.passes_on(Operation::Open, |guest, node, _| {
            let fh = guest.open(node, 2)?;
            guest.release(node, fh)
        });
        rig.passes_on(Operation::Allocate, |guest, node, fh| {
            guest.fallocate(node, fh, 0, 4096, 0)
        });
    });
}

/// A transfer in pieces is whole, and one that fails after some bytes is a short one. As in
/// `store`, not with io_uring.
#[test]
fn counts_are_what_was_moved() {
    with_engines(&["sync"], "counts_are_what_was_moved", |rig| {
        for most in [1, 512, 1000, 4095] {
            rig.plan(Operation::Read, 2, Wrong::Short(most));
            assert_eq!(rig.read(8192, 4096).len(), 4096, "{}: {most}", rig.name);
            rig.plan(Operation::Write, 2, Wrong::Short(most));
            let data = Sequence::new(most as u64).bytes(4096);
            assert_eq!(
                rig.write(8192, &data).unwrap(),
                4096,
                "{}: {most}",
                rig.name
            );
            rig.store.behaviour.faults.heal();
        }
        rig.plan(Operation::Read, 1, Wrong::Short(1000));
        rig.plan(Operation::Read, 1, Wrong::Errno(5));
        assert_eq!(rig.read(0, 4096).len(), 1000, "{}", rig.name);
        rig.plan(Operation::Write, 1, Wrong::Short(1000));
        rig.plan(Operation::Write, 1, Wrong::Errno(5));
        assert_eq!(rig.write(0, &[1; 4096]).unwrap(), 1000, "{}", rig.name);
        // Full after 1.5 KiB.
        rig.store.behaviour.faults.leave_room(1536);
        assert_eq!(rig.write(0, &[2; 4096]).unwrap(), 1536, "{}", rig.name);
        for _ in 0..3 {
            let full = rig.write(1536, &[2; 4096]);
            refused(full, &[Errno::NOSPC]).unwrap();
        }
        rig.store.behaviour.faults.leave_room(u64::MAX);
        assert_eq!(rig.write(1536, &[2; 4096]).unwrap(), 4096, "{}", rig.name);
    });
}

/// Some of two hundred transfers at a time fail.
#[test]
fn others_do_not_hear_of_a_failure() {
    use pericarp_tests::fs::wire::op;
    in_every_way("others_do_not_hear_of_a_failure", |rig| {
        let faults = &rig.store.behaviour.faults;
        for slot in [7_u64, 77, 177] {
            let bytes = slot * 4096..slot * 4096 + 4000;
            faults.plan(Operation::Read, bytes, 1, Wrong::Errno(5));
        }
        for slot in 0..200_u16 {
            let at = u64::from(slot) * 4096;
            let body = pericarp_tests::fs::transfer_body(rig.fh, at, 4000, 0);
            rig.guest
                .begin(slot, op::READ, rig.node, body, 4000)
                .unwrap();
        }
        rig.guest.go();
        for (slot, answer) in rig.guest.finish(200).unwrap() {
            let at = usize::from(slot) * 4096;
            match [7, 77, 177].contains(&slot) {
                true => assert_eq!(answer.errno(), Some(Errno::IO), "{}: {slot}", rig.name),
                false => assert!(
                    answer.error == 0 && answer.body == rig.content[at..at + 4000],
                    "{}: {slot}",
                    rig.name
                ),
            }
        }
    });
}
