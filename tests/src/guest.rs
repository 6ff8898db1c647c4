//! A root for a virtual machine that tests a device: busybox, programs of the
//! host with their libraries, the driver modules, and a first process that runs
//! one script, all in the initramfs. A disk under test carries nothing the
//! guest needs. Used by `tests/qemu.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use pericarp_kernel::cache::Plain;

use crate::parts::{Part, beside_us, have, search_path, skip};
use crate::process::command;
use crate::scratch::Scratch;

/// What the first process writes to the console before the exit code.
pub const MARK: &str = "pericarp-guest-exit";

/// The guest's kernel and modules, as `cargo xtask setup` lays them out.
#[derive(Debug)]
pub struct Assets(PathBuf);

impl Assets {
    /// Looks in `PERICARP_ASSETS`, beside the programs, and in the workspace's
    /// own target directory.
    pub fn find() -> Option<Self> {
        let named = std::env::var_os("PERICARP_ASSETS").map(PathBuf::from);
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assets");
        named
            .into_iter()
            .chain([beside_us().join("../assets"), workspace])
            .find(|dir| dir.join("kernel/vmlinuz").is_file())
            .map(Assets)
    }

    /// What a test with a guest needs, besides `parts`: QEMU, busybox, and these.
    /// `None` is a skipped test, and says so.
    ///
    /// # Panics
    /// As [`have`] and [`skip`].
    pub fn for_test(test: &str, parts: &[Part]) -> Option<Self> {
        let needed = [&[Part::QemuSystem, Part::Busybox], parts].concat();
        if !have(test, &needed) {
            return None;
        }
        let found = Self::find();
        if found.is_none() {
            skip(
                test,
                "the guest's kernel is missing (make it: cargo xtask setup)",
            );
        }
        found
    }

    /// Those of the release's own kernel, which is older.
    pub fn older(&self) -> Self {
        Self(self.0.join("older"))
    }

    /// The kernel image.
    pub fn kernel(&self) -> PathBuf {
        self.0.join("kernel/vmlinuz")
    }

    /// The same, unpacked, where that can be kept: a guest on an emulated CPU takes a second for it.
    pub fn plain_kernel(&self) -> PathBuf {
        let packed = self.kernel();
        let cache = pericarp_kernel::cache::directory();
        match pericarp_kernel::cache::plain(&packed, cache.as_deref()) {
            Ok(Some(Plain::Kept(path))) => path,
            _ => packed,
        }
    }

    /// Driver modules in load order.
    fn modules(&self) -> io::Result<Vec<PathBuf>> {
        self.listed("order")
    }

    /// The modules of a list, in load order.
    pub(crate) fn listed(&self, list: &str) -> io::Result<Vec<PathBuf>> {
        let dir = self.0.join("kernel/modules");
        let order = fs::read_to_string(dir.join(list))?;
        Ok(order.lines().map(|name| dir.join(name.trim())).collect())
    }

    /// The modules of the network driver, as tools of an [`initramfs`], and the lines of
    /// a script that load them.
    ///
    /// # Errors
    /// When the assets are incomplete.
    pub fn network(&self) -> io::Result<(Vec<String>, String)> {
        let mut lines = String::new();
        let modules = self.listed("order-net")?;
        for name in modules.iter().filter_map(|module| module.file_name()) {
            lines += &format!("insmod /bin/{}\n", name.to_string_lossy());
        }
        let text = |module: &PathBuf| module.to_string_lossy().into_owned();
        Ok((modules.iter().map(text).collect(), lines))
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.0
    }
}

/// QEMU with an emulated CPU, memory that backends can share, and this root; its
/// console is stdout. Disks are for the caller to add, and `parameters` for the
/// kernel.
///
/// # Panics
/// When QEMU is missing: ask with [`Assets::for_test`] before.
pub fn emulated(assets: &Assets, image: &Path, parameters: &str) -> Command {
    let qemu = Part::QemuSystem.find().expect("QEMU is there");
    let mut qemu = command(&qemu);
    qemu.args(["-machine", "q35,memory-backend=mem", "-m", "512M"])
        .args(["-accel", "tcg,thread=single", "-cpu", "max"])
        .args(["-object", "memory-backend-memfd,id=mem,share=on,size=512M"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(assets.plain_kernel())
        .arg("-initrd")
        .arg(image)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 no_timer_check cryptomgr.notests quiet panic=-1 {parameters}"
        ));
    qemu
}

/// The exit code that the script left on the console, if it came to its end.
pub fn exit_code(console: &str) -> Option<&str> {
    let (_, code) = console.rsplit_once(MARK)?;
    code.trim().lines().next()
}

/// The shared libraries a program loads, its loader among them.
fn libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

fn run(command: &mut Command) -> io::Result<Vec<u8>> {
    let output = command.output()?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let text = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!("{command:?}: {text}")))
    }
}

/// Writes an initramfs into `scratch` whose first process loads the drivers,
/// runs `script` with `sh -e`, prints [`MARK`] and its exit code, and powers off.
/// `tools` are programs of the host that the guest gets, by name or path.
///
/// # Errors
/// When a tool is missing or the disk is full.
pub fn initramfs(
    scratch: &Scratch,
    assets: &Assets,
    tools: &[&str],
    script: &str,
) -> io::Result<PathBuf> {
    let root = scratch.path("root");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "mnt", "modules", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = Part::Busybox.find().ok_or_else(|| missing("busybox"))?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    programs(&root, tools)?;
    let mut loads = String::new();
    for module in assets.modules()? {
        let name = module
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let plain = name.trim_end_matches(".xz");
        let bytes = if plain == name {
            fs::read(&module)?
        } else {
            run(Command::new("xz").arg("-dc").arg(&module))?
        };
        fs::write(root.join("modules").join(plain), bytes)?;
        loads += &format!("insmod /modules/{plain}\n");
    }
    fs::write(root.join("script"), script)?;
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mount -t proc proc /proc\n\
         /bin/busybox mount -t sysfs sys /sys\n\
         /bin/busybox mount -t devtmpfs dev /dev\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin HOME=/tmp\n\
         {loads}\
         cd /tmp\n\
         sh -e /script >/dev/console 2>&1\n\
         echo {MARK} $? >/dev/console\n\
         poweroff -f\n"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;

    pack(scratch, &root)
}

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, what.to_owned())
}

/// Copies programs of the host, by name or path, into the `bin` of a tree, and the libraries that
/// they load.
///
/// # Errors
/// When one is missing or the disk is full.
pub fn programs(root: &Path, tools: &[&str]) -> io::Result<()> {
    let mut files = BTreeSet::new();
    for &tool in tools {
        let program = search_path(tool).ok_or_else(|| missing(tool))?;
        let name = program.file_name().ok_or_else(|| missing(tool))?;
        fs::copy(&program, root.join("bin").join(name))?;
        files.extend(libraries(&program)?);
    }
    for file in files {
        // At the path the loader looks for, whatever links lead there here.
        let place = root.join(file.strip_prefix("/").unwrap_or(&file));
        fs::create_dir_all(place.parent().unwrap_or(root))?;
        fs::copy(&file, place)?;
    }
    Ok(())
}

/// Makes an initramfs of a tree, which is removed.
///
/// # Errors
/// When busybox is missing or the disk is full.
pub fn pack(scratch: &Scratch, root: &Path) -> io::Result<PathBuf> {
    let image = scratch.path("initramfs");
    let pack = "cd \"$0\" && find . | busybox cpio -o -H newc >\"$1\"";
    run(Command::new("sh").args(["-c", pack]).arg(root).arg(&image))?;
    fs::remove_dir_all(root)?;
    Ok(image)
}
