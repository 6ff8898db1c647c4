//! A driver that sets queues up as it should, in memory of its own, and then puts anything into
//! them: what its devices do with that is not the machine's affair alone, but that of whoever
//! serves them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::Random;
use crate::device::{Device, Registers, Window};

const PAGE: usize = 4096;
/// Pages of a queue: descriptors, the driver's ring, the device's.
const PARTS: usize = 3;
/// Queues that are set up.
const QUEUES: usize = 4;
/// Pages that requests point to.
const DATA: usize = 16;
/// Entries of a queue, at most: what fits into these pages.
const SIZE: u16 = 256;

/// Memory whose place the device can be told.
pub(crate) struct Pages(Vec<(*mut u8, u64)>);

impl Pages {
    /// Asks the kernel for it. `None` where it does not say where the memory is.
    pub(crate) fn new() -> Option<Self> {
        let count = PARTS * QUEUES + DATA;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return None;
        }
        let map = File::open("/proc/self/pagemap").ok()?;
        let page = |index: usize| {
            let at = at as usize + index * PAGE;
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, (at / PAGE * 8) as u64).ok()?;
            let entry = u64::from_le_bytes(entry);
            let frame = entry & ((1 << 55) - 1);
            let here = entry >> 63 == 1 && frame != 0;
            here.then_some((at as *mut u8, frame * PAGE as u64))
        };
        (0..count).map(page).collect::<Option<_>>().map(Self)
    }

    fn of_queue(&self, queue: usize, part: usize) -> (*mut u8, u64) {
        self.0[queue * PARTS + part]
    }

    fn data(&self, random: &mut Random) -> (*mut u8, u64) {
        self.0[PARTS * QUEUES + random.below(DATA as u64) as usize]
    }
}

/// Registers that are written as wide as they are.
struct Common(Window, usize);

impl Common {
    const FEATURE_SELECT: usize = 0x00;
    const FEATURE: usize = 0x04;
    const DRIVER_SELECT: usize = 0x08;
    const DRIVER: usize = 0x0c;
    const QUEUES: usize = 0x12;
    const STATUS: usize = 0x14;
    const SELECT: usize = 0x16;
    const SIZE: usize = 0x18;
    const VECTOR: usize = 0x1a;
    const ENABLE: usize = 0x1c;
    const NOTIFY: usize = 0x1e;
    /// Of descriptors; the two rings follow.
    const ADDRESSES: usize = 0x20;

    fn place(&self, at: usize) -> *mut u8 {
        assert!(self.1 + at + 8 <= self.0.len, "registers are in the memory");
        // SAFETY: within the mapping, as was looked at.
        unsafe { self.0.at.add(self.1 + at) }
    }

    fn status(&self, value: u8) {
        // SAFETY: a byte of the mapping.
        unsafe { self.place(Self::STATUS).write_volatile(value) }
    }

    fn half(&self, at: usize, value: u16) {
        // SAFETY: within the mapping, and aligned as registers are.
        unsafe { self.place(at).cast::<u16>().write_volatile(value) }
    }

    fn read_half(&self, at: usize) -> u16 {
        // SAFETY: as above.
        unsafe { self.place(at).cast::<u16>().read_volatile() }
    }

    fn word(&self, at: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.place(at).cast::<u32>().write_volatile(value) }
    }

    fn read_word(&self, at: usize) -> u32 {
        // SAFETY: as above.
        unsafe { self.place(at).cast::<u32>().read_volatile() }
    }
}

/// Sets the device up, has it work on anything, and resets it. How many doorbells were rung.
pub(crate) fn attack(device: &Device, pages: &Pages, random: &mut Random) -> u64 {
    let (Some(memory), Some(registers)) = (device.memory, device.registers) else {
        return 0;
    };
    let common = Common(memory, registers.common);
    let queues = set_up(&common, pages, random);
    let mut next = [0_u16; QUEUES];
    let mut rung = 0;
    for _ in 0..64 + random.below(256) {
        let queue = random.below(queues as u64) as usize;
        for _ in 0..1 + random.below(4) {
            offer(device.kind, pages, queue, &mut next[queue], random);
        }
        if random.below(8) == 0 {
            // The index jumps, or anything changes that is in flight.
            let (at, _) = pages.of_queue(queue, random.below(3) as usize);
            let value = random.next();
            // SAFETY: eight bytes of the page.
            unsafe {
                at.add(random.below(512) as usize * 8)
                    .cast::<u64>()
                    .write_volatile(value)
            };
        }
        ring(memory, registers, &common, queue, random);
        rung += 1;
    }
    common.status(0);
    rung
}

/// As a driver does, but for a value here and there. How many queues there are.
fn set_up(common: &Common, pages: &Pages, random: &mut Random) -> usize {
    for value in [0, 1, 3] {
        common.status(value);
    }
    for half in 0..2 {
        common.word(Common::FEATURE_SELECT, half);
        let offered = common.read_word(Common::FEATURE);
        let taken = match random.below(4) {
            0 => offered & random.next() as u32,
            _ => offered,
        };
        common.word(Common::DRIVER_SELECT, half);
        // VERSION_1, without which there is no way on.
        common.word(Common::DRIVER, taken | (half & 1));
    }
    common.status(0xb);
    let queues = usize::from(common.read_half(Common::QUEUES)).clamp(1, QUEUES);
    for queue in 0..queues {
        common.half(Common::SELECT, queue as u16);
        let largest = common.read_half(Common::SIZE).clamp(1, SIZE);
        let size = match random.below(16) {
            0 => random.next() as u16,
            _ => largest,
        };
        common.half(Common::SIZE, size);
        common.half(Common::VECTOR, u16::MAX);
        for part in 0..PARTS {
            let (page, mut address) = pages.of_queue(queue, part);
            // SAFETY: a page of ours.
            unsafe { page.write_bytes(0, PAGE) };
            if random.below(64) == 0 {
                address = random.next();
            }
            let at = Common::ADDRESSES + 8 * part;
            common.word(at, address as u32);
            common.word(at + 4, (address >> 32) as u32);
        }
        common.half(Common::ENABLE, 1);
    }
    common.status(0xf);
    queues
}

/// Makes a request available that is nearly right.
fn offer(kind: u16, pages: &Pages, queue: usize, next: &mut u16, random: &mut Random) {
    const CHAINED: u16 = 1;
    const WRITE: u16 = 2;
    let (header, address) = pages.data(random);
    let mut bytes = header_of(kind, random);
    if random.below(8) == 0 {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] = random.next() as u8;
    }
    // SAFETY: a header is shorter than a page of ours.
    unsafe { header.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    let (descriptors, _) = pages.of_queue(queue, 0);
    let first = (random.below(u64::from(SIZE) - 4)) as u16;
    let middle = if random.below(2) == 0 { WRITE } else { 0 };
    let chain = [
        (address, bytes.len() as u32, CHAINED),
        (
            pages.data(random).1,
            1 << random.below(13),
            CHAINED | middle,
        ),
        (pages.data(random).1, 1 << random.below(13), WRITE),
    ];
    for (number, (mut address, mut len, mut flags)) in chain.into_iter().enumerate() {
        let mut follows = first + number as u16 + 1;
        match random.below(24) {
            // Seldom: it may be the guest's own kernel that is written to.
            0 if random.below(16) == 0 => address = random.next(),
            1 => address = u64::MAX - random.below(4096),
            2 => address = 0x2000_0000 - random.below(8),
            3 => len = random.next() as u32,
            4 => flags ^= 1 << random.below(3),
            5 => follows = random.next() as u16,
            _ => {}
        }
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&address.to_le_bytes());
        entry[8..12].copy_from_slice(&len.to_le_bytes());
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&follows.to_le_bytes());
        let at = usize::from(first + number as u16) * 16;
        // SAFETY: one of the 256 descriptors of the page.
        unsafe {
            descriptors
                .add(at)
                .copy_from_nonoverlapping(entry.as_ptr(), 16)
        };
    }
    let (ring, _) = pages.of_queue(queue, 1);
    let head = match random.below(32) {
        0 => random.next() as u16,
        _ => first,
    };
    // SAFETY: an entry of the ring, and its index, in the page.
    unsafe {
        let entries = ring.cast::<u16>();
        entries
            .add(2 + usize::from(*next % SIZE))
            .write_volatile(head);
        *next = next.wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        entries.add(1).write_volatile(*next);
    }
}

/// A header as the driver of such a device writes it.
fn header_of(kind: u16, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    match kind {
        // A disk.
        2 => {
            let operation = [0, 1, 0, 1, 4, 8, 11, 13][random.below(8) as usize];
            bytes.extend(u32::to_le_bytes(operation));
            bytes.extend([0; 4]);
            bytes.extend(random.below(1 << 16).to_le_bytes());
        }
        // Sockets.
        19 => {
            for context in [42_u64, 2] {
                bytes.extend(context.to_le_bytes());
            }
            for port in [1000 + random.below(16), random.below(4)] {
                bytes.extend((port as u32).to_le_bytes());
            }
            bytes.extend((random.below(64) as u32).to_le_bytes());
            bytes.extend(1_u16.to_le_bytes());
            bytes.extend((random.below(8) as u16).to_le_bytes());
            for _ in 0..3 {
                bytes.extend((random.next() as u32).to_le_bytes());
            }
        }
        // A directory.
        26 => {
            bytes.extend(40_u32.to_le_bytes());
            bytes.extend((random.below(52) as u32).to_le_bytes());
            bytes.extend(random.next().to_le_bytes());
            bytes.extend((1 + random.below(3)).to_le_bytes());
            bytes.extend([0; 16]);
        }
        // A card: a header that asks for nothing, and a frame.
        _ => {
            bytes.extend([0; 12]);
            bytes.extend([0xff; 12]);
            bytes.extend((0..50).map(|_| random.next() as u8));
        }
    }
    bytes
}

/// Rings a queue's doorbell, or another one.
fn ring(memory: Window, registers: Registers, common: &Common, queue: usize, random: &mut Random) {
    common.half(Common::SELECT, queue as u16);
    let number = usize::from(common.read_half(Common::NOTIFY));
    let at = match random.below(32) {
        0 => registers.notify + 2 * random.below(512) as usize,
        _ => registers.notify + number * registers.stride,
    };
    if at + 2 <= memory.len && at.is_multiple_of(2) {
        // SAFETY: within the mapping, as was looked at.
        unsafe { memory.at.add(at).cast::<u16>().write_volatile(queue as u16) };
    }
}
