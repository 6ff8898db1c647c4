//! Locks: kept by the guest unless the operator says otherwise; then the host's
//! and other guests', too. Waiting for one holds nobody up and always ends.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use pericarp_tests::bounded::{OneCpu, poll};
use pericarp_tests::fs::wire::posix::{O_RDONLY, O_RDWR};
use pericarp_tests::fs::wire::{Body, ROOT, feature, op};
use pericarp_tests::fs::{Client, Options, Server, TAG, Wrong, refused};
use pericarp_tests::fuse::{self, Fuse};
use pericarp_tests::parts::{Part, have};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::Machine;
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;

const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const UNLOCK: u32 = 2;
/// For all that comes.
const END: u64 = i64::MAX as u64;
pub(crate) const LOCKS: u64 = feature::LINUX | feature::POSIX_LOCKS | feature::FLOCK_LOCKS;
/// Descriptors 0 to 15 are those of requests that are alone.
const FIRST: u16 = 100;

fn options(locks: &'static [&'static str]) -> Options {
    Options {
        more: locks,
        ..Options::default()
    }
}

/// A server that passes locks on, a session, and a file that is open in it.
fn rig(test: &str) -> Option<(Server, Client, u64, u64)> {
    let options = options(&["--locks", "host", "--queue-size", "256"]);
    let mut server = Server::for_test(test, &[], options)?;
    if !server.is_ours() {
        return None;
    }
    fs::write(server.path("file"), b"0123456789").unwrap();
    let mut c = server.connect(&Client::setup()).unwrap();
    let (node, fh) = begin(&mut c);
    Some((server, c, node, fh))
}

fn begin(c: &mut Client) -> (u64, u64) {
    let agreed = c.init_as(7, 41, LOCKS).unwrap();
    let both = feature::POSIX_LOCKS | feature::FLOCK_LOCKS;
    assert_eq!(agreed.features & both, both);
    let node = c.lookup(ROOT, "file").unwrap().node;
    let fh = c.open(node, O_RDWR).unwrap();
    (node, fh)
}

/// The body of a lock on a range.
pub(crate) fn range(fh: u64, owner: u64, kind: u32, (start, end): (u64, u64)) -> Body {
    let body = Body::new().u64(fh).u64(owner).u64(start).u64(end);
    body.u32(kind).u32(4711).u32(0).u32(0)
}

/// That of a lock on the whole file.
pub(crate) fn whole(fh: u64, kind: u32) -> Body {
    let body = Body::new().u64(fh).u64(fh).u64(0).u64(END);
    body.u32(kind).u32(4711).u32(1).u32(0)
}

pub(crate) fn set(c: &mut Client, node: u64, body: Body) -> Result<(), Wrong> {
    c.ask(op::SETLK, node, body, 0).map(drop)
}

fn is_taken(answer: Result<(), Wrong>) {
    refused(answer, &[Errno::AGAIN]).unwrap();
}

fn close(c: &mut Client, node: u64, fh: u64, owner: u64) {
    let body = Body::new().u64(fh).u64(0).u64(owner);
    c.ask(op::FLUSH, node, body, 0).unwrap();
}

/// RELEASE of a file with or without a lock of its own.
fn release(c: &mut Client, node: u64, fh: u64, unlock: u32) {
    let body = Body::new().u64(fh).u32(0).u32(unlock).u64(fh);
    c.ask(op::RELEASE, node, body, 0).unwrap();
}

/// Has the host take a lock on the whole file, by fcntl.
fn by_host(path: &Path, operation: FlockOperation) -> Result<File, Errno> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    fcntl_lock(&file, operation).map(|()| file)
}

const ALONE: FlockOperation = FlockOperation::NonBlockingLockExclusive;

#[test]
fn a_guest_keeps_its_locks_unless_the_operator_says_otherwise() {
    let test = "a_guest_keeps_its_locks_unless_the_operator_says_otherwise";
    for more in [&[][..], &["--locks", "guest"]] {
        let Some(mut server) = Server::for_test(test, &[], options(more)) else {
            return;
        };
        fs::write(server.path("file"), b"x").unwrap();
        let mut c = server.connect(&Client::setup()).unwrap();
        let agreed = c.init_as(7, 41, LOCKS).unwrap();
        let both = feature::POSIX_LOCKS | feature::FLOCK_LOCKS;
        assert_eq!(agreed.features & both, 0, "the guest's kernel has them");
        let node = c.lookup(ROOT, "file").unwrap().node;
        let fh = c.open(node, O_RDWR).unwrap();
        for code in [op::GETLK, op::SETLK, op::SETLKW] {
            let answer = c.ask(code, node, range(fh, 1, WRITE, (0, END)), 24);
            refused(answer, &[Errno::NOSYS]).unwrap();
        }
    }
}

#[test]
fn a_guest_and_the_host_see_each_others_locks() {
    let test = "a_guest_and_the_host_see_each_others_locks";
    let Some((server, mut c, node, fh)) = rig(test) else {
        return;
    };
    let path = server.path("file");
    // Of the guest's, on ten bytes: the host finds them taken.
    set(&mut c, node, range(fh, 1, WRITE, (0, 9))).unwrap();
    assert!(matches!(
        by_host(&path, ALONE),
        Err(Errno::AGAIN | Errno::ACCESS)
    ));
    set(&mut c, node, range(fh, 1, UNLOCK, (0, 9))).unwrap();
    // Of the host's. What the process has ends with any close of the file.
    let held = by_host(&path, ALONE).unwrap();
    is_taken(set(&mut c, node, range(fh, 1, WRITE, (5, 5))));
    is_taken(set(&mut c, node, range(fh, 1, READ, (5, 5))));
    let found = c.ask(op::GETLK, node, range(fh, 1, READ, (5, 5)), 24);
    let found = found.unwrap();
    assert_eq!(found[..8], [0; 8]);
    assert_eq!(found[8..16], END.to_le_bytes());
    assert_eq!(found[16..20], WRITE.to_le_bytes());
    drop(held);
    let found = c.ask(op::GETLK, node, range(fh, 1, READ, (5, 5)), 24);
    assert_eq!(found.unwrap()[16..20], UNLOCK.to_le_bytes());
    set(&mut c, node, range(fh, 1, WRITE, (5, 5))).unwrap();

    // On whole files they are others, and know nothing of these.
    let file = File::open(&path).unwrap();
    flock(&file, FlockOperation::NonBlockingLockShared).unwrap();
    set(&mut c, node, whole(fh, READ)).unwrap();
    is_taken(set(&mut c, node, whole(fh, WRITE)));
    drop(file);
    set(&mut c, node, whole(fh, WRITE)).unwrap();
    let file = File::open(&path).unwrap();
    let taken = flock(&file, FlockOperation::NonBlockingLockShared);
    assert_eq!(taken, Err(Errno::WOULDBLOCK));
    release(&mut c, node, fh, 2);
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    by_host(&path, ALONE).unwrap();
}

#[test]
fn an_owner_has_all_its_open_files_and_loses_its_locks_with_the_first() {
    let test = "an_owner_has_all_its_open_files_and_loses_its_locks_with_the_first";
    let Some((server, mut c, node, fh)) = rig(test) else {
        return;
    };
    let other = c.open(node, O_RDWR).unwrap();
    // One process, two open files: its locks never meet.
    set(&mut c, node, range(fh, 1, WRITE, (0, 9))).unwrap();
    set(&mut c, node, range(other, 1, WRITE, (5, 20))).unwrap();
    is_taken(set(&mut c, node, range(fh, 2, READ, (15, 15))));
    set(&mut c, node, range(fh, 2, READ, (30, 30))).unwrap();
    // A part of it given up, through the other.
    set(&mut c, node, range(other, 1, UNLOCK, (0, 4))).unwrap();
    set(&mut c, node, range(fh, 2, WRITE, (0, 4))).unwrap();
    // Closing any of its files ends all that the first has, and nothing else.
    close(&mut c, node, other, 1);
    set(&mut c, node, range(fh, 2, WRITE, (5, 25))).unwrap();
    is_taken(set(&mut c, node, range(fh, 1, WRITE, (30, 30))));
    // What a guest has by open file is never flushed.
    release(&mut c, node, fh, 0);
    set(&mut c, node, range(other, 1, WRITE, (0, END))).unwrap();
    // Nobody's business: kinds, ranges and files that are none.
    let bad = [Errno::INVAL];
    let cases = [
        range(other, 1, 3, (0, 0)),
        range(other, 1, WRITE, (5, 4)),
        range(other, 1, WRITE, (0, END + 1)),
        range(other, 1, WRITE, (u64::MAX, u64::MAX)),
    ];
    for body in cases {
        for code in [op::GETLK, op::SETLK, op::SETLKW] {
            refused(c.ask(code, node, body.clone(), 24), &bad).unwrap();
        }
    }
    let answer = set(&mut c, node, range(12345, 1, WRITE, (0, 0)));
    refused(answer, &[Errno::BADF]).unwrap();
    // The guest goes: its locks do.
    drop(c);
    let free = poll(Duration::from_secs(10), || {
        by_host(&server.path("file"), ALONE).ok()
    });
    assert!(free.is_some(), "locked by a guest that is gone");
}

#[test]
fn who_waits_holds_nobody_up_and_gets_the_lock() {
    let test = "who_waits_holds_nobody_up_and_gets_the_lock";
    let Some((server, mut c, node, fh)) = rig(test) else {
        return;
    };
    let path = server.path("file");
    type Lock = fn(&File, FlockOperation) -> Result<(), Errno>;
    let ranges: Lock = |file, how| fcntl_lock(file, how);
    let wholes: Lock = |file, how| flock(file, how);
    let cases = [
        (range(fh, 1, WRITE, (0, END)), ranges),
        (whole(fh, WRITE), wholes),
    ];
    for (body, lock) in cases {
        let held = File::options().read(true).write(true).open(&path).unwrap();
        lock(&held, ALONE).unwrap();
        c.begin(FIRST, op::SETLKW, node, body, 8).unwrap();
        c.go();
        // All else is served meanwhile, on the same queue.
        for _ in 0..50 {
            assert_eq!(c.read(node, fh, 0, 10).unwrap(), b"0123456789");
            c.getattr(node).unwrap();
        }
        drop(held);
        let all = c.finish(1).unwrap();
        assert_eq!((all[0].0, all[0].1.errno()), (FIRST, None));
    }
    assert!(by_host(&path, ALONE).is_err());
    let file = File::open(&path).unwrap();
    assert_eq!(flock(&file, ALONE), Err(Errno::WOULDBLOCK));
    // Of another owner's in the same guest.
    let body = range(fh, 2, READ, (3, 3));
    c.begin(FIRST, op::SETLKW, node, body, 8).unwrap();
    c.go();
    c.getattr(node).unwrap();
    let body = range(fh, 1, UNLOCK, (3, 3));
    c.begin(FIRST + 1, op::SETLK, node, body, 8).unwrap();
    c.go();
    let all = c.finish(2).unwrap();
    assert!(all.iter().all(|(_, answer)| answer.errno().is_none()));
}

#[test]
fn waiting_ends_with_an_interrupt_a_limit_and_the_session() {
    let test = "waiting_ends_with_an_interrupt_a_limit_and_the_session";
    let Some((mut server, mut c, node, fh)) = rig(test) else {
        return;
    };
    let path = server.path("file");
    let held = by_host(&path, ALONE).unwrap();
    let waiting = |c: &mut Client, slot: u16, owner: u64| {
        let body = range(fh, owner, WRITE, (0, END));
        c.begin(slot, op::SETLKW, node, body, 8).unwrap()
    };
    let first = waiting(&mut c, FIRST, 1);
    waiting(&mut c, FIRST + 1, 2);
    c.go();
    c.getattr(node).unwrap();
    // By the high priority queue; an unknown number is nobody's.
    c.queue = 0;
    for number in [99_999, first] {
        c.tell(op::INTERRUPT, 0, Body::new().u64(number)).unwrap();
    }
    c.queue = 1;
    let all = c.finish(1).unwrap();
    assert_eq!((all[0].0, all[0].1.errno()), (FIRST, Some(Errno::INTR)));

    // A queue of 256 has room for 16 that wait, one of which does already.
    for index in 0..20 {
        waiting(&mut c, FIRST + 2 + index, 3 + u64::from(index));
    }
    c.go();
    let all = c.finish(5).unwrap();
    for (_, answer) in all {
        assert_eq!(answer.errno(), Some(Errno::NOLCK));
    }
    c.getattr(node).unwrap();
    // It goes, and another comes, while the host still has its lock.
    drop(c);
    let mut c = server.connect(&Client::setup()).unwrap();
    let (node, fh) = begin(&mut c);
    is_taken(set(&mut c, node, range(fh, 1, WRITE, (0, END))));
    let body = range(fh, 1, WRITE, (0, END));
    c.begin(FIRST, op::SETLKW, node, body, 8).unwrap();
    c.go();
    c.getattr(node).unwrap();
    // The server ends in good order with one that waits.
    let status = server.stop();
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    drop(held);
    by_host(&path, ALONE).unwrap();
}

/// Another server of the same directory, for another guest.
fn second(server: &Server) -> (Process, Client) {
    let socket = server.scratch.path("second.sock");
    let mut program = command(&Part::PERICARP_FS.find().unwrap());
    program.arg("--socket-path").arg(&socket);
    program.arg("--shared-dir").arg(server.dir());
    program.args(["--tag", TAG, "--locks", "host"]);
    let process = Process::start(&mut program, Duration::from_secs(60)).unwrap();
    poll(Duration::from_secs(10), || socket.exists().then_some(())).unwrap();
    let client = Client::connect(&socket, &Client::setup()).unwrap();
    (process, client)
}

#[test]
fn two_guests_see_each_others_locks() {
    let Some((server, mut a, node, fh)) = rig("two_guests_see_each_others_locks") else {
        return;
    };
    let (_process, mut b) = second(&server);
    let (theirs, open) = begin(&mut b);
    set(&mut a, node, range(fh, 1, WRITE, (0, 4))).unwrap();
    set(&mut a, node, whole(fh, READ)).unwrap();
    // The same number of another guest's is another owner.
    is_taken(set(&mut b, theirs, range(open, 1, READ, (4, 4))));
    set(&mut b, theirs, range(open, 1, WRITE, (5, 9))).unwrap();
    is_taken(set(&mut b, theirs, whole(open, WRITE)));
    set(&mut b, theirs, whole(open, READ)).unwrap();
    is_taken(set(&mut a, node, range(fh, 1, WRITE, (0, END))));
    let body = range(open, 1, WRITE, (0, 9));
    b.begin(FIRST, op::SETLKW, theirs, body, 8).unwrap();
    b.go();
    b.getattr(theirs).unwrap();
    close(&mut a, node, fh, 1);
    let all = b.finish(1).unwrap();
    assert_eq!(all[0].1.errno(), None);
}

#[test]
fn a_read_only_directory_is_locked_for_reading() {
    let test = "a_read_only_directory_is_locked_for_reading";
    let options = Options {
        read_only: true,
        cache: "always",
        ..options(&["--locks", "host"])
    };
    let Some(mut server) = Server::for_test(test, &[], options) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    fs::write(server.path("file"), b"x").unwrap();
    let mut c = server.connect(&Client::setup()).unwrap();
    let asked = LOCKS | feature::NO_OPEN | feature::NO_OPENDIR;
    let agreed = c.init_as(7, 41, asked).unwrap();
    assert_eq!(agreed.features & feature::NO_OPEN, 0, "locks have a file");
    let node = c.lookup(ROOT, "file").unwrap().node;
    let fh = c.open(node, O_RDONLY).unwrap();
    set(&mut c, node, range(fh, 1, READ, (0, 4))).unwrap();
    let answer = set(&mut c, node, range(fh, 1, WRITE, (0, 4)));
    refused(answer, &[Errno::BADF]).unwrap();
    assert!(by_host(&server.path("file"), ALONE).is_err());
}

/// Every call of such a directory is made elsewhere, the first attempt at a lock
/// among them.
#[test]
fn locks_of_a_slow_directory_are_not_the_workers() {
    let test = "locks_of_a_slow_directory_are_not_the_workers";
    if !fuse::usable(test) || !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    let scratch = Scratch::new();
    let _store = Fuse::mount_share(&scratch.path("dir"), vec![7; 1 << 20]).unwrap();
    let socket = scratch.path("fs.sock");
    let mut program = command(&Part::PERICARP_FS.find().unwrap());
    program.arg("--socket-path").arg(&socket);
    program.arg("--shared-dir").arg(scratch.path("dir"));
    program.args(["--tag", TAG, "--locks", "host"]);
    let mut server = Process::start(&mut program, Duration::from_secs(60)).unwrap();
    poll(Duration::from_secs(10), || socket.exists().then_some(())).unwrap();
    let mut c = Client::connect(&socket, &Client::setup()).unwrap();
    c.init_as(7, 41, LOCKS).unwrap();
    let node = c.lookup(ROOT, "disk").unwrap().node;
    let fh = c.open(node, O_RDWR).unwrap();
    for (one, other) in [
        (range(fh, 1, WRITE, (0, 9)), range(fh, 1, UNLOCK, (0, 9))),
        (whole(fh, WRITE), whole(fh, UNLOCK)),
    ] {
        // Nobody has it: the wait is over at once.
        c.ask(op::SETLKW, node, one, 8).unwrap();
        set(&mut c, node, other).unwrap();
    }
    set(&mut c, node, range(fh, 1, WRITE, (0, 9))).unwrap();
    is_taken(set(&mut c, node, range(fh, 2, WRITE, (0, 9))));
    let body = range(fh, 2, WRITE, (0, 9));
    c.begin(FIRST, op::SETLKW, node, body, 8).unwrap();
    c.go();
    assert_eq!(c.read(node, fh, 0, 100).unwrap(), [7; 100]);
    let body = Body::new().u64(fh).u64(0).u64(1);
    c.begin(FIRST + 1, op::FLUSH, node, body, 8).unwrap();
    c.go();
    let all = c.finish(2).unwrap();
    assert!(all.iter().all(|(_, answer)| answer.errno().is_none()));
    assert!(server.ended().is_none(), "{}", server.epitaph());
}

/// Linux in the guest, flock(1) in its shell, this process on the host.
#[test]
fn a_linux_guest_and_the_host_take_turns() {
    const WORK: &str = r#"
cd share
if flock -n held true; then exit 3; fi
flock -n -s shared true
if flock -n -x shared true; then exit 4; fi
flock mine sh -c ': >ready; i=0; while [ ! -e seen ]; do sleep 0.1; i=$((i+1)); [ $i -lt 600 ]; done'
if flock -n held true; then exit 5; fi
: >waiting
flock held sh -c 'echo got >result'
cd ..
umount share
"#;
    let test = "a_linux_guest_and_the_host_take_turns";
    let needed = [Part::UserModeLinux];
    let mut options = options(&["--locks", "host"]);
    options.lifetime = Duration::from_secs(240);
    let Some(mut server) = Server::for_test(test, &needed, options) else {
        return;
    };
    if !server.is_ours() {
        return;
    }
    let _cpu = OneCpu::turn();
    let [held, shared, mine] = ["held", "shared", "mine"].map(|name| {
        let path = server.path(name);
        fs::write(&path, b"").unwrap();
        File::open(path).unwrap()
    });
    flock(&held, ALONE).unwrap();
    flock(&shared, FlockOperation::NonBlockingLockShared).unwrap();
    let script = format!("tag={TAG}\n{}{WORK}", crate::guests::MOUNT);
    let mut machine = Machine::new(&[], &script);
    machine.shares.push(server.socket());
    let [ready, seen, waiting] = ["ready", "seen", "waiting"].map(|name| server.path(name));
    let host = std::thread::spawn(move || {
        let limit = Duration::from_secs(100);
        poll(limit, || ready.exists().then_some(())).ok_or("the guest is not ready")?;
        let taken = flock(&mine, ALONE);
        fs::write(&seen, b"").unwrap();
        if taken != Err(Errno::WOULDBLOCK) {
            return Err("the host does not see the guest's lock");
        }
        poll(limit, || waiting.exists().then_some(())).ok_or("the guest does not wait")?;
        drop(held);
        Ok(())
    });
    let report = machine
        .run()
        .unwrap_or_else(|error| panic!("{error}\nthe server {}", server.epitaph()));
    host.join().unwrap().unwrap();
    let said = format!("{}\n{}", report.output, report.console);
    assert_eq!(report.code, 0, "{said}\nthe server {}", server.epitaph());
    assert_eq!(fs::read_to_string(server.path("result")).unwrap(), "got\n");
}
