//! What is kept from script to script: guest memory, and a scratch directory
//! with a share in it and a secret beside it. What is made for each: the share.

use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pericarp_fs::{Cache, FsDevice, Settings};
use pericarp_share::{Share, ShareOptions};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, chmodat, makedev, mknodat, openat, unlinkat,
};

use crate::memory::Memory;

/// Ways to serve a directory.
pub(super) const MODES: u8 = 8;
/// What the secret holds; no reply may.
pub(super) const SECRET: &[u8] = b"not for guests: 7d1f";
/// The largest number of descriptors, open files and nodes of small budgets.
const SMALL: u32 = 64;
/// Those of others: a thousand descriptors are what a test may have.
const LARGE: u32 = 256;

/// Descriptors that whoever runs us may open meanwhile, as under libFuzzer.
const SLACK: usize = 4;

/// A share of the scratch directory, as a script wants it.
pub(super) struct Stage {
    pub(super) device: Arc<FsDevice>,
    pub(super) read_only: bool,
    /// Most descriptors, nodes and open files.
    pub(super) limits: (u32, u32, u32),
    /// What a read-only directory was like.
    before: Option<Vec<String>>,
}

/// What is kept from script to script.
pub(super) struct Rig {
    pub(super) memory: Memory,
    scratch: PathBuf,
    outside: Vec<String>,
    /// Inode numbers that no guest may be told.
    pub(super) hidden: Vec<u64>,
    descriptors: usize,
}

impl Rig {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // In memory where there is such a place: nothing is synced to a disk.
        let place = PathBuf::from("/dev/shm");
        let place = if place.is_dir() {
            place
        } else {
            std::env::temp_dir()
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let scratch = place.join(format!("pericarp-fuzz-{}-{number}", std::process::id()));
        fs::create_dir_all(scratch.join("outside")).expect("a scratch directory");
        fs::create_dir(scratch.join("share")).expect("a directory to share");
        for name in ["secret", "outside/file"] {
            fs::write(scratch.join(name), SECRET).expect("a secret");
        }
        let hidden = ["", "secret", "outside", "outside/file"]
            .map(|name| fs::metadata(scratch.join(name)).expect("there").ino())
            .to_vec();
        let mut rig = Self {
            memory: Memory::new(),
            scratch,
            outside: Vec::new(),
            hidden,
            descriptors: 0,
        };
        // A first share has the standard library and the kernel open what they
        // keep.
        rig.clear();
        drop(rig.stage(0));
        rig.descriptors = descriptors();
        rig
    }

    pub(super) fn share(&self) -> PathBuf {
        self.scratch.join("share")
    }

    /// Empty memory, and the directory as every script finds it.
    pub(super) fn clear(&mut self) {
        self.memory.clear();
        let share = self.share();
        empty(File::open(&share).expect("the directory"));
        let _ = lchown(&share, Some(rustix::process::geteuid().as_raw()), None);
        let _ = fs::set_permissions(&share, Permissions::from_mode(0o755));
        let names = ["user.x", "user.y", "trusted.x", "system.posix_acl_access"];
        for name in names.into_iter().chain(["system.posix_acl_default"]) {
            let _ = rustix::fs::lremovexattr(&share, name);
        }
        let path = |name: &str| share.join(name);
        fs::write(path("file"), [7; 3000]).expect("a file");
        fs::create_dir(path("dir")).expect("a directory");
        fs::write(path("dir/inner"), b"inner").expect("a file");
        symlink("../secret", path("link")).expect("a link");
        symlink("..", path("up")).expect("a link");
        mknodat(CWD, path("fifo"), FileType::Fifo, 0o666.into(), 0).expect("a fifo");
        let device = FileType::CharacterDevice;
        // Root alone may, and not in every container.
        let _ = mknodat(CWD, path("zero"), device, 0o666.into(), makedev(1, 5));
        self.outside = self.look_outside();
    }

    pub(super) fn stage(&self, mode: u8) -> Stage {
        let mode = mode % MODES;
        let small = matches!(mode, 3 | 4);
        let many = |few| if small { few } else { LARGE };
        let options = ShareOptions {
            read_only: mode == 1,
            xattr: mode != 5,
            posix_acl: mode == 2,
            file_handles: mode != 3,
            descriptors: many(SMALL),
            open_files: many(SMALL),
            nodes: many(2 * SMALL),
            ..ShareOptions::default()
        };
        let settings = Settings {
            cache: match mode {
                6 => Cache::Never,
                2 | 7 => Cache::Always,
                _ => Cache::Auto,
            },
            writeback: mode == 7,
            dont_cache: mode == 6,
            alone: mode == 3,
            later_mounts: mode == 4,
        };
        let limits = (options.descriptors, options.nodes, options.open_files);
        let root: OwnedFd = File::open(self.share()).expect("the directory").into();
        let read_only = options.read_only;
        let share = Share::open(root, options).expect("a share");
        Stage {
            device: Arc::new(FsDevice::new(share, "fuzz", 1, 16, settings)),
            read_only,
            limits,
            before: read_only.then(|| picture(&self.share())),
        }
    }

    /// The guest is gone: nothing of it is left, and all is untouched that was
    /// not its to touch.
    pub(super) fn judge(&self, stage: &Stage) {
        assert_eq!(stage.device.share().counts(), (0, 0, 0), "left behind");
        assert_eq!(
            self.look_outside(),
            self.outside,
            "outside of the directory"
        );
        if let Some(before) = &stage.before {
            assert_eq!(&picture(&self.share()), before, "read-only");
        }
    }

    /// The share is gone, too.
    pub(super) fn settled(&self) {
        let (now, before) = (descriptors(), self.descriptors);
        assert!(now <= before + SLACK, "{now} descriptors, {before} before");
    }

    fn look_outside(&self) -> Vec<String> {
        let mut all: Vec<String> = ["", "secret", "outside", "outside/file"]
            .into_iter()
            .map(|name| {
                // Without times of access: we read the directory ourselves.
                let meta = fs::metadata(self.scratch.join(name)).expect("still there");
                let read = if name.is_empty() {
                    0
                } else {
                    meta.atime_nsec()
                };
                format!("{name} {} {read}", described(&meta))
            })
            .collect();
        let names = fs::read_dir(&self.scratch).expect("still there");
        let mut names: Vec<_> = names.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        all.push(format!("{names:?}"));
        all
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Ok(dir) = File::open(&self.scratch) {
            empty(dir);
        }
        let _ = fs::remove_dir(&self.scratch);
    }
}

fn described(meta: &fs::Metadata) -> String {
    let (mode, links, size) = (meta.mode(), meta.nlink(), meta.size());
    let (uid, gid) = (meta.uid(), meta.gid());
    let (written, changed) = (meta.mtime_nsec(), meta.ctime_nsec());
    format!("{mode:o} {links} {uid}:{gid} {size} {written} {changed}")
}

/// All of a tree but times of access.
fn picture(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut next = vec![dir.to_owned()];
    while let Some(path) = next.pop() {
        let meta = fs::symlink_metadata(&path).expect("nobody else is here");
        all.push(format!("{} {}", path.display(), described(&meta)));
        if meta.is_dir() {
            let entries = fs::read_dir(&path).expect("a directory");
            next.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    all.sort();
    all
}

/// Removes what is in a directory, whatever rights and names the guest has left
/// there: its trees may be deeper than paths can be long.
fn empty(dir: impl AsFd) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let entries = Dir::read_from(&dir).expect("a directory");
    let entries: Vec<_> = entries.flatten().collect();
    for entry in entries {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let directory = entry.file_type() == FileType::Directory;
        if directory {
            let _ = chmodat(&dir, name, Mode::RWXU, AtFlags::empty());
            empty(openat(&dir, name, flags, Mode::empty()).expect("a directory"));
        }
        let what = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(&dir, name, what).expect("nobody is there any more");
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
