//! A node's store of guest files: versions side by side, one of which new machines take.
//!
//! For `pericarp assets`; where things lie is said in `pericarp_pod::assets::place`. A version is made
//! beside its place, checked, and moved there whole, so that nobody ever sees half of one. It is
//! never changed, and not removed while a machine runs that was made of it. What is added is copied:
//! the source may be an image that goes away, and nothing there is ever "text busy" here.

mod holders;
mod listing;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink},
    path::{Path, PathBuf},
};

use pericarp_oci::digest::Digest;
use pericarp_pod::{
    Assets,
    assets::place::{CURRENT, LOCK, MANIFEST, VERSIONS},
};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use thiserror::Error;

pub use holders::{Holder, holders};
use listing::Listing;

const NEW_LINK: &str = "current.new";
const NEW: &str = "new-";
const GONE: &str = "gone-";
const LONGEST_NAME: usize = 64;
/// Of a version that is damaged.
const CURE: &str = "remove it with `pericarp assets rm`, and add it again";
/// Of a digest, in a name that nobody has chosen.
const SHORT: usize = 12;

/// Why the store stays as it is.
#[derive(Debug, Error)]
pub enum StoreError {
    /// What is asked for cannot be.
    #[error("'{value}' {rule}; {cure}")]
    Refused {
        /// What was given.
        value: String,
        /// What is wrong with it.
        rule: String,
        /// What to do.
        cure: String,
    },
    /// The kernel says no.
    #[error("'{}': {source}", path.display())]
    System {
        /// What was worked on.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn refused(value: impl ToString, rule: impl Into<String>, cure: &str) -> StoreError {
    StoreError::Refused {
        value: value.to_string(),
        rule: rule.into(),
        cure: cure.to_owned(),
    }
}

fn during<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::System {
        path: path.to_owned(),
        source: source.into(),
    }
}

/// A version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Its name.
    pub name: String,
    /// Of its list of files, which has the digest of each: `sha256sum manifest.json` says it, too.
    pub digest: String,
    /// Of all files together.
    pub bytes: u64,
    /// How many there are.
    pub files: usize,
    /// The kernel's release, as far as they say it.
    pub kernel: Option<String>,
    /// New machines take it.
    pub current: bool,
}

/// What a store has under a name: a version, or what is wrong with it.
pub type Listed = (String, Result<Version, StoreError>);

/// A store.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The one in this directory, which need not be there yet.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a version is.
    #[must_use]
    pub fn directory(&self, name: &str) -> PathBuf {
        self.root.join(VERSIONS).join(name)
    }

    /// The name of the version that new machines take.
    #[must_use]
    pub fn current(&self) -> Option<String> {
        let link = fs::read_link(self.root.join(CURRENT)).ok()?;
        Some(link.file_name()?.to_str()?.to_owned())
    }

    /// All versions, by name; of one that is damaged, what is wrong with it.
    ///
    /// # Errors
    ///
    /// The store cannot be read. One that is not there is empty.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let directory = self.root.join(VERSIONS);
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(during(&directory))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(during(&directory))?.file_name();
            names.extend(name.into_string().ok());
        }
        names.sort();
        let versions = names.into_iter().filter_map(|name| {
            let version = self.version(&name);
            // One that has gone meanwhile is none.
            let is_there = version.is_ok() || fs::symlink_metadata(directory.join(&name)).is_ok();
            is_there.then_some((name, version))
        });
        Ok(versions.collect())
    }

    /// What there is to say of a version.
    ///
    /// # Errors
    ///
    /// There is none of that name, or its list of files is damaged.
    pub fn version(&self, name: &str) -> Result<Version, StoreError> {
        check_name(name)?;
        let directory = self.directory(name);
        let listing = match Listing::read(&directory) {
            Err(error) if error.kind() == ErrorKind::NotFound && directory.is_dir() => {
                return Err(refused(name, format!("has no '{MANIFEST}'"), CURE));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(self.unknown(name)),
            listing => listing.map_err(during(&directory.join(MANIFEST)))?,
        };
        let release = fs::read_to_string(directory.join("kernel/release"));
        Ok(Version {
            name: name.to_owned(),
            digest: listing.digest().to_string(),
            bytes: listing.bytes(),
            files: listing.files.len(),
            kernel: release.ok().map(|text| text.trim().to_owned()),
            current: self.current().as_deref() == Some(name),
        })
    }

    /// Reads every file of a version and compares it with the list.
    ///
    /// # Errors
    ///
    /// There is no such version, or the first file that is not as it was.
    pub fn verify(&self, name: &str) -> Result<Version, StoreError> {
        let version = self.version(name)?;
        listing::verify(&self.directory(name)).map_err(|rule| refused(name, rule, CURE))?;
        Ok(version)
    }

    /// Copies what a guest boots from out of `source`, under this name or one that says what it is.
    /// A source with a list of files must be as that says; with `wanted` the list must have that
    /// digest. Whether it was not there before comes with it.
    ///
    /// # Errors
    ///
    /// The source is incomplete or not what it should be; the name is another one's. Nothing is
    /// added then.
    pub fn add(
        &self,
        source: &Path,
        name: Option<&str>,
        wanted: Option<Digest>,
    ) -> Result<(Version, bool), StoreError> {
        if let Some(name) = name {
            check_name(name)?;
        }
        let given = || source.display().to_string();
        let assets = Assets::open(source).map_err(|error| {
            let cure = "give a directory as `cargo xtask setup` lays it out";
            refused(error.directory.display(), error.rule, cure)
        })?;
        let _lock = self.lock()?;
        let new = self.root.join(format!("{NEW}{}", std::process::id()));
        let listing = copy(&assets, &new).inspect_err(|_| {
            let _ = fs::remove_dir_all(&new);
        })?;
        let unwanted = |error| {
            let _ = fs::remove_dir_all(&new);
            Err(error)
        };
        let digest = listing.digest();
        match Listing::read(&assets.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return unwanted(during(&assets.directory.join(MANIFEST))(error)),
            Ok(said) => {
                if let Some(difference) = said.difference(&listing) {
                    let cure = "get it again: it was changed or is incomplete";
                    return unwanted(refused(given(), difference, cure));
                }
            }
        }
        if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
            let rule = format!("has the digest {digest}, and not {wanted}");
            let cure = "check where it comes from";
            return unwanted(refused(given(), rule, cure));
        }
        let chosen = name.map_or_else(
            || name_of(assets.release().as_deref(), &digest),
            str::to_owned,
        );
        let place = self.directory(&chosen);
        match self.version(&chosen) {
            Ok(there) if there.digest == digest.to_string() => {
                let _ = fs::remove_dir_all(&new);
                return Ok((there, false));
            }
            Ok(there) => {
                let rule = format!("is there, and is another ({})", there.digest);
                let cure = "choose another name: a version is never changed";
                return unwanted(refused(chosen, rule, cure));
            }
            Err(damaged) if fs::symlink_metadata(&place).is_ok() => return unwanted(damaged),
            Err(_) => {}
        }
        let moved = fs::rename(&new, &place)
            .and_then(|()| sync(&self.root.join(VERSIONS)))
            .map_err(during(&place));
        if let Err(error) = moved {
            return unwanted(error);
        }
        Ok((self.version(&chosen)?, true))
    }

    /// Has new machines take this version, after reading all of it. The one they took before comes
    /// back.
    ///
    /// # Errors
    ///
    /// There is no such version, or it is damaged. The one in use stays.
    pub fn take(&self, name: &str) -> Result<Option<String>, StoreError> {
        // Nothing is made for a name that is none.
        self.version(name)?;
        let _lock = self.lock()?;
        self.verify(name)?;
        let before = self.current();
        let new = self.root.join(NEW_LINK);
        let _ = fs::remove_file(&new);
        symlink(Path::new(VERSIONS).join(name), &new)
            .and_then(|()| fs::rename(&new, self.root.join(CURRENT)))
            .and_then(|()| sync(&self.root))
            .map_err(during(&new))?;
        Ok(before)
    }

    /// Removes a version that new machines do not take, that none of `named` is, and that no machine
    /// was made of which still runs.
    ///
    /// # Errors
    ///
    /// It is used, and by whom; or there is no such version.
    pub fn remove(&self, name: &str, named: &[(String, PathBuf)]) -> Result<(), StoreError> {
        check_name(name)?;
        let directory = self.directory(name);
        if !directory.is_dir() {
            return Err(self.unknown(name));
        }
        let _lock = self.lock()?;
        if self.current().as_deref() == Some(name) {
            let rule = "is what new pods take";
            let cure = "have them take another first, with `pericarp assets use`";
            return Err(refused(name, rule, cure));
        }
        let place = fs::canonicalize(&directory).map_err(during(&directory))?;
        let is_it = |path: &PathBuf| fs::canonicalize(path).is_ok_and(|path| path == place);
        if let Some((profile, _)) = named.iter().find(|(_, path)| is_it(path)) {
            let rule = format!("is what the profile '{profile}' takes");
            let cure = "change its 'assets' first";
            return Err(refused(name, rule, cure));
        }
        let opened = File::open(&directory).map_err(during(&directory))?;
        match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                let all: Vec<String> = holders(&directory)
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                let by = match all.is_empty() {
                    true => "a process that cannot be seen from here".to_owned(),
                    false => all.join(", "),
                };
                let cure = "remove it when that has ended";
                return Err(refused(name, format!("is in use by {by}"), cure));
            }
            locked => locked.map_err(during(&directory))?,
        }
        let gone = self.root.join(format!("{GONE}{}", std::process::id()));
        fs::rename(&directory, &gone).map_err(during(&directory))?;
        // Nobody finds it any more; what fails from here on is swept up by the next change.
        fs::remove_dir_all(&gone).map_err(during(&gone))
    }

    /// Makes the directories, waits for its turn, and removes what one has left who died.
    fn lock(&self) -> Result<File, StoreError> {
        let versions = self.root.join(VERSIONS);
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&versions);
        made.map_err(during(&versions))?;
        let path = self.root.join(LOCK);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(during(&path))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(during(&path))?;
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(NEW) || name.starts_with(GONE) {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(during(&path))?;
            }
        }
        Ok(lock)
    }

    fn unknown(&self, name: &str) -> StoreError {
        let rule = format!("is no version in '{}'", self.root.display());
        refused(name, rule, "`pericarp assets list` lists those there are")
    }
}

fn check_name(name: &str) -> Result<(), StoreError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    let good = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with(['.', '-'])
        && name.chars().all(allowed);
    match good {
        true => Ok(()),
        false => Err(refused(
            name.escape_debug(),
            "is no name of a version",
            "use letters, digits and any of ._+- inside, at most 64 characters",
        )),
    }
}

/// What a version is called that nobody has named.
fn name_of(release: Option<&str>, digest: &Digest) -> String {
    let hex = digest.hex();
    let short = &hex[..SHORT];
    let named = release.map(|release| format!("{release}-{short}"));
    let named = named.filter(|name| check_name(name).is_ok());
    named.unwrap_or_else(|| short.to_owned())
}

/// Copies the files of `assets` to a new directory, and lists them there.
fn copy(assets: &Assets, new: &Path) -> Result<Listing, StoreError> {
    let mut files = Vec::new();
    for (name, source) in assets.files() {
        let contents = fs::read(&source).map_err(during(&source))?;
        let place = new.join(&name);
        if let Some(parent) = place.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
            made.map_err(during(parent))?;
        }
        let is_program = name.starts_with("guest/") || !name.contains('/');
        let mode = if is_program { 0o555 } else { 0o444 };
        write(&place, mode, &contents).map_err(during(&place))?;
        files.push(listing::Entry::of(name, &contents));
    }
    let listing = Listing::new(files);
    let place = new.join(MANIFEST);
    write(&place, 0o444, &listing.text()).map_err(during(&place))?;
    for directory in directories(new) {
        sync(&directory).map_err(during(&directory))?;
    }
    Ok(listing)
}

fn write(place: &Path, mode: u32, contents: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(place)?;
    file.write_all(contents)?;
    file.sync_all()
}

/// This one and all below it.
fn directories(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next).cloned() {
        next += 1;
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        all.extend(
            entries
                .map(|entry| entry.path())
                .filter(|path| path.is_dir()),
        );
    }
    all
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let name = format!("pericarp-store-{name}-{}", std::process::id());
            let place = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&place);
            fs::create_dir_all(&place).unwrap();
            Self(fs::canonicalize(place).unwrap())
        }

        /// Guest files whose agent is this.
        fn source(&self, agent: &str) -> PathBuf {
            let source = self.0.join(format!("source-{agent}"));
            fs::create_dir_all(source.join("kernel/modules")).unwrap();
            fs::create_dir_all(source.join("guest/bin")).unwrap();
            for (name, text) in [
                ("kernel/vmlinuz", "kernel"),
                ("kernel/release", "6.12.1\n"),
                ("kernel/modules/order", "a.ko\n"),
                ("kernel/modules/a.ko", "module"),
                ("kernel/modules/unused.ko", "module"),
                ("guest/bin/crun", "crun"),
                ("pericarp-agent", agent),
            ] {
                fs::write(source.join(name), text).unwrap();
            }
            source
        }

        fn store(&self) -> Store {
            Store::at(&self.0.join("store"))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn versions_come_are_taken_and_go() {
        let place = Place::new("life");
        let store = place.store();
        assert!(store.list().unwrap().is_empty());
        let (one, new) = store.add(&place.source("one"), Some("1"), None).unwrap();
        assert!(new && !one.current);
        assert_eq!(one.kernel.as_deref(), Some("6.12.1"));
        assert_eq!(one.files, 6);
        let directory = store.directory("1");
        assert!(!directory.join("kernel/modules/unused.ko").exists());
        let mode = |name: &str| {
            let found = fs::metadata(directory.join(name)).unwrap();
            found.permissions().mode() & 0o777
        };
        assert_eq!(
            (mode("pericarp-agent"), mode("kernel/vmlinuz")),
            (0o555, 0o444)
        );
        // Again is no error; another of the same name is.
        let (again, new) = store.add(&place.source("one"), Some("1"), None).unwrap();
        assert_eq!((again, new), (one.clone(), false));
        let error = store
            .add(&place.source("two"), Some("1"), None)
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("'1' is there, and is another"),
            "{error}"
        );
        // Without a name it says what it is.
        let (two, _) = store.add(&place.source("two"), None, None).unwrap();
        assert!(two.name.starts_with("6.12.1-"), "{}", two.name);
        assert_eq!(store.take("1").unwrap(), None);
        assert_eq!(store.take(&two.name).unwrap().as_deref(), Some("1"));
        let names: Vec<_> = store
            .list()
            .unwrap()
            .into_iter()
            .map(|(name, version)| (name, version.unwrap().current))
            .collect();
        assert_eq!(names, [("1".to_owned(), false), (two.name.clone(), true)]);
        // What was added can be added elsewhere, with its digest.
        let other = Store::at(&place.0.join("other"));
        let digest: Digest = one.digest.parse().unwrap();
        other
            .add(&store.directory("1"), Some("x"), Some(digest))
            .unwrap();
        let error = other
            .add(&place.source("two"), None, Some(digest))
            .unwrap_err();
        assert!(error.to_string().contains("and not sha256:"), "{error}");
        store.remove("1", &[]).unwrap();
        let error = store.remove("1", &[]).unwrap_err().to_string();
        assert!(error.contains("is no version in"), "{error}");
        assert_eq!(store.list().unwrap().len(), 1);
    }

    #[test]
    fn what_is_used_stays() {
        let place = Place::new("used");
        let store = place.store();
        for name in ["1", "2"] {
            store.add(&place.source(name), Some(name), None).unwrap();
        }
        store.take("1").unwrap();
        let error = store.remove("1", &[]).unwrap_err().to_string();
        assert!(error.starts_with("'1' is what new pods take; "), "{error}");
        let taken = Assets::open(store.root()).unwrap();
        assert_eq!(taken.version(), Some("1"));
        store.take("2").unwrap();
        // It is held by this very process.
        let error = store.remove("1", &[]).unwrap_err().to_string();
        let by = format!("is in use by process {} ", std::process::id());
        assert!(error.contains(&by), "{error}");
        drop(taken);
        let named = [("small".to_owned(), store.directory("1"))];
        let error = store.remove("1", &named).unwrap_err().to_string();
        assert!(
            error.contains("is what the profile 'small' takes"),
            "{error}"
        );
        store.remove("1", &[]).unwrap();
    }

    #[test]
    fn what_is_damaged_or_half_is_never_taken() {
        let place = Place::new("damaged");
        let store = place.store();
        store.add(&place.source("1"), Some("1"), None).unwrap();
        // As one left it who died in the middle.
        let half = store.root().join("new-1");
        fs::create_dir(&half).unwrap();
        fs::write(half.join("pericarp-agent"), "").unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        let agent = store.directory("1").join("pericarp-agent");
        fs::remove_file(&agent).unwrap();
        fs::write(&agent, "2").unwrap();
        let error = store.take("1").unwrap_err().to_string();
        assert!(
            error.contains("'pericarp-agent' is not as it was"),
            "{error}"
        );
        assert_eq!(store.current(), None);
        assert!(!half.exists());
        // Nor can it be added elsewhere.
        let other = Store::at(&place.0.join("other"));
        let error = other
            .add(&store.directory("1"), None, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("'pericarp-agent'"), "{error}");
        assert!(other.list().unwrap().is_empty());
        let left = fs::read_dir(other.root()).unwrap().flatten();
        let left: Vec<_> = left
            .map(|entry| entry.file_name())
            .filter(|name| name != LOCK && name != VERSIONS)
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn one_whose_list_is_damaged_is_listed() {
        let place = Place::new("listless");
        let store = place.store();
        for name in ["1", "2", "3"] {
            store.add(&place.source(name), Some(name), None).unwrap();
        }
        fs::remove_file(store.directory("1").join(MANIFEST)).unwrap();
        let list = store.directory("2").join(MANIFEST);
        fs::remove_file(&list).unwrap();
        fs::write(&list, "{").unwrap();
        let all = store.list().unwrap();
        let said = |number: usize| all[number].1.as_ref().unwrap_err().to_string();
        assert_eq!((all.len(), all[2].1.is_ok()), (3, true));
        assert!(said(0).starts_with("'1' has no 'manifest.json'; "));
        assert!(said(1).contains("2/manifest.json': "), "{}", said(1));
        for name in ["1", "2"] {
            assert!(store.take(name).is_err());
            assert!(store.add(&place.source(name), Some(name), None).is_err());
            store.remove(name, &[]).unwrap();
        }
        assert_eq!(store.list().unwrap().len(), 1);
    }

    #[test]
    fn names_lead_nowhere_else() {
        let place = Place::new("names");
        let store = place.store();
        for name in ["", ".", "..", "a/b", "-x", "a b", &"x".repeat(65)] {
            let error = store.add(&place.source("1"), Some(name), None).unwrap_err();
            assert!(
                error.to_string().contains("is no name of a version"),
                "{error}"
            );
            assert!(store.remove(name, &[]).is_err() && store.take(name).is_err());
        }
        assert!(!store.root().exists());
    }
}
