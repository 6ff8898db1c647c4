//! What of the host's files a program can reach from its first instruction on, by Landlock.
//!
//! QEMU's own sandbox keeps it from starting programs and from gaining rights, and leaves it all
//! that its user may do with files. Started as root it would own root's, capabilities or not. So
//! whoever starts it names what it opens, and the kernel refuses the rest, as well as TCP, sockets
//! without a path and signals to others, as far as its version knows these rules. Connecting to
//! sockets by their path stays allowed: network cards and disks that come later are found so.
//!
//! Called by the driver of QEMU before it starts it.

// UNSAFETY: what a child must do between fork and exec has no safe form in the standard library.
#![expect(unsafe_code)]

use std::{
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

/// What may be opened.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// To be read.
    pub(crate) read: Vec<PathBuf>,
    /// To be read and written to, and told what devices are told.
    pub(crate) devices: Vec<PathBuf>,
}

/// Has `program` start behind these walls. On a kernel without Landlock there are none.
///
/// # Errors
///
/// The kernel refuses rules that it knows.
pub(crate) fn enter(command: &mut Command, program: &str, reach: &Reach) -> io::Result<()> {
    let rules = rules(program, reach).map_err(io::Error::other)?;
    let Some(rules) = rules else {
        return Ok(());
    };
    // SAFETY: the closure makes two system calls with numbers, and nothing else.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_no_new_privs(true)?;
            match libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    Ok(())
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
        .chain(prefix(program));
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

/// Where a program is installed that is somewhere else: the directory above its own.
fn prefix(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())?;
    let found = found.canonicalize().ok()?;
    let above = found.parent()?.parent()?;
    // Never all there is.
    (above != Path::new("/")).then(|| above.to_owned())
}

#[cfg(test)]
mod tests {
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
            "cat {named}; cat {other}; echo more >>{named}; echo new >{new}; rm {other}; echo end",
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
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
