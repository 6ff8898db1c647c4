//! A disk that another process has opened: whether it is open as the device
//! needs it. [`super::Disk::given`] calls this, in a confined program.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

use super::{CacheMode, DiskError, DiskOptions};

pub(super) fn check(file: BorrowedFd<'_>, options: &DiskOptions) -> Result<(), DiskError> {
    let measure = |errno: rustix::io::Errno| DiskError::Measure(errno.into());
    let found = fstat(file).map_err(measure)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => {}
        FileType::Directory => return Err(DiskError::WrongKind("directory")),
        FileType::Fifo => return Err(DiskError::WrongKind("fifo")),
        FileType::Socket => return Err(DiskError::WrongKind("socket")),
        FileType::CharacterDevice => return Err(DiskError::WrongKind("character device")),
        _ => return Err(DiskError::WrongKind("special file")),
    }
    let flags = fcntl_getfl(file).map_err(measure)?;
    let direct = options.cache == CacheMode::Direct;
    let rule = match flags & OFlags::RWMODE {
        _ if flags.contains(OFlags::PATH) => "its descriptor is O_PATH: open it for reading",
        OFlags::RDONLY if options.read_only => "",
        OFlags::RDWR if !options.read_only => "",
        _ if options.read_only => {
            "its descriptor can write, and the device is read-only: open it for reading only"
        }
        _ => "it is not open for reading and writing: open it so, or add it read-only",
    };
    // Writes at a place would go to the end.
    let rule = match rule {
        "" if flags.contains(OFlags::APPEND) => "it is open with O_APPEND: open it without",
        "" if direct && !flags.contains(OFlags::DIRECT) => {
            "it is open without O_DIRECT, and cache is direct: open it with, or choose another cache"
        }
        "" if !direct && flags.contains(OFlags::DIRECT) => {
            "it is open with O_DIRECT, and cache is not direct: open it without, or leave cache out"
        }
        other => other,
    };
    if rule.is_empty() {
        Ok(())
    } else {
        Err(DiskError::Opened(rule))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::OpenOptionsExt;

    fn verdict(file: impl AsFd, read_only: bool, cache: CacheMode) -> String {
        let options = DiskOptions {
            file: "/disk".into(),
            read_only,
            cache,
            iopoll: false,
        };
        check(file.as_fd(), &options)
            .err()
            .map_or_else(String::new, |e| e.to_string())
    }

    #[test]
    fn a_descriptor_must_be_open_as_the_device_needs_it() {
        let path = std::env::temp_dir().join(format!("pericarp-given-{}", std::process::id()));
        std::fs::write(&path, [0; 512]).unwrap();
        let open = |write: bool, flags: i32| -> OwnedFd {
            let mut options = OpenOptions::new();
            options.read(true).write(write).custom_flags(flags);
            options.open(&path).unwrap().into()
        };
        let (both, read) = (open(true, 0), open(false, 0));
        let cached = CacheMode::Buffered;
        assert_eq!(verdict(&both, false, cached), "");
        assert_eq!(verdict(&read, true, cached), "");
        for (file, read_only, cache, want) in [
            (&both, true, cached, "can write"),
            (&read, false, cached, "not open for reading and writing"),
            (&both, false, CacheMode::Direct, "without O_DIRECT"),
            (&open(false, libc::O_PATH), true, cached, "O_PATH"),
            (&open(true, libc::O_APPEND), false, cached, "O_APPEND"),
        ] {
            let got = verdict(file, read_only, cache);
            assert!(got.contains(want), "{got}");
        }
        let directory = File::open(std::env::temp_dir()).unwrap();
        assert!(verdict(&directory, true, cached).contains("directory"));
        let (pipe, _) = std::io::pipe().unwrap();
        assert!(verdict(&pipe, true, cached).contains("fifo"));
        std::fs::remove_file(&path).unwrap();
    }
}
