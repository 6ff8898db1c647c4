//! Requests that were begun when the process died: done on the host and not yet
//! answered, done by nobody, or done by somebody else. What only a real kill can
//! show is in the suite `fs`.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use pericarp_share::{Share, ShareOptions, State};

use super::*;
use crate::{Cache, Settings};

const SHAPE: (u16, u16) = (2, 16);
const ROOT: u64 = 1;
const NEW: Recorded = Recorded {
    queue: 1,
    head: 3,
    again: false,
};
const AGAIN: Recorded = Recorded { again: true, ..NEW };

struct Rig {
    path: PathBuf,
    state: File,
    device: Option<FsDevice>,
    unique: u64,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Rig {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-fs-again-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let state = File::from(rustix::fs::memfd_create(c"state", flags).unwrap());
        state.set_len(State::bytes(SHAPE.0, SHAPE.1)).unwrap();
        let mut rig = Self {
            path,
            state,
            device: None,
            unique: 0,
        };
        rig.restart();
        rig.device().agree_for_test();
        rig
    }

    fn device(&self) -> &FsDevice {
        self.device.as_ref().unwrap()
    }

    fn restart(&mut self) {
        drop(self.device.take());
        let options = ShareOptions {
            descriptors: 128,
            open_files: 64,
            xattr: true,
            ..ShareOptions::default()
        };
        let root = File::open(&self.path).unwrap();
        let share = Share::open(root.into(), options).unwrap();
        let state = self.state.try_clone().unwrap();
        let state = State::open(state, 0, SHAPE, [0; 64]).unwrap();
        let (share, _) = share.remember(state);
        let settings = Settings {
            cache: Cache::Never,
            ..Settings::default()
        };
        self.device = Some(FsDevice::new(share, "tag", 1, SHAPE.1, settings));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn header(&mut self, opcode: u32, node: u64) -> Header {
        self.unique += 2;
        Header {
            opcode,
            unique: self.unique,
            node,
            caller: Caller {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                ..Caller::default()
            },
            ..Header::default()
        }
    }

    fn call(&self, header: &Header, body: &[u8], at: Recorded) -> Result<Reply, Errno> {
        self.device().call(header, body, 4096, Some(at))
    }

    /// Writes down that this is about to be done, and nothing more.
    fn begin(&self, header: &Header, body: &[u8]) {
        let asked = Asked {
            header,
            caller: &header.caller,
            fields: Fields(body),
        };
        let mut intent = Intent {
            unique: header.unique,
            opcode: header.opcode,
            digest: digest(header, body),
            ..Intent::default()
        };
        let _ = self.device().describe(&mut intent, asked);
        let state = self.device().share.state().unwrap();
        state.slot(NEW.queue, NEW.head).unwrap().begin(&intent);
    }
}

fn body(halves: &[u32], rest: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
    bytes.extend(rest);
    bytes
}

fn node(reply: &Reply) -> u64 {
    u64::from_le_bytes(reply.0[..8].try_into().unwrap())
}

const EXCLUSIVE: u32 = (libc::O_RDWR | libc::O_EXCL) as u32;

/// Opcode, body, and the same on the host.
type Creation = (u32, Vec<u8>, fn(&Rig));

/// Each with what it makes under the name `new`; there is a file `old`.
fn creations(old: u64) -> [Creation; 5] {
    let linked = [old.to_le_bytes().as_slice(), b"new\0"].concat();
    [
        (opcode::MKDIR, body(&[0o755, 0], b"new\0"), |rig| {
            fs::create_dir(rig.file("new")).unwrap();
        }),
        (
            opcode::MKNOD,
            body(&[libc::S_IFREG | 0o644, 0, 0, 0], b"new\0"),
            |rig| drop(File::create(rig.file("new")).unwrap()),
        ),
        (opcode::SYMLINK, b"new\0nowhere\0".to_vec(), |rig| {
            std::os::unix::fs::symlink("nowhere", rig.file("new")).unwrap();
        }),
        (
            opcode::CREATE,
            body(&[EXCLUSIVE, 0o644, 0, 0], b"new\0"),
            |rig| drop(File::create(rig.file("new")).unwrap()),
        ),
        (opcode::LINK, linked, |rig| {
            fs::hard_link(rig.file("old"), rig.file("new")).unwrap();
        }),
    ]
}

fn with_old() -> (Rig, u64) {
    let mut rig = Rig::new();
    fs::write(rig.file("old"), "content").unwrap();
    let header = rig.header(opcode::LOOKUP, ROOT);
    let old = node(&rig.call(&header, b"old\0", NEW).unwrap());
    (rig, old)
}

#[test]
fn what_was_made_before_the_kill_is_made() {
    for index in 0..5 {
        for after_restart in [false, true] {
            let (mut rig, old) = with_old();
            let (code, body, make) = creations(old).into_iter().nth(index).unwrap();
            let header = rig.header(code, ROOT);
            rig.begin(&header, &body);
            make(&rig);
            if after_restart {
                rig.restart();
            }
            let reply = rig.call(&header, &body, AGAIN);
            let reply = reply.unwrap_or_else(|errno| panic!("opcode {code}: {errno}"));
            assert!(node(&reply) > 1);
            // Once more, by the next successor.
            rig.restart();
            let again = rig.call(&header, &body, AGAIN).unwrap();
            assert_eq!(node(&again), node(&reply), "opcode {code}");
            assert_eq!(reply.0[ENTRY..], again.0[ENTRY..], "opcode {code}");
            // One lookup, not two. The file that was there has one of its own.
            let lookups = 1 + u64::from(code == opcode::LINK);
            let share = &rig.device().share;
            share.forget(NodeId(node(&reply)), lookups - 1);
            assert!(share.glimpse_node(NodeId(node(&reply))).is_ok());
            share.forget(NodeId(node(&reply)), 1);
            assert!(share.glimpse_node(NodeId(node(&reply))).is_err());
        }
    }
}

#[test]
fn what_was_not_made_is_made_now() {
    for index in 0..5 {
        let (mut rig, old) = with_old();
        let (code, body, _) = creations(old).into_iter().nth(index).unwrap();
        let header = rig.header(code, ROOT);
        rig.begin(&header, &body);
        rig.restart();
        let reply = rig.call(&header, &body, AGAIN).unwrap();
        assert!(node(&reply) > 1, "opcode {code}");
        assert!(fs::symlink_metadata(rig.file("new")).is_ok());
    }
}

#[test]
fn what_was_there_before_is_an_error_as_it_was() {
    for index in 0..5 {
        let (mut rig, old) = with_old();
        let (code, body, make) = creations(old).into_iter().nth(index).unwrap();
        make(&rig);
        std::thread::sleep(TICK * 3);
        let header = rig.header(code, ROOT);
        rig.begin(&header, &body);
        rig.restart();
        let answer = rig.call(&header, &body, AGAIN).map(drop);
        assert_eq!(answer, Err(Errno::EXIST), "opcode {code}");
        // And is told so again, whatever has become of it.
        let _ = fs::remove_file(rig.file("new")).or_else(|_| fs::remove_dir(rig.file("new")));
        let answer = rig.call(&header, &body, AGAIN).map(drop);
        assert_eq!(answer, Err(Errno::EXIST), "opcode {code}");
        // Another request in the same place is its own.
        let header = rig.header(code, ROOT);
        assert!(rig.call(&header, &body, AGAIN).is_ok(), "opcode {code}");
    }
}

#[test]
fn what_was_removed_is_removed_and_nothing_else() {
    for (code, is_dir) in [(opcode::UNLINK, false), (opcode::RMDIR, true)] {
        let make = |path: PathBuf| match is_dir {
            true => fs::create_dir(path).unwrap(),
            false => fs::write(path, "x").unwrap(),
        };
        let remove = |path: PathBuf| match is_dir {
            true => fs::remove_dir(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        };
        for state in ["gone", "there", "another"] {
            let mut rig = Rig::new();
            make(rig.file("name"));
            let header = rig.header(code, ROOT);
            rig.begin(&header, b"name\0");
            match state {
                "gone" => remove(rig.file("name")),
                "another" => {
                    make(rig.file("other"));
                    remove(rig.file("name"));
                    fs::rename(rig.file("other"), rig.file("name")).unwrap();
                }
                _ => {}
            }
            rig.restart();
            assert_eq!(
                rig.call(&header, b"name\0", AGAIN).map(drop),
                Ok(()),
                "{state}"
            );
            assert_eq!(rig.file("name").exists(), state == "another", "{state}");
            assert_eq!(
                rig.call(&header, b"name\0", AGAIN).map(drop),
                Ok(()),
                "{state}"
            );
            assert_eq!(rig.file("name").exists(), state == "another", "{state}");
        }
        // What was never there is missed, now as then.
        let mut rig = Rig::new();
        let header = rig.header(code, ROOT);
        rig.begin(&header, b"name\0");
        assert_eq!(
            rig.call(&header, b"name\0", AGAIN).map(drop),
            Err(Errno::NOENT)
        );
    }
}

#[test]
fn what_was_moved_is_moved_once() {
    let exchange = RenameFlags::EXCHANGE.bits();
    for flags in [0, RenameFlags::NOREPLACE.bits(), exchange] {
        for moved in [false, true] {
            let mut rig = Rig::new();
            fs::write(rig.file("a"), "a").unwrap();
            if flags == exchange {
                fs::write(rig.file("b"), "b").unwrap();
            }
            let header = rig.header(opcode::RENAME2, ROOT);
            let body = [&ROOT.to_le_bytes()[..], &body(&[flags, 0], b"a\0b\0")].concat();
            rig.begin(&header, &body);
            if moved {
                let flags = RenameFlags::from_bits_retain(flags);
                let (a, b) = (rig.file("a"), rig.file("b"));
                rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags).unwrap();
            }
            rig.restart();
            for _ in 0..2 {
                assert_eq!(rig.call(&header, &body, AGAIN).map(drop), Ok(()));
                assert_eq!(fs::read(rig.file("b")).unwrap(), b"a");
                assert_eq!(rig.file("a").exists(), flags == exchange);
            }
        }
    }
}

#[test]
fn attributes_are_set_and_removed_once() {
    let (mut rig, old) = with_old();
    let set = body(&[3, libc::XATTR_CREATE as u32], b"user.x\0abc");
    let other = body(&[3, libc::XATTR_CREATE as u32], b"user.x\0abd");
    let header = rig.header(opcode::SETXATTR, old);
    rig.begin(&header, &set);
    assert_eq!(rig.device().act(asked(&header, &set), 0).map(drop), Ok(()));
    rig.restart();
    assert_eq!(rig.call(&header, &set, AGAIN).map(drop), Ok(()));
    let header = rig.header(opcode::SETXATTR, old);
    rig.begin(&header, &other);
    let answer = rig.call(&header, &other, AGAIN).map(drop);
    assert_eq!(answer, Err(Errno::EXIST), "another value");
    let header = rig.header(opcode::REMOVEXATTR, old);
    rig.begin(&header, b"user.x\0");
    assert!(rig.device().act(asked(&header, b"user.x\0"), 0).is_ok());
    assert_eq!(rig.call(&header, b"user.x\0", AGAIN).map(drop), Ok(()));
    let header = rig.header(opcode::REMOVEXATTR, old);
    let answer = rig.call(&header, b"user.x\0", NEW).map(drop);
    assert_eq!(answer, Err(Errno::NODATA));
}

fn asked<'a>(header: &'a Header, body: &'a [u8]) -> Asked<'a> {
    Asked {
        header,
        caller: &header.caller,
        fields: Fields(body),
    }
}

#[test]
fn lookups_and_opens_are_answered_again_and_counted_once() {
    let (mut rig, old) = with_old();
    let header = rig.header(opcode::LOOKUP, ROOT);
    assert_eq!(node(&rig.call(&header, b"old\0", NEW).unwrap()), old);
    rig.restart();
    assert_eq!(node(&rig.call(&header, b"old\0", AGAIN).unwrap()), old);
    let share = &rig.device().share;
    share.forget(NodeId(old), 1);
    assert!(share.glimpse_node(NodeId(old)).is_ok());
    let header = rig.header(opcode::OPEN, old);
    let open = body(&[libc::O_RDWR as u32, 0], b"");
    let reply = rig.call(&header, &open, NEW).unwrap();
    rig.restart();
    assert_eq!(rig.call(&header, &open, AGAIN).unwrap().0, reply.0);
    assert_eq!(rig.device().share.counts().2, 1);
    let release = [&reply.0[..8], &[0; 16]].concat();
    let header = rig.header(opcode::RELEASE, old);
    rig.device().act(asked(&header, &release), 0).unwrap();
    rig.restart();
    // Closed, and not written down.
    assert_eq!(rig.call(&header, &release, AGAIN).map(drop), Ok(()));
    let header = rig.header(opcode::RELEASE, old);
    assert_eq!(rig.call(&header, &release, NEW).map(drop), Err(Errno::BADF));
    rig.device().share.forget(NodeId(old), 1);
    assert!(rig.device().share.glimpse_node(NodeId(old)).is_err());
}

#[test]
fn what_was_forgotten_is_not_forgotten_again() {
    let (mut rig, old) = with_old();
    for _ in 0..4 {
        let header = rig.header(opcode::LOOKUP, ROOT);
        rig.call(&header, b"old\0", NEW).unwrap();
    }
    let header = rig.header(opcode::BATCH_FORGET, 0);
    let all = [(NodeId(old), 1); 3];
    let forget = |rig: &Rig, at, count| {
        let mut left = all[..count].iter().copied();
        rig.device()
            .forget_recorded(Some(at), &header, || left.next());
    };
    // Killed after two of three.
    forget(&rig, NEW, 2);
    rig.restart();
    forget(&rig, AGAIN, 3);
    rig.restart();
    forget(&rig, AGAIN, 3);
    // Five lookups, three of them taken back.
    let share = &rig.device().share;
    share.forget(NodeId(old), 1);
    assert!(share.glimpse_node(NodeId(old)).is_ok());
    share.forget(NodeId(old), 1);
    assert!(share.glimpse_node(NodeId(old)).is_err());
}
