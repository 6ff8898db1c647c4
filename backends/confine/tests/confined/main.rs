//! What a confined process can and cannot do, seen from inside. Each case runs
//! in a process of its own, as root and as an unprivileged user where the run
//! is root's. The program is its own child: a case's name in the environment
//! makes it play that case.

#![expect(clippy::unwrap_used, reason = "a test, though not by that attribute")]
#![expect(unsafe_code)]
// UNSAFETY: pushing to a ring, and calling what no safe wrapper should offer.

mod alive;
mod sharing;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode};

use pericarp_confine::{Confinement, Namespaces, Profile, SocketFile, enter};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use rustix::thread::{CapabilitySet, capabilities};

const PROFILE: Profile<'_> = Profile {
    syscalls: &[],
    ioctls: &[],
    registrations: &[],
    namespaces: Namespaces::ALL,
};
const NOBODY: u32 = 65534;

type Case<Body> = (&'static str, Body);

/// Cases that must return without a panic.
const ALIVE: &[Case<fn(&Path)>] = &[
    ("everything_holds_and_is_reported", alive::everything_holds),
    ("no_path_leads_to_a_file", alive::no_paths),
    ("a_ring_works_and_reaches_nothing", alive::rings),
    ("sockets_files_and_threads_go_on", alive::work_goes_on),
    ("the_own_socket_can_be_removed", alive::removal),
    ("another_socket_is_left_alone", alive::replaced_socket),
    ("neighbours_can_be_reached", alive::neighbours),
    ("a_second_call_is_an_error", alive::second_call),
    ("a_second_thread_is_an_error", alive::second_thread),
    ("what_a_kernel_lacks_is_reported", alive::less),
    ("a_landlock_failure_is_an_error", alive::landlock_fails),
    (
        "own_memory_can_be_opened_anew_and_nothing_else",
        alive::reopening,
    ),
    ("a_profile_adds_calls_and_ioctls", alive::profile_adds),
    ("a_shared_tree_works_and_ends_at_its_root", sharing::works),
    ("a_ring_reaches_the_shared_tree_alone", sharing::rings),
    ("a_read_only_tree_cannot_be_changed", sharing::read_only),
    ("several_trees_keep_their_rights", sharing::several),
    ("what_is_mounted_below_is_shared", sharing::submounts),
    ("a_whole_file_system_has_handles", sharing::handles),
    ("a_tree_is_held_without_mounts", sharing::without_mounts),
    ("a_tree_is_held_without_attributes", sharing::no_attributes),
    ("a_replaced_tree_is_an_error", sharing::replaced),
    ("what_cannot_be_shared_is_an_error", sharing::refusals),
];

/// Calls that a confined process must not survive.
const DEADLY: &[Case<fn()>] = &[
    ("execve", || drop(Command::new("/bin/true").exec())),
    ("fork", || drop(Command::new("/bin/true").spawn())),
    ("ptrace", || call(libc::SYS_ptrace, [0; 3])),
    ("connect", || call(libc::SYS_connect, [0; 3])),
    ("mount", || call(libc::SYS_mount, [0; 3])),
    ("unshare", || call(libc::SYS_unshare, [0; 3])),
    ("signal_to_another", || call(libc::SYS_tgkill, [1, 1, 0])),
    ("affinity_of_another", || {
        call(libc::SYS_sched_setaffinity, [1, 0, 0]);
    }),
    ("prctl_dumpable", || call(libc::SYS_prctl, [4, 1, 0])),
    ("unlisted_ioctl", || call(libc::SYS_ioctl, [0, 0x1277, 0])),
    ("ring_credentials", || {
        call(libc::SYS_io_uring_register, [0, 9, 0]);
    }),
    ("socket_of_another_kind", || {
        call(
            libc::SYS_socket,
            [libc::AF_UNIX as usize, libc::SOCK_DGRAM as usize, 0],
        );
    }),
    ("socket_of_another_family", || {
        call(
            libc::SYS_socket,
            [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0],
        );
    }),
    ("executable_mmap", || {
        page(ProtFlags::READ | ProtFlags::EXEC);
    }),
    ("executable_mprotect", || {
        let page = page(ProtFlags::READ);
        // SAFETY: this page is nobody else's.
        let _ = unsafe { mprotect(page, 4096, MprotectFlags::READ | MprotectFlags::EXEC) };
    }),
];

/// The same of one that shares a tree.
const DEADLY_SHARING: &[Case<fn()>] = &[
    ("sharing_execve", || drop(Command::new("/bin/true").exec())),
    ("sharing_fork", || drop(Command::new("/bin/true").spawn())),
    ("sharing_ptrace", || call(libc::SYS_ptrace, [0; 3])),
    ("sharing_mount", || call(libc::SYS_mount, [0; 3])),
    ("sharing_open_tree", || call(libc::SYS_open_tree, [0; 3])),
    ("sharing_chroot", || call(libc::SYS_chroot, [0; 3])),
    ("sharing_chdir", || call(libc::SYS_chdir, [0; 3])),
    ("sharing_unshare_of_more", sharing::unshare_more),
    ("sharing_unshare_of_nothing", || {
        call(libc::SYS_unshare, [0; 3]);
    }),
    ("sharing_connect", || call(libc::SYS_connect, [0; 3])),
];

fn main() -> ExitCode {
    if let Ok(name) = std::env::var("CONFINED_CASE") {
        play(&name);
        return ExitCode::SUCCESS;
    }
    let alive = ALIVE.iter().map(|case| (case.0, 0));
    let deadly = DEADLY.iter().chain(DEADLY_SHARING);
    let deadly = deadly.map(|case| (case.0, libc::SIGSYS));
    let cases = alive.chain(deadly).chain([("abort", libc::SIGABRT)]);
    let filter = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let own = rustix::process::geteuid().as_raw();
    let may_change = capabilities(None).unwrap().effective;
    let users = match own {
        0 if may_change.contains(CapabilitySet::SETUID) => vec![0, NOBODY],
        _ => vec![own],
    };
    let (mut passed, mut failed) = (0, 0);
    for (name, signal) in cases {
        if filter.as_ref().is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        for uid in &users {
            let good = run(name, signal, *uid, own);
            println!(
                "test {name} (uid {uid}) ... {}",
                if good { "ok" } else { "FAILED" }
            );
            *(if good { &mut passed } else { &mut failed }) += 1;
        }
    }
    println!("\ntest result: {passed} passed; {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

/// The child's part.
fn play(name: &str) {
    if let Some(case) = ALIVE.iter().find(|case| case.0 == name) {
        return case.1(Path::new(&std::env::var("CONFINED_DIR").unwrap()));
    }
    if let Some(case) = DEADLY_SHARING.iter().find(|case| case.0 == name) {
        let dir = std::env::var("CONFINED_DIR").unwrap();
        return sharing::enter_for(Path::new(&dir), case.1);
    }
    let profile = Profile {
        syscalls: if name.starts_with("socket_") {
            &[libc::SYS_socket]
        } else {
            &[]
        },
        ..PROFILE
    };
    let _ = enter(&profile, &mut []).unwrap();
    match DEADLY.iter().find(|case| case.0 == name) {
        Some(case) => case.1(),
        None => std::process::abort(),
    }
}

/// Runs a case as `uid`; `signal` must end it, or none if that is 0.
fn run(name: &str, signal: i32, uid: u32, own: u32) -> bool {
    let dir = std::env::temp_dir().join(format!("confined-{}-{name}-{uid}", std::process::id()));
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    // The link works where the path is closed to this user.
    let mut child = Command::new("/proc/self/exe");
    child.env("CONFINED_CASE", name).env("CONFINED_DIR", &dir);
    // A panic then asks for paths and the working directory: it must be heard.
    child.env("RUST_BACKTRACE", "1");
    if uid != own {
        chown(&dir, Some(uid), Some(uid)).unwrap();
        child.uid(uid).gid(uid);
    }
    let status = child.status().unwrap();
    fs::remove_dir_all(&dir).unwrap();
    let good = if signal == 0 {
        status.success()
    } else {
        status.signal() == Some(signal)
    };
    if !good {
        eprintln!("{name} as uid {uid}: {status}, expected signal {signal}");
    }
    good
}

fn confine(sockets: &mut [SocketFile]) -> Confinement {
    enter(&PROFILE, sockets).unwrap()
}

fn call(number: i64, arguments: [usize; 3]) {
    // SAFETY: the arguments name no memory of this process.
    unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
}

fn page(protection: ProtFlags) -> *mut std::ffi::c_void {
    // SAFETY: a new mapping at an address of the kernel's choice.
    unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) }.unwrap()
}
