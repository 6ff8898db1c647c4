//! Mounts of the host below a pod's shared directory.
//!
//! That directory itself is one that the guest can change nothing in, by its mount: who could put
//! a link where a container's root is to be mounted would choose what the host's root user mounts
//! over, or removes. What the shim makes there it makes behind it.
//!
//! Each appears in the mount namespace of `pericarp-fs` at once, as a copy that has the attributes of
//! that moment. So a mount gets them before it gets its place, and devices are never among them:
//! the server must not be able to open the node of a disk that an image happens to have.
#![expect(unsafe_code)]
// UNSAFETY: mount_setattr, which rustix does not have.

use std::{
    ffi::{CString, OsString},
    fs::{self, File},
    io::{self, ErrorKind},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, fstatvfs},
    io::Errno,
    mount::{
        MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree,
        unmount,
    },
};

use crate::spec::Bind;

/// What mount(2) takes of options is a page.
const LONGEST: usize = 4096 - 256;

/// Shows `behind` at `directory`, to be read alone, as a mount that tells its copies of what is
/// mounted below it.
pub(crate) fn make_shared(behind: &Path, directory: &Path) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, behind, flags)?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    // Its copies alone: not what the host's root may be shared with.
    change(tree.as_fd(), attributes, libc::MS_PRIVATE)?;
    change(tree.as_fd(), 0, libc::MS_SHARED)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&tree, c"", CWD, directory, flags)?)
}

/// A file or directory of the host that is to be shown.
#[derive(Debug)]
pub(crate) struct Shown {
    file: OwnedFd,
    is_directory: bool,
}

/// By what two of them are the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    device: u64,
    inode: u64,
    /// Of the mount through which it is reached.
    flags: u64,
    read_only: bool,
    recursive: bool,
}

/// Opens it, and keeps it from being another one by the time it is mounted.
pub(crate) fn open(path: &Path) -> io::Result<Shown> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
    Ok(Shown {
        file,
        is_directory: kind == FileType::Directory,
    })
}

impl Shown {
    pub(crate) fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// None where it may not be the same a moment later: with mounts of its own, which come and go.
    pub(crate) fn key(&self, what: &Bind, recursive: bool) -> io::Result<Option<Key>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let path = fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        if what.follows || (recursive && below(&mounts, &path).iter().any(|at| *at != path)) {
            return Ok(None);
        }
        let there = fstat(&self.file)?;
        Ok(Some(Key {
            device: there.st_dev,
            inode: there.st_ino,
            flags: fstatvfs(&self.file)?.f_flag.bits(),
            read_only: what.read_only,
            recursive,
        }))
    }

    /// Shows it at `place`, which is there.
    pub(crate) fn bind(&self, what: &Bind, recursive: bool, place: &Path) -> io::Result<()> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(&self.file, c"", flags)?;
        let mut attributes = libc::MOUNT_ATTR_NODEV;
        if what.read_only {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        let propagation = if what.follows {
            libc::MS_SLAVE
        } else {
            libc::MS_PRIVATE
        };
        change(tree.as_fd(), attributes, propagation)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&tree, c"", CWD, place, flags)?)
    }
}

fn change(tree: BorrowedFd<'_>, attributes: u64, propagation: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is empty and static, and the kernel reads as many bytes of the attributes
    // as there are.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Mounts what containerd's snapshotters describe.
pub(crate) fn snapshot(what: &Mount, place: &Path) -> io::Result<()> {
    let options = Options::parse(&what.options);
    if what.type_ == "bind" || options.bind {
        let read_only = options.flags.contains(MountFlags::RDONLY);
        let what = Bind {
            path: PathBuf::from(&what.source),
            read_only,
            follows: false,
        };
        return open(&what.path)?.bind(&what, true, place);
    }
    // Longer ones name their layers by descriptors, which stay open until the mount is made.
    let mut layers = Vec::new();
    let data = match options.data.len() > LONGEST {
        true => shortened(&options.data, &mut layers)?,
        false => options.data,
    };
    let data = CString::new(data)?;
    let flags = options.flags | MountFlags::NODEV;
    mount(
        &what.source,
        place,
        what.type_.as_str(),
        flags,
        Some(&*data),
    )?;
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    bind: bool,
    /// What the file system itself reads.
    data: String,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MountFlags::empty(),
            bind: false,
            data: String::new(),
        };
        for option in options {
            let flag = match option.as_str() {
                "ro" => MountFlags::RDONLY,
                "nosuid" => MountFlags::NOSUID,
                "nodev" => MountFlags::NODEV,
                "noexec" => MountFlags::NOEXEC,
                "noatime" => MountFlags::NOATIME,
                "nodiratime" => MountFlags::NODIRATIME,
                "relatime" => MountFlags::RELATIME,
                "strictatime" => MountFlags::STRICTATIME,
                "sync" => MountFlags::SYNCHRONOUS,
                "bind" | "rbind" => {
                    parsed.bind = true;
                    continue;
                }
                // What is so anyway, and what is for a program on the host to know.
                "rw" | "defaults" | "suid" | "dev" | "exec" | "async" | "loop" => continue,
                other => {
                    if !parsed.data.is_empty() {
                        parsed.data.push(',');
                    }
                    parsed.data.push_str(other);
                    continue;
                }
            };
            parsed.flags |= flag;
        }
        parsed
    }
}

/// The same options with the layers of an overlay by descriptor.
fn shortened(data: &str, open: &mut Vec<File>) -> io::Result<String> {
    let mut options = Vec::new();
    for option in data.split(',') {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            options.push(option.to_owned());
            continue;
        };
        let mut short = Vec::new();
        for layer in layers.split(':') {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(layer, flags, Mode::empty())?);
            short.push(format!("/proc/self/fd/{}", file.as_raw_fd()));
            open.push(file);
        }
        options.push(format!("lowerdir={}", short.join(":")));
    }
    Ok(options.join(","))
}

/// Takes a mount away, if there is one. A server that has files open there keeps nobody waiting: it
/// loses them when it lets go.
pub(crate) fn detach(place: &Path) -> io::Result<()> {
    loop {
        match unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // There may be several, one upon the other.
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes what lies behind a place, which is empty. One that is gone is no error.
pub(crate) fn remove_place(behind: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(behind) {
        Ok(there) if there.is_dir() => fs::remove_dir(behind),
        Ok(_) => fs::remove_file(behind),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes away all mounts at or below a directory.
pub(crate) fn unmount_below(directory: &Path) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for place in below(&mounts, directory) {
        detach(&place)?;
    }
    Ok(())
}

/// Mount points at or below a directory, the last first.
fn below(mounts: &str, directory: &Path) -> Vec<PathBuf> {
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let mut places: Vec<PathBuf> = points
        .map(unescaped)
        .filter(|point| point.starts_with(directory))
        .collect();
    places.reverse();
    places
}

/// Blanks and the like are written in octal there.
pub(crate) fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use rustix::mount::mount_bind;

    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let options = ["ro", "nosuid", "index=off", "lowerdir=/a:/b", "rw"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(parsed.data, "index=off,lowerdir=/a:/b");
        assert!(!parsed.bind);
        assert!(Options::parse(&["rbind".into()]).bind);
    }

    #[test]
    fn long_lists_of_layers_become_short() {
        let layers = vec!["/tmp"; 1000].join(":");
        let mut open = Vec::new();
        let data = shortened(
            &format!("index=off,lowerdir={layers},upperdir=/u"),
            &mut open,
        );
        let data = data.unwrap();
        assert!(data.starts_with("index=off,lowerdir=/proc/self/fd/"));
        assert!(data.ends_with(",upperdir=/u"));
        assert_eq!(open.len(), 1000);
    }

    #[test]
    fn mounts_below_a_directory_are_found_by_whole_names() {
        let line = |point: &str| format!("36 35 98:0 / {point} rw - ext4 /dev/sda rw\n");
        let mounts =
            line("/") + &line("/p/a") + &line("/p/a\\040b/c") + &line("/p/ab") + &line("/p/a/x");
        assert_eq!(
            below(&mounts, Path::new("/p/a")),
            [PathBuf::from("/p/a/x"), "/p/a".into()]
        );
        assert_eq!(
            below(&mounts, Path::new("/p/a b")),
            [PathBuf::from("/p/a b/c")]
        );
    }

    #[test]
    fn what_is_shown_is_told_to_copies_without_devices() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = std::env::temp_dir().join(format!("pericarp-mounts-{}", std::process::id()));
        let at = |name: &str| base.join(name);
        let (behind, shared, copy, outer) = (at("behind"), at("shared"), at("copy"), at("outer"));
        for path in [&behind, &shared, &copy, &outer] {
            fs::create_dir_all(path).unwrap();
        }
        make_shared(&behind, &shared).unwrap();
        mount_bind(&shared, &copy).unwrap();
        fs::create_dir(behind.join("a")).unwrap();
        // Whoever has a copy chooses no place.
        for top in [&shared, &copy] {
            let link = std::os::unix::fs::symlink("/etc", top.join("b"));
            assert_eq!(link.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
            let moved = fs::rename(top.join("a"), top.join("b"));
            assert_eq!(moved.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        }
        fs::write(outer.join("file"), "x").unwrap();
        let what = Bind {
            path: outer.clone(),
            read_only: true,
            follows: false,
        };
        let source = open(&outer).unwrap();
        source.bind(&what, true, &shared.join("a")).unwrap();
        assert_eq!(fs::read_to_string(copy.join("a/file")).unwrap(), "x");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let at = copy.join("a").display().to_string();
        let line = mounts.lines().find(|line| line.contains(&at)).unwrap();
        assert!(line.contains(" ro,nodev"), "{line}");
        detach(&shared.join("a")).unwrap();
        assert!(!copy.join("a/file").exists());
        detach(&shared.join("a")).unwrap();
        unmount_below(&base).unwrap();
        fs::remove_dir_all(base).unwrap();
    }
}
