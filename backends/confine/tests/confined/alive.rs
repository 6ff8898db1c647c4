//! The cases of a confined process that goes on: what works, what is refused
//! with an error, what is reported. Each function runs in a process of its own
//! with a directory of its own.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;

use io_uring::{IoUring, opcode, squeue, types};
use pericarp_confine::{
    ConfineError, Measure, Namespaces, Profile, SocketFile, enter, enter_reopening,
};
use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, memfd_create, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::process::{Resource, getrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::{PROFILE, call, confine};

fn path_fd(path: &Path) -> OwnedFd {
    openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

/// Runs one entry on the ring and gives its result.
pub(crate) fn on_ring(ring: &mut IoUring, entry: squeue::Entry) -> Result<u32, Errno> {
    // SAFETY: every caller waits here, so what the entry points at lives long enough.
    unsafe { ring.submission().push(&entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    let result = ring.completion().next().unwrap().result();
    u32::try_from(result).map_err(|_| Errno::from_raw_os_error(-result))
}

pub(crate) fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))
        .unwrap()
}

pub(crate) fn everything_holds(_: &Path) {
    const LEFT: [&str; 5] = ["mnt", "net", "ipc", "uts", "cgroup"];
    let mut status = File::open("/proc/self/status").unwrap();
    let directory = path_fd(Path::new("/proc/self/ns"));
    let namespaces = || LEFT.map(|name| statat(&directory, name, AtFlags::empty()).unwrap().st_ino);
    let host = namespaces();
    let report = confine(&mut []);
    for measure in Measure::ALL {
        if measure == Measure::Trees {
            // Nothing is shared.
            assert!(!report.has(measure));
            continue;
        }
        let missing = report.missing().iter().any(|(lack, _)| *lack == measure);
        assert!(
            report.has(measure) || missing,
            "{measure:?} is unaccounted for"
        );
    }
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        // Without a user namespace an unprivileged process keeps its bounding set.
        if set != "CapBnd" || report.is_complete() {
            assert_eq!(field(&text, set), "0000000000000000", "{set}");
        }
    }
    assert_eq!(field(&text, "NoNewPrivs"), "1");
    assert_eq!(field(&text, "Seccomp"), "2");
    assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
    if report.is_complete() {
        for ((name, before), after) in LEFT.iter().zip(host).zip(namespaces()) {
            assert_ne!(before, after, "the {name} namespace is the host's");
        }
    }
    println!("    {report}");
}

pub(crate) fn no_paths(dir: &Path) {
    let mut ring = IoUring::new(8).unwrap();
    let report = confine(&mut []);
    assert_eq!(
        fs::read("/etc/passwd").unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    assert_eq!(
        UnixStream::connect("/x").unwrap_err().raw_os_error(),
        Some(libc::EPERM),
        "socket()"
    );
    assert_eq!(
        IoUring::new(8).err().unwrap().raw_os_error(),
        Some(libc::EPERM)
    );
    if !report.has(Measure::EmptyRoot) {
        return println!("    skipped in part: no empty root on this system");
    }
    assert_eq!(
        fs::metadata(dir).unwrap_err().kind(),
        std::io::ErrorKind::NotFound
    );
    assert_eq!(
        statat(CWD, "/..", AtFlags::empty()).unwrap().st_nlink,
        2,
        "an empty directory"
    );
    // Past the filter, through a ring.
    let path = CString::new("/etc/passwd").unwrap();
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr());
    assert_eq!(on_ring(&mut ring, open.build()), Err(Errno::NOENT));
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/new".as_ptr())
        .flags(libc::O_CREAT | libc::O_RDWR);
    assert!(matches!(
        on_ring(&mut ring, open.build()),
        Err(Errno::ACCESS | Errno::ROFS)
    ));
}

pub(crate) fn rings(dir: &Path) {
    let (image, host) = (
        dir.join("image"),
        std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
    );
    fs::write(&image, b"before").unwrap();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let leaked = path_fd(dir);
    let mut ring = IoUring::new(8).unwrap();
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .unwrap();
    let report = confine(&mut []);
    ring.submitter()
        .register_iowq_max_workers(&mut [4, 4])
        .unwrap();
    // A worker thread drives the ring, and ASYNC makes the kernel start its own.
    std::thread::spawn(move || {
        let mut buffer = *b"......";
        let read = opcode::Read::new(types::Fixed(0), buffer.as_mut_ptr(), 6).build();
        assert_eq!(on_ring(&mut ring, read.flags(squeue::Flags::ASYNC)), Ok(6));
        assert_eq!(&buffer, b"before");
        let write = opcode::Write::new(types::Fixed(0), b"behind".as_ptr(), 6).build();
        assert_eq!(on_ring(&mut ring, write.flags(squeue::Flags::ASYNC)), Ok(6));
        assert_eq!(
            on_ring(&mut ring, opcode::Fsync::new(types::Fixed(0)).build()),
            Ok(0)
        );
        if report.has(Measure::Landlock) {
            let open =
                opcode::OpenAt::new(types::Fd(leaked.as_raw_fd()), c"image".as_ptr()).build();
            assert_eq!(on_ring(&mut ring, open), Err(Errno::ACCESS));
            let unlink =
                opcode::UnlinkAt::new(types::Fd(leaked.as_raw_fd()), c"image".as_ptr()).build();
            assert_eq!(on_ring(&mut ring, unlink), Err(Errno::ACCESS));
        }
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        if let Ok(socket) = on_ring(&mut ring, socket) {
            // SAFETY: all bytes zero is a valid address.
            let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            address.sin_family = libc::AF_INET as u16;
            address.sin_port = host.local_addr().unwrap().port().to_be();
            address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
            let fd = types::Fd(socket.cast_signed());
            let connect = opcode::Connect::new(fd, (&raw const address).cast(), 16).build();
            let result = on_ring(&mut ring, connect);
            assert!(
                matches!(result, Err(Errno::ACCESS | Errno::NETUNREACH)),
                "{result:?}"
            );
        }
    })
    .join()
    .unwrap();
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"behind");
}

pub(crate) fn work_goes_on(dir: &Path) {
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut peer = UnixStream::connect(&path).unwrap();
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 8192).unwrap();
    let file = File::create_new(dir.join("image")).unwrap();
    let _ = confine(&mut []);
    let threads: Vec<_> = (0..4)
        .map(|index| {
            std::thread::Builder::new()
                .name(format!("queue-{index}"))
                .spawn(move || {
                    assert_eq!(
                        fs::read("/etc/passwd").unwrap_err().raw_os_error(),
                        Some(libc::EPERM)
                    );
                    vec![index; 1 << 20].len()
                })
        })
        .collect();
    let panic = std::thread::spawn(|| panic!("of a confined thread, on purpose")).join();
    assert!(panic.is_err(), "it unwinds and prints a backtrace");
    assert!(
        threads
            .into_iter()
            .all(|thread| thread.unwrap().join().unwrap() == 1 << 20)
    );
    let (mut served, _) = listener.accept().unwrap();
    served.set_nonblocking(false).unwrap();
    served
        .set_read_timeout(Some(std::time::Duration::from_secs(5)))
        .unwrap();
    peer.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    served.read_exact(&mut hello).unwrap();
    served.write_all(&hello).unwrap();
    assert!(rustix::net::sockopt::socket_acceptconn(&listener).unwrap());
    let shared = ProtFlags::READ | ProtFlags::WRITE;
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let map = unsafe { mmap(null, 8192, shared, MapFlags::SHARED, &memory, 0) }.unwrap();
    // SAFETY: the mapping is 8192 bytes long and nobody else's.
    unsafe { map.cast::<u8>().add(8191).write(7) };
    assert_eq!(rustix::io::pread(&memory, &mut [0; 16], 8191).unwrap(), 1);
    file.write_all_at(b"data", 4096).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 65536).unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    assert_eq!(file.metadata().unwrap().len(), 65536);
    std::thread::sleep(std::time::Duration::from_millis(1));
    assert!(std::thread::available_parallelism().unwrap().get() > 0);
}

pub(crate) fn removal(dir: &Path) {
    let (mine, other) = (dir.join("mine"), dir.join("other"));
    fs::create_dir_all(&mine)
        .and(fs::create_dir_all(&other))
        .unwrap();
    let _listener = UnixListener::bind(mine.join("s")).unwrap();
    fs::write(mine.join("file"), b"x")
        .and(fs::write(other.join("file"), b"x"))
        .unwrap();
    let socket = SocketFile::open(&mine.join("s")).unwrap();
    let (leaked, seen) = (path_fd(&other), path_fd(&mine));
    let mut ring = IoUring::new(8).unwrap();
    let mut sockets = [socket];
    let report = confine(&mut sockets);
    let [socket] = sockets;
    if report.has(Measure::EmptyRoot) {
        let (here, up) = (
            statat(&socket, ".", AtFlags::empty()),
            statat(&socket, "..", AtFlags::empty()),
        );
        assert_eq!(
            here.unwrap().st_ino,
            up.unwrap().st_ino,
            "the directory has no parent"
        );
    }
    if report.has(Measure::Landlock) {
        let fd = types::Fd(socket.as_fd().as_raw_fd());
        let mut entry = |entry| on_ring(&mut ring, entry);
        assert_eq!(
            entry(opcode::OpenAt::new(fd, c"file".as_ptr()).build()),
            Err(Errno::ACCESS)
        );
        assert_eq!(
            entry(opcode::OpenAt::new(fd, c".".as_ptr()).build()),
            Err(Errno::ACCESS)
        );
        let create = opcode::OpenAt::new(fd, c"new".as_ptr()).flags(libc::O_CREAT | libc::O_WRONLY);
        assert_eq!(entry(create.build()), Err(Errno::ACCESS));
        assert!(entry(opcode::MkDirAt::new(fd, c"new".as_ptr()).build()).is_err());
        assert!(
            entry(opcode::RenameAt::new(fd, c"file".as_ptr(), fd, c"new".as_ptr()).build())
                .is_err()
        );
        assert!(
            unlinkat(&leaked, "file", AtFlags::empty()).is_err(),
            "another directory"
        );
    }
    assert!(socket.remove().unwrap());
    assert_eq!(
        statat(&seen, "s", AtFlags::empty()).unwrap_err(),
        Errno::NOENT
    );
    assert!(!socket.remove().unwrap(), "it is gone");
    // Landlock cannot tell: any file in that directory could go.
    assert!(unlinkat(&socket, "file", AtFlags::empty()).is_ok());
}

pub(crate) fn replaced_socket(dir: &Path) {
    let path = dir.join("s");
    let _first = UnixListener::bind(&path).unwrap();
    let mut sockets = [SocketFile::open(&path).unwrap()];
    fs::rename(&path, dir.join("old")).unwrap();
    let _second = UnixListener::bind(&path).unwrap();
    assert!(SocketFile::open(&dir.join("missing")).is_err());
    assert!(SocketFile::open(Path::new("/etc/passwd")).is_err());
    let seen = path_fd(dir);
    let _ = confine(&mut sockets);
    assert!(!sockets[0].remove().unwrap());
    assert!(statat(&seen, "s", AtFlags::empty()).is_ok());
}

pub(crate) fn neighbours(dir: &Path) {
    let (mine, other) = (dir.join("mine"), dir.join("other"));
    fs::create_dir_all(&mine)
        .and(fs::create_dir_all(&other))
        .unwrap();
    let _first = UnixListener::bind(mine.join("s")).unwrap();
    let _outside = UnixListener::bind(other.join("t")).unwrap();
    let neighbour = UnixListener::bind(mine.join("s_1")).unwrap();
    let absolute = other.join("t");
    std::os::unix::fs::symlink(&absolute, mine.join("s_2")).unwrap();
    let mut sockets = [SocketFile::open(&mine.join("s")).unwrap().with_neighbours()];
    let profile = Profile {
        syscalls: &[libc::SYS_socket, libc::SYS_connect],
        ..PROFILE
    };
    let report = enter(&profile, &mut sockets).unwrap();
    // A thread of its own, which the filter holds, too.
    std::thread::spawn(move || {
        let mut stream = UnixStream::connect("s_1").unwrap();
        let (mut accepted, _) = neighbour.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        let mut hello = [0; 5];
        accepted.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        assert!(fs::read("s").is_err() && fs::write("new", b"x").is_err());
        if report.has(Measure::EmptyRoot) {
            let outside = ["../other/t", "s_2", absolute.to_str().unwrap()];
            for path in outside {
                let error = UnixStream::connect(path).unwrap_err();
                assert!(
                    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES)),
                    "{path}: {error}"
                );
            }
        }
    })
    .join()
    .unwrap();
    assert!(sockets[0].remove().unwrap());
}

pub(crate) fn second_call(_: &Path) {
    let _ = confine(&mut []);
    assert!(matches!(enter(&PROFILE, &mut []), Err(ConfineError::Again)));
}

pub(crate) fn second_thread(_: &Path) {
    let (stop, wait) = mpsc::channel::<()>();
    let (started, named) = mpsc::channel();
    let early = std::thread::Builder::new().name("early".into());
    let early = early.spawn(move || (started.send(()), wait.recv()).1);
    named.recv().unwrap();
    let error = enter(&PROFILE, &mut []).unwrap_err();
    assert!(
        matches!(&error, ConfineError::Threads { names } if names == "early"),
        "{error}"
    );
    drop(stop);
    assert!(early.unwrap().join().unwrap().is_err());
    // Nothing was given up. The kernel forgets a thread a moment after `join`.
    while matches!(enter(&PROFILE, &mut []), Err(ConfineError::Threads { .. })) {}
}

/// Makes these calls fail as on a kernel that lacks them.
pub(crate) fn fail(calls: &[i64], errno: i32) {
    let rules = calls.iter().map(|call| (*call, vec![])).collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let action = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

pub(crate) fn less(dir: &Path) {
    fail(&[libc::SYS_unshare], libc::EPERM);
    fail(&[libc::SYS_landlock_create_ruleset], libc::ENOSYS);
    let path = dir.join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut sockets = [SocketFile::open(&path).unwrap()];
    let report = confine(&mut sockets);
    let line = report.to_string();
    for words in [
        "not applied: ",
        "namespace",
        "empty root (no mount namespace)",
        "landlock (not in this kernel)",
    ] {
        assert!(line.contains(words), "{words:?} in {line:?}");
    }
    assert!(
        !report.is_complete() && !report.has(Measure::Landlock) && !report.has(Measure::EmptyRoot)
    );
    assert!(report.has(Measure::Seccomp) && report.has(Measure::Capabilities));
    assert!(fs::read("/etc/passwd").is_err());
    assert!(sockets[0].remove().unwrap());
}

pub(crate) fn landlock_fails(_: &Path) {
    fail(&[libc::SYS_landlock_restrict_self], libc::EIO);
    assert!(matches!(
        enter(&PROFILE, &mut []),
        Err(ConfineError::Landlock(_))
    ));
}

pub(crate) fn profile_adds(_: &Path) {
    let entry = path_fd(Path::new("/proc/self"));
    let file = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    let syscalls = &[
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        libc::SYS_io_uring_setup,
    ];
    let profile = Profile {
        syscalls,
        ioctls: &[0x1277],
        registrations: &[],
        namespaces: Namespaces::NONE,
    };
    let report = enter(&profile, &mut []).unwrap();
    assert!(!report.has(Measure::Namespaces));
    // The mark of a process that cannot be dumped; no user namespace hides it.
    let status = statat(&entry, "status", AtFlags::empty()).unwrap();
    assert_eq!(status.st_uid, 0);
    call(libc::SYS_ioctl, [usize::MAX, 0x1277, 0]);
    rustix::fs::ftruncate(&file, 4096).unwrap();
    memfd_create("y", MemfdFlags::CLOEXEC).unwrap();
    IoUring::new(8).unwrap();
}

pub(crate) fn reopening(dir: &Path) {
    let image = dir.join("image");
    fs::write(&image, b"x").unwrap();
    let image = File::options().read(true).write(true).open(&image).unwrap();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let own = openat(CWD, "/proc/self/fd", flags, Mode::empty()).unwrap();
    let leaked = path_fd(dir);
    let memory = memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
    let report = enter_reopening(&PROFILE, &mut [], Some(own.as_fd())).unwrap();
    std::thread::spawn(move || {
        let open = |name: &str, flags| openat(&own, name, flags | OFlags::CLOEXEC, Mode::empty());
        let number = memory.as_raw_fd().to_string();
        if !report.has(Measure::Landlock) {
            assert_eq!(open(&number, OFlags::RDWR).unwrap_err(), Errno::PERM);
            return;
        }
        // A description of its own: one lock keeps the other out.
        let again = open(&number, OFlags::RDWR).unwrap();
        rustix::io::write(&again, b"same").unwrap();
        assert_eq!(rustix::io::pread(&memory, &mut [0; 4], 0).unwrap(), 4);
        assert_eq!(rustix::fs::tell(&memory).unwrap(), 0);
        // A path, however it is put, and a file of a real file system.
        for path in [
            "../../../etc/passwd",
            "../../etc/passwd",
            "../../sys/kernel/hostname",
            "../environ",
            "../mem",
            "../root/etc/passwd",
            "../cwd",
            "../../1/root/etc/passwd",
            "../../self/root/etc/passwd",
            "/etc/passwd",
            "../exe",
            "../task",
            ".",
            &image.as_raw_fd().to_string(),
            &format!("{}/image", leaked.as_raw_fd()),
        ] {
            let error = open(path, OFlags::RDWR).map(drop).unwrap_err();
            let refused = [
                Errno::ACCESS,
                Errno::NOENT,
                Errno::ISDIR,
                Errno::LOOP,
                Errno::NOTDIR,
                Errno::TXTBSY,
            ];
            assert!(refused.contains(&error), "{path}: {error}");
        }
        // Other flags, and other directories.
        for flags in [OFlags::RDONLY, OFlags::PATH, OFlags::RDWR | OFlags::CREATE] {
            assert_eq!(open(&number, flags).unwrap_err(), Errno::PERM, "{flags:?}");
        }
        let other = openat(
            &leaked,
            "image",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        );
        assert_eq!(other.unwrap_err(), Errno::PERM);
        let none = openat(CWD, "/", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        assert_eq!(none.unwrap_err(), Errno::PERM);
    })
    .join()
    .unwrap();
}
