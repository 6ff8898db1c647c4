//! A function's configuration space (PCI 3.0, 6.1): 256 bytes, of which the
//! guest may change the bits of a mask. [`crate::virtio::function`] builds it and
//! looks at what a write has changed.

use super::copy;

/// Bytes of it.
pub const SIZE: usize = 256;

/// Offsets (PCI 3.0, 6.1 and 6.2.5).
pub const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
/// The first base address register.
pub const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const HAS_CAPABILITIES: u16 = 1 << 4;
/// A 64-bit memory register.
const BAR_64: u8 = 0b100;

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Of the subsystem, the vendor's being the same.
    pub subsystem: u16,
    /// Base class, subclass, interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
}

/// The space.
#[derive(Debug, Clone)]
pub struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    free: usize,
    last: Option<usize>,
}

impl Config {
    /// A function without memory or capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            free: FIRST_CAPABILITY,
            last: None,
        };
        config.put(0, &identity.vendor.to_le_bytes());
        config.put(2, &identity.device.to_le_bytes());
        config.put(REVISION, &[identity.revision]);
        let [base, sub, interface] = identity.class;
        config.put(CLASS, &[interface, sub, base]);
        config.put(SUBSYSTEM_VENDOR, &identity.vendor.to_le_bytes());
        config.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config
    }

    /// Gives it one region of memory at registers 0 and 1, of `size` bytes, a
    /// power of two, placed at `address`.
    pub fn set_memory(&mut self, address: u64, size: u64) {
        debug_assert!(size.is_power_of_two() && address.is_multiple_of(size));
        self.put(BAR0, &address.to_le_bytes());
        self.bytes[BAR0] |= BAR_64;
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(size - 1)).to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        self.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
    }

    /// Appends a capability: `body` goes after its id and the link to the next.
    /// Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let offset = self.free;
        assert!(offset + 2 + body.len() <= SIZE, "no room for a capability");
        match self.last {
            Some(last) => self.bytes[last + 1] = offset as u8,
            None => {
                self.bytes[CAPABILITIES] = offset as u8;
                self.put(STATUS, &HAS_CAPABILITIES.to_le_bytes());
            }
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.last = Some(offset);
        self.free = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Lets the guest change these bits.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// What the guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        copy(&self.bytes, offset, data);
    }

    /// The guest's write: only what it may change does.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = offset + index;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// Two bytes of it.
    pub fn half(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// Four bytes of it.
    pub fn word(&self, offset: usize) -> u32 {
        u32::from(self.half(offset)) | (u32::from(self.half(offset + 2)) << 16)
    }

    /// Where its memory is now: nowhere while the guest has switched it off.
    pub fn memory(&self) -> Option<u64> {
        let address = u64::from(self.word(BAR0)) | (u64::from(self.word(BAR0 + 4)) << 32);
        let on = self.half(COMMAND) & COMMAND_MEMORY != 0;
        on.then_some(address & !0xf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let mut config = Config::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            subsystem: 0x40,
            class: [1, 2, 3],
            revision: 1,
        });
        config.set_memory(0x40_0000_0000, 0x8000);
        config
    }

    #[test]
    fn the_header_says_who_it_is() {
        let config = config();
        assert_eq!(config.word(0), 0x1042_1af4);
        assert_eq!(config.word(REVISION), 0x0102_0301);
        assert_eq!(config.half(SUBSYSTEM), 0x40);
        let mut beyond = [7; 4];
        config.read(254, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn memory_is_sized_in_two_halves_and_off_at_first() {
        let mut config = config();
        assert_eq!(config.memory(), None);
        config.write(COMMAND, &[2]);
        assert_eq!(config.memory(), Some(0x40_0000_0000));
        config.write(BAR0, &[0xff; 4]);
        config.write(BAR0 + 4, &[0xff; 4]);
        let size = u64::from(config.word(BAR0)) | (u64::from(config.word(BAR0 + 4)) << 32);
        assert_eq!(!(size & !0xf) + 1, 0x8000);
        assert_eq!(size & 0xf, u64::from(BAR_64));
        config.write(BAR0, &0x1234_8000u32.to_le_bytes());
        config.write(BAR0 + 4, &1u32.to_le_bytes());
        assert_eq!(config.memory(), Some(0x1_1234_8000));
    }

    #[test]
    fn capabilities_are_a_chain() {
        let mut config = config();
        let first = config.add_capability(9, &[0xaa; 14]);
        let second = config.add_capability(0x11, &[0xbb; 10]);
        let at = |offset: usize| config.bytes[offset];
        assert_eq!(usize::from(at(CAPABILITIES)), first);
        assert_eq!((at(first), usize::from(at(first + 1))), (9, second));
        assert_eq!((at(second), at(second + 1)), (0x11, 0));
        assert_eq!(config.half(STATUS) & HAS_CAPABILITIES, HAS_CAPABILITIES);
    }

    #[test]
    fn nothing_else_changes() {
        let mut config = config();
        let before = config.clone();
        for offset in 0..SIZE {
            if !(BAR0..BAR0 + 8).contains(&offset) && !(COMMAND..COMMAND + 2).contains(&offset) {
                config.write(offset, &[!before.bytes[offset]]);
            }
        }
        config.write(SIZE - 1, &[0xff; 4]);
        assert_eq!(config.bytes, before.bytes);
    }
}
