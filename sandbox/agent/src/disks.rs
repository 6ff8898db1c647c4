//! Finds the machine's disks by the serial their backends report.
//!
//! Device names such as `vda` depend on the order of probing; serials do not. Called when a disk
//! is needed; the block driver has been loaded by then, and may still be probing. A disk may have
//! come to the machine a moment ago: QEMU tells the kernel of it (ACPI), `pericarp-vmm` does not, so
//! the bus is looked at again for one that does not appear by itself.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::MAX_DISK_ID;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::error::{RequestError, trying};

const BLOCKS: &str = "/sys/block";
/// Has the kernel look for devices that it does not know.
const LOOK_AGAIN: &str = "/sys/bus/pci/rescan";
/// How long a disk may take to appear. On an emulated CPU, beside others.
const LIMIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);
/// How long it is waited for before the bus is looked at again.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long before the next look at the bus.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// A disk that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Its device node.
    pub(crate) node: PathBuf,
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Waits for the disk with this serial.
pub(crate) fn find(serial: &str) -> Result<Disk, RequestError> {
    check(serial)?;
    let begin = Instant::now();
    let end = begin + LIMIT;
    let mut next_look = begin + PATIENCE;
    loop {
        if let Some(disk) = look(Path::new(BLOCKS), serial) {
            return Ok(disk);
        }
        if Instant::now() >= end {
            return Err(RequestError::NotFound(format!(
                "the disk '{serial}' did not appear; its backend must report that serial"
            )));
        }
        if Instant::now() >= next_look {
            // Where there is no bus, there is no disk either, which is said at the end.
            let _ = fs::write(LOOK_AGAIN, "1");
            next_look = Instant::now() + LOOK_PAUSE;
        }
        thread::sleep(PAUSE);
    }
}

/// Has the kernel let go of the disk with this serial. One that is not there is no error.
pub(crate) fn remove(serial: &str) -> Result<(), RequestError> {
    check(serial)?;
    let Some(disk) = look(Path::new(BLOCKS), serial) else {
        return Ok(());
    };
    let let_go = || -> io::Result<()> {
        // O_EXCL on a block device fails while it is mounted, open(2).
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::open(&disk.node, flags, Mode::empty())?;
        let name = disk.node.file_name().unwrap_or_default();
        let device = device_of(Path::new(BLOCKS), Path::new(name))?;
        fs::write(device.join("remove"), "1")
    };
    let_go().map_err(trying(format!("the disk '{serial}' cannot be let go of")))
}

/// The function on the bus of this block device: its parent is a virtio device, and that one's is
/// it.
fn device_of(blocks: &Path, name: &Path) -> io::Result<PathBuf> {
    let virtio = fs::canonicalize(blocks.join(name).join("device"))?;
    let parent = virtio.parent().ok_or(io::ErrorKind::NotFound)?;
    Ok(parent.to_owned())
}

fn check(serial: &str) -> Result<(), RequestError> {
    if serial.is_empty() || serial.len() > MAX_DISK_ID {
        return Err(RequestError::Invalid(format!(
            "'{serial}' is no serial of a disk: they have 1 to {MAX_DISK_ID} bytes"
        )));
    }
    Ok(())
}

/// Serials that have been read, by the kernel's numbers of their disks, which no other disk ever
/// gets. Reading one asks the backend, and the host may have taken that from a disk that was not
/// let go of: it would be waited for without end, by whoever looks for another disk.
static READ: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());

/// The serial of the disk with this directory.
fn serial_of(disk: &Path) -> Option<String> {
    let read = |file: &str| fs::read_to_string(disk.join(file)).ok();
    let known = || READ.lock().unwrap_or_else(PoisonError::into_inner);
    let number = read("diskseq").and_then(|text| text.trim().parse().ok());
    if let Some(serial) = number.and_then(|number: u64| known().get(&number).cloned()) {
        return Some(serial);
    }
    let serial = read("serial")?.trim_matches(['\0', '\n', ' ']).to_owned();
    if let Some(number) = number {
        known().insert(number, serial.clone());
    }
    Some(serial)
}

/// The disk with this serial, if it is there now.
fn look(blocks: &Path, serial: &str) -> Option<Disk> {
    fs::read_dir(blocks).ok()?.flatten().find_map(|entry| {
        if serial_of(&entry.path())? != serial {
            return None;
        }
        let numbers = fs::read_to_string(entry.path().join("dev")).ok()?;
        let (major, minor) = numbers.trim().split_once(':')?;
        Some(Disk {
            node: Path::new("/dev").join(entry.file_name()),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    })
}

/// Waits until no file system is on any disk any more. Mounts in a namespace of a container go
/// when the kernel has taken that namespace apart, some time after its last process.
pub(crate) fn wait_until_unused(limit: Duration) -> Result<(), io::Error> {
    let end = Instant::now() + limit;
    for entry in fs::read_dir(BLOCKS)?.flatten() {
        // Only disks of backends have a serial.
        if !entry.path().join("serial").exists() {
            continue;
        }
        let node = Path::new("/dev").join(entry.file_name());
        // O_EXCL on a block device fails while it is mounted, open(2).
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        while let Err(error) = rustix::fs::open(&node, flags, Mode::empty()) {
            if error != Errno::BUSY || Instant::now() >= end {
                return Err(error.into());
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_known_by_serial_only() {
        let dir = std::env::temp_dir().join(format!("pericarp-disks-{}", std::process::id()));
        for (device, serial) in [("vda", Some("root\n")), ("vdb", Some("")), ("loop0", None)] {
            fs::create_dir_all(dir.join(device)).unwrap();
            fs::write(dir.join(device).join("dev"), "254:16\n").unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join(device).join("serial"), serial).unwrap();
            }
        }
        let found = look(&dir, "root");
        let other = look(&dir, "data");
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            found,
            Some(Disk {
                node: "/dev/vda".into(),
                major: 254,
                minor: 16
            })
        );
        assert_eq!(other, None);
    }

    #[test]
    fn a_serial_is_read_once() {
        let dir = std::env::temp_dir().join(format!("pericarp-serials-{}", std::process::id()));
        let disk = dir.join("vda");
        fs::create_dir_all(&disk).unwrap();
        let write = |file: &str, text: &str| fs::write(disk.join(file), text).unwrap();
        write("dev", "254:0\n");
        write("diskseq", "4000000001\n");
        write("serial", "first\n");
        assert!(look(&dir, "first").is_some());
        // As one that nobody answers for any more.
        fs::remove_file(disk.join("serial")).unwrap();
        assert!(look(&dir, "first").is_some());
        // Another disk of the same name.
        write("diskseq", "4000000002\n");
        write("serial", "second\n");
        assert!(look(&dir, "first").is_none());
        assert!(look(&dir, "second").is_some());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_disk_is_on_the_bus_above_its_driver() {
        let dir = std::env::temp_dir().join(format!("pericarp-bus-{}", std::process::id()));
        let function = dir.join("pci0000:00/0000:01:00.0");
        fs::create_dir_all(function.join("virtio3/block/vdb")).unwrap();
        let place = dir.join("block/vdb");
        fs::create_dir_all(&place).unwrap();
        std::os::unix::fs::symlink(function.join("virtio3"), place.join("device")).unwrap();
        let found = device_of(&dir.join("block"), Path::new("vdb")).unwrap();
        assert_eq!(found, fs::canonicalize(&function).unwrap());
        assert!(device_of(&dir.join("block"), Path::new("vdc")).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_serial_has_a_length() {
        for serial in ["", "123456789012345678901"] {
            assert!(matches!(find(serial), Err(RequestError::Invalid(_))));
            assert!(matches!(remove(serial), Err(RequestError::Invalid(_))));
        }
    }
}
