//! The parts of the machine that do not depend on its containers: kernel file systems, modules,
//! the root, power.
//!
//! Called by `main` in the order of the boot.

use std::{fs, path::Path};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{Resource, Rlimit, setrlimit},
    system::RebootCommand,
    time::{ClockId, clock_gettime},
};

use crate::error::{AgentError, during};

/// Where the initramfs has its modules, and in which order they are loaded.
const MODULES: &str = "/modules";
/// `MODULE_INIT_COMPRESSED_FILE` of `linux/module.h`: the kernel unpacks `.ko.xz` itself.
const COMPRESSED: i32 = 4;
/// Everything of this program that changes while it runs.
pub(crate) const STATE: &str = "/run/pericarp";
/// A process has up to four connections, four pipe ends and an eventfd here, and there may be a
/// thousand.
const OPEN_FILES: u64 = 65536;

/// Milliseconds since the kernel started.
pub(crate) fn uptime_ms() -> u32 {
    let now = clock_gettime(ClockId::Boottime);
    let ms = now
        .tv_sec
        .saturating_mul(1000)
        .saturating_add(now.tv_nsec / 1_000_000);
    u32::try_from(ms).unwrap_or(u32::MAX)
}

/// Puts a mount of the initramfs over itself and enters it. The kernel's first mount has no
/// parent, and pivot_root(2), which crun calls, refuses a process whose root is such a mount. No
/// file is copied.
pub(crate) fn detach_root() -> Result<(), AgentError> {
    const PLACE: &str = "/root";
    let what = "the root cannot be moved";
    directory(PLACE)?;
    mount_bind("/", PLACE).map_err(during(what))?;
    rustix::process::chdir(PLACE).map_err(during(what))?;
    mount_move(".", "/").map_err(during(what))?;
    rustix::process::chroot(".").map_err(during(what))?;
    rustix::process::chdir("/").map_err(during(what))
}

pub(crate) fn mount_kernel_file_systems() -> Result<(), AgentError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, at, flags) in [
        ("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC),
        ("proc", "/proc", quiet),
        ("sysfs", "/sys", quiet),
        ("cgroup2", "/sys/fs/cgroup", quiet),
    ] {
        if kind != "cgroup2" {
            directory(at)?;
        }
        mount(kind, at, kind, flags, None).map_err(during(format!("mount {at}")))?;
    }
    for at in ["/run", STATE, "/tmp"] {
        directory(at)?;
    }
    Ok(())
}

fn directory(at: &str) -> Result<(), AgentError> {
    match rustix::fs::mkdirat(CWD, at, 0o755.into()) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(during(format!("mkdir {at}"))(error)),
    }
}

/// Loads what `/modules/order` lists, in its order, and frees the memory the files took.
pub(crate) fn load_modules() -> Result<(), AgentError> {
    let directory = Path::new(MODULES);
    let order = fs::read_to_string(directory.join("order"))
        .map_err(during("the list of kernel modules cannot be read"))?;
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = directory.join(name);
        let load = || {
            let file = fs::File::open(&path)?;
            let compressed = path.extension().is_some_and(|extension| extension == "xz");
            let flags = if compressed { COMPRESSED } else { 0 };
            match rustix::system::finit_module(&file, c"", flags) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(std::io::Error::from(error)),
            }
        };
        load().map_err(|source| AgentError::Module {
            path: path.clone(),
            source,
        })?;
    }
    // The initramfs lives in memory; what stays there is what runs.
    let _ = fs::remove_dir_all(directory);
    Ok(())
}

pub(crate) fn raise_limits() -> Result<(), AgentError> {
    let limit = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(OPEN_FILES),
    };
    setrlimit(Resource::Nofile, limit).map_err(during("the limit of open files"))
}

/// Switches the machine off. Returns only if the kernel refuses, and then waits: a first process
/// that exits is a kernel panic.
pub(crate) fn power_off() -> ! {
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        crate::greeting::say(&format!("the machine cannot be switched off: {error}"));
    }
    loop {
        std::thread::park();
    }
}
