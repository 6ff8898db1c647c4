//! `pericarp-fs` hands its guests over to a new process: all that they know, have
//! open and have locked goes on there, while they ask for more.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use pericarp_tests::bounded::OneCpu;
use pericarp_tests::fs::wire::ROOT;
use pericarp_tests::fs::wire::posix::O_RDWR;
use pericarp_tests::fs::{Client, Options, Server, TAG, refused};
use pericarp_tests::model::Sequence;
use pericarp_tests::parts::Part;
use pericarp_tests::uml::Machine;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::guests::MOUNT;
use crate::locks::{LOCKS, UNLOCK, WRITE, range, set, whole};
use crate::restart::actor::Actor;

/// Directories, each with somebody who does one thing after another in it.
const ACTORS: u16 = 24;

/// A server that can be taken over from.
fn server(test: &str, parts: &[Part], options: Options) -> Option<Server> {
    let options = Options {
        control: true,
        lifetime: Duration::from_secs(180),
        ..options
    };
    Server::for_test(test, parts, options).filter(Server::is_ours)
}

#[test]
fn a_new_process_goes_on_under_load() {
    let test = "a_new_process_goes_on_under_load";
    let Some(mut server) = server(test, &[], Options::default()) else {
        return;
    };
    let mut client = server.client().unwrap();
    let mut actors: Vec<Actor> = (0..ACTORS)
        .map(|slot| {
            let name = format!("actor-{slot}");
            let dir = client.mkdir(ROOT, &name, 0o755).unwrap();
            Actor::new(slot, dir.node, server.path(&name))
        })
        .collect();
    for actor in &mut actors {
        actor.begin(&mut client).unwrap();
    }
    client.go();
    let mut random = Sequence::new(9);
    let (mut idle, mut done) = (0, 0u64);
    let mut left = 8;
    while idle < actors.len() {
        let end = Instant::now() + Duration::from_millis(20 + random.below(100));
        let mut quiet = Instant::now();
        while idle < actors.len() && (left == 0 || Instant::now() < end) {
            let come = client.come().unwrap();
            if come.is_empty() {
                let waited = quiet.elapsed();
                assert!(waited < Duration::from_secs(20), "{}", server.epitaph());
                std::thread::sleep(Duration::from_micros(20));
                continue;
            }
            quiet = Instant::now();
            for (slot, answer) in come {
                let actor = &mut actors[usize::from(slot)];
                let ended = actor.end(&answer);
                ended.unwrap_or_else(|wrong| panic!("{left}: {wrong}\n{}", server.epitaph()));
                done += 1;
                match left {
                    0 => idle += 1,
                    _ => actor.begin(&mut client).unwrap(),
                }
            }
            client.go();
        }
        if left > 0 {
            server.hand_over();
            left -= 1;
        }
    }
    for actor in &mut actors {
        actor.compare();
    }
    eprintln!("{test}: 8 hand-overs, {done} requests");
    assert!(done > 1000, "{done} requests prove little");
    assert_eq!(server.stop().unwrap().code(), Some(0));
    assert!(!server.socket().exists() && !server.control().exists());
}

/// What a kill loses, too: files without a name, and locks.
#[test]
fn a_new_process_has_all_that_the_old_one_had() {
    let test = "a_new_process_has_all_that_the_old_one_had";
    let cases = [(true, false), (false, false), (true, true), (false, true)];
    for (file_handles, state) in cases {
        let options = Options {
            more: match file_handles {
                true => &["--locks=host"],
                false => &["--locks=host", "--no-file-handles"],
            },
            descriptors: Some(700),
            state,
            records: state,
            ..Options::default()
        };
        let Some(mut server) = server(test, &[], options) else {
            return;
        };
        let mut c = server.connect(&Client::setup()).unwrap();
        c.init_as(7, 41, LOCKS).unwrap();
        let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
        let many: Vec<_> = (0..1000)
            .map(|i| {
                let name = format!("file{i}");
                fs::write(server.path(&format!("dir/{name}")), &name).unwrap();
                c.lookup(dir.node, &name).unwrap()
            })
            .collect();
        let (kept, kept_fh) = c.create(dir.node, "kept", 0o600, O_RDWR).unwrap();
        let (gone, gone_fh) = c.create(dir.node, "gone", 0o600, O_RDWR).unwrap();
        c.write(gone.node, gone_fh, 0, b"nameless").unwrap();
        c.unlink(dir.node, "gone").unwrap();
        let removed = c.mkdir(ROOT, "removed", 0o755).unwrap();
        let removed_fh = c.opendir(removed.node).unwrap();
        c.rmdir(ROOT, "removed").unwrap();
        let listing = c.opendir(dir.node).unwrap();
        let first = c.readdir(dir.node, listing, 0, 512).unwrap();
        set(&mut c, kept.node, whole(kept_fh, WRITE)).unwrap();
        // An owner of a lock on a range.
        set(&mut c, gone.node, range(gone_fh, 77, WRITE, (0, 9))).unwrap();
        c.rename((ROOT, "dir"), (ROOT, "moved"), 0).unwrap();
        for round in 0..3 {
            if state && round == 1 {
                // A guest that is away for a moment.
                c.driver.leave();
                server.hand_over();
                c.reconnect(&server.socket()).unwrap();
            } else {
                server.hand_over();
            }
            assert_eq!(c.read(gone.node, gone_fh, 0, 100).unwrap(), b"nameless");
            assert_eq!(c.getattr(gone.node).unwrap().nlink, 0);
            c.write(kept.node, kept_fh, 0, b"after").unwrap();
            assert_eq!(c.lookup(dir.node, "kept").unwrap().node, kept.node);
            assert_eq!(c.getattr(removed.node).unwrap().nlink, 0);
            // What Linux says of a directory that is removed, and not EBADF.
            let nothing = c.readdir(removed.node, removed_fh, 0, 512);
            assert_eq!(nothing.unwrap_err().errno(), Some(Errno::NOENT));
            for (i, entry) in many.iter().enumerate() {
                let found = c.getattr(entry.node).unwrap();
                assert_eq!(
                    (found.ino, found.size),
                    (entry.attr.ino, entry.attr.size),
                    "{i}"
                );
            }
            // On with the listing, from where it was.
            let cookie = first.last().unwrap().cookie;
            let rest = c.readdir(dir.node, listing, cookie, 512).unwrap();
            assert!(
                rest.iter()
                    .all(|entry| first.iter().all(|f| f.name != entry.name))
            );
            let host = File::open(server.path("moved/kept")).unwrap();
            let locked = flock(&host, FlockOperation::NonBlockingLockExclusive);
            assert_eq!(locked, Err(Errno::WOULDBLOCK), "round {round}");
            // New numbers are nobody's.
            let (new, new_fh) = c.create(dir.node, "new", 0o600, O_RDWR).unwrap();
            assert!(many.iter().all(|entry| entry.node != new.node));
            assert!(![kept_fh, gone_fh, removed_fh, listing].contains(&new_fh));
            c.release(new.node, new_fh).unwrap();
            c.unlink(dir.node, "new").unwrap();
            c.forget(new.node, 1).unwrap();
        }
        set(&mut c, kept.node, whole(kept_fh, UNLOCK)).unwrap();
        refused(
            set(&mut c, gone.node, range(gone_fh, 78, WRITE, (5, 5))),
            &[Errno::AGAIN],
        )
        .unwrap();
        set(&mut c, gone.node, range(gone_fh, 77, UNLOCK, (0, 9))).unwrap();
        set(&mut c, gone.node, range(gone_fh, 78, WRITE, (5, 5))).unwrap();
        let host = File::open(server.path("moved/kept")).unwrap();
        flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
        if state {
            // What the old process wrote down is the new one's, and so is what
            // was made since.
            let (late, late_fh) = c.create(dir.node, "late", 0o600, O_RDWR).unwrap();
            server.succeed();
            c.reconnect(&server.socket()).unwrap();
            c.write(late.node, late_fh, 0, b"late").unwrap();
            assert_eq!(c.read(kept.node, kept_fh, 0, 5).unwrap(), b"after");
            for entry in &many {
                assert_eq!(c.getattr(entry.node).unwrap().ino, entry.attr.ino);
            }
            assert_eq!(server.stop().unwrap().code(), Some(0));
            continue;
        }
        c.release(gone.node, gone_fh).unwrap();
        c.forget(gone.node, 1).unwrap();
        let lost = c.getattr(gone.node).unwrap_err();
        assert_eq!(lost.errno(), Some(Errno::STALE));
        assert_eq!(server.stop().unwrap().code(), Some(0));
    }
}

/// Linux's own driver, which knows no reconnecting.
#[test]
fn a_linux_guest_does_not_notice() {
    let test = "a_linux_guest_does_not_notice";
    let parts = [Part::UserModeLinux, Part::Fio];
    let options = Options {
        cache: "auto",
        direct: true,
        ..Options::default()
    };
    let Some(mut server) = server(test, &parts, options) else {
        return;
    };
    let _cpu = OneCpu::turn();
    let script = format!(
        "tag={TAG}\n{MOUNT}cd share\n: >begun\n\
         fio --name=verify --directory=. --ioengine=io_uring --direct=1 --iodepth=16 --rw=randrw \
             --rwmixread=50 --bs=4k --size=24m --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --verify_backlog=256 --randseed=7 --unlink=1 --output-format=terse >/tmp/fio.log 2>&1 \
             || {{ cat /tmp/fio.log; exit 1; }}\n\
         cd ..\numount share\necho well\n"
    );
    let mut machine = Machine::new(&[], &script);
    machine.shares.push(server.socket());
    let (report, count) = std::thread::scope(|scope| {
        let running = scope.spawn(|| machine.run());
        let begun = server.path("begun");
        pericarp_tests::bounded::poll(Duration::from_secs(60), || begun.exists().then_some(()));
        let mut count = 0;
        while !running.is_finished() && count < 10 {
            std::thread::sleep(Duration::from_millis(250));
            server.hand_over();
            count += 1;
        }
        (running.join().unwrap(), count)
    });
    let report = report.unwrap_or_else(|e| panic!("{e}\n{}", server.epitaph()));
    let said = format!("{}\n{}", report.output, report.console);
    assert!(report.code == 0 && report.output.contains("well"), "{said}");
    assert!(count >= 3, "{count} hand-overs prove little");
}
