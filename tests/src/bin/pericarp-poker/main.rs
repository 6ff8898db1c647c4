//! `pericarp-poker SECONDS SEED [devices]`: a guest's first process that writes random values to
//! every port, every register of every PCI device and every byte of their memory, reads them back,
//! and puts anything into the queues of virtio's devices. With `devices` it leaves all else alone.
//! The suites `monitor` and `attack` run it as root in a guest; what becomes of the guest does not
//! matter, what becomes of its monitor, and of those behind its devices, does.
#![expect(unsafe_code)]
// UNSAFETY: ports are reached by instructions, device memory by a mapping.

mod device;
mod rings;

use std::arch::asm;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use device::{Device, Window, devices};
use rings::{Pages, attack};

/// Ports that are left alone: the console, by which the guest says that it is done, and
/// power and reset, which would end it.
const SPARED: [std::ops::RangeInclusive<u16>; 2] = [0x3f0..=0x3ff, 0x5f8..=0x603];
/// Pokes between two words of them.
const SAID: u64 = 64;
/// Xorshift: the same pokes for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
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

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.0 >> 11).wrapping_add(self.next()) % end
    }
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

fn poke_memory(random: &mut Random, memory: Window) {
    // Most of it is empty; what is not begins at a page.
    let offset = match random.below(3) {
        0 => random.below(memory.len as u64) as usize,
        1 => random.below(0x48) as usize,
        _ => (random.below(8) * 0x1000 + random.below(0x40)) as usize,
    };
    let value = random.next();
    let offset = offset.min(memory.len - 8);
    // SAFETY: within the mapping; unaligned accesses are made of bytes.
    unsafe {
        let at = memory.at.add(offset);
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

fn main() {
    let mut words = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok());
    let (seconds, seed) = (words.next().unwrap_or(1), words.next().unwrap_or(1));
    let mut random = Random(seed | 1);
    // SAFETY: asks for a right and changes no memory.
    let ports = unsafe { libc::iopl(3) } == 0;
    let all = !std::env::args().any(|word| word == "devices");
    let devices = devices(all);
    let pages = Pages::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut count, mut doorbells) = (0u64, 0u64);
    while Instant::now() < end {
        // Now and then: the next poke may be the last.
        if count >= SAID {
            println!("poked {count} times, {doorbells} doorbells");
            (count, doorbells) = (0, 0);
        }
        // What was poked moves it away, and then nothing is hit any more.
        devices.iter().for_each(Device::restore);
        for _ in 0..64 {
            count += 1;
            let device = match devices.len() {
                0 => None,
                all => devices.get(random.below(all as u64) as usize),
            };
            match (random.below(4), device) {
                (0, _) | (_, None) if ports && all => poke_port(&mut random),
                (1, Some(device)) => poke_config(&mut random, device),
                (_, Some(device)) => {
                    if let Some(memory) = device.memory {
                        poke_memory(&mut random, memory);
                    }
                }
                _ => {}
            }
        }
        // A device whose memory is where it belongs.
        devices.iter().for_each(Device::restore);
        if let (Some(pages), 1..) = (&pages, devices.len()) {
            let device = &devices[random.below(devices.len() as u64) as usize];
            doorbells += attack(device, pages, &mut random);
        }
    }
    println!(
        "poked {count} times, {doorbells} doorbells, {} devices, memory of {}, ports {ports}",
        devices.len(),
        devices
            .iter()
            .filter(|device| device.memory.is_some())
            .count()
    );
}
