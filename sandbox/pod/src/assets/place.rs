//! Where the guest's files are: in a directory, or in the version of a store that is in use.
//!
//! ```text
//! /var/lib/pericarp/assets/          a store, which `pericarp assets` fills
//!     lock                           held by whoever changes it
//!     current -> versions/<name>     what new machines take
//!     versions/<name>/               a version; whole, and never changed
//!     versions/<name>/manifest.json  its files and their digests
//!     new-<pid>, gone-<pid>          on their way; of nobody if the lock is free
//! ```
//!
//! A machine holds its version by a shared lock on the directory, so that nobody removes it. The
//! kernel drops the lock with the process, however that ends.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::program_directory;

/// The store of a node.
pub const STORE: &str = "/var/lib/pericarp/assets";
/// The link to the version in use.
pub const CURRENT: &str = "current";
/// The directory of all versions.
pub const VERSIONS: &str = "versions";
/// Held by whoever changes a store.
pub const LOCK: &str = "lock";
/// The files of a version and their digests.
pub const MANIFEST: &str = "manifest.json";
/// Says where they are, if not in a store or beside the program.
pub const VARIABLE: &str = "PERICARP_ASSETS";
/// For one who removes the version that was in use a moment ago.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// A version of a store that nobody removes as long as this is there.
#[derive(Debug)]
pub(super) struct Held {
    name: String,
    /// Locked.
    _directory: File,
}

impl Held {
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

/// Where they are: as somebody says, else as `PERICARP_ASSETS` says, else in the node's store if a
/// version of it is in use, else beside the program. The one who has said it comes with it, if
/// anybody has. None where nobody has and this program's own place is unknown.
#[must_use]
pub fn find(given: Option<&Path>) -> Option<(PathBuf, Option<&'static str>)> {
    if let Some(given) = given {
        return Some((given.to_owned(), None));
    }
    if let Some(path) = std::env::var_os(VARIABLE) {
        return Some((path.into(), Some(VARIABLE)));
    }
    let store = Path::new(STORE);
    if is_store(store) {
        return Some((store.to_owned(), None));
    }
    beside_the_program().map(|place| (place, None))
}

/// Beside the program: the first of two places that is a directory, else the first. None where this
/// program's own place is unknown.
#[must_use]
pub fn beside_the_program() -> Option<PathBuf> {
    let directory = program_directory()?;
    let places = ["../assets", "../share/pericarp"].map(|place| directory.join(place));
    let found = places.iter().find(|place| place.is_dir());
    found.or(places.first()).cloned()
}

/// Whether a version of it is in use.
fn is_store(directory: &Path) -> bool {
    fs::symlink_metadata(directory.join(CURRENT)).is_ok_and(|link| link.is_symlink())
}

/// The directory itself, without links and behind the one to the version in use; a version of a
/// store is held.
pub(super) fn hold(given: &Path) -> Result<(PathBuf, Option<Held>), String> {
    let mut tries = 0;
    loop {
        let behind = match is_store(given) {
            true => given.join(CURRENT),
            false => given.to_owned(),
        };
        let directory = match fs::canonicalize(&behind) {
            Ok(directory) => directory,
            Err(error) if error.kind() == ErrorKind::NotFound && behind != given => {
                return Err(format!(
                    "the version in use is not there ('{}' leads nowhere)",
                    behind.display()
                ));
            }
            Err(error) => return Err(error.to_string()),
        };
        let Some(name) = version_name(&directory) else {
            return Ok((directory, None));
        };
        match lock(&directory) {
            Ok(Some(locked)) => {
                let held = Held {
                    name,
                    _directory: locked,
                };
                return Ok((directory, Some(held)));
            }
            // Somebody removes it, so that another is in use by now.
            Ok(None) if tries < TRIES => {}
            Ok(None) => return Err(format!("the version {name} is being removed")),
            Err(error) => return Err(format!("'{}': {error}", directory.display())),
        }
        tries += 1;
        thread::sleep(PAUSE);
    }
}

/// The name of the version that a directory is, if it is one. In a store one without its list is a
/// version, too: nobody is to remove it from under a machine for what it lacks.
fn version_name(directory: &Path) -> Option<String> {
    let versions = directory.parent()?;
    let store = versions.parent()?;
    let is_version = versions.file_name()? == VERSIONS
        && (directory.join(MANIFEST).is_file() || is_store(store) || store.join(LOCK).is_file());
    let name = directory.file_name()?.to_str()?;
    is_version.then(|| name.to_owned())
}

/// Locks it for use. None when somebody removes it, or has.
fn lock(directory: &Path) -> std::io::Result<Option<File>> {
    let opened = match File::open(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match flock(&opened, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    // It may have been removed before it was locked.
    let (ours, there) = (opened.metadata()?, fs::metadata(directory));
    let same = there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
    Ok(same.then_some(opened))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let name = format!("pericarp-place-{name}-{}", std::process::id());
            let place = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&place);
            for version in ["1", "2"] {
                let directory = place.join(VERSIONS).join(version);
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join(MANIFEST), "{}").unwrap();
            }
            Self(fs::canonicalize(place).unwrap())
        }

        fn switch(&self, version: &str) {
            let new = self.0.join("new");
            std::os::unix::fs::symlink(format!("{VERSIONS}/{version}"), &new).unwrap();
            fs::rename(new, self.0.join(CURRENT)).unwrap();
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_store_means_its_version_in_use_and_a_directory_itself() {
        let place = Place::new("use");
        // Nothing is in use yet.
        let (directory, held) = hold(&place.0).unwrap();
        assert_eq!(directory, place.0);
        assert!(held.is_none());
        place.switch("1");
        let (first, held) = hold(&place.0).unwrap();
        assert_eq!(first, place.0.join("versions/1"));
        assert_eq!(held.as_ref().unwrap().name(), "1");
        place.switch("2");
        assert_eq!(hold(&place.0).unwrap().0, place.0.join("versions/2"));
        // Who has one keeps it.
        let remover = File::open(&first).unwrap();
        let locked = || flock(&remover, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(locked(), Err(Errno::WOULDBLOCK));
        drop(held);
        locked().unwrap();
        // By its own name, too, and whatever it lacks.
        let pinned = hold(&place.0.join("versions/2")).unwrap();
        assert_eq!(pinned.1.unwrap().name(), "2");
        fs::remove_file(place.0.join("versions/2").join(MANIFEST)).unwrap();
        assert_eq!(hold(&place.0).unwrap().1.unwrap().name(), "2");
    }

    #[test]
    fn a_version_that_is_being_removed_is_not_taken() {
        let place = Place::new("gone");
        place.switch("1");
        let first = place.0.join("versions/1");
        let remover = File::open(&first).unwrap();
        flock(&remover, FlockOperation::NonBlockingLockExclusive).unwrap();
        let store = place.0.clone();
        let taker = thread::spawn(move || hold(&store).map(|(directory, _)| directory));
        place.switch("2");
        assert_eq!(taker.join().unwrap().unwrap(), place.0.join("versions/2"));
        fs::rename(&first, place.0.join("gone-1")).unwrap();
        place.switch("1");
        let error = hold(&place.0).unwrap_err();
        assert!(error.contains("is not there"), "{error}");
    }
}
