//! Private directories that vanish with the test, also when it panics.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of its own for one test.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one below `/var/tmp`, which unlike `/tmp` is a disk everywhere:
    /// O_DIRECT and io_uring behave differently on a memory file system. The
    /// name is short because a socket path may have 107 bytes only.
    ///
    /// # Panics
    /// When the directory cannot be made.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let base = std::env::var_os("PERICARP_TEST_DIR").map_or("/var/tmp".into(), PathBuf::from);
        fs::create_dir_all(&base).unwrap_or_else(|e| panic!("{}: {e}", base.display()));
        let path = loop {
            let serial = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = base.join(format!("pericarp-test-{}-{serial}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => break path,
                // Of a test that was killed, whose process id is ours now.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        };
        Scratch(path)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// A path inside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A sparse file of `len` bytes.
    ///
    /// # Panics
    /// When the file cannot be made.
    pub fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("a scratch file can be created");
        file.set_len(len).expect("a scratch file can be sized");
        path
    }

    /// A file with `bytes` in it.
    ///
    /// # Panics
    /// When the file cannot be made.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        let mut file = File::create(&path).expect("a scratch file can be created");
        file.write_all(bytes)
            .expect("a scratch file can be written");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_of_the_same_id_left_is_passed_over() {
        let first = Scratch::new();
        let name = first.dir().to_str().expect("the name is text");
        let (stem, serial) = name.rsplit_once('-').expect("it ends with a number");
        let next = serial.parse::<u32>().expect("it ends with a number") + 1;
        // Others may take numbers meanwhile: some will do.
        let left: Vec<_> = (next..next + 4)
            .map(|serial| PathBuf::from(format!("{stem}-{serial}")))
            .filter(|path| fs::create_dir(path).is_ok())
            .collect();
        let scratch = Scratch::new();
        assert!(!left.contains(&scratch.0) && scratch.dir().is_dir());
        for path in left {
            fs::remove_dir(path).expect("it is empty");
        }
    }
}
