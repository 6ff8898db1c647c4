//! The disks that a pod's containers have: each is in the machine once, however many containers have
//! it, from the first to the last.
//!
//! Made by `pod`, asked by `rootfs`. What is on the disk is the guest's from then on: it is given
//! away as it is, and nothing of it is read on the host. Two devices in one guest on one disk would
//! each have a cache of their own of it; so containers that are to have the same disk get the same
//! device.

use std::{
    collections::HashMap,
    fs,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use pericarp_api::host::Guest;
use pericarp_pod::sidecar::Limits;
use rustix::fs::{FileType, Mode, OFlags, fstat, makedev};

use crate::{
    bundle::refused,
    disks::Backing,
    error::{ShimError, during},
    guest,
    keeper::Orders,
    machine::Booted,
};

/// Where the kernel says what a device's number is called.
const NUMBERS: &str = "/sys/dev/block";
const NODES: &str = "/dev";
/// How long a guest may take to give a device up after it has said that it has let go.
const GIVEN_UP: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// What a disk is to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A device that it reads and writes itself.
    Device,
    /// A file system that the guest mounts.
    FileSystem,
}

/// Where it is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A block device by its number, which is all that a configuration says.
    Number(u32, u32),
    /// A block device, or an image.
    Path(PathBuf),
}

/// A disk that a container is to have.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    /// What of the container's configuration says so.
    pub(crate) field: &'a str,
    /// What the pod calls the volume, or `root`.
    pub(crate) volume: &'a str,
    pub(crate) place: Place,
    pub(crate) read_only: bool,
    pub(crate) purpose: Purpose,
    /// What may be done with it in a second.
    pub(crate) limits: Limits,
}

/// All of a pod's.
#[derive(Debug)]
pub(crate) struct Blocks {
    orders: Arc<Orders>,
    had: Mutex<Had>,
}

#[derive(Debug, Default)]
struct Had {
    next: u64,
    /// Each with a lock of its own, held while it comes or leaves: who wants the same one waits,
    /// others do not.
    all: HashMap<Key, Slot>,
}

/// None while the machine does not have it.
type Slot = Arc<Mutex<Option<Shared>>>;

/// By what two of them are the same: the machine, and the number of the device, or that of the
/// file's file system with its own.
type Key = (u32, u64, Option<u64>);

#[derive(Debug)]
struct Shared {
    id: String,
    read_only: bool,
    purpose: Purpose,
    limits: Limits,
    users: usize,
}

/// One, as long as a container has it.
#[derive(Debug)]
pub(crate) struct Block {
    orders: Arc<Orders>,
    slot: Slot,
    id: String,
    guest: Guest,
}

impl Blocks {
    pub(crate) fn new(orders: Arc<Orders>) -> Arc<Self> {
        Arc::new(Self {
            orders,
            had: Mutex::default(),
        })
    }

    /// Adds the disk to the machine, unless it is there already.
    pub(crate) fn attach(&self, wanted: &Wanted<'_>, booted: &Booted) -> Result<Block, ShimError> {
        let (file, number) = open(wanted)?;
        let key = (booted.pid, number.0, number.1);
        let (id, slot) = {
            let mut had = locked(&self.had);
            // Nobody has these, or is about to.
            had.all.retain(|_, slot| Arc::strong_count(slot) > 1);
            had.next += 1;
            let id = format!("disk{}", had.next);
            (id, Arc::clone(had.all.entry(key).or_default()))
        };
        let block = |id: &str| Block {
            orders: Arc::clone(&self.orders),
            slot: Arc::clone(&slot),
            id: id.to_owned(),
            guest: booted.guest.clone(),
        };
        // To the end.
        let mut there = locked(&slot);
        if let Some(shared) = &mut *there {
            shared.check(wanted)?;
            shared.users += 1;
            return Ok(block(&shared.id));
        }
        let backing = Backing {
            id: id.clone(),
            volume: wanted.volume.to_owned(),
            file,
            read_only: wanted.read_only,
            limits: wanted.limits,
        };
        self.orders
            .add_disk(backing)
            .map_err(|error| ShimError::Machine(format!("{}: {error}", wanted.field)))?;
        *there = Some(Shared {
            id: id.clone(),
            read_only: wanted.read_only,
            purpose: wanted.purpose,
            limits: wanted.limits,
            users: 1,
        });
        Ok(block(&id))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn check(&self, wanted: &Wanted<'_>) -> Result<(), ShimError> {
        if self.purpose != wanted.purpose {
            let rule = "another container of the pod has it as a device and this one as a file \
                        system, or the other way round: two would write to one disk";
            return Err(refused(wanted.field, rule));
        }
        if self.read_only && !wanted.read_only {
            let rule = "another container of the pod may only read it, and has it already: give \
                        both the same access";
            return Err(refused(wanted.field, rule));
        }
        if self.limits != wanted.limits {
            let rule = "another container of the pod has it with other limits: give it one name in \
                        the pod's annotations, and the same in each container";
            return Err(refused(wanted.field, rule));
        }
        Ok(())
    }
}

impl Block {
    /// Its serial in the guest.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Block {
    /// The last user's has the guest let go of it, takes it from the machine, and lets go of the
    /// host's device.
    fn drop(&mut self) {
        // To the end: who wants the same one waits until it is gone, and has a new one.
        let mut there = locked(&self.slot);
        if let Some(shared) = &mut *there {
            shared.users -= 1;
            if shared.users > 0 {
                return;
            }
        }
        *there = None;
        if let Err(error) = guest::remove_disk(&self.guest, &self.id) {
            log::warn!(
                "the guest does not let go of the disk '{}': {error}",
                self.id
            );
        }
        let end = Instant::now() + GIVEN_UP;
        while !self.orders.remove_disk(&self.id, Instant::now() >= end) {
            thread::sleep(PAUSE);
        }
    }
}

/// Opens it by its place, so that it is not another one by the time it is served, and says by what
/// it is known.
fn open(wanted: &Wanted<'_>) -> Result<(OwnedFd, (u64, Option<u64>)), ShimError> {
    let path = match &wanted.place {
        Place::Number(major, minor) => node(Path::new(NUMBERS), *major, *minor)
            .ok_or_else(|| no_device(wanted.field, *major, *minor))?,
        Place::Path(path) => path.clone(),
    };
    let what = || format!("{}: {}", wanted.field, path.display());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(during(what()))?;
    let there = fstat(&file).map_err(during(what()))?;
    match (FileType::from_raw_mode(there.st_mode), &wanted.place) {
        (FileType::BlockDevice, Place::Number(major, minor))
            if there.st_rdev != makedev(*major, *minor) =>
        {
            Err(no_device(wanted.field, *major, *minor))
        }
        (FileType::BlockDevice, _) => Ok((file, (there.st_rdev, None))),
        (FileType::RegularFile, Place::Path(_)) => Ok((file, (there.st_dev, Some(there.st_ino)))),
        (_, Place::Number(major, minor)) => Err(no_device(wanted.field, *major, *minor)),
        (_, Place::Path(_)) => Err(refused(
            &what(),
            "is neither a block device nor an image file",
        )),
    }
}

fn no_device(field: &str, major: u32, minor: u32) -> ShimError {
    let rule = format!("there is no block device {major}:{minor} with a node in {NODES}");
    refused(field, &rule)
}

/// The node of the device with this number, as the kernel calls it.
fn node(numbers: &Path, major: u32, minor: u32) -> Option<PathBuf> {
    let about = numbers.join(format!("{major}:{minor}/uevent"));
    let text = fs::read_to_string(about).ok()?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    let plain = |part| matches!(part, Component::Normal(_));
    let is_plain = !name.is_empty() && Path::new(name).components().all(plain);
    is_plain.then(|| Path::new(NODES).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(place: Place) -> Wanted<'static> {
        Wanted {
            field: "linux.devices: /dev/x",
            volume: "x",
            place,
            read_only: false,
            purpose: Purpose::Device,
            limits: Limits::default(),
        }
    }

    #[test]
    fn a_number_leads_to_a_node() {
        let dir = std::env::temp_dir().join(format!("pericarp-numbers-{}", std::process::id()));
        let say = |number: &str, text: &str| {
            fs::create_dir_all(dir.join(number)).unwrap();
            fs::write(dir.join(number).join("uevent"), text).unwrap();
        };
        say("7:1", "MAJOR=7\nMINOR=1\nDEVNAME=loop1\nDEVTYPE=disk\n");
        say("7:2", "DEVNAME=../etc\n");
        say("7:3", "DEVNAME=\n");
        assert_eq!(node(&dir, 7, 1), Some("/dev/loop1".into()));
        for minor in 2..5 {
            assert_eq!(node(&dir, 7, minor), None, "{minor}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let said = |place| open(&wanted(place)).unwrap_err().to_string();
        assert_eq!(
            said(Place::Number(4095, 7)),
            "linux.devices: /dev/x: there is no block device 4095:7 with a node in /dev"
        );
        for (path, rule) in [
            ("/dev/null", "is neither a block device nor an image file"),
            ("/tmp", "is neither a block device nor an image file"),
            ("/no/where", "No such file"),
        ] {
            let error = said(Place::Path(path.into()));
            assert!(error.contains(path) && error.contains(rule), "{error}");
        }
    }

    #[test]
    fn an_image_is_known_by_its_file() {
        let image = std::env::temp_dir().join(format!("pericarp-image-{}", std::process::id()));
        fs::write(&image, [0; 512]).unwrap();
        let linked = image.with_extension("link");
        std::os::unix::fs::symlink(&image, &linked).unwrap();
        let number = |path: &Path| open(&wanted(Place::Path(path.into()))).unwrap().1;
        assert_eq!(number(&image), number(&linked));
        assert!(number(&image).1.is_some());
        fs::remove_file(&linked).unwrap();
        fs::remove_file(&image).unwrap();
    }

    #[test]
    fn containers_agree_on_what_a_disk_is() {
        let mut shared = Shared {
            id: "disk1".into(),
            read_only: true,
            purpose: Purpose::Device,
            limits: Limits::default(),
            users: 1,
        };
        let mut other = wanted(Place::Number(7, 0));
        let error = shared.check(&other).unwrap_err().to_string();
        assert!(error.contains("may only read it"), "{error}");
        shared.read_only = false;
        shared.check(&other).unwrap();
        other.read_only = true;
        shared.check(&other).unwrap();
        other.limits.iops = Some(5);
        let error = shared.check(&other).unwrap_err().to_string();
        assert!(error.contains("with other limits"), "{error}");
        other.purpose = Purpose::FileSystem;
        let error = shared.check(&other).unwrap_err().to_string();
        assert!(error.contains("two would write to one disk"), "{error}");
    }
}
