//! What code that has taken a program over would try: one entry for each act, with
//! arguments that would work where nothing stands in the way. Those of acts that would
//! harm the machine are of a kind that the kernel refuses itself: for them only death by
//! the filter counts.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::*;
use pericarp_tests::puppet::{Outcome, Puppet};

use crate::programs::Scene;

/// An act and how it is done.
pub(crate) type Attempt = (&'static str, fn(&mut Puppet, &Scene) -> io::Result<Outcome>);

/// The working directory, where a path is absolute all the same.
const HERE: u64 = AT_FDCWD as u64;
const READ: u64 = O_RDONLY as u64;
/// A page that nobody has mapped.
const NOWHERE: u64 = 0x10_0000_0000;

/// All of it, in groups.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    // Files by path.
    ("read a file by its path", |p, s| open(p, &s.secret)),
    ("read a file through /proc/self/root", |p, s| {
        open(p, format!("/proc/self/root{}", s.secret.display()))
    }),
    ("read a file through another's root", |p, s| {
        open(p, format!("/proc/{}/root{}", s.other, s.secret.display()))
    }),
    ("read a file upwards", |p, s| {
        open(p, format!("../../../../../../../..{}", s.secret.display()))
    }),
    ("read a file with openat2", |p, s| {
        let path = p.text(&s.secret)?;
        let how = p.put(&[0; 24])?;
        p.call(SYS_openat2, &[HERE, path, how, 24])
    }),
    ("read a file of the directory that was left open", |p, s| {
        let path = p.text(name(&s.victim))?;
        p.call(SYS_openat, &[left_open(p, s)?, path, READ])
    }),
    ("look at a file", |p, s| {
        let path = p.text(&s.secret)?;
        let room = p.put(&[0; 256])?;
        p.call(SYS_newfstatat, &[HERE, path, room, 0])
    }),
    ("remove a file", |p, s| {
        let path = p.text(&s.victim)?;
        p.call(SYS_unlinkat, &[HERE, path, 0])
    }),
    (
        "remove a file of the directory that was left open",
        |p, s| {
            let path = p.text(name(&s.victim))?;
            p.call(SYS_unlinkat, &[left_open(p, s)?, path, 0])
        },
    ),
    ("make a file", |p, s| {
        let path = p.text(s.victim.with_extension("new"))?;
        let flags = (O_CREAT | O_WRONLY) as u64;
        p.call(SYS_openat, &[HERE, path, flags, 0o600])
    }),
    ("make a directory", |p, s| {
        let path = p.text(s.victim.with_extension("new"))?;
        p.call(SYS_mkdirat, &[HERE, path, 0o700])
    }),
    ("make a device", |p, s| {
        let path = p.text(s.victim.with_extension("new"))?;
        p.call(
            SYS_mknodat,
            &[HERE, path, u64::from(S_IFCHR) | 0o600, 0x103],
        )
    }),
    ("link to a file", |p, s| {
        let old = p.text(&s.secret)?;
        let new = p.text(s.victim.with_extension("new"))?;
        p.call(SYS_linkat, &[HERE, old, HERE, new, 0])
    }),
    ("rename a file", |p, s| {
        let old = p.text(&s.victim)?;
        let new = p.text(s.victim.with_extension("new"))?;
        p.call(SYS_renameat2, &[HERE, old, HERE, new, 0])
    }),
    ("change the mode of a file", |p, s| {
        let path = p.text(&s.victim)?;
        p.call(SYS_fchmodat, &[HERE, path, 0o777])
    }),
    ("give a file away", |p, s| {
        let path = p.text(&s.victim)?;
        p.call(SYS_fchownat, &[HERE, path, 1, 1, 0])
    }),
    (
        "write to memory past the descriptors of the process",
        |p, _| {
            // One sidecar opens its own files from there, with these flags and no others.
            let directory = format!("/proc/{}/fd", p.process());
            let (directory, path) = match p.descriptor_of(Path::new(&directory)) {
                Some(directory) => (directory, "../mem"),
                None => (HERE, "/proc/self/fd/../mem"),
            };
            let path = p.text(path)?;
            let flags = (O_RDWR | O_CLOEXEC | 0o100_000) as u64;
            p.call(SYS_openat, &[directory, path, flags])
        },
    ),
    ("open a device", |p, _| open(p, "/dev/zero")),
    ("write to memory through /proc", |p, _| {
        let path = p.text("/proc/self/mem")?;
        p.call(SYS_openat, &[HERE, path, O_RDWR as u64])
    }),
    ("a handle of a file", |p, s| {
        let path = p.text(&s.secret)?;
        let mut handle = [0; 136];
        handle[..4].copy_from_slice(&128_u32.to_ne_bytes());
        let handle = p.put(&handle)?;
        let mount = p.put(&[0; 8])?;
        p.call(SYS_name_to_handle_at, &[HERE, path, handle, mount, 0])
    }),
    ("a file by its handle", |p, s| {
        let handle = p.put(&s.handle)?;
        p.call(SYS_open_by_handle_at, &[left_open(p, s)?, handle, READ])
    }),
    // Another view of the files.
    ("change the root", |p, _| at(p, SYS_chroot, "/")),
    ("swap the root", |p, _| {
        let root = p.text("/")?;
        p.call(SYS_pivot_root, &[root, root])
    }),
    ("change the directory", |p, _| at(p, SYS_chdir, "/")),
    ("enter the directory that was left open", |p, s| {
        let directory = left_open(p, s)?;
        p.call(SYS_fchdir, &[directory])
    }),
    ("mount", |p, _| {
        let (tmpfs, at) = (p.text("tmpfs")?, p.text("/nowhere")?);
        p.call(SYS_mount, &[tmpfs, at, tmpfs, 0, 0])
    }),
    ("unmount", |p, _| at(p, SYS_umount2, "/nowhere")),
    ("mount the new way", |p, _| at(p, SYS_fsopen, "tmpfs")),
    ("copy a mount", |p, _| {
        let path = p.text("/")?;
        p.call(SYS_open_tree, &[HERE, path, 1])
    }),
    ("move a mount", |p, s| {
        let (from, to) = (left_open(p, s)?, p.text("/")?);
        p.call(SYS_move_mount, &[from, to, HERE, to, 4])
    }),
    ("a namespace of one's own", |p, _| {
        p.call(SYS_unshare, &[CLONE_NEWUSER as u64])
    }),
    ("the namespace of another", |p, s| {
        let directory = left_open(p, s)?;
        p.call(SYS_setns, &[directory, 0])
    }),
    // Programs and processes.
    ("execute a program", |p, _| at(p, SYS_execve, "/bin/true")),
    ("execute what is in memory", |p, _| {
        let name = p.text("program")?;
        let memory = p.call(SYS_memfd_create, &[name, 0])?;
        let Some(memory) = memory.value() else {
            return Ok(memory);
        };
        let (empty, none) = (p.text("")?, 0);
        p.call(
            SYS_execveat,
            &[memory, empty, none, none, AT_EMPTY_PATH as u64],
        )
    }),
    ("fork", |p, _| p.call(SYS_fork, &[])),
    ("clone a process", |p, _| {
        p.call(SYS_clone, &[SIGCHLD as u64, 0, 0, 0, 0])
    }),
    ("clone a process the new way", |p, _| {
        let mut arguments = [0; 88];
        arguments[32..40].copy_from_slice(&(SIGCHLD as u64).to_ne_bytes());
        let arguments = p.put(&arguments)?;
        p.call(SYS_clone3, &[arguments, 88])
    }),
    ("trace another", |p, s| {
        p.call(SYS_ptrace, &[u64::from(PTRACE_SEIZE), s.other, 0, 0])
    }),
    ("read the memory of another", |p, s| {
        let room = p.put(&[0; 64])?;
        let here = p.put(&pair(room, 16))?;
        let there = p.put(&pair(NOWHERE, 16))?;
        p.call(SYS_process_vm_readv, &[s.other, here, 1, there, 1, 0])
    }),
    ("write the memory of another", |p, s| {
        let room = p.put(&[0; 64])?;
        let here = p.put(&pair(room, 16))?;
        let there = p.put(&pair(NOWHERE, 16))?;
        p.call(SYS_process_vm_writev, &[s.other, here, 1, there, 1, 0])
    }),
    // Signal 0 does nothing, and may be sent to who may be killed.
    ("signal another", |p, s| p.call(SYS_kill, &[s.other, 0])),
    ("signal the first process", |p, _| p.call(SYS_kill, &[1, 0])),
    ("signal everybody", |p, _| p.call(SYS_kill, &[u64::MAX, 0])),
    ("signal a thread of another", |p, s| {
        p.call(SYS_tgkill, &[s.other, s.other, 0])
    }),
    ("hold another by its descriptor", |p, s| {
        p.call(SYS_pidfd_open, &[s.other, 0])
    }),
    ("limits of another", |p, s| {
        let room = p.put(&[0; 16])?;
        p.call(SYS_prlimit64, &[s.other, RLIMIT_NOFILE.into(), 0, room])
    }),
    ("higher limits", |p, _| {
        let limit = p.put(&[0xff; 16])?;
        p.call(SYS_prlimit64, &[0, RLIMIT_CORE.into(), limit, 0])
    }),
    ("processors of another", |p, s| {
        let set = p.put(&[1; 128])?;
        p.call(SYS_sched_setaffinity, &[s.other, 128, set])
    }),
    ("a turn before all others", |p, _| {
        let parameter = p.put(&1_u32.to_ne_bytes())?;
        p.call(SYS_sched_setscheduler, &[0, SCHED_FIFO as u64, parameter])
    }),
    ("compare with another", |p, s| {
        p.call(SYS_kcmp, &[s.other, s.other, 0, 0, 0])
    }),
    // Memory that is executed.
    ("memory to be written and executed", |p, _| {
        map(
            p,
            PROT_READ | PROT_WRITE | PROT_EXEC,
            MAP_PRIVATE | MAP_ANONYMOUS,
            u64::MAX,
        )
    }),
    ("memory made executable", |p, _| {
        let shape = (PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS);
        let page = map(p, shape.0, shape.1, u64::MAX)?;
        let Some(page) = page.value() else {
            return Ok(page);
        };
        p.call(SYS_mprotect, &[page, 4096, (PROT_READ | PROT_EXEC) as u64])
    }),
    ("the same with a key", |p, _| {
        let place = p.put(&[0; 16])? & !4095;
        let shape = (PROT_READ | PROT_EXEC) as u64;
        p.call(SYS_pkey_mprotect, &[place, 4096, shape, u64::MAX])
    }),
    ("a program in a segment of System V", |p, _| {
        p.call(SYS_shmat, &[0, 0, SHM_EXEC as u64])
    }),
    ("all that is read is executable", |p, _| {
        p.call(SYS_personality, &[READ_IMPLIES_EXEC as u64])
    }),
    ("faults that are answered by oneself", |p, _| {
        p.call(SYS_userfaultfd, &[0])
    }),
    // The network and other sockets.
    ("a connection to the host", |p, s| {
        let mut address = (AF_INET as u16).to_ne_bytes().to_vec();
        address.extend(s.port.to_be_bytes());
        address.extend([127, 0, 0, 1]);
        address.resize(16, 0);
        connect(p, AF_INET, &address)
    }),
    ("packets of any kind", |p, _| socket(p, AF_PACKET, SOCK_RAW)),
    ("the kernel's network settings", |p, _| {
        socket(p, AF_NETLINK, SOCK_RAW)
    }),
    ("datagrams between processes", |p, _| {
        socket(p, AF_UNIX, SOCK_DGRAM)
    }),
    ("a socket of the host without a path", |p, s| {
        let mut address = (AF_UNIX as u16).to_ne_bytes().to_vec();
        address.push(0);
        address.extend(s.abstract_name.as_bytes());
        connect(p, AF_UNIX, &address)
    }),
    ("a socket of the host by its path", |p, s| {
        let mut address = (AF_UNIX as u16).to_ne_bytes().to_vec();
        address.extend(s.listener.as_os_str().as_bytes());
        address.push(0);
        connect(p, AF_UNIX, &address)
    }),
    ("listen for others", |p, _| p.call(SYS_listen, &[0, 1])),
    ("a name for a socket", |p, _| {
        let address = p.put(&(AF_UNIX as u16).to_ne_bytes())?;
        p.call(SYS_bind, &[0, address, 2])
    }),
    // Rings, which no filter sees.
    ("a ring of one's own", |p, _| {
        let parameters = p.put(&[0; 128])?;
        p.call(SYS_io_uring_setup, &[4, parameters])
    }),
    ("the rights of others for a ring", |p, _| {
        p.call(SYS_io_uring_register, &[ring(p), 9, 0, 0])
    }),
    ("memory of a ring's own", |p, _| {
        p.call(SYS_io_uring_register, &[ring(p), 34, 0, 0])
    }),
    ("the buffers of another ring", |p, _| {
        p.call(SYS_io_uring_register, &[ring(p), 30, 0, 0])
    }),
    ("asynchronous transfers of the old kind", |p, _| {
        let context = p.put(&[0; 8])?;
        p.call(SYS_io_setup, &[4, context])
    }),
    // Doors to the kernel.
    ("a program for the kernel", |p, _| {
        p.call(SYS_bpf, &[0, 0, 0])
    }),
    ("counters of the processor", |p, _| {
        let attributes = p.put(&[0; 128])?;
        p.call(SYS_perf_event_open, &[attributes, 0, u64::MAX, u64::MAX, 0])
    }),
    ("a key for the kernel", |p, _| {
        let (kind, name) = (p.text("user")?, p.text("pericarp")?);
        // Of the process itself.
        let ring = (-2_i64).cast_unsigned();
        p.call(SYS_add_key, &[kind, name, name, 4, ring])
    }),
    ("keys of others", |p, _| {
        p.call(SYS_keyctl, &[0, (-4_i64).cast_unsigned(), 0])
    }),
    ("ask for a key", |p, _| {
        let (kind, name) = (p.text("user")?, p.text("pericarp")?);
        p.call(SYS_request_key, &[kind, name, 0, 0])
    }),
    ("watch files", |p, _| p.call(SYS_inotify_init1, &[0])),
    ("watch and answer for files", |p, _| {
        p.call(SYS_fanotify_init, &[0, 0])
    }),
    ("the kernel's messages", |p, _| {
        p.call(SYS_syslog, &[10, 0, 0])
    }),
    ("what a terminal is to have typed", |p, _| {
        let key = p.put(b"x")?;
        p.call(SYS_ioctl, &[0, TIOCSTI, key])
    }),
    ("a device's command", |p, _| {
        p.call(SYS_ioctl, &[0, 0x1277, 0])
    }),
    // The rights that were given up.
    ("to be dumped", |p, _| {
        p.call(SYS_prctl, &[PR_SET_DUMPABLE as u64, 1])
    }),
    ("to be traced by anybody", |p, _| {
        p.call(SYS_prctl, &[PR_SET_PTRACER as u64, u64::MAX])
    }),
    ("a capability for programs", |p, _| {
        let raise = PR_CAP_AMBIENT_RAISE as u64;
        p.call(SYS_prctl, &[PR_CAP_AMBIENT as u64, raise, 21, 0, 0])
    }),
    ("all capabilities", |p, s| {
        let header = p.put(&pair(0x2008_0522, 0))?;
        let all = p.put(&s.capabilities)?;
        p.call(SYS_capset, &[header, all])
    }),
    ("to be root", |p, _| p.call(SYS_setuid, &[0])),
    ("to be root in all respects", |p, _| {
        p.call(SYS_setresuid, &[0, 0, 0])
    }),
    ("to be in root's group", |p, _| p.call(SYS_setgid, &[0])),
    ("other rules for files", |p, _| {
        let rules = p.put(&[0xff; 8])?;
        p.call(SYS_landlock_create_ruleset, &[rules, 8, 0])
    }),
    ("a session of one's own", |p, _| p.call(SYS_setsid, &[])),
    // What is the whole machine's. Each is refused by the kernel, too, as it is asked for.
    ("restart the machine", |p, _| {
        p.call(SYS_reboot, &[0, 0, 0, 0])
    }),
    ("another kernel", |p, _| {
        p.call(SYS_kexec_load, &[0, 0, 0, u64::MAX])
    }),
    ("a module", |p, _| {
        let nothing = p.text("")?;
        p.call(SYS_init_module, &[0, 0, nothing])
    }),
    ("a module of a file", |p, _| {
        let nothing = p.text("")?;
        p.call(SYS_finit_module, &[u64::MAX, nothing, 0])
    }),
    ("no module", |p, _| {
        at(p, SYS_delete_module, "no_such_module")
    }),
    ("another time", |p, _| p.call(SYS_settimeofday, &[8, 0])),
    ("another clock", |p, _| p.call(SYS_clock_settime, &[99, 0])),
    ("another speed of time", |p, _| p.call(SYS_adjtimex, &[0])),
    ("another host name", |p, _| {
        p.call(SYS_sethostname, &[0, u64::MAX])
    }),
    ("another domain name", |p, _| {
        p.call(SYS_setdomainname, &[0, u64::MAX])
    }),
    ("swap to a file", |p, _| at(p, SYS_swapon, "/nowhere")),
    ("no swap to a file", |p, _| at(p, SYS_swapoff, "/nowhere")),
    ("quotas", |p, _| {
        let nowhere = p.text("/nowhere")?;
        p.call(SYS_quotactl, &[0, nowhere, 0, 0])
    }),
    ("accounts of processes", |p, _| at(p, SYS_acct, "/nowhere")),
    ("ports of the machine", |p, _| p.call(SYS_iopl, &[4])),
    ("segments of the processor", |p, _| {
        p.call(SYS_modify_ldt, &[0, 0, 0])
    }),
];

/// And out of a shared tree.
pub(crate) const TREE: &[Attempt] = &[
    ("climb out of the tree", |p, s| {
        in_tree(p, s, "../secret", READ)
    }),
    ("a link that leads out", |p, s| in_tree(p, s, "link", READ)),
    ("a link that leads up", |p, s| {
        in_tree(p, s, "link-up", READ)
    }),
    ("a device in the tree", |p, s| {
        let (tree, path) = (tree(p, s)?, p.text("device")?);
        let made = p.call(
            SYS_mknodat,
            &[tree, path, u64::from(S_IFCHR) | 0o600, 0x105],
        )?;
        if made.value().is_none() {
            return Ok(made);
        }
        p.call(SYS_openat, &[tree, path, READ])
    }),
    ("execute a file of the tree", |p, s| {
        let (tree, path) = (tree(p, s)?, p.text("program")?);
        p.call(SYS_execveat, &[tree, path, 0, 0, 0])
    }),
    ("change a file of the tree", |p, s| {
        in_tree(p, s, "file", (O_WRONLY | O_TRUNC) as u64)
    }),
    ("remove a file of the tree", |p, s| {
        let (tree, path) = (tree(p, s)?, p.text("file")?);
        p.call(SYS_unlinkat, &[tree, path, 0])
    }),
];

fn tree(puppet: &Puppet, scene: &Scene) -> io::Result<u64> {
    puppet
        .descriptor_of(&scene.tree)
        .ok_or_else(|| io::Error::other("the tree is not open"))
}

fn in_tree(p: &mut Puppet, scene: &Scene, path: &str, flags: u64) -> io::Result<Outcome> {
    let (tree, path) = (tree(p, scene)?, p.text(path)?);
    p.call(SYS_openat, &[tree, path, flags])
}

fn name(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}

/// The directory of the victim, which whoever started the program has left open.
fn left_open(puppet: &Puppet, scene: &Scene) -> io::Result<u64> {
    let parent = scene.victim.parent().unwrap_or(Path::new("/"));
    puppet
        .descriptor_of(parent)
        .ok_or_else(|| io::Error::other("no directory is left open"))
}

/// A ring, or what is none where there is none.
fn ring(puppet: &Puppet) -> u64 {
    puppet
        .descriptor_named("anon_inode:[io_uring]")
        .unwrap_or(u64::MAX)
}

fn open(puppet: &mut Puppet, path: impl AsRef<Path>) -> io::Result<Outcome> {
    let path = puppet.text(path)?;
    puppet.call(SYS_openat, &[HERE, path, READ])
}

/// A call whose first argument is a path or a name.
fn at(puppet: &mut Puppet, call: i64, text: &str) -> io::Result<Outcome> {
    let text = puppet.text(text)?;
    puppet.call(call, &[text, 0, 0, 0])
}

fn map(puppet: &mut Puppet, shape: i32, kind: i32, file: u64) -> io::Result<Outcome> {
    puppet.call(SYS_mmap, &[0, 4096, shape as u64, kind as u64, file, 0])
}

fn socket(puppet: &mut Puppet, family: i32, kind: i32) -> io::Result<Outcome> {
    puppet.call(SYS_socket, &[family as u64, kind as u64, 0])
}

fn connect(puppet: &mut Puppet, family: i32, address: &[u8]) -> io::Result<Outcome> {
    let socket = socket(puppet, family, SOCK_STREAM)?;
    let Some(socket) = socket.value() else {
        return Ok(socket);
    };
    let place = puppet.put(address)?;
    puppet.call(SYS_connect, &[socket, place, address.len() as u64])
}

/// Two numbers of 64 bits, one behind the other.
fn pair(first: u64, second: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_ne_bytes());
    bytes[8..].copy_from_slice(&second.to_ne_bytes());
    bytes
}
