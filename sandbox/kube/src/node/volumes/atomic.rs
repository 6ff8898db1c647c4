//! Files that change all at once. Called by `volumes` for what is of ConfigMaps, Secrets and the
//! pod itself.
//!
//! A reader sees all files of one version or all of the next: they are in a directory of their
//! version, `..data` is a link to it that is replaced by a rename, and what a reader opens are links
//! through `..data`. This is the layout of a kubelet (pkg/volume/util/atomic_writer.go), which
//! programs that wait for changes of `..data` rely on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink,
};
use std::path::{Component, Path, PathBuf};

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
}

/// Files by their place in the volume.
pub(super) type Files = BTreeMap<String, File>;

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes the volume in `dir` have these files and no others, which belong to `group`. True when
/// something changed.
pub(super) fn write(dir: &Path, files: &Files, group: Option<u32>) -> io::Result<bool> {
    if let Some(wrong) = files.keys().find(|place| !is_inside(place)) {
        let text = format!("'{wrong}' is no place inside a volume");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let old = fs::read_link(dir.join(DATA)).ok();
    if let Some(old) = &old
        && as_it_is(&dir.join(old), files)
    {
        // Whoever wrote it may have been stopped before these.
        links(dir, files)?;
        return Ok(false);
    }
    let version = new_version(dir)?;
    let whole = dir.join(&version);
    for (place, file) in files {
        one(&whole, place, file, group)?;
    }
    owned(&whole, 0o755, group)?;
    let link = dir.join(NEW_DATA);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => symlink(&version, &link)?,
    }
    fs::rename(&link, dir.join(DATA))?;
    links(dir, files)?;
    // What an interrupted change left goes, too.
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        if text.starts_with("..") && text != DATA && name != *version {
            super::remove::tree(&dir.join(&name))?;
        }
    }
    Ok(true)
}

/// A place is one or more plain names.
pub(super) fn is_inside(place: &str) -> bool {
    let path = Path::new(place);
    let plain = |part| matches!(part, Component::Normal(_));
    !place.is_empty() && !place.starts_with("..") && path.components().all(plain)
}

fn as_it_is(version: &Path, files: &Files) -> bool {
    let same = |(place, file): (&String, &File)| {
        let there = version.join(place);
        let mode = fs::metadata(&there).map(|data| data.permissions().mode() & 0o777);
        // Group bits may be more than was asked for.
        mode.is_ok_and(|mode| mode & file.mode == file.mode & 0o777)
            && fs::read(&there).is_ok_and(|bytes| bytes == file.bytes)
    };
    files.iter().all(same) && count(version) == Some(files.len())
}

/// How many files there are.
fn count(dir: &Path) -> Option<usize> {
    let mut files = 0;
    for entry in fs::read_dir(dir).ok()? {
        let entry = entry.ok()?;
        files += if entry.file_type().ok()?.is_dir() {
            count(&entry.path())?
        } else {
            1
        };
    }
    Some(files)
}

/// A directory that was not there.
fn new_version(dir: &Path) -> io::Result<PathBuf> {
    let now = humantime::format_rfc3339_nanos(std::time::SystemTime::now()).to_string();
    let name = PathBuf::from(format!("..{}", now.replace([':', 'T'], "_")));
    DirBuilder::new().mode(0o755).create(dir.join(&name))?;
    Ok(name)
}

fn one(version: &Path, place: &str, file: &File, group: Option<u32>) -> io::Result<()> {
    let place = Path::new(place);
    let mut parent = version.to_owned();
    for part in place.parent().into_iter().flat_map(Path::components) {
        parent.push(part);
        match fs::create_dir(&parent) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => {
                made?;
                owned(&parent, 0o755, group)?;
            }
        }
    }
    let path = version.join(place);
    let mut options = OpenOptions::new();
    let mut opened = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    opened.write_all(&file.bytes)?;
    let group_may_read = if group.is_some() { 0o440 } else { 0 };
    owned(&path, file.mode & 0o777 | group_may_read, group)
}

fn owned(path: &Path, mode: u32, group: Option<u32>) -> io::Result<()> {
    if group.is_some() {
        chown(path, None, group)?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// The links that readers see: one for each first part of a place.
fn links(dir: &Path, files: &Files) -> io::Result<()> {
    let first = |place: &String| place.split('/').next().map(str::to_owned);
    let wanted: BTreeSet<String> = files.keys().filter_map(first).collect();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_symlink() && !name.starts_with("..") && !wanted.contains(&name) {
            fs::remove_file(entry.path())?;
        }
    }
    for name in wanted {
        match symlink(Path::new(DATA).join(&name), dir.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;

    fn files(all: &[(&str, &str, u32)]) -> Files {
        let file = |(place, text, mode): &(&str, &str, u32)| {
            let bytes = text.as_bytes().to_vec();
            ((*place).to_owned(), File { bytes, mode: *mode })
        };
        all.iter().map(file).collect()
    }

    fn listed(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("..2"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_reader_of_one_version_keeps_it() {
        let scratch = Scratch::new();
        let dir = scratch.path();
        let first = files(&[("a", "1", 0o644), ("d/b", "2", 0o400), ("d/c", "3", 0o644)]);
        assert!(write(dir, &first, None).unwrap());
        assert_eq!(listed(dir), ["..data", "a", "d"]);
        assert_eq!(fs::read_to_string(dir.join("d/b")).unwrap(), "2");
        let mode = fs::metadata(dir.join("d/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400);
        let held = fs::File::open(dir.join("a")).unwrap();
        let version = fs::read_link(dir.join(DATA)).unwrap();

        assert!(!write(dir, &first, None).unwrap());
        assert_eq!(fs::read_link(dir.join(DATA)).unwrap(), version);

        let second = files(&[("a", "one", 0o644), ("e", "5", 0o644)]);
        assert!(write(dir, &second, None).unwrap());
        assert_eq!(listed(dir), ["..data", "a", "e"]);
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "one");
        assert_eq!(io::read_to_string(held).unwrap(), "1");
        assert!(!dir.join(version).exists());
    }

    #[test]
    fn what_an_interrupted_change_left_is_no_matter() {
        let scratch = Scratch::new();
        let dir = scratch.path();
        fs::create_dir(dir.join("..2020_left")).unwrap();
        symlink("..2020_left", dir.join(NEW_DATA)).unwrap();
        assert!(write(dir, &files(&[("a", "1", 0o644)]), None).unwrap());
        assert_eq!(listed(dir), ["..data", "a"]);
        assert!(!dir.join("..2020_left").exists());
    }

    #[test]
    fn places_are_inside() {
        assert!(is_inside("a") && is_inside("a/b.c") && is_inside(".a"));
        for wrong in ["", "..", "../a", "/a", "a/../b", "..data", "./a/.."] {
            assert!(!is_inside(wrong), "{wrong}");
        }
        let scratch = Scratch::new();
        assert!(write(scratch.path(), &files(&[("../x", "", 0)]), None).is_err());
    }
}
