//! Ways out of the directory: names, links, and a host that swaps directories
//! for links while the guest looks them up. Nothing outside is ever returned.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pericarp_tests::fs::wire::posix::{O_RDONLY, O_RDWR, S_IFDIR, S_IFLNK, S_IFMT};
use pericarp_tests::fs::wire::{Body, ENTRY, Entry, ROOT, op};
use pericarp_tests::fs::{Client, Options, Server, Wrong};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::session;

/// Lookups while the host swaps: the race is lost in a few hundred.
const ROUNDS: usize = 4000;

/// Inode numbers that must never be seen.
fn outside(server: &Server) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt;
    let secret = server.scratch.path("outside");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("file"), b"secret").unwrap();
    [
        secret.clone(),
        secret.join("file"),
        server.scratch.dir().to_owned(),
        "/".into(),
        "/etc".into(),
        "/etc/passwd".into(),
        "/proc".into(),
        "/proc/self".into(),
    ]
    .iter()
    .filter_map(|path| fs::metadata(path).ok())
    .map(|meta| meta.ino())
    .collect()
}

#[test]
fn names_that_lead_up_are_refused() {
    let Some((server, mut c)) = session("names_that_lead_up_are_refused", Options::default())
    else {
        return;
    };
    let forbidden = outside(&server);
    fs::create_dir(server.path("dir")).unwrap();
    let root = c.getattr(ROOT).unwrap().ino;
    let dir = c.lookup(ROOT, "dir").unwrap();
    let names = [
        "..",
        "../outside",
        "../outside/file",
        "dir/../../outside/file",
        "/etc/passwd",
        "/",
        "./../outside",
        "...",
    ];
    for parent in [ROOT, dir.node] {
        for name in names {
            let found = c.ask(op::LOOKUP, parent, Body::new().name(name), ENTRY as u32);
            match found {
                Err(Wrong::Refused(_)) => {}
                Err(wrong) => panic!("{name}: {wrong}"),
                Ok(body) => {
                    let entry = Entry::parse(&body);
                    // Up to the root and no further is what a lookup may mean.
                    let fine = entry.node == 0 || entry.attr.ino == root;
                    assert!(
                        fine && !forbidden.contains(&entry.attr.ino),
                        "{name}: {entry:?}"
                    );
                }
            }
            if name == "..." {
                continue;
            }
            let made = c.create(parent, name, 0o600, O_RDWR);
            assert!(matches!(made, Err(Wrong::Refused(_))), "{name}: {made:?}");
            let made = c.mkdir(parent, name, 0o700);
            assert!(matches!(made, Err(Wrong::Refused(_))), "{name}: {made:?}");
            let made = c.symlink(parent, name, "x");
            assert!(matches!(made, Err(Wrong::Refused(_))), "{name}: {made:?}");
            let made = c.link(dir.node, parent, name);
            assert!(matches!(made, Err(Wrong::Refused(_))), "{name}: {made:?}");
            let gone = c.unlink(parent, name);
            assert!(matches!(gone, Err(Wrong::Refused(_))), "{name}: {gone:?}");
            let gone = c.rmdir(parent, name);
            assert!(matches!(gone, Err(Wrong::Refused(_))), "{name}: {gone:?}");
            let moved = c.rename((ROOT, "dir"), (parent, name), 0);
            assert!(matches!(moved, Err(Wrong::Refused(_))), "{name}: {moved:?}");
            let moved = c.rename((parent, name), (ROOT, "new"), 0);
            assert!(matches!(moved, Err(Wrong::Refused(_))), "{name}: {moved:?}");
        }
    }
    let secret = server.scratch.path("outside/file");
    assert_eq!(fs::read(secret).unwrap(), b"secret");
    // A listing names them; their numbers lead nowhere.
    let fh = c.opendir(ROOT).unwrap();
    for name in c.readdirplus(ROOT, fh, 0, 4096).unwrap() {
        let Some(entry) = name.entry else { continue };
        assert!(!forbidden.contains(&entry.attr.ino), "{name:?}");
        if name.name == ".." && entry.node != 0 {
            assert!(entry.attr.ino == root, "{name:?}");
        }
    }
}

#[test]
fn links_lead_nowhere() {
    let Some((server, mut c)) = session("links_lead_nowhere", Options::default()) else {
        return;
    };
    let forbidden = outside(&server);
    let links = [
        ("passwd", "/etc/passwd"),
        ("up", ".."),
        ("outside", "../outside"),
        ("proc", "/proc"),
        ("self", "/proc/self"),
        ("fd", "/proc/self/fd"),
        ("root", "/proc/self/root"),
        ("cwd", "/proc/self/cwd"),
        ("fd0", "/proc/self/fd/0"),
    ];
    for (name, target) in links {
        symlink(target, server.path(name)).unwrap();
    }
    for (name, target) in links {
        let entry = c.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.mode & S_IFMT, S_IFLNK, "{name}");
        assert!(!forbidden.contains(&entry.attr.ino), "{name}");
        assert_eq!(c.readlink(entry.node).unwrap(), target);
        no_way_through(&mut c, entry, name);
        // Opened by CREATE, which finds the name taken.
        let made = c.create(ROOT, name, 0o600, O_RDWR);
        assert!(matches!(made, Err(Wrong::Refused(_))), "{name}: {made:?}");
    }
    let secret = server.scratch.path("outside/file");
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

fn no_way_through(c: &mut Client, link: Entry, name: &str) {
    for below in [
        "passwd", "file", "self", "fd", "0", "1", "root", "cwd", "environ",
    ] {
        let found = c.lookup(link.node, below);
        assert!(
            matches!(found, Err(Wrong::Refused(_))),
            "{name}/{below}: {found:?}"
        );
        let made = c.create(link.node, below, 0o600, O_RDWR);
        assert!(
            matches!(made, Err(Wrong::Refused(_))),
            "{name}/{below}: {made:?}"
        );
    }
    let opened = c.open(link.node, O_RDONLY);
    assert!(
        matches!(opened, Err(Wrong::Refused(_))),
        "{name}: {opened:?}"
    );
    let opened = c.opendir(link.node);
    assert!(
        matches!(opened, Err(Wrong::Refused(_))),
        "{name}: {opened:?}"
    );
}

/// What the host swaps with `dir`, over and over.
fn raced(test: &str, prepare: fn(&Server), other: &'static str) {
    let Some((mut server, mut c)) = session(test, Options::default()) else {
        return;
    };
    let forbidden = outside(&server);
    fs::create_dir(server.path("dir")).unwrap();
    fs::write(server.path("dir/file"), b"inside").unwrap();
    prepare(&server);
    let (one, two) = (server.path("dir"), server.scratch.dir().join(other));
    let done = AtomicBool::new(false);
    let mut met = (0, 0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE).unwrap();
            }
        });
        // A panic must end the other thread, too.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..ROUNDS {
                match look(&mut c, &forbidden) {
                    Some(S_IFDIR) => met.0 += 1,
                    Some(_) => met.1 += 1,
                    None => met.2 += 1,
                }
            }
        }));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(server.is_alive(), "{}", server.epitaph());
    eprintln!(
        "{test}: {} directories, {} links, {} errors",
        met.0, met.1, met.2
    );
    assert_eq!(met.0 + met.1 + met.2, ROUNDS);
    assert!(met.0 > 0, "the directory was never seen");
    let secret = server.scratch.path("outside/file");
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

/// Looks `dir/file` up, reads it, and makes a file beside it; the type of `dir`.
fn look(c: &mut Client, forbidden: &[u64]) -> Option<u32> {
    let allowed = |wrong: Wrong| {
        assert!(wrong.errno().is_some(), "{wrong}");
        wrong.errno()
    };
    let dir = c.lookup(ROOT, "dir").map_err(allowed).ok()?;
    assert!(!forbidden.contains(&dir.attr.ino), "{dir:?}");
    let kind = dir.attr.mode & S_IFMT;
    if let Ok(file) = c.lookup(dir.node, "file").map_err(allowed) {
        assert!(!forbidden.contains(&file.attr.ino), "{file:?}");
        if let Ok(fh) = c.open(file.node, O_RDONLY).map_err(allowed) {
            let content = c.read(file.node, fh, 0, 64).unwrap();
            assert_eq!(content, b"inside", "from outside of the share");
            c.release(file.node, fh).unwrap();
        }
        c.forget(file.node, 1).unwrap();
    }
    if let Ok((made, fh)) = c.create(dir.node, "made", 0o600, O_RDWR).map_err(allowed) {
        c.release(made.node, fh).unwrap();
        c.forget(made.node, 1).unwrap();
        let gone = c.unlink(dir.node, "made").map_err(allowed);
        assert!(gone.is_ok() || gone == Err(Some(Errno::NOENT)), "{gone:?}");
    }
    c.forget(dir.node, 1).unwrap();
    Some(kind)
}

#[test]
fn a_directory_swapped_for_a_link() {
    fn prepare(server: &Server) {
        symlink(server.scratch.path("outside"), server.path("other")).unwrap();
    }
    raced("a_directory_swapped_for_a_link", prepare, "dir/other");
}

/// The guest's directory leaves the share under its feet: what it holds open is
/// its own, and there is no way up from it.
#[test]
fn a_directory_moved_out_of_the_share() {
    fn prepare(server: &Server) {
        let other = server.scratch.path("beside");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("file"), b"inside").unwrap();
    }
    raced("a_directory_moved_out_of_the_share", prepare, "beside");
}
