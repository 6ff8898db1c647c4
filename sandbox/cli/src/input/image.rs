//! Disk images: checked, opened and locked for as long as the run lasts.
//!
//! The lock is advisory, between runs of this program: one that writes an image excludes all
//! others, ones that only read share it. It is released when the [`Image`] is dropped or its
//! process dies.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::input::{problem::Problem, values::size};

/// Sectors are the unit of every disk.
const SECTOR: u64 = 512;

/// An image as named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageName {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

impl ImageName {
    /// Splits `FILE[:ro|:rw]`.
    pub(crate) fn parse(text: &str) -> Self {
        match text.rsplit_once(':') {
            Some((path, "ro")) => Self {
                path: path.into(),
                read_only: true,
            },
            Some((path, "rw")) => Self {
                path: path.into(),
                read_only: false,
            },
            _ => Self {
                path: text.into(),
                read_only: false,
            },
        }
    }
}

/// Which file it is, under whatever name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// An image that is ours for the time of the run.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) id: FileId,
    /// Holds the lock.
    _file: File,
}

impl Image {
    /// Opens and locks an image. `option` is named in the problem.
    pub(crate) fn open(option: &str, name: &ImageName) -> Result<Self, Problem> {
        let problem = |rule: String, cure: &str| {
            Problem::new(option, name.path.display().to_string(), rule, cure)
        };
        let metadata = std::fs::metadata(&name.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => problem("no such file".into(), "check the path"),
            _ => problem(error.to_string(), "check the path and its permissions"),
        })?;
        if metadata.is_dir() {
            let cure = if option == "--disk" {
                "name an image file"
            } else {
                "name an image file, or use '--rootfs' for a directory"
            };
            return Err(problem("is a directory".into(), cure));
        }
        if !metadata.is_file() {
            return Err(problem(
                "is not a regular file".into(),
                "name an image file",
            ));
        }
        match metadata.len() {
            0 => {
                return Err(problem(
                    "is empty".into(),
                    "make a file system in it, with mkfs.ext4",
                ));
            }
            length if length % SECTOR != 0 => {
                let rule = format!("its size of {length} bytes is not a multiple of {SECTOR}");
                return Err(problem(rule, "round it up with `truncate --size %512`"));
            }
            _ => {}
        }
        let file = File::options()
            .read(true)
            .write(!name.read_only)
            .open(&name.path)
            .map_err(|error| match name.read_only {
                true => problem(format!("cannot be read ({error})"), "check its permissions"),
                false => problem(
                    format!("cannot be written ({error})"),
                    "check its permissions, or add ':ro'",
                ),
            })?;
        lock(&file, name.read_only).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => problem(
                "is in use by another run".into(),
                "wait for that run to end; runs may share an image only if all use ':ro'",
            ),
            other => problem(
                format!("cannot be locked ({other})"),
                "move it to a local disk",
            ),
        })?;
        let path = std::fs::canonicalize(&name.path)
            .map_err(|error| problem(error.to_string(), "check the path"))?;
        if path.to_str().is_none() {
            return Err(problem(
                "the path is not valid UTF-8".into(),
                "rename the file",
            ));
        }
        let id = FileId::of(&metadata);
        Ok(Self {
            path,
            read_only: name.read_only,
            id,
            _file: file,
        })
    }
}

fn lock(file: &File, shared: bool) -> rustix::io::Result<()> {
    let operation = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    rustix::fs::flock(file, operation)
}

/// Checks a directory that is to become a root file system.
pub(crate) fn check_root_directory(path: &Path) -> Result<PathBuf, Problem> {
    let problem =
        |rule: String, cure: &str| Problem::new("--rootfs", path.display().to_string(), rule, cure);
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => problem("no such directory".into(), "check the path"),
        _ => problem(error.to_string(), "check the path and its permissions"),
    })?;
    if metadata.is_file() {
        let rule = format!("is a file of {}, not a directory", size(metadata.len()));
        return Err(problem(rule, "use '--rootfs-image' for a disk image"));
    }
    if !metadata.is_dir() {
        return Err(problem("is not a directory".into(), "name a directory"));
    }
    let mut entries = std::fs::read_dir(path)
        .map_err(|error| problem(format!("cannot be read ({error})"), "check its permissions"))?;
    if entries.next().is_none() {
        return Err(problem(
            "is empty".into(),
            "name a directory with a root file system",
        ));
    }
    let path = std::fs::canonicalize(path)
        .map_err(|error| problem(error.to_string(), "check the path"))?;
    match path.to_str() {
        Some("/") => Err(problem(
            "is this host's own root".into(),
            "name a directory below it",
        )),
        Some(_) => Ok(path),
        None => Err(problem(
            "the path is not valid UTF-8".into(),
            "rename the directory",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn the_suffix_says_how_an_image_is_used() {
        for (text, path, read_only) in [
            ("a.img", "a.img", false),
            ("a.img:ro", "a.img", true),
            ("a.img:rw", "a.img", false),
            ("a:b.img", "a:b.img", false),
            ("a:ro:rw", "a:ro", false),
        ] {
            assert_eq!(
                ImageName::parse(text),
                ImageName {
                    path: path.into(),
                    read_only
                }
            );
        }
    }

    #[test]
    fn each_bad_image_is_refused_with_its_cure() {
        let dir = scratch("images");
        let path = |name: &str| dir.join(name).display().to_string();
        std::fs::write(dir.join("empty"), b"").unwrap();
        std::fs::write(dir.join("odd"), [0; 1000]).unwrap();
        let refuse = |name: &str| {
            Image::open("--disk", &ImageName::parse(&path(name)))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refuse("none"),
            format!("--disk '{}': no such file; check the path", path("none"))
        );
        assert_eq!(
            refuse(""),
            format!("--disk '{}': is a directory; name an image file", path(""))
        );
        assert_eq!(
            refuse("empty"),
            format!(
                "--disk '{}': is empty; make a file system in it, with mkfs.ext4",
                path("empty")
            )
        );
        assert_eq!(
            refuse("odd"),
            format!(
                "--disk '{}': its size of 1000 bytes is not a multiple of 512; round it up with \
                 `truncate --size %512`",
                path("odd")
            )
        );
        assert_eq!(
            Image::open("--disk", &ImageName::parse("/dev/null"))
                .unwrap_err()
                .to_string(),
            "--disk '/dev/null': is not a regular file; name an image file"
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_writer_excludes_and_readers_share() {
        let dir = scratch("locks");
        let file = dir.join("disk");
        std::fs::write(&file, [0; 512]).unwrap();
        let name = |read_only| ImageName {
            path: file.clone(),
            read_only,
        };
        let first = Image::open("--disk", &name(true)).unwrap();
        let second = Image::open("--disk", &name(true)).unwrap();
        assert_eq!(first.id, second.id);
        let refused = Image::open("--disk", &name(false)).unwrap_err().to_string();
        assert!(
            refused.contains("is in use by another run; wait for that run"),
            "{refused}"
        );
        drop((first, second));
        let writer = Image::open("--disk", &name(false)).unwrap();
        assert!(Image::open("--disk", &name(true)).is_err());
        drop(writer);
        assert!(Image::open("--disk", &name(true)).is_ok());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
