//! The cases of a process that shares directory trees: what works below them,
//! and what does not lead out of them. Each function runs in a process of its
//! own with a directory of its own, as those of `alive`.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use io_uring::{IoUring, opcode, types};
use pericarp_confine::{
    CapabilitySet, ConfineError, Confinement, Measure, Profile, Sharing, SocketFile, Tree,
    enter_sharing,
};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps,
    UTIME_NOW, XattrFlags, chownat, fgetxattr, fsetxattr, mkdirat, mknodat, openat, openat2,
    readlinkat, renameat_with, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::thread::{CapabilitySets, Gid, Uid, capabilities, set_capabilities};

use crate::alive::{field, on_ring};
use crate::{PROFILE, call};

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
const CREATE: OFlags = OFlags::CREATE.union(OFlags::EXCL).union(OFlags::RDWR);

/// A tree with something in it, and something beside it.
struct Scene {
    tree: PathBuf,
}

fn scene(dir: &Path) -> Scene {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), b"shared").unwrap();
    fs::write(dir.join("beside"), b"secret").unwrap();
    symlink(dir.join("beside"), tree.join("absolute")).unwrap();
    symlink("../beside", tree.join("relative")).unwrap();
    Scene { tree }
}

fn proc() -> OwnedFd {
    File::open("/proc/self/fd").unwrap().into()
}

fn share_with(
    profile: &Profile<'_>,
    tree: Tree,
    capabilities: CapabilitySet,
    handles: bool,
) -> (Tree, OwnedFd, Confinement) {
    let (mut trees, mut descriptors) = ([tree], proc());
    let sharing = Sharing {
        descriptors: &mut descriptors,
        capabilities,
        handles,
    };
    let report = enter_sharing(profile, &mut [], &mut trees, sharing).unwrap();
    let [tree] = trees;
    (tree, descriptors, report)
}

fn share(tree: Tree) -> (Tree, OwnedFd, Confinement) {
    share_with(&PROFILE, tree, Sharing::CAPABILITIES, false)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Its content, through its number in `/proc/self/fd`, as `pericarp-share` does.
fn read(tree: &Tree, descriptors: &OwnedFd, name: &str) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = openat2(tree, name, flags, Mode::empty(), BENEATH)?;
    let file = reopen(descriptors, node.as_fd().as_raw_fd(), OFlags::RDONLY)?;
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text).unwrap();
    Ok(text)
}

fn reopen(descriptors: &OwnedFd, number: i32, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    openat(descriptors, DecInt::new(number), flags, Mode::empty())
}

/// The thread's own ids, as `pericarp-share` changes them.
fn as_other(uid: u32, work: impl FnOnce()) {
    let before = capabilities(None).unwrap();
    rustix::thread::set_thread_groups(&[]).unwrap();
    rustix::thread::set_thread_res_gid(None, Gid::from_raw(uid), None).unwrap();
    rustix::thread::set_thread_res_uid(None, Uid::from_raw(uid), None).unwrap();
    let less = CapabilitySets {
        effective: CapabilitySet::DAC_OVERRIDE,
        ..before
    };
    set_capabilities(None, less).unwrap();
    work();
    rustix::thread::set_thread_res_uid(None, Uid::ROOT, None).unwrap();
    set_capabilities(None, before).unwrap();
    rustix::thread::set_thread_res_gid(None, Gid::ROOT, None).unwrap();
}

pub(crate) fn works(dir: &Path) {
    let scene = scene(dir);
    let mut status = File::open("/proc/self/status").unwrap();
    let own = capabilities(None).unwrap().permitted;
    let (tree, descriptors, report) = share(Tree::open(&scene.tree).unwrap());
    println!("    {report}");
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    let mut kept = own & (Sharing::CAPABILITIES - CapabilitySet::DAC_READ_SEARCH);
    if !tree.is_detached() {
        kept.remove(CapabilitySet::MKNOD);
    }
    for (set, expected) in [
        ("CapInh", CapabilitySet::empty()),
        ("CapAmb", CapabilitySet::empty()),
        ("CapPrm", kept),
        ("CapEff", kept),
        ("CapBnd", kept),
    ] {
        if set != "CapBnd" || report.is_complete() {
            let expected = format!("{:016x}", expected.bits());
            assert_eq!(field(&text, set), expected, "{set}");
        }
    }
    let words = match kept.iter().count() {
        8 => "8 capabilities,".to_owned(),
        some => format!("{some} of 8 capabilities wanted,"),
    };
    assert!(report.to_string().contains(&words), "{report}");
    std::thread::spawn(move || {
        assert_eq!(read(&tree, &descriptors, "sub/file").unwrap(), b"shared");
        changes(&tree, &descriptors);
        if kept.contains(CapabilitySet::SETUID | CapabilitySet::MKNOD) {
            ownership(&tree);
        }
        outside(&tree, &descriptors, &report);
    })
    .join()
    .unwrap();
    assert_eq!(
        fs::read("/etc/passwd").unwrap_err().raw_os_error(),
        Some(libc::ENOENT)
    );
}

/// What a guest asks for.
fn changes(tree: &Tree, descriptors: &OwnedFd) {
    let mode = Mode::from_raw_mode(0o644);
    // A thread's own umask.
    // SAFETY: of the working directory and the umask alone.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
    rustix::process::umask(Mode::empty());
    mkdirat(tree, "new", Mode::from_raw_mode(0o777)).unwrap();
    let seen = statat(tree, "new", AtFlags::empty()).unwrap();
    assert_eq!(seen.st_mode & 0o777, 0o777);
    let file = openat(tree, "new/file", CREATE | OFlags::CLOEXEC, mode).unwrap();
    rustix::io::write(&file, b"written").unwrap();
    rustix::fs::ftruncate(&file, 4).unwrap();
    rustix::fs::fdatasync(&file).unwrap();
    rustix::fs::syncfs(&file).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(read(tree, descriptors, "new/file").unwrap(), b"writ");
    // From directory to directory, and exchanged.
    renameat_with(tree, "new/file", tree, "sub/moved", RenameFlags::NOREPLACE).unwrap();
    renameat_with(tree, "sub/moved", tree, "sub/file", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(read(tree, descriptors, "sub/moved").unwrap(), b"shared");
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = openat(tree, "sub/moved", flags, Mode::empty()).unwrap();
    let number = DecInt::from_fd(&node);
    let follow = AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(descriptors, number, tree, "new/link", follow).unwrap();
    symlinkat("anywhere", tree, "new/symbolic").unwrap();
    assert_eq!(
        readlinkat(tree, "new/symbolic", Vec::new()).unwrap(),
        c"anywhere".to_owned()
    );
    mknodat(tree, "new/fifo", FileType::Fifo, mode, 0).unwrap();
    mknodat(tree, "new/socket", FileType::Socket, mode, 0).unwrap();
    // A file without a name, which gets one.
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let unnamed = openat(tree, "new", flags, mode).unwrap();
    let number = DecInt::from_fd(&unnamed);
    rustix::fs::linkat(descriptors, number, tree, "sub/named", follow).unwrap();
    let number = DecInt::from_fd(&node);
    rustix::fs::chmodat(descriptors, number, mode, AtFlags::empty()).unwrap();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    utimensat(&node, c"", &times, AtFlags::EMPTY_PATH).unwrap();
    match fsetxattr(&unnamed, "user.x", b"value", XattrFlags::empty()) {
        Err(Errno::NOTSUP) => {}
        result => {
            result.unwrap();
            assert_eq!(fgetxattr(&unnamed, "user.x", &mut [0; 8]).unwrap(), 5);
            rustix::fs::fremovexattr(&unnamed, "user.x").unwrap();
        }
    }
    let (mut from, mut to) = (0, 0);
    let source = reopen(descriptors, node.as_raw_fd(), OFlags::RDONLY).unwrap();
    let copied = rustix::fs::copy_file_range(&source, Some(&mut from), &unnamed, Some(&mut to), 6);
    assert_eq!(copied.unwrap(), 6);
    for name in ["link", "symbolic", "fifo", "socket"] {
        unlinkat(tree, format!("new/{name}"), AtFlags::empty()).unwrap();
    }
    unlinkat(tree, "new", AtFlags::REMOVEDIR).unwrap();
    let listed = reopen(descriptors, tree.descriptor().as_raw_fd(), OFlags::RDONLY).unwrap();
    let names = rustix::fs::Dir::new(listed).unwrap().count();
    assert_eq!(names, 5, "sub, absolute, relative, . and ..");
}

/// What root does for others.
fn ownership(tree: &Tree) {
    let mode = Mode::from_raw_mode(0o600);
    as_other(1234, || {
        drop(openat(tree, "others", CREATE | OFlags::CLOEXEC, mode).unwrap());
    });
    let seen = statat(tree, "others", AtFlags::empty()).unwrap();
    assert_eq!((seen.st_uid, seen.st_gid), (1234, 1234));
    let (uid, gid) = (Uid::from_raw(2345), Gid::from_raw(2345));
    chownat(tree, "others", Some(uid), Some(gid), AtFlags::empty()).unwrap();
    assert_eq!(
        statat(tree, "others", AtFlags::empty()).unwrap().st_uid,
        2345
    );
    // A device is made, for the guest to open: nobody here does.
    let null = rustix::fs::makedev(1, 3);
    mknodat(tree, "null", FileType::CharacterDevice, mode, null).unwrap();
    let opened = openat(tree, "null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    assert_eq!(opened.unwrap_err(), Errno::ACCESS);
}

/// Nothing else is within reach, neither by call nor by ring.
fn outside(tree: &Tree, descriptors: &OwnedFd, report: &Confinement) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let open = |directory: &dyn AsFd, path: &str, flags| {
        openat(directory.as_fd(), path, flags, Mode::empty())
    };
    let gone = [
        Errno::NOENT,
        Errno::ACCESS,
        Errno::LOOP,
        Errno::NOTDIR,
        Errno::XDEV,
    ];
    for path in [
        "../beside",
        "../../../../etc/passwd",
        "sub/../../beside",
        "absolute",
        "relative",
        "/etc/passwd",
        "/proc/self/root/etc/passwd",
        "/proc/1/root/etc/passwd",
    ] {
        let error = open(tree, path, flags).unwrap_err();
        assert!(gone.contains(&error), "{path}: {error}");
    }
    for path in [
        "../root/etc/passwd",
        "../../1/root/etc/passwd",
        "../../self/environ",
        "../environ",
        "../../../etc/passwd",
    ] {
        let error = open(descriptors, path, flags).unwrap_err();
        assert!(gone.contains(&error), "{path}: {error}");
        if report.has(Measure::Trees) {
            let error = open(descriptors, path, OFlags::PATH | OFlags::CLOEXEC).unwrap_err();
            assert!(gone.contains(&error), "{path} as a path: {error}");
        }
    }
    if report.has(Measure::Trees) {
        assert!(tree.is_detached());
        for directory in [tree.descriptor(), descriptors.as_fd()] {
            let inode = |path| statat(directory, path, AtFlags::empty()).unwrap().st_ino;
            assert_eq!(inode("."), inode(".."), "it has no parent");
        }
    }
    let own = open(tree, "sub/file", OFlags::PATH | OFlags::CLOEXEC).unwrap();
    assert!(reopen(descriptors, own.as_raw_fd(), OFlags::RDONLY).is_ok());
    // A handle leads to any file of the file system, so none is opened, and not
    // even looked at: all zeros would be EINVAL.
    let anchor = open(tree, ".", OFlags::RDONLY | OFlags::CLOEXEC).unwrap();
    let refused = by_handle(&anchor, &Handle([0; 136])).unwrap_err();
    assert_eq!(refused, Errno::PERM);
    assert_eq!(
        std::os::unix::net::UnixStream::connect("/x")
            .unwrap_err()
            .raw_os_error(),
        Some(libc::EPERM)
    );
}

/// Handle type and bytes, as the kernel gives them.
#[repr(C, align(8))]
struct Handle([u8; 136]);

fn handle(file: &OwnedFd) -> Handle {
    let mut handle = Handle([0; 136]);
    handle.0[0] = 128;
    let mut mount = 0i32;
    // SAFETY: there are 128 bytes after the header.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    handle
}

fn by_handle(anchor: &OwnedFd, handle: &Handle) -> Result<OwnedFd, Errno> {
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is there.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            anchor.as_raw_fd(),
            handle,
            flags,
        )
    };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap());
    }
    // SAFETY: nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

pub(crate) fn rings(dir: &Path) {
    let scene = scene(dir);
    let mut ring = IoUring::new(8).unwrap();
    let (tree, descriptors, report) = share(Tree::open(&scene.tree).unwrap());
    let mut open = |directory: i32, path: &str| {
        let path = CString::new(path).unwrap();
        let open = opcode::OpenAt::new(types::Fd(directory), path.as_ptr()).flags(libc::O_RDONLY);
        on_ring(&mut ring, open.build())
    };
    let (root, own) = (tree.descriptor().as_raw_fd(), descriptors.as_raw_fd());
    open(root, "sub/file").unwrap();
    for (directory, path) in [
        (root, "../beside"),
        (root, "absolute"),
        (root, "relative"),
        (root, "/etc/passwd"),
        (own, "../environ"),
        (own, "../../1/environ"),
        (own, "../root/etc/passwd"),
        (libc::AT_FDCWD, "etc/passwd"),
        (libc::AT_FDCWD, "/proc/self/environ"),
    ] {
        if report.has(Measure::Landlock) || report.has(Measure::EmptyRoot) {
            let error = open(directory, path).unwrap_err();
            assert!(
                matches!(error, Errno::NOENT | Errno::ACCESS | Errno::NOTDIR),
                "{path}: {error}"
            );
        }
    }
}

pub(crate) fn read_only(dir: &Path) {
    let scene = scene(dir);
    let tree = Tree::open(&scene.tree).unwrap().read_only();
    let held = openat(
        CWD,
        &scene.tree,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap();
    let mut ring = IoUring::new(8).unwrap();
    let (tree, descriptors, report) = share(tree);
    println!("    {report}");
    assert!(tree.is_read_only() && report.has(Measure::Trees) == tree.is_detached());
    let kept = if is_root() {
        Sharing::READING
    } else {
        CapabilitySet::empty()
    };
    assert_eq!(capabilities(None).unwrap().permitted, kept);
    assert_eq!(read(&tree, &descriptors, "sub/file").unwrap(), b"shared");
    let listed = reopen(&descriptors, tree.descriptor().as_raw_fd(), OFlags::RDONLY).unwrap();
    assert_eq!(rustix::fs::Dir::new(listed).unwrap().count(), 5);
    let mode = Mode::from_raw_mode(0o600);
    let refused = [Errno::ROFS, Errno::ACCESS];
    let not = |what: &str, result: Result<(), Errno>| {
        let error = result.unwrap_err();
        assert!(refused.contains(&error), "{what}: {error}");
    };
    // The plain directory, which is writable, is held by Landlock alone.
    for root in [tree.descriptor(), held.as_fd()] {
        if root.as_raw_fd() == held.as_raw_fd() && !report.has(Measure::Landlock) {
            continue;
        }
        let write = OFlags::WRONLY | OFlags::CLOEXEC;
        let open = |name, flags| openat(root, name, flags, mode).map(drop);
        not("write", open("sub/file", write));
        not("truncate", open("sub/file", write | OFlags::TRUNC));
        not("create", open("new", CREATE | OFlags::CLOEXEC));
        not("temporary", open("sub", write | OFlags::TMPFILE));
        not("unlink", unlinkat(root, "sub/file", AtFlags::empty()));
        not("rmdir", unlinkat(root, "sub", AtFlags::REMOVEDIR));
    }
    // Refused by the filter, whatever they are asked for.
    let root = &tree;
    let calls = [
        ("mkdir", mkdirat(root, "new", mode)),
        ("mknod", mknodat(root, "new", FileType::Fifo, mode, 0)),
        ("symlink", symlinkat("x", root, "new")),
        (
            "rename",
            renameat_with(root, "sub", root, "new", RenameFlags::empty()),
        ),
        (
            "link",
            rustix::fs::linkat(root, "sub/file", root, "new", AtFlags::empty()),
        ),
        (
            "chmod",
            rustix::fs::chmodat(root, "sub", mode, AtFlags::empty()),
        ),
        ("chown", chownat(root, "sub", None, None, AtFlags::empty())),
    ];
    for (what, result) in calls {
        assert_eq!(result.unwrap_err(), Errno::ROFS, "{what}");
    }
    // Past the filter, on the mount that is read-only.
    let fd = types::Fd(tree.descriptor().as_raw_fd());
    let make = opcode::MkDirAt::new(fd, c"new".as_ptr()).build();
    not("mkdir on a ring", on_ring(&mut ring, make).map(drop));
    let file = openat(root, "sub/file", OFlags::RDONLY | OFlags::CLOEXEC, mode).unwrap();
    let file = types::Fd(file.as_raw_fd());
    if tree.is_detached() {
        let name = c"user.x";
        let set = opcode::FSetXattr::new(file, name.as_ptr(), c"y".as_ptr().cast(), 1).build();
        assert_eq!(on_ring(&mut ring, set).unwrap_err(), Errno::ROFS);
    }
    assert!(
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(1), None).unwrap_err()
            == Errno::PERM
    );
}

pub(crate) fn several(dir: &Path) {
    let (one, two) = (scene(&dir.join("1")), scene(&dir.join("2")));
    let socket = dir.join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut sockets = [SocketFile::open(&socket).unwrap()];
    let mut trees = [
        Tree::open(&one.tree).unwrap(),
        Tree::open(&two.tree).unwrap().read_only(),
    ];
    let mut descriptors = proc();
    let number = descriptors.as_raw_fd();
    let sharing = Sharing {
        descriptors: &mut descriptors,
        capabilities: CapabilitySet::CHOWN,
        handles: true,
    };
    let report = enter_sharing(&PROFILE, &mut sockets, &mut trees, sharing).unwrap();
    println!("    {report}");
    assert_eq!(descriptors.as_raw_fd(), number);
    let kept = if is_root() {
        CapabilitySet::CHOWN
    } else {
        CapabilitySet::empty()
    };
    assert_eq!(capabilities(None).unwrap().permitted, kept);
    let create = |tree: &Tree| {
        let mode = Mode::from_raw_mode(0o600);
        openat(tree, "new", CREATE | OFlags::CLOEXEC, mode).map(drop)
    };
    create(&trees[0]).unwrap();
    let error = create(&trees[1]).unwrap_err();
    assert!(matches!(error, Errno::ROFS | Errno::ACCESS), "{error}");
    assert_eq!(
        read(&trees[1], &descriptors, "sub/file").unwrap(),
        b"shared"
    );
    assert!(report.to_string().contains("no file handles"), "{report}");
    assert!(sockets[0].remove().unwrap());
}

/// Mounts a tmpfs; only root can, in a mount namespace of its own.
fn mount_tmpfs(at: &Path) {
    let at = CString::new(at.to_str().unwrap()).unwrap();
    // SAFETY: all strings are there; nothing of Rust's depends on mounts.
    unsafe {
        let none: *const libc::c_char = std::ptr::null();
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
        let private = libc::MS_PRIVATE | libc::MS_REC;
        assert_eq!(
            libc::mount(none, c"/".as_ptr(), none, private, none.cast()),
            0
        );
        let tmpfs = c"tmpfs".as_ptr();
        assert_eq!(libc::mount(tmpfs, at.as_ptr(), tmpfs, 0, none.cast()), 0);
    }
}

fn may_mount() -> bool {
    let sets = capabilities(None).unwrap();
    let may = is_root() && sets.effective.contains(CapabilitySet::SYS_ADMIN);
    if !may {
        println!("    skipped: takes CAP_SYS_ADMIN");
    }
    may
}

pub(crate) fn submounts(dir: &Path) {
    if !may_mount() {
        return;
    }
    let scene = scene(dir);
    mount_tmpfs(&scene.tree.join("sub"));
    fs::write(scene.tree.join("sub/inner"), b"mounted").unwrap();
    let (tree, descriptors, report) = share(Tree::open(&scene.tree).unwrap().read_only());
    assert!(tree.is_detached(), "{report}");
    assert_eq!(read(&tree, &descriptors, "sub/inner").unwrap(), b"mounted");
    assert_eq!(
        read(&tree, &descriptors, "sub/file").unwrap_err(),
        Errno::NOENT
    );
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let error = openat(&tree, "sub/inner", flags, Mode::empty()).unwrap_err();
    assert!(matches!(error, Errno::ROFS | Errno::ACCESS), "{error}");
    let directory = openat(&tree, "sub", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let up = statat(&directory, "..", AtFlags::empty()).unwrap();
    assert_eq!(
        up.st_ino,
        statat(&tree, ".", AtFlags::empty()).unwrap().st_ino
    );
}

pub(crate) fn handles(dir: &Path) {
    if !may_mount() {
        return;
    }
    let tree = dir.join("tree");
    fs::create_dir(&tree).unwrap();
    mount_tmpfs(&tree);
    fs::write(tree.join("file"), b"shared").unwrap();
    let node = openat(CWD, tree.join("file"), OFlags::PATH, Mode::empty()).unwrap();
    let tree = Tree::open(&tree).unwrap();
    let (tree, descriptors, report) = share_with(&PROFILE, tree, Sharing::CAPABILITIES, true);
    println!("    {report}");
    assert_eq!(capabilities(None).unwrap().permitted, Sharing::CAPABILITIES);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let anchor = openat(&tree, ".", flags, Mode::empty()).unwrap();
    let node = by_handle(&anchor, &handle(&node)).unwrap();
    let file = reopen(&descriptors, node.as_raw_fd(), OFlags::RDONLY).unwrap();
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).unwrap();
    assert_eq!(text, "shared");
}

/// Root as in a container: it cannot mount, and Landlock is what bounds it.
pub(crate) fn without_mounts(dir: &Path) {
    let scene = scene(dir);
    if is_root() {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        sets.permitted.remove(CapabilitySet::SYS_ADMIN);
        sets.inheritable = CapabilitySet::empty();
        set_capabilities(None, sets).unwrap();
    } else {
        crate::alive::fail(&[libc::SYS_unshare], libc::EPERM);
    }
    let (tree, descriptors, report) = share(Tree::open(&scene.tree).unwrap());
    println!("    {report}");
    assert!(!tree.is_detached() && !report.has(Measure::Trees));
    assert!(
        report.to_string().contains("own mounts of trees (1)"),
        "{report}"
    );
    let kept = capabilities(None).unwrap().permitted;
    assert!(
        !kept.contains(CapabilitySet::MKNOD),
        "devices can be opened"
    );
    assert_eq!(kept.contains(CapabilitySet::CHOWN), is_root());
    assert_eq!(read(&tree, &descriptors, "sub/file").unwrap(), b"shared");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    if report.has(Measure::Landlock) {
        for path in ["../beside", "/etc/passwd", "absolute", "/proc/self/environ"] {
            let error = openat(&tree, path, flags, Mode::empty()).unwrap_err();
            assert_eq!(error, Errno::ACCESS, "{path}");
        }
    }
}

pub(crate) fn no_attributes(dir: &Path) {
    let scene = scene(dir);
    crate::alive::fail(&[libc::SYS_mount_setattr], libc::ENOSYS);
    let (tree, _, report) = share(Tree::open(&scene.tree).unwrap().read_only());
    if tree.is_detached() {
        let line = report.to_string();
        assert!(
            line.contains("; not applied: read-only mount without devices"),
            "{line}"
        );
    }
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let opened = openat(&tree, "sub/file", flags, Mode::empty());
    if report.has(Measure::Landlock) {
        assert_eq!(opened.unwrap_err(), Errno::ACCESS);
    }
}

pub(crate) fn replaced(dir: &Path) {
    let scene = scene(dir);
    let mut trees = [Tree::open(&scene.tree).unwrap()];
    fs::rename(&scene.tree, dir.join("old")).unwrap();
    fs::create_dir(&scene.tree).unwrap();
    let mut descriptors = proc();
    let sharing = Sharing {
        descriptors: &mut descriptors,
        capabilities: Sharing::CAPABILITIES,
        handles: false,
    };
    match enter_sharing(&PROFILE, &mut [], &mut trees, sharing) {
        Err(ConfineError::ReplacedTree { path }) => assert_eq!(path, scene.tree),
        Ok(report) => assert!(!report.has(Measure::Trees), "{report}"),
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn refusals(dir: &Path) {
    let closed = dir.join("closed");
    fs::create_dir_all(closed.join("in")).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    if !is_root() {
        for path in [closed.clone(), closed.join("in")] {
            let error = Tree::open(&path).unwrap_err().to_string();
            assert_eq!(error, format!("{path:?} may not be read by this user"));
        }
    }
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let link = dir.join("link");
    symlink("closed", &link).unwrap();
    let tree = Tree::open(&link).unwrap();
    assert_eq!(tree.path(), fs::canonicalize(&closed).unwrap());
    let seen = rustix::fs::fstat(tree.into_fd()).unwrap();
    assert_eq!(seen.st_ino, fs::metadata(&closed).unwrap().ino());
}

/// For the calls that must be deadly.
pub(crate) fn enter_for(dir: &Path, call: impl FnOnce()) {
    let scene = scene(dir);
    let _kept = share(Tree::open(&scene.tree).unwrap());
    call();
}

pub(crate) fn unshare_more() {
    let flags = (libc::CLONE_FS | libc::CLONE_NEWUSER) as usize;
    call(libc::SYS_unshare, [flags, 0, 0]);
}
