//! `pericarp-poker SECONDS SEED`: a guest's first process that writes random values to every port, every
//! register of every PCI device and every byte of their memory, and reads them
//! back. The suite `monitor` runs it as root in a guest; what becomes of the
//! guest does not matter, what becomes of its monitor does.
#![expect(unsafe_code)]
// UNSAFETY: ports are reached by instructions, device memory by a mapping.

use std::arch::asm;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Ports that are left alone: the console, by which the guest says that it is done, and
/// power and reset, which would end it.
const SPARED: [std::ops::RangeInclusive<u16>; 2] = [0x3f0..=0x3ff, 0x5f8..=0x603];
/// Bytes of a device's memory.
const MEMORY: usize = 0x8000;

/// Xorshift: the same pokes for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The low bits of a xorshift are weak; values that mean something come often.
        match self.0 >> 60 {
            0 => 0,
            1 => u64::MAX,
            2 => (self.0 >> 8) & 0xff,
            _ => self.0 >> 3,
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.0 >> 11).wrapping_add(self.next()) % end
    }
}

struct Device {
    config: File,
    memory: Option<*mut u8>,
    /// Where that was at first.
    bar: [u8; 8],
}

impl Device {
    const COMMAND: u64 = 0x04;
    const BAR: u64 = 0x10;

    /// Its memory is where it was, and on.
    fn restore(&self) {
        let _ = self.config.write_at(&self.bar, Self::BAR);
        let _ = self.config.write_at(&[6, 0], Self::COMMAND);
    }
}

fn devices() -> Vec<Device> {
    let list = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten();
    let open = |entry: fs::DirEntry| {
        // Memory that a driver has is not given to others; without one the device is off.
        let name = entry.file_name();
        let _ = fs::write(entry.path().join("driver/unbind"), name.as_encoded_bytes());
        let _ = fs::write(entry.path().join("enable"), "1");
        let both = |name| {
            File::options()
                .read(true)
                .write(true)
                .open(entry.path().join(name))
        };
        let config = both("config").ok()?;
        let mut bar = [0; 8];
        config.read_exact_at(&mut bar, Device::BAR).ok()?;
        Some(Device {
            config,
            bar,
            memory: both("resource0").ok().and_then(|file| map(&file)),
        })
    };
    list.filter_map(|entry| open(entry.ok()?)).collect()
}

fn map(file: &File) -> Option<*mut u8> {
    // SAFETY: a new mapping of a device's memory, at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MEMORY,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    (at != libc::MAP_FAILED).then(|| at.cast())
}

fn poke_port(random: &mut Random) {
    let port = random.below(0x1_0000) as u16;
    if SPARED.iter().any(|range| range.contains(&port)) {
        return;
    }
    let value = random.next() as u32;
    // SAFETY: `iopl` was granted; what the machine does with it is what is tested.
    unsafe {
        match random.below(6) {
            0 => asm!("out dx, al", in("dx") port, in("al") value as u8),
            1 => asm!("out dx, ax", in("dx") port, in("ax") value as u16),
            2 => asm!("out dx, eax", in("dx") port, in("eax") value),
            3 => asm!("in al, dx", in("dx") port, out("al") _),
            4 => asm!("in ax, dx", in("dx") port, out("ax") _),
            _ => asm!("in eax, dx", in("dx") port, out("eax") _),
        }
    }
}

fn poke_config(random: &mut Random, device: &Device) {
    let size = 1 << random.below(3);
    let offset = random.below(256);
    let bytes = random.next().to_le_bytes();
    let mut back = [0; 4];
    let _ = match random.below(3) {
        0 => device.config.read_at(&mut back[..size], offset).map(drop),
        _ => device.config.write_at(&bytes[..size], offset).map(drop),
    };
}

fn poke_memory(random: &mut Random, memory: *mut u8) {
    // Most of it is empty; what is not begins at a page.
    let offset = match random.below(3) {
        0 => random.below(MEMORY as u64) as usize,
        1 => random.below(0x48) as usize,
        _ => (random.below(8) * 0x1000 + random.below(0x40)) as usize,
    };
    let value = random.next();
    let offset = offset.min(MEMORY - 8);
    // SAFETY: within the mapping; unaligned accesses are made of bytes.
    unsafe {
        let at = memory.add(offset);
        match (random.below(8), offset % 8) {
            (0, _) => at.write_volatile(value as u8),
            (1, 0 | 2 | 4 | 6) => at.cast::<u16>().write_volatile(value as u16),
            (2, 0 | 4) => at.cast::<u32>().write_volatile(value as u32),
            (3, 0) => at.cast::<u64>().write_volatile(value),
            (4, 0 | 4) => drop(at.cast::<u32>().read_volatile()),
            (5, 0) => drop(at.cast::<u64>().read_volatile()),
            (6, 0 | 2 | 4 | 6) => drop(at.cast::<u16>().read_volatile()),
            _ => drop(at.read_volatile()),
        }
    }
}

/// Takes a device as a driver does, without a queue, and leaves it at once.
fn take_and_leave(memory: *mut u8) {
    const FEATURE_SELECT: usize = 0x08;
    const FEATURE: usize = 0x0c;
    const STATUS: usize = 0x14;
    let (status, word) = (
        // SAFETY: within the mapping.
        |value: u8| unsafe { memory.add(STATUS).write_volatile(value) },
        // SAFETY: as above, and aligned.
        |at: usize, value: u32| unsafe { memory.add(at).cast::<u32>().write_volatile(value) },
    );
    for value in [0, 1, 3] {
        status(value);
    }
    // VERSION_1, which no driver of our time does without.
    for (half, bits) in [(0, 0), (1, 1)] {
        word(FEATURE_SELECT, half);
        word(FEATURE, bits);
    }
    for value in [0xb, 0xf, 0, 0] {
        status(value);
    }
}

fn main() {
    let mut words = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok());
    let (seconds, seed) = (words.next().unwrap_or(1), words.next().unwrap_or(1));
    let mut random = Random(seed | 1);
    // SAFETY: asks for a right and changes no memory.
    let ports = unsafe { libc::iopl(3) } == 0;
    let devices = devices();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut count = 0u64;
    while Instant::now() < end {
        // What was poked moves it away, and then nothing is hit any more.
        devices.iter().for_each(Device::restore);
        for _ in 0..64 {
            count += 1;
            let device = match devices.len() {
                0 => None,
                all => devices.get(random.below(all as u64) as usize),
            };
            match (random.below(4), device) {
                (0, _) | (_, None) if ports => poke_port(&mut random),
                (1, Some(device)) => poke_config(&mut random, device),
                (
                    _,
                    Some(Device {
                        memory: Some(memory),
                        ..
                    }),
                ) => match random.below(32) {
                    0 => take_and_leave(*memory),
                    _ => poke_memory(&mut random, *memory),
                },
                _ => {}
            }
        }
    }
    println!(
        "poked {count} times, {} devices, memory of {}, ports {ports}",
        devices.len(),
        devices
            .iter()
            .filter(|device| device.memory.is_some())
            .count()
    );
}
