//! Mounts below the root, and an empty root of our own. On threads with a mount
//! namespace of their own; nothing outside the scratch directory is touched.
#![expect(unsafe_code)]
// UNSAFETY: unshare, mount, umount2 and pivot_root, which rustix has only with a
// feature that nobody else needs.

use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pericarp_share::{Errno, NodeId, SetAttributes, Share, ShareOptions, Xattr};

use crate::scratch::{Scratch, me, open, root, share};

const ROOT: NodeId = NodeId::ROOT;

/// On a thread whose mounts are its own.
pub(crate) fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    if !root() {
        return;
    }
    let thread = std::thread::spawn(|| {
        // SAFETY: the calling thread alone gets another namespace.
        let result = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
        assert_eq!(result, 0);
        mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE);
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn mount(source: &str, target: &Path, kind: &str, flags: u64) {
    mount_with(source, target, kind, flags, "");
}

pub(crate) fn mount_with(source: &str, target: &Path, kind: &str, flags: u64, options: &str) {
    let [source, target, kind, options] =
        [source, target.to_str().unwrap(), kind, options].map(|s| CString::new(s).unwrap());
    // SAFETY: four strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub(crate) fn unmount(target: &Path) {
    let target = CString::new(target.to_str().unwrap()).unwrap();
    // SAFETY: a string that outlives the call.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}

#[test]
fn a_mount_is_said_to_be_one_and_its_numbers_are_its_own() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        for name in ["one", "two", "plain"] {
            fs::create_dir(scratch.path(name)).unwrap();
        }
        scratch.file("here", "");
        for name in ["one", "two"] {
            mount("scratch", &scratch.path(name), "tmpfs", 0);
            fs::create_dir(scratch.path(name).join("below")).unwrap();
            fs::write(scratch.path(name).join("f"), name).unwrap();
        }
        let share = scratch.share();
        let entry = |parent, name| share.lookup(parent, name).unwrap();
        let (one, two) = (entry(ROOT, c"one"), entry(ROOT, c"two"));
        assert!(one.submount && two.submount && one.crosses);
        let (plain, below) = (entry(ROOT, c"plain"), entry(one.node, c"below"));
        assert!(!(plain.submount || plain.crosses || below.submount || below.crosses));
        let (f, g) = (entry(one.node, c"f"), entry(two.node, c"f"));
        // On the host both have the same number.
        let ino = |name| fs::metadata(scratch.path(name)).unwrap().ino();
        assert_eq!(ino("one/f"), ino("two/f"));
        assert_ne!(f.attributes.ino, g.attributes.ino);
        assert_ne!(f.node, g.node);
        // Read or looked up, the number is the same.
        let handle = share.open_dir(one.node).unwrap();
        let mut found = 0;
        share
            .read_dir_plus(handle, 0, &mut |entry, node| {
                if let Some(node) = node {
                    assert_eq!(entry.ino, node.attributes.ino);
                    assert!(!node.submount);
                    found += 1;
                }
                true
            })
            .unwrap();
        assert_eq!(found, 2);
        assert_eq!(share.link(f.node, ROOT, c"l"), Err(Errno::XDEV));
        let moved = share.rename(one.node, c"f", ROOT, c"f", 0);
        assert_eq!(moved, Err(Errno::XDEV));
        // Nothing of ours keeps it mounted once it is forgotten.
        share.close_dir(handle).unwrap();
        share.reset();
        let target = CString::new(scratch.path("one").to_str().unwrap()).unwrap();
        // SAFETY: a string that outlives the call.
        assert_eq!(unsafe { libc::umount2(target.as_ptr(), 0) }, 0);
        let again = share.lookup(ROOT, c"one").unwrap();
        assert!(!again.submount);
        let target = CString::new(scratch.path("two").to_str().unwrap()).unwrap();
        // SAFETY: a string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    });
}

#[test]
fn a_file_that_something_is_mounted_on_is_that() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        fs::write(scratch.outside("source"), "mounted").unwrap();
        scratch.file("f", "");
        let source = scratch.outside("source");
        mount(
            source.to_str().unwrap(),
            &scratch.path("f"),
            "",
            libc::MS_BIND,
        );
        let share = scratch.share();
        let entry = share.lookup(ROOT, c"f").unwrap();
        assert_eq!((entry.attributes.size, entry.submount), (7, false));
        assert!(entry.crosses);
        let opened = share.open_file(entry.node, libc::O_RDONLY, false).unwrap();
        let mut buffer = [0; 7];
        rustix::io::pread(&*opened.file, &mut buffer, 0).unwrap();
        assert_eq!(&buffer, b"mounted");
        assert_eq!(share.unlink(ROOT, c"f"), Err(Errno::BUSY));
        let target = CString::new(scratch.path("f").to_str().unwrap()).unwrap();
        // SAFETY: a string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    });
}

/// Everything that goes through /proc, where there is none.
#[test]
fn an_empty_root_is_enough() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        scratch.file("f", "hello");
        let empty = scratch.outside("empty");
        fs::create_dir(&empty).unwrap();
        let tree: OwnedFd = open(&scratch.root());
        let options = ShareOptions {
            descriptors: 64,
            open_files: 64,
            xattr: true,
            ..ShareOptions::default()
        };
        let share = Share::open(tree, options).unwrap();
        mount("empty", &empty, "tmpfs", 0);
        let before = open(Path::new("/"));
        std::env::set_current_dir("/").unwrap();
        rustix::process::chdir(&empty).unwrap();
        // SAFETY: "." is static; the thread's namespace is its own.
        unsafe {
            assert_eq!(
                libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()),
                0
            );
            assert_eq!(libc::umount2(c".".as_ptr(), libc::MNT_DETACH), 0);
        }
        assert!(!Path::new("/proc").exists());

        let node = share.lookup(ROOT, c"f").unwrap().node;
        let opened = share.open_file(node, libc::O_RDWR, false).unwrap();
        let mut buffer = [0; 5];
        rustix::io::pread(&*opened.file, &mut buffer, 0).unwrap();
        assert_eq!(&buffer, b"hello");
        let set = SetAttributes {
            mode: Some(0o600),
            size: Some(1),
            uid: Some(3),
            ..SetAttributes::default()
        };
        let changed = share.set_attributes(node, None, &set).unwrap();
        assert_eq!(
            (changed.size, changed.mode & 0o7777, changed.uid),
            (1, 0o600, 3)
        );
        share
            .create(&me(), ROOT, c"c", libc::O_RDWR, 0o644, 0, false)
            .unwrap();
        let unnamed = share
            .make_temporary(&me(), ROOT, libc::O_RDWR, 0o644, 0)
            .unwrap();
        share.link(unnamed.0.node, ROOT, c"l").unwrap();
        share.set_xattr(node, c"user.a", b"x", 0, false).unwrap();
        assert_eq!(
            share.get_xattr(node, c"user.a", 1),
            Ok(Xattr::Value(b"x".to_vec()))
        );
        let handle = share.open_dir(ROOT).unwrap();
        let mut names = 0;
        share
            .read_dir_plus(handle, 0, &mut |_, node| {
                names += usize::from(node.is_some());
                true
            })
            .unwrap();
        assert_eq!(names, 3);
        // Back, for the scratch directory to be removed.
        rustix::process::fchdir(before).unwrap();
        rustix::process::chroot(".").unwrap();
    });
}

#[test]
fn a_share_of_tmpfs_has_handles_too() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        mount("scratch", &scratch.root(), "tmpfs", 0);
        for number in 0..500 {
            scratch.file(&format!("f{number}"), "");
        }
        let on_tmpfs = share(&scratch.root(), |o| o.descriptors = 64);
        let nodes: Vec<_> = (0..500)
            .map(|number| {
                let name = CString::new(format!("f{number}")).unwrap();
                on_tmpfs.lookup(ROOT, &name).unwrap().node
            })
            .collect();
        assert!(on_tmpfs.counts().0 <= 64);
        assert!(
            nodes
                .iter()
                .all(|node| on_tmpfs.attributes(*node, None).is_ok())
        );
        drop(on_tmpfs);
        unmount(&scratch.root());
    });
}

/// Overlayfs says another time of making of a file that it has copied up.
#[test]
fn a_file_that_is_copied_up_is_found_again() {
    with_own_mounts(|| {
        let scratch = Scratch::new();
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| scratch.outside(name));
        for dir in [&lower, &upper, &work] {
            fs::create_dir(dir).unwrap();
        }
        let name = |number: usize| format!("f{number}");
        for number in 0..300 {
            fs::write(lower.join(name(number)), "x".repeat(number)).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount_with("overlay", &scratch.root(), "overlay", 0, &options);
        let share = scratch.share_with(|o| (o.descriptors, o.file_handles) = (64, false));
        let nodes: Vec<_> = (0..300)
            .map(|number| {
                let name = CString::new(name(number)).unwrap();
                share.lookup(ROOT, &name).unwrap().node
            })
            .collect();
        let press = || {
            for (number, node) in nodes.iter().enumerate().skip(10) {
                let size = share.attributes(*node, None).unwrap().size;
                assert_eq!(size, number as u64);
            }
        };
        press();
        let opened = share.open_file(nodes[3], libc::O_RDWR, false).unwrap();
        share.close_file(opened.handle).unwrap();
        assert!(upper.join("f3").exists());
        press();
        assert_eq!(share.attributes(nodes[3], None).map(|a| a.size), Ok(3));
        share.reset();
        unmount(&scratch.root());
    });
}
