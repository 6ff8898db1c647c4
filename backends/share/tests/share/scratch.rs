//! A directory of a test's own, and a share of it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use pericarp_share::{Caller, Share, ShareOptions};
use rustix::fs::{CWD, Mode, OFlags, openat};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Root, as far as a guest is concerned; in tests that are not run as root,
/// whoever runs them.
pub(crate) fn me() -> Caller {
    Caller {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        ..Caller::default()
    }
}

/// False, loudly, where the test cannot be run.
pub(crate) fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        assert!(
            std::env::var_os("PERICARP_REQUIRE_ALL").is_none(),
            "must be run as root"
        );
        eprintln!("SKIPPED: must be run as root");
    }
    root
}

pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-share-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        fs::create_dir(path.join("root")).unwrap();
        Self(path)
    }

    /// Beside what is shared.
    pub(crate) fn outside(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn file(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    pub(crate) fn share(&self) -> Share {
        self.share_with(|_| {})
    }

    pub(crate) fn share_with(&self, change: impl FnOnce(&mut ShareOptions)) -> Share {
        share(&self.root(), change)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn open(path: &Path) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).unwrap()
}

pub(crate) fn share(path: &Path, change: impl FnOnce(&mut ShareOptions)) -> Share {
    let mut options = ShareOptions {
        descriptors: 512,
        open_files: 128,
        ..ShareOptions::default()
    };
    change(&mut options);
    Share::open(open(path), options).unwrap()
}
