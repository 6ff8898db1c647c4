//! An emptyDir that may not grow as it likes: a sparse image in the kubelet's directory of it, with a
//! file system that the guest mounts in its place.
//!
//! Asked by `rootfs`. The host's own file system has no quota that could be relied on; a disk ends
//! where it ends. The image lies where the files would, so that a kubelet counts what it takes and
//! removes it with the pod. Whoever comes later, such as a container after one that has prepared the
//! volume, finds the same image.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use rustix::fs::statfs;

use crate::{
    bundle::refused,
    error::{ShimError, during},
};

/// Hidden, as nothing of the kubelet's or a container's is called.
const IMAGE: &str = ".pericarp-volume.img";
const UNFINISHED: &str = ".pericarp-volume.new";
/// A block of the file system, and the least that a disk has.
const BLOCK: u64 = 4096;
/// A journal takes 4 MiB, which a small volume is better off without.
const LEAST_WITH_JOURNAL: u64 = 64 << 20;
/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS: i64 = 0x0102_1994;
/// Containers of a pod are made at the same time.
static MAKING: Mutex<()> = Mutex::new(());

/// How an emptyDir of limited size is served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// As it is: the kubelet has mounted memory there that is no larger.
    ByHost,
    /// By this image.
    Image(PathBuf),
}

/// Has the directory hold no more than so many bytes. `field` is what says so.
pub(crate) fn hold(field: &str, directory: &Path, limit: u64) -> Result<Held, ShimError> {
    let what = || format!("{field}: {}", directory.display());
    let host = statfs(directory).map_err(during(what()))?;
    #[allow(clippy::unnecessary_cast, reason = "it is narrower elsewhere")]
    if host.f_type as i64 == TMPFS {
        let size = host
            .f_blocks
            .saturating_mul(u64::try_from(host.f_bsize).unwrap_or(0));
        if (1..=limit).contains(&size) {
            return Ok(Held::ByHost);
        }
        let rule = format!(
            "the kubelet has mounted memory of {size} bytes there, which is more: set the \
             emptyDir's own sizeLimit"
        );
        return Err(refused(&what(), &rule));
    }
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let image = directory.join(IMAGE);
    match fs::symlink_metadata(&image) {
        // Another size is that of an earlier pod of the same directory, which there is not.
        Ok(there) if there.is_file() => return Ok(Held::Image(image)),
        Ok(_) => return Err(refused(&what(), &format!("'{IMAGE}' in it is no file"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(during(what())(error)),
    }
    let unfinished = directory.join(UNFINISHED);
    let made = make(directory, &unfinished, limit)
        .and_then(|()| fs::rename(&unfinished, &image).map_err(during(what())));
    if made.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    made.map(|()| Held::Image(image))
}

fn make(directory: &Path, unfinished: &Path, limit: u64) -> Result<(), ShimError> {
    let what = || format!("the image of {}", directory.display());
    match fs::remove_file(unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(during(what())(error)),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let file: File = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(unfinished)
        .map_err(during(what()))?;
    file.set_len(limit / BLOCK * BLOCK)
        .map_err(during(what()))?;
    drop(file);
    // A pod whose machine was killed gets another, with the same volume.
    let journal = match limit < LEAST_WITH_JOURNAL {
        true => "-O ^resize_inode,^has_journal",
        false => "-O ^resize_inode -J size=4",
    };
    let options = "-q -F -b 4096 -m 0 -E lazy_itable_init=1,nodiscard";
    let options: Vec<&str> = options.split(' ').chain(journal.split(' ')).collect();
    run("mkfs.ext4", &options, unfinished, "")?;
    // Empty, and of whom the kubelet has given the directory to.
    let top = fs::metadata(directory).map_err(during(what()))?;
    let orders = format!(
        "rmdir lost+found\nsif <2> mode 0{:o}\nsif <2> uid {}\nsif <2> gid {}\n",
        0o040_000 | (top.mode() & 0o7777),
        top.uid(),
        top.gid()
    );
    run("debugfs", &["-w", "-f", "-"], unfinished, &orders)
}

/// Runs a program of the system on the image, and has it read this.
fn run(name: &str, options: &[&str], image: &Path, input: &str) -> Result<(), ShimError> {
    let failed = |why: &dyn std::fmt::Display| {
        let text =
            format!("a volume with a size limit: {name}: {why}; Debian's package is e2fsprogs");
        ShimError::Machine(text)
    };
    let places = ["/usr/sbin", "/sbin"].map(|place| Path::new(place).join(name));
    let program = places.iter().find(|path| path.exists());
    let program = program.map_or(OsStr::new(name), |path| path.as_os_str());
    let child = Command::new(program)
        .args(options)
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| failed(&error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has ended says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(&error))?;
    // debugfs ends well whatever it could not do, and says its version.
    let said = String::from_utf8_lossy(&output.stderr);
    let mut complaints = said.lines().filter(|line| !line.starts_with("debugfs 1."));
    match (output.status.success(), complaints.next()) {
        (true, None) => Ok(()),
        (_, said) => Err(failed(&said.unwrap_or("it failed"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    fn directory(name: &str) -> PathBuf {
        let name = format!("pericarp-{name}-{}", std::process::id());
        // On a disk.
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../target")
            .join(name);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn debugfs(image: &Path, order: &str) -> String {
        let output = Command::new("/usr/sbin/debugfs")
            .args(["-R", order])
            .arg(image)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn an_image_is_as_large_as_allowed_empty_and_of_the_same_owner() {
        if !Path::new("/usr/sbin/debugfs").exists() {
            return;
        }
        let directory = directory("hold");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o2777)).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&directory, Some(70_001), Some(70_077)).unwrap();
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o2777)).unwrap();
        }
        let Held::Image(image) = hold("x", &directory, (5 << 20) + 7).unwrap() else {
            fs::remove_dir_all(&directory).unwrap();
            return;
        };
        assert_eq!(fs::metadata(&image).unwrap().len(), 5 << 20);
        let top = debugfs(&image, "stat <2>");
        let there = fs::metadata(&directory).unwrap();
        for said in [
            "Type: directory".to_owned(),
            "Mode:  02777".to_owned(),
            format!("User: {:>5}", there.uid()),
            format!("Group: {:>5}", there.gid()),
        ] {
            assert!(top.contains(&said), "{said}: {top}");
        }
        assert!(!debugfs(&image, "ls -l /").contains("lost+found"));
        let checked = Command::new("/usr/sbin/e2fsck")
            .arg("-fn")
            .arg(&image)
            .output();
        let checked = checked.unwrap();
        assert!(checked.status.success(), "{checked:?}");
        // The next has the same one.
        let inode = fs::metadata(&image).unwrap().ino();
        assert_eq!(
            hold("x", &directory, 5 << 20).unwrap(),
            Held::Image(image.clone())
        );
        assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
        fs::remove_file(&image).unwrap();
        hold("x", &directory, LEAST_WITH_JOURNAL).unwrap();
        assert!(debugfs(&image, "stats").contains("has_journal"));
        assert!(!debugfs(&image, "ls -l /").contains("lost+found"));
        fs::remove_file(&image).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &image).unwrap();
        let error = hold("x", &directory, 5 << 20).unwrap_err().to_string();
        assert!(error.contains("is no file"), "{error}");
        fs::remove_dir_all(&directory).unwrap();
    }
}
