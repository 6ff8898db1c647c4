//! What a program can reach from its first instruction on, by Landlock and a filter of system calls.
//!
//! QEMU's own sandbox keeps it from starting programs and from gaining rights, and leaves it all
//! that its user may do with files. Started as root it would own root's, capabilities or not. So
//! whoever starts it names what it opens, and the kernel refuses the rest, as well as TCP, sockets
//! without a path and signals to others, as far as its version knows these rules. What Landlock does
//! not know, such as the mode of a file, and doors to the kernel that QEMU has no use for, a filter
//! refuses with EPERM. Connecting to sockets by their path stays allowed: network cards and disks
//! that come later are found so.
//!
//! Called by the driver of QEMU before it starts it.

// UNSAFETY: what a child must do between fork and exec has no safe form in the standard library.
#![expect(unsafe_code)]

use std::{
    collections::BTreeMap,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// The newest ABI whose rights are known to be of no use to QEMU. The crate leaves out what the
/// running kernel does not know.
const NEWEST: ABI = ABI::V6;

/// Where distributions have programs, their libraries and their data.
const PROGRAMS: [&str; 6] = ["/usr", "/lib", "/lib64", "/opt", "/nix/store", "/gnu/store"];
/// Single files that programs read at their start.
const READ: [&str; 4] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/dev/urandom",
    "/proc/sys/vm/overcommit_memory",
];

/// System calls that QEMU has no use for, with these devices and this kind of memory.
#[rustfmt::skip]
const REFUSED: &[i64] = &[
    // What a file is, beside its bytes.
    libc::SYS_chmod, libc::SYS_fchmod, libc::SYS_fchmodat, SYS_FCHMODAT2,
    libc::SYS_chown, libc::SYS_fchown, libc::SYS_lchown, libc::SYS_fchownat,
    libc::SYS_setxattr, libc::SYS_lsetxattr, libc::SYS_fsetxattr, SYS_SETXATTRAT,
    libc::SYS_removexattr, libc::SYS_lremovexattr, libc::SYS_fremovexattr, SYS_REMOVEXATTRAT,
    libc::SYS_utime, libc::SYS_utimes, libc::SYS_futimesat, libc::SYS_utimensat,
    // Files past their paths, and other views of them.
    libc::SYS_name_to_handle_at, libc::SYS_open_by_handle_at, libc::SYS_chroot,
    libc::SYS_pivot_root, libc::SYS_mount, libc::SYS_umount2, libc::SYS_fsopen,
    libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick, libc::SYS_open_tree,
    libc::SYS_move_mount, libc::SYS_mount_setattr, libc::SYS_inotify_init,
    libc::SYS_inotify_init1, libc::SYS_fanotify_init,
    // Other processes.
    libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_kcmp,
    libc::SYS_pidfd_open, libc::SYS_pidfd_getfd, libc::SYS_pidfd_send_signal,
    // Sockets that wait for others; memory and messages that others see.
    libc::SYS_bind, libc::SYS_listen, libc::SYS_shmget, libc::SYS_shmat, libc::SYS_msgget,
    libc::SYS_semget, libc::SYS_mq_open,
    // Doors to the kernel.
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    libc::SYS_io_setup,
    libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_add_key,
    libc::SYS_request_key, libc::SYS_keyctl, libc::SYS_modify_ldt, libc::SYS_personality,
    libc::SYS_landlock_create_ruleset, libc::SYS_syslog,
    // What is the whole machine's.
    libc::SYS_reboot, libc::SYS_kexec_load, libc::SYS_kexec_file_load, libc::SYS_init_module,
    libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_settimeofday,
    libc::SYS_clock_settime, libc::SYS_adjtimex, libc::SYS_clock_adjtime, libc::SYS_sethostname,
    libc::SYS_setdomainname, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_quotactl,
    libc::SYS_acct, libc::SYS_iopl, libc::SYS_ioperm,
];
/// Younger than the names of the library.
const SYS_FCHMODAT2: i64 = 452;
/// See [`SYS_FCHMODAT2`].
const SYS_SETXATTRAT: i64 = 463;
/// See [`SYS_FCHMODAT2`].
const SYS_REMOVEXATTRAT: i64 = 466;

/// What may be opened.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// To be read.
    pub(crate) read: Vec<PathBuf>,
    /// To be read and written to, and told what devices are told.
    pub(crate) devices: Vec<PathBuf>,
}

/// Has `program` start behind these walls. A kernel without Landlock has the filter alone.
///
/// # Errors
///
/// The kernel refuses rules that it knows.
pub(crate) fn enter(command: &mut Command, program: &str, reach: &Reach) -> io::Result<()> {
    let rules = rules(program, reach).map_err(io::Error::other)?;
    let filter = filter().map_err(io::Error::other)?;
    // SAFETY: the closure makes system calls with numbers and a filter that is there, and nothing
    // else.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_no_new_privs(true)?;
            if let Some(rules) = &rules
                && libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) != 0
            {
                return Err(io::Error::last_os_error());
            }
            seccompiler::apply_filter(&filter).map_err(|_| io::Error::from(io::ErrorKind::Other))
        });
    }
    Ok(())
}

/// All is let through but what is [`REFUSED`], sockets that are not of the kernel's own machine, and
/// the limits of other processes.
fn filter() -> Result<BpfProgram, BackendError> {
    let other_than = |value: i32| {
        let condition =
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value as u64)?;
        Ok::<_, BackendError>(vec![SeccompRule::new(vec![condition])?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, other_than(libc::AF_UNIX)?);
    rules.insert(libc::SYS_prlimit64, other_than(0)?);
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, refused, arch)?.try_into()
}

/// `None` on a kernel that knows no such rules.
fn rules(program: &str, reach: &Reach) -> Result<Option<OwnedFd>, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let programs = PROGRAMS
        .map(PathBuf::from)
        .into_iter()
        .chain(installed(program));
    let programs = programs.map(|path| (path, read | AccessFs::Execute));
    let single = READ.map(PathBuf::from).into_iter();
    let single = single.chain(reach.read.iter().cloned());
    let single = single.map(|path| (path, BitFlags::from(AccessFs::ReadFile)));
    let told = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let null = [PathBuf::from("/dev/null")].into_iter();
    let devices = null.chain(reach.devices.iter().cloned());
    let devices = devices.map(|path| (path, told));
    for (path, access) in programs.chain(single).chain(devices) {
        // What is not there cannot be opened.
        if let Ok(path) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(path, access))?;
        }
    }
    Ok(rules.into())
}

/// Where a program is installed that is somewhere else: its own directory, and those beside it for
/// libraries and data. Not the one above, which may be somebody's home.
fn installed(program: &str) -> Vec<PathBuf> {
    // Never all there is.
    let Some(own) = found(program).filter(|own| own != Path::new("/")) else {
        return Vec::new();
    };
    let beside = ["lib", "lib64", "libexec", "share"].map(|name| own.with_file_name(name));
    beside.into_iter().chain([own]).collect()
}

/// The directory of a program, where a search finds it.
fn found(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())?;
    Some(found.canonicalize().ok()?.parent()?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn said(script: &str, reach: &Reach) -> String {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        enter(&mut shell, "sh", reach).unwrap();
        let output = shell.output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn what_is_named_can_be_read_and_nothing_else() {
        if rules("sh", &Reach::default()).unwrap().is_none() {
            return; // a kernel without Landlock
        }
        let directory = std::env::temp_dir().join(format!("pericarp-walls-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (named, other) = (directory.join("named"), directory.join("other"));
        for file in [&named, &other] {
            std::fs::write(file, "content\n").unwrap();
        }
        let script = format!(
            "cat {named}; cat {other}; echo more >>{named}; echo new >{new}; rm {other}; \
             chmod 777 {named}; touch -d 1999-01-01 {named}; echo end",
            named = named.display(),
            other = other.display(),
            new = directory.join("new").display(),
        );
        let reach = Reach {
            read: vec![named.clone()],
            ..Reach::default()
        };
        assert_eq!(said(&script, &reach), "content\nend\n");
        assert_eq!(std::fs::read_to_string(&named).unwrap(), "content\n");
        assert!(other.exists() && !directory.join("new").exists());
        let reach = Reach {
            devices: vec![named.clone()],
            ..Reach::default()
        };
        assert_eq!(said(&script, &reach), "content\nend\n");
        assert_eq!(std::fs::read_to_string(&named).unwrap(), "content\nmore\n");
        let seen = std::fs::metadata(&named).unwrap();
        assert_ne!(
            seen.permissions().mode() & 0o777,
            0o777,
            "no filter sees to that"
        );
        assert!(seen.modified().unwrap().elapsed().unwrap().as_secs() < 3600);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
