//! Message interrupts of a function (PCI 3.0, 6.8.2). Each vector is an eventfd
//! that a backend writes to and that the hypervisor turns into an interrupt: no
//! thread of ours is woken.
//!
//! A masked vector is disconnected, and its eventfd keeps what was written, which
//! is the pending bit; connecting it again delivers it. Used by
//! [`crate::virtio::function`].

use std::io;
use std::sync::Arc;

use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::copy;
use crate::event;
use crate::wiring::{Message, Wiring};

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Bits of message control, the upper byte: enabled, all masked.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// What the guest may change of message control.
pub const CONTROL_MASK: u16 = ENABLE | MASK_ALL;

/// Bytes of an entry of the table.
const ENTRY: usize = 16;
/// Bit 0 of an entry's vector control.
const MASKED: u32 = 1;

#[derive(Debug)]
struct Vector {
    message: Message,
    control: u32,
    event: Arc<EventFd>,
    gsi: u32,
    connected: bool,
}

/// A function's table and what it leads to.
#[derive(Debug)]
pub struct Msix {
    vectors: Vec<Vector>,
    control: u16,
    wiring: Arc<dyn Wiring>,
    /// Interrupts that could not be wired.
    failures: u64,
}

impl Msix {
    /// `count` vectors, masked all, with interrupts from `first_gsi` on.
    ///
    /// # Errors
    /// No eventfds.
    pub fn new(count: u16, first_gsi: u32, wiring: Arc<dyn Wiring>) -> io::Result<Self> {
        let vector = |gsi| -> io::Result<Vector> {
            Ok(Vector {
                message: Message::default(),
                control: MASKED,
                event: Arc::new(event::new()?),
                gsi,
                connected: false,
            })
        };
        let gsis = first_gsi..first_gsi + u32::from(count);
        Ok(Self {
            vectors: gsis.map(vector).collect::<io::Result<_>>()?,
            control: 0,
            wiring,
            failures: 0,
        })
    }

    /// Bytes of the table.
    pub fn table_size(&self) -> usize {
        self.vectors.len() * ENTRY
    }

    /// The body of the capability: table and pending bits in memory region 0.
    pub fn capability(&self, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let last = (self.vectors.len() - 1) as u16;
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// What a vector's user writes to; `None` for a number that is none.
    pub fn event(&self, vector: u16) -> Option<Arc<EventFd>> {
        let vector = self.vectors.get(usize::from(vector))?;
        Some(Arc::clone(&vector.event))
    }

    /// How many there are.
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Interrupts the hypervisor did not take.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// The guest has written message control.
    pub fn set_control(&mut self, control: u16) {
        let control = control & CONTROL_MASK;
        if control != self.control {
            self.control = control;
            (0..self.vectors.len()).for_each(|index| self.wire(index));
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let Some(vector) = self.vectors.get(offset / ENTRY) else {
            return data.fill(0);
        };
        copy(&vector.bytes(), offset % ENTRY, data);
    }

    /// The guest writes to it. Four or eight bytes, aligned; others may be
    /// passed over and are (6.8.2).
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let whole = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len());
        let Some(vector) = self.vectors.get_mut(offset / ENTRY).filter(|_| whole) else {
            return;
        };
        let mut bytes = vector.bytes();
        let at = offset % ENTRY;
        bytes[at..at + data.len()].copy_from_slice(data);
        let half = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let message = Message {
            address: u64::from(half(0)) | (u64::from(half(4)) << 32),
            data: half(8),
        };
        let control = half(12) & MASKED;
        if (message, control) != (vector.message, vector.control) {
            (vector.message, vector.control) = (message, control);
            self.wire(offset / ENTRY);
        }
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let mut bits = vec![0; self.vectors.len().div_ceil(64) * 8];
        for (index, vector) in self.vectors.iter().enumerate() {
            if !vector.connected && event::is_written(&vector.event) {
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        copy(&bits, offset, data);
    }

    /// As when the machine was switched on.
    pub fn reset(&mut self) {
        self.control = 0;
        for index in 0..self.vectors.len() {
            self.vectors[index].message = Message::default();
            self.vectors[index].control = MASKED;
            self.wire(index);
            let _ = self.vectors[index].event.read();
        }
    }

    /// The hypervisor's machine is another: nothing is wired any more.
    pub fn forget(&mut self) {
        self.vectors.iter_mut().for_each(|v| v.connected = false);
    }

    /// Makes the wiring what the registers say.
    fn wire(&mut self, index: usize) {
        let vector = &mut self.vectors[index];
        let on = self.control == ENABLE && vector.control & MASKED == 0;
        let done = match (on, vector.connected) {
            (true, false) => self
                .wiring
                .route(vector.gsi, vector.message)
                .and_then(|()| self.wiring.connect(vector.gsi, &vector.event)),
            (true, true) => self.wiring.route(vector.gsi, vector.message),
            (false, true) => self.wiring.disconnect(vector.gsi, &vector.event),
            (false, false) => Ok(()),
        };
        match done {
            Ok(()) => vector.connected = on,
            Err(e) => {
                // A guest can write what no hypervisor takes.
                self.failures += 1;
                debug!("interrupt {} cannot be wired: {e}", vector.gsi);
            }
        }
    }
}

impl Vector {
    fn bytes(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wiring::tests::Recorder;

    fn msix() -> (Msix, Arc<Recorder>) {
        let recorder = Recorder::new();
        let wiring: Arc<dyn Wiring> = Arc::<Recorder>::clone(&recorder);
        (Msix::new(3, 100, wiring).unwrap(), recorder)
    }

    fn entry(msix: &mut Msix, vector: usize, data: u32, control: u32) {
        let at = vector * ENTRY;
        msix.write_table(at, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &control.to_le_bytes());
    }

    #[test]
    fn nothing_is_wired_before_the_guest_enables_and_unmasks() {
        let (mut msix, recorder) = msix();
        entry(&mut msix, 0, 0x41, 0);
        assert!(recorder.connected.lock().unwrap().is_empty());
        msix.set_control(ENABLE | MASK_ALL);
        assert!(recorder.connected.lock().unwrap().is_empty());
        msix.set_control(ENABLE);
        assert_eq!(*recorder.connected.lock().unwrap(), [100].into());
        entry(&mut msix, 2, 0x42, 0);
        let message = Message {
            address: 0xfee0_1000,
            data: 0x42,
        };
        assert_eq!(recorder.routes.lock().unwrap()[&102], message);
        entry(&mut msix, 0, 0x41, 1);
        assert_eq!(*recorder.connected.lock().unwrap(), [102].into());
        msix.set_control(0);
        assert!(recorder.connected.lock().unwrap().is_empty());
        msix.set_control(ENABLE);
        msix.reset();
        assert!(recorder.connected.lock().unwrap().is_empty());
        let mut control = [0; 4];
        msix.read_table(12, &mut control);
        assert_eq!(control, MASKED.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_not() {
        let (mut msix, _) = msix();
        msix.set_control(ENABLE);
        let pending = |msix: &Msix| {
            let mut bits = [0; 8];
            msix.read_pending(0, &mut bits);
            u64::from_le_bytes(bits)
        };
        msix.event(1).unwrap().write(1).unwrap();
        assert_eq!(pending(&msix), 0b10);
        entry(&mut msix, 1, 0x30, 0);
        // The hypervisor has it now.
        assert_eq!(pending(&msix), 0);
        assert!(msix.event(3).is_none());
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let (mut msix, recorder) = msix();
        msix.set_control(ENABLE);
        for (offset, size) in [
            (1, 4),
            (4, 8),
            (12, 1),
            (14, 2),
            (48, 4),
            (usize::MAX - 7, 8),
        ] {
            msix.write_table(offset, &vec![0; size]);
            let mut data = vec![1; size];
            msix.read_table(offset.min(1 << 20), &mut data);
        }
        assert!(recorder.connected.lock().unwrap().is_empty());
        assert_eq!(msix.capability(0x4000, 0x6000)[..6], [2, 0, 0, 0x40, 0, 0]);
    }
}
