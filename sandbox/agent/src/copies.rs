//! Volumes that a kubelet writes (ConfigMaps, Secrets, tokens), as copies in this kernel's memory: a
//! change that the host makes reaches no inotify through virtio-fs, one that is made here does.
//!
//! Called by `root` when a container is created and removed, by `service` when the host has seen a
//! change, and by `pod` at power-off. A change is made as a kubelet makes it: all files of a version
//! lie in a directory of its own, and one link that leads there is replaced in one step.
//!
//! ```text
//! /run/pericarp/copies/<n>                 a tmpfs
//! /run/pericarp/copies/<n>/..2024_10_18    the files
//! /run/pericarp/copies/<n>/..data          leads there
//! /run/pericarp/copies/<n>/key             leads to ..data/key
//! ```
//!
//! What is copied may be written by a container, if it is shown the same directory: no link is
//! followed, and its size is bounded.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::symlink},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{
    MAX_COPIED, MAX_COPIED_BYTES, VERSION_LINK,
    agent::{Part, RefreshRequest},
    is_version,
};
use rustix::{
    fs::{Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chmod, chown, fstat, openat, readlinkat},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    boot::STATE,
    error::{RequestError, trying},
    root::put_away,
    shares::Shares,
};

/// Directories in one another.
const DEEPEST: usize = 16;
/// How long a link may lead where it led: a guest believes what it has looked up for a second.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(50);
/// How often a version may go while it is copied.
const TRIES: usize = 5;
/// Half as much again as is copied: the old version stays until the new one is there.
const MEMORY: &std::ffi::CStr = c"mode=755,size=40m";

/// Those that there are.
#[derive(Debug, Default)]
pub(crate) struct Copies(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    /// By the part of a share that is copied.
    all: BTreeMap<(String, String), Copied>,
}

#[derive(Debug)]
struct Copied {
    place: PathBuf,
    /// Containers that are shown it.
    users: usize,
}

impl Copies {
    /// Makes a copy of a part unless there is one; returns where. To be let go of.
    pub(crate) fn show(
        &self,
        shares: &Shares,
        (tag, path): (&str, &str),
        version: &str,
    ) -> Result<PathBuf, RequestError> {
        // Held meanwhile: another container may want the same one.
        let mut kept = self.lock();
        let part = (tag.to_owned(), path.to_owned());
        if let Some(there) = kept.all.get_mut(&part) {
            there.users += 1;
            return Ok(there.place.clone());
        }
        let source = shares.open(tag, path)?;
        let place = Path::new(STATE).join("copies").join(kept.next.to_string());
        kept.next += 1;
        let made = make(&place).and_then(|()| {
            follow(&source, &place, version).map_err(trying(format!("the copy of '{path}'")))
        });
        drop(source);
        if let Err(error) = made {
            take_away(&place);
            shares.close(tag, path);
            return Err(error);
        }
        let copied = Copied {
            place: place.clone(),
            users: 1,
        };
        kept.all.insert(part, copied);
        Ok(place)
    }

    /// Has a copy be what it was made of again.
    pub(crate) fn refresh(
        &self,
        shares: &Shares,
        request: &RefreshRequest,
    ) -> Result<(), RequestError> {
        let Part { tag, path, .. } = request.part.clone().unwrap_or_default();
        // Held meanwhile: what is opened is let go of with the copy.
        let kept = self.lock();
        let Some(there) = kept.all.get(&(tag.clone(), path.clone())) else {
            return Err(RequestError::NotFound(format!(
                "there is no copy of '{path}'"
            )));
        };
        let source = shares.open(&tag, &path)?;
        follow(&source, &there.place, &request.version)
            .map_err(trying(format!("the copy of '{path}'")))
    }

    /// A container is done with it; the last one lets go of what was copied, too.
    pub(crate) fn let_go(&self, shares: &Shares, tag: &str, path: &str) {
        let mut kept = self.lock();
        let part = (tag.to_owned(), path.to_owned());
        let Some(there) = kept.all.get_mut(&part) else {
            return;
        };
        there.users -= 1;
        if there.users == 0 {
            take_away(&there.place);
            kept.all.remove(&part);
            shares.close(tag, path);
        }
    }

    /// Takes all of them away.
    pub(crate) fn put_away(&self) {
        for there in std::mem::take(&mut self.lock().all).values() {
            take_away(&there.place);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // A panic ends this program, so nobody sees a state left half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make(place: &Path) -> Result<(), RequestError> {
    fs::create_dir_all(place).map_err(trying(place.display().to_string()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("copy", place, "tmpfs", flags, Some(MEMORY)).map_err(trying("a volume's memory"))
}

fn take_away(place: &Path) {
    // Memory that goes with its last user.
    let _ = put_away(place, false);
    let _ = fs::remove_dir(place);
}

/// Has `place` be what `source` is, which is to be of this version at least.
fn follow(source: &OwnedFd, place: &Path, version: &str) -> io::Result<()> {
    // It was opened by its place alone, which does not list what is there.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = &openat(source, ".", flags, Mode::empty())?;
    let end = Instant::now() + PATIENCE;
    while leads_to(source)? != version && Instant::now() < end {
        thread::sleep(PAUSE);
    }
    for _ in 1..TRIES {
        match copy(source, place) {
            // It went while it was copied, and there is another.
            Err(error) if error.kind() == io::ErrorKind::NotFound => thread::sleep(PAUSE),
            other => return other,
        }
    }
    copy(source, place)
}

fn leads_to(directory: &OwnedFd) -> io::Result<String> {
    let link = readlinkat(directory, VERSION_LINK, Vec::new())?;
    let version = link.into_string().unwrap_or_default();
    match is_version(&version) {
        true => Ok(version),
        false => Err(io::Error::other(format!(
            "'{VERSION_LINK}' does not lead to a version"
        ))),
    }
}

/// One look: the version that there is now, and the links to its files.
fn copy(source: &OwnedFd, place: &Path) -> io::Result<()> {
    let version = leads_to(source)?;
    let link = place.join(VERSION_LINK);
    let there = fs::read_link(&link).ok();
    owner_and_mode(&fstat(source)?, place)?;
    if there.as_deref() != Some(Path::new(&version)) {
        let files = place.join(&version);
        // What an attempt has left that failed.
        let _ = fs::remove_dir_all(&files);
        let from = openat(source, &version, FLAGS | OFlags::DIRECTORY, Mode::empty())?;
        let mut budget = Budget::default();
        if let Err(error) = budget.tree(&from, &files, 0) {
            let _ = fs::remove_dir_all(&files);
            return Err(error);
        }
        let new = place.join("..data_tmp");
        let _ = fs::remove_file(&new);
        symlink(&version, &new)?;
        fs::rename(&new, &link)?;
    }
    let wanted = links(source)?;
    for (name, target) in &wanted {
        let name = place.join(name);
        if fs::read_link(&name).ok().as_deref() != Some(target) {
            let _ = fs::remove_file(&name);
            symlink(target, &name)?;
        }
    }
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        let name = entry.file_name();
        let stays = wanted.contains_key(Path::new(&name))
            || name == VERSION_LINK
            || name.as_bytes() == version.as_bytes();
        match stays {
            true => {}
            false if entry.file_type()?.is_dir() => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// The links at the top by which files are found; those with two dots are the kubelet's own.
fn links(source: &OwnedFd) -> io::Result<BTreeMap<PathBuf, PathBuf>> {
    let mut links = BTreeMap::new();
    for name in names(source.as_fd())? {
        if name.to_bytes().starts_with(b"..") {
            continue;
        }
        match readlinkat(source, &name, Vec::new()) {
            Ok(target) => {
                let name = Path::new(OsStr::from_bytes(name.to_bytes()));
                let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                links.insert(name.to_owned(), target.to_owned());
            }
            // No link, or none any more.
            Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(links)
}

fn names(directory: BorrowedFd<'_>) -> io::Result<BTreeSet<CString>> {
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_owned();
        if ![&b"."[..], b".."].contains(&name.to_bytes()) {
            names.insert(name);
        }
        if names.len() > MAX_COPIED {
            return Err(too_much());
        }
    }
    Ok(names)
}

fn too_much() -> io::Error {
    io::Error::other(format!(
        "it has more than {MAX_COPIED} files or {MAX_COPIED_BYTES} bytes"
    ))
}

/// What one version may be.
#[derive(Debug, Default)]
struct Budget {
    files: usize,
    bytes: u64,
}

impl Budget {
    fn tree(&mut self, from: &OwnedFd, to: &Path, depth: usize) -> io::Result<()> {
        if depth > DEEPEST {
            return Err(too_much());
        }
        fs::create_dir(to)?;
        for name in names(from.as_fd())? {
            self.files += 1;
            if self.files > MAX_COPIED {
                return Err(too_much());
            }
            let place = to.join(OsStr::from_bytes(name.to_bytes()));
            let file = match openat(from, &name, FLAGS, Mode::empty()) {
                Ok(file) => file,
                // A link, which is passed on as it is.
                Err(Errno::LOOP) => {
                    let target = readlinkat(from, &name, Vec::new())?;
                    symlink(OsStr::from_bytes(target.to_bytes()), &place)?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let there = fstat(&file)?;
            match FileType::from_raw_mode(there.st_mode) {
                FileType::Directory => self.tree(&file, &place, depth + 1)?,
                FileType::RegularFile => self.file(file, &there, &place)?,
                // No kubelet writes such things.
                _ => {}
            }
        }
        owner_and_mode(&fstat(from)?, to)
    }

    fn file(&mut self, from: OwnedFd, there: &Stat, to: &Path) -> io::Result<()> {
        let left = MAX_COPIED_BYTES - self.bytes;
        let mut new = File::create_new(to)?;
        let copied = io::copy(&mut File::from(from).take(left + 1), &mut new)?;
        if copied > left {
            return Err(too_much());
        }
        self.bytes += copied;
        owner_and_mode(there, to)
    }
}

fn owner_and_mode(of: &Stat, to: &Path) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(of.st_uid), Gid::from_raw(of.st_gid));
    chown(to, Some(user), Some(group))?;
    Ok(chmod(to, Mode::from_raw_mode(of.st_mode & 0o7777))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Two(PathBuf);

    impl Two {
        fn new(name: &str) -> Self {
            let top = std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()));
            fs::create_dir_all(top.join("to")).unwrap();
            fs::create_dir(top.join("from")).unwrap();
            Self(top)
        }

        /// As a kubelet does it.
        fn publish(&self, version: &str, files: &[(&str, &str)]) {
            let from = self.0.join("from");
            fs::create_dir(from.join(version)).unwrap();
            for (name, text) in files {
                let file = from.join(version).join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            let before = fs::read_link(from.join("..data")).ok();
            symlink(version, from.join("..data_tmp")).unwrap();
            fs::rename(from.join("..data_tmp"), from.join("..data")).unwrap();
            if let Some(before) = before {
                fs::remove_dir_all(from.join(before)).unwrap();
            }
        }

        fn link(&self, name: &str) {
            symlink(format!("..data/{name}"), self.0.join("from").join(name)).unwrap();
        }

        fn follow(&self, version: &str) -> io::Result<()> {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let from = rustix::fs::open(self.0.join("from"), flags, Mode::empty()).unwrap();
            follow(&from, &self.0.join("to"), version)
        }

        fn read(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.0.join("to").join(name)).ok()
        }

        fn all(&self) -> Vec<String> {
            let all = fs::read_dir(self.0.join("to")).unwrap();
            let all = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut all: Vec<String> = all.collect();
            all.sort();
            all
        }
    }

    impl Drop for Two {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_copy_follows_what_it_was_made_of() {
        let two = Two::new("follows");
        two.publish("..1", &[("a", "first"), ("deep/b", "more")]);
        two.link("a");
        two.link("deep");
        let from = two.0.join("from/..1/a");
        chmod(&from, Mode::from_raw_mode(0o640)).unwrap();
        two.follow("..1").unwrap();
        assert_eq!(two.all(), ["..1", "..data", "a", "deep"]);
        assert_eq!(two.read("a").unwrap(), "first");
        assert_eq!(two.read("deep/b").unwrap(), "more");
        let mode = fstat(File::open(two.0.join("to/a")).unwrap()).unwrap();
        assert_eq!(mode.st_mode & 0o777, 0o640);

        two.publish("..2", &[("a", "second"), ("c", "new")]);
        two.link("c");
        fs::remove_file(two.0.join("from/deep")).unwrap();
        two.follow("..2").unwrap();
        assert_eq!(two.all(), ["..2", "..data", "a", "c"]);
        assert_eq!(two.read("a").unwrap(), "second");
        assert_eq!(two.read("c").unwrap(), "new");
    }

    #[test]
    fn links_are_not_followed_and_too_much_is_left() {
        let two = Two::new("links");
        two.publish("..1", &[("a", "text")]);
        two.link("a");
        symlink("/etc", two.0.join("from/..1/etc")).unwrap();
        symlink("/etc/passwd", two.0.join("from/..1/passwd")).unwrap();
        two.follow("..1").unwrap();
        let copied = two.0.join("to/..1/etc");
        assert_eq!(fs::read_link(copied).unwrap(), Path::new("/etc"));

        let large = File::create(two.0.join("from/..1/large")).unwrap();
        large.set_len(MAX_COPIED_BYTES + 1).unwrap();
        fs::rename(two.0.join("from/..1"), two.0.join("from/..2")).unwrap();
        fs::remove_file(two.0.join("from/..data")).unwrap();
        symlink("..2", two.0.join("from/..data")).unwrap();
        let error = two.follow("..2").unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
        // What was there stays.
        assert_eq!(two.read("a").unwrap(), "text");

        for bad in ["/etc", "../..", "plain"] {
            fs::remove_file(two.0.join("from/..data")).unwrap();
            symlink(bad, two.0.join("from/..data")).unwrap();
            assert!(two.follow(bad).is_err(), "{bad}");
        }
    }
}
