//! The machine's PCI devices, as sysfs shows them to root: their configuration, their memory, and
//! where in it virtio's registers are.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Memory of a device.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
}

/// Where virtio's registers are in the [`Window`] (virtio 1.3, 4.1.4).
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    pub(crate) common: usize,
    pub(crate) notify: usize,
    /// Bytes from one doorbell to the next.
    pub(crate) stride: usize,
}

pub(crate) struct Device {
    pub(crate) config: File,
    pub(crate) memory: Option<Window>,
    pub(crate) registers: Option<Registers>,
    /// Virtio's number of its kind, 0 of another.
    pub(crate) kind: u16,
    /// Where its memory was at first.
    bars: [u8; 24],
}

impl Device {
    const COMMAND: u64 = 0x04;
    const BARS: u64 = 0x10;

    /// Its memory is where it was, and on.
    pub(crate) fn restore(&self) {
        let _ = self.config.write_at(&self.bars, Self::BARS);
        let _ = self.config.write_at(&[7, 0], Self::COMMAND);
    }
}

/// All of them, or those of virtio, without their drivers.
pub(crate) fn devices(all: bool) -> Vec<Device> {
    let list = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten();
    let open = |entry: fs::DirEntry| {
        let path = entry.path();
        let both = |name: &str| {
            let file = File::options().read(true).write(true).open(path.join(name));
            file.ok()
        };
        let config = both("config")?;
        let mut space = [0; 256];
        let known = config.read_at(&mut space, 0).ok()?;
        let word = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let kind = match (word(0), word(2)) {
            (0x1af4, id @ 0x1040..=0x107f) => id - 0x1040,
            // Older numbers, of network cards and disks.
            (0x1af4, 0x1000) => 1,
            (0x1af4, 0x1001) => 2,
            _ => 0,
        };
        if kind == 0 && !all {
            return None;
        }
        // Memory that a driver has is not given to others; without one the device is off.
        let name = entry.file_name();
        let _ = fs::write(path.join("driver/unbind"), name.as_encoded_bytes());
        let _ = fs::write(path.join("enable"), "1");
        let found = (kind != 0 && known == 256)
            .then(|| registers(&space))
            .flatten();
        let bar = found.map_or(0, |(bar, _)| bar);
        Some(Device {
            memory: both(&format!("resource{bar}")).and_then(|file| map(&file)),
            registers: found.map(|(_, registers)| registers),
            kind,
            bars: space[0x10..0x28].try_into().ok()?,
            config,
        })
    };
    list.filter_map(|entry| open(entry.ok()?)).collect()
}

/// In which memory virtio's registers are, and where.
fn registers(space: &[u8; 256]) -> Option<(u8, Registers)> {
    const VENDOR: u8 = 9;
    let long = |at: usize| {
        let bytes = space.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let (mut at, mut common, mut notify) = (usize::from(space[0x34]), None, None);
    // A chain of them has no more.
    for _ in 0..48 {
        if !(0x40..0xf0).contains(&at) {
            break;
        }
        if space[at] == VENDOR {
            let place = (space[at + 4], long(at + 8)?);
            match space[at + 3] {
                1 => common = common.or(Some(place)),
                2 => notify = notify.or(Some((place, long(at + 16)?))),
                _ => {}
            }
        }
        at = usize::from(space[at + 1]);
    }
    let ((bar, common), ((other, notify), stride)) = (common?, notify?);
    let registers = Registers {
        common,
        notify,
        stride,
    };
    (bar == other).then_some((bar, registers))
}

fn map(file: &File) -> Option<Window> {
    let len = file.metadata().ok()?.len() as usize;
    // SAFETY: a new mapping of a device's memory, at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    (at != libc::MAP_FAILED && len >= 16).then(|| Window { at: at.cast(), len })
}
