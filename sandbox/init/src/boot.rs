//! The parts of the machine that do not depend on the run: kernel file systems, modules, the
//! clock, power.
//!
//! Called by `main` in the order of the boot. Works on the initramfs, before the root disk.

use std::{fs, path::Path};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MountFlags, mount},
    system::RebootCommand,
    time::{ClockId, clock_gettime},
};

use crate::error::{InitError, during};

/// Where the initramfs has its modules, and in which order they are loaded.
const MODULES: &str = "/modules";
/// `MODULE_INIT_COMPRESSED_FILE` of `linux/module.h`: the kernel unpacks `.ko.xz` itself.
const COMPRESSED: i32 = 4;

/// Milliseconds since the kernel started.
pub(crate) fn uptime_ms() -> u32 {
    let now = clock_gettime(ClockId::Boottime);
    let ms = now
        .tv_sec
        .saturating_mul(1000)
        .saturating_add(now.tv_nsec / 1_000_000);
    u32::try_from(ms).unwrap_or(u32::MAX)
}

pub(crate) fn mount_kernel_file_systems() -> Result<(), InitError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, at, flags) in [
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("proc", "/proc", quiet),
        ("sysfs", "/sys", quiet),
    ] {
        match rustix::fs::mkdirat(CWD, at, 0o755.into()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(during(format!("mkdir {at}"))(error)),
        }
        mount(kind, at, kind, flags, None).map_err(during(format!("mount {at}")))?;
    }
    Ok(())
}

/// Loads what `/modules/order` lists, in its order, and frees the memory the files took.
pub(crate) fn load_modules() -> Result<(), InitError> {
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
        load().map_err(|source| InitError::Module {
            path: path.clone(),
            source,
        })?;
    }
    // The initramfs lives in memory; what stays there is this program.
    let _ = fs::remove_dir_all(directory);
    Ok(())
}

pub(crate) fn set_hostname(name: &str) -> Result<(), InitError> {
    rustix::system::sethostname(name.as_bytes()).map_err(during("the host name"))
}

/// Switches the machine off. Returns only if the kernel refuses, and then waits: a first process
/// that exits is a kernel panic.
pub(crate) fn power_off() -> ! {
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        eprintln!("pericarp-init: the machine cannot be switched off: {error}");
    }
    loop {
        std::thread::park();
    }
}
