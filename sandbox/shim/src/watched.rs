//! Volumes that a kubelet writes and changes (ConfigMaps, Secrets, tokens, the downward API): of each
//! the guest keeps a copy, and is told here when it has to look again.
//!
//! A kubelet puts all files of a version into a directory of its own and has one link, `..data`, lead
//! there. That is what such a volume is known by, beside its place (`named`) and that it is mounted to
//! be read alone. The host's inotify says when the link has been replaced; a thread of the pod passes
//! that on.
//!
//! A container may write where such a volume comes from, if it is shown the same directory elsewhere.
//! What is looked at here, as root, is below that directory alone: no link is followed, and nothing
//! that is mounted there is entered.

use std::{
    collections::HashMap,
    ffi::CStr,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::{MAX_COPIED, MAX_COPIED_BYTES, VERSION_LINK, host::Guest, is_version};
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags,
        inotify::{self, CreateFlags, Reader, WatchFlags},
        openat2, readlinkat, statat,
    },
    path::Arg,
};

use crate::{error::ShimError, guest};

/// A kubelet changes the links beside `..data` a moment after it.
const SETTLE: Duration = Duration::from_millis(30);
/// A container that is being created has no copy yet, and may take so long.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);
/// Directories in one another, as many as a guest copies.
const DEEPEST: usize = 16;
const LISTED: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// All of a pod's.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// None where there is no inotify to be had: then nothing is watched.
    notices: OnceLock<Option<Arc<Notices>>>,
}

#[derive(Debug)]
struct Notices {
    inotify: OwnedFd,
    all: Mutex<HashMap<i32, Vec<Copied>>>,
}

/// A copy in a guest.
#[derive(Debug, Clone)]
struct Copied {
    number: u64,
    directory: PathBuf,
    tag: String,
    path: String,
    guest: Guest,
}

/// One, as long as a container has it.
#[derive(Debug)]
pub(crate) struct Watch {
    notices: Arc<Notices>,
    descriptor: i32,
    number: u64,
}

/// Where the link of such a volume leads, if this is one of which a guest can keep a copy.
pub(crate) fn version(directory: &Path) -> Option<String> {
    let directory = rustix::fs::open(directory, LISTED, Mode::empty()).ok()?;
    let link = readlinkat(&directory, VERSION_LINK, Vec::new()).ok()?;
    let version = link.to_str().ok().filter(|name| is_version(name))?;
    let files = inside(&directory, version).ok()?;
    let mut left = (MAX_COPIED, MAX_COPIED_BYTES);
    (is_small(&files, &mut left, 0) == Ok(true)).then(|| version.to_owned())
}

/// Opens a directory in another one, where it is really there.
fn inside(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(directory, name, LISTED, Mode::empty(), how)
}

/// Whether no more than that is in a directory.
fn is_small(
    directory: &OwnedFd,
    left: &mut (usize, u64),
    depth: usize,
) -> rustix::io::Result<bool> {
    if depth > DEEPEST {
        return Ok(false);
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let there = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(there.st_mode);
        let bytes = match kind {
            FileType::RegularFile => u64::try_from(there.st_size).unwrap_or(u64::MAX),
            _ => 0,
        };
        let (Some(files), Some(bytes)) = (left.0.checked_sub(1), left.1.checked_sub(bytes)) else {
            return Ok(false);
        };
        *left = (files, bytes);
        if kind == FileType::Directory && !is_small(&inside(directory, name)?, left, depth + 1)? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Watched {
    /// Has the guest told of changes in this directory, a part of a share there. None where it cannot
    /// be watched.
    pub(crate) fn watch(
        &self,
        directory: &Path,
        (tag, path): (&str, &str),
        guest: &Guest,
    ) -> Option<Watch> {
        let notices = self.notices.get_or_init(|| match Notices::start() {
            Ok(notices) => Some(notices),
            Err(error) => {
                log::warn!("changes of ConfigMaps and the like are not watched: {error}");
                None
            }
        });
        let notices = Arc::clone(notices.as_ref()?);
        let flags =
            WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        // Held meanwhile: it may be watched already, and be let go of.
        let mut all = notices.all();
        let descriptor = match inotify::add_watch(&notices.inotify, directory, flags) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                log::warn!("{} is not watched: {error}", directory.display());
                return None;
            }
        };
        let of_it = all.entry(descriptor).or_default();
        let number = of_it.iter().map(|copy| copy.number + 1).max().unwrap_or(0);
        of_it.push(Copied {
            number,
            directory: directory.to_owned(),
            tag: tag.to_owned(),
            path: path.to_owned(),
            guest: guest.clone(),
        });
        drop(all);
        Some(Watch {
            notices,
            descriptor,
            number,
        })
    }
}

impl Notices {
    fn start() -> io::Result<Arc<Self>> {
        let notices = Arc::new(Self {
            inotify: inotify::init(CreateFlags::CLOEXEC)?,
            all: Mutex::default(),
        });
        let heard = Arc::clone(&notices);
        // It ends with the process.
        thread::Builder::new()
            .name("watched".into())
            .spawn(move || heard.hear())?;
        Ok(notices)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<i32, Vec<Copied>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        loop {
            let mut changed = match reader.next() {
                Ok(event) => vec![event.wd()],
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    log::warn!("changes of ConfigMaps and the like are heard no more: {error}");
                    return;
                }
            };
            thread::sleep(SETTLE);
            while !reader.is_buffer_empty() {
                changed.extend(reader.next().map(|event| event.wd()));
            }
            changed.sort_unstable();
            changed.dedup();
            for descriptor in changed {
                let copies = self.all().get(&descriptor).cloned().unwrap_or_default();
                let mut told: Vec<&Copied> = Vec::new();
                for copy in &copies {
                    // Containers have one copy of what they share.
                    let is_told =
                        |other: &&Copied| (&other.tag, &other.path) == (&copy.tag, &copy.path);
                    if !told.iter().any(is_told) {
                        self.tell(descriptor, copy);
                        told.push(copy);
                    }
                }
            }
        }
    }

    fn tell(&self, descriptor: i32, copy: &Copied) {
        let end = Instant::now() + PATIENCE;
        loop {
            let Some(version) = version(&copy.directory) else {
                log::warn!(
                    "{} has become larger than a guest copies, and stays as it was there",
                    copy.directory.display()
                );
                return;
            };
            match guest::refresh(&copy.guest, (&copy.tag, &copy.path), &version) {
                Ok(()) => return,
                Err(ShimError::NotFound(_)) if Instant::now() < end => {}
                Err(error) => {
                    log::warn!(
                        "{} is not new in the guest: {error}",
                        copy.directory.display()
                    );
                    return;
                }
            }
            // It is not there yet, or no more.
            thread::sleep(PAUSE);
            let of_it = self.all();
            let all = of_it.get(&descriptor);
            if !all.is_some_and(|all| all.iter().any(|other| other.path == copy.path)) {
                return;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut all = self.notices.all();
        let Some(of_it) = all.get_mut(&self.descriptor) else {
            return;
        };
        of_it.retain(|copy| copy.number != self.number);
        if of_it.is_empty() {
            all.remove(&self.descriptor);
            // The directory may have gone, and the watch with it.
            let _ = inotify::remove_watch(&self.notices.inotify, self.descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn what_a_kubelet_writes_is_known_by_its_link() {
        let top = std::env::temp_dir().join(format!("pericarp-watched-{}", std::process::id()));
        fs::create_dir_all(top.join("..1/deep")).unwrap();
        fs::write(top.join("..1/deep/key"), "value").unwrap();
        assert_eq!(version(&top), None);
        symlink("..1", top.join("..data")).unwrap();
        assert_eq!(version(&top).unwrap(), "..1");
        let large = fs::File::create(top.join("..1/large")).unwrap();
        large.set_len(MAX_COPIED_BYTES + 1).unwrap();
        assert_eq!(version(&top), None);
        for elsewhere in ["/etc", "../x", "plain", "..2"] {
            fs::remove_file(top.join("..data")).unwrap();
            symlink(elsewhere, top.join("..data")).unwrap();
            assert_eq!(version(&top), None, "{elsewhere}");
        }
        // What is called as a version is no way out either, nor is what is in one.
        symlink("/etc", top.join("..3")).unwrap();
        fs::remove_file(top.join("..data")).unwrap();
        symlink("..3", top.join("..data")).unwrap();
        assert_eq!(version(&top), None);
        fs::create_dir(top.join("..4")).unwrap();
        symlink("/", top.join("..4/all")).unwrap();
        fs::remove_file(top.join("..data")).unwrap();
        symlink("..4", top.join("..data")).unwrap();
        assert_eq!(version(&top).unwrap(), "..4");
        let deep = top.join("..4").join(vec!["x"; DEEPEST + 1].join("/"));
        fs::create_dir_all(deep).unwrap();
        assert_eq!(version(&top), None);
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn a_directory_is_watched_as_long_as_somebody_has_it() {
        let top = std::env::temp_dir().join(format!("pericarp-watch-{}", std::process::id()));
        fs::create_dir_all(top.join("..1")).unwrap();
        symlink("..1", top.join("..data")).unwrap();
        // Nobody listens there.
        let guest = Guest::new(top.join("socket"));
        let watched = Watched::default();
        let watch = || watched.watch(&top, ("pod", "volumes/0"), &guest).unwrap();
        let (one, two) = (watch(), watch());
        assert_eq!(one.descriptor, two.descriptor);
        let notices = Arc::clone(&one.notices);
        drop(one);
        assert_eq!(notices.all()[&two.descriptor].len(), 1);
        drop(two);
        assert!(notices.all().is_empty());
        fs::remove_dir_all(top).unwrap();
    }
}
