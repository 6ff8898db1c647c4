//! Disk images that nobody needs after this run: they have no name, so nothing is left of them
//! however the run ends.
//!
//! Made in `TMPDIR`, else `/var/tmp`: on a disk, unlike the run's own directory. Other programs
//! open such an image through this process's entry in `/proc`.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{
    failure::{Failure, during},
    helper,
    signals::Signals,
};

/// What a container may write before its disk is full. The file is sparse: it takes what is used.
const WRITABLE_SIZE: u64 = 8 << 30;

/// A file without a name.
#[derive(Debug)]
pub(crate) struct Unnamed {
    file: File,
}

impl Unnamed {
    /// A sparse file of this size.
    fn new(size: u64) -> Result<Self, Failure> {
        let directory = directory();
        let failed = || during(format!("a temporary file in '{}'", directory.display()));
        let file = open_unnamed(&directory).map_err(failed())?;
        file.set_len(size).map_err(failed())?;
        Ok(Self { file })
    }

    /// How programs started by this process open it.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// An empty ext4 file system for what a container writes.
    pub(crate) fn writable(signals: &mut Signals) -> Result<Self, Failure> {
        let image = Self::new(WRITABLE_SIZE)?;
        let mut command = mkfs_ext4();
        command.args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]);
        command.arg(image.path());
        helper::run_to_end("mkfs.ext4", command, signals)?;
        Ok(image)
    }
}

/// Quietly, without a journal: the file system does not outlive its machine.
fn mkfs_ext4() -> Command {
    let mut command = Command::new(helper::system_program("mkfs.ext4"));
    command
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal"])
        .stdout(Stdio::null());
    command
}

fn directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute() && path.is_dir())
        .unwrap_or_else(|| "/var/tmp".into())
}

fn open_unnamed(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Some file systems cannot; a name is taken away again at once.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let id = crate::registry::new_id()?;
            let path = directory.join(format!("pericarp-{id}"));
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            fs::remove_file(path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn an_unnamed_file_is_reached_through_proc() {
        let image = Unnamed::new(4096).unwrap();
        let path = image.path();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all(b"abc")
            .unwrap();
        let mut seen = [0; 3];
        File::open(&path).unwrap().read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"abc");
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        drop(image);
        assert!(!path.exists());
    }
}
