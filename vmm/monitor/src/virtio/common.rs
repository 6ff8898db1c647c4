//! The common configuration of a virtio device (virtio 1.3, 4.1.4.3 and 3.1):
//! features, rings and the status by which a driver moves from one step to the
//! next. A hostile driver may do all of it in any order. Used by
//! [`super::function`].
//!
//! A reset takes time, since the rings' requests must end first: the status
//! reads as it was until then, and drivers wait for zero (4.1.4.3.1).

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Back, Mirror, Ring, VERSION_1};
use crate::event;
use crate::memory::Ram;
use crate::pci::copy;

/// Bytes of the structure.
pub const SIZE: usize = 0x40;
/// No interrupt (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;
/// ACKNOWLEDGE, DRIVER and those above.
const KNOWN: u8 = 1 | 2 | FEATURES_OK | DRIVER_OK | FAILED;

const CONFIG_VECTOR: usize = 0x10;
const STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;

/// A queue as far as the driver has set it up.
#[derive(Debug)]
struct Queue {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    kick: Arc<EventFd>,
}

impl Queue {
    fn reset(&mut self) {
        self.size = self.max;
        self.vector = NO_VECTOR;
        self.enabled = false;
        (self.descriptors, self.driver, self.device) = (0, 0, 0);
        // What the old driver asked for is not the new one's.
        let _ = self.kick.read();
    }

    /// The rings' places, if they are whole and in guest memory (2.7).
    fn checked(&self, ram: &Ram) -> Result<(), &'static str> {
        if !self.size.is_power_of_two() || self.size > self.max {
            return Err("its size is no power of two, or more than the device has");
        }
        let size = u64::from(self.size);
        let parts = [
            (self.descriptors, 16, 16 * size),
            (self.driver, 2, 6 + 2 * size),
            (self.device, 4, 6 + 8 * size),
        ];
        for (address, alignment, bytes) in parts {
            if !address.is_multiple_of(alignment) {
                return Err("a part of it is not aligned");
            }
            if !ram.holds(address, bytes) {
                return Err("a part of it is not in memory");
            }
        }
        Ok(())
    }
}

/// The state.
#[derive(Debug)]
pub struct Common {
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    config_vector: u16,
    status: u8,
    select: u16,
    queues: Vec<Queue>,
    /// Vectors the function has.
    vectors: u16,
    /// A write of zero waits for the other half.
    resetting: bool,
    mirror: Arc<Mirror>,
    ram: Arc<Ram>,
    /// Goes nowhere: the call of a queue without an interrupt.
    nowhere: Arc<EventFd>,
    /// What the driver did wrong, counted.
    mistakes: u64,
    last_mistake: Option<&'static str>,
}

/// What a write asks of the function.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// The driver is ready, with these features.
    Activate,
    /// The driver has reset the device.
    Reset,
    /// This queue, which is active, has another vector.
    Vector(u16),
}

impl Common {
    /// A device with these features and queue sizes, on a function with
    /// `vectors` vectors.
    ///
    /// # Errors
    /// No eventfds.
    pub fn new(
        offered: u64,
        queues: &[u16],
        vectors: u16,
        mirror: Arc<Mirror>,
        ram: Arc<Ram>,
    ) -> io::Result<Self> {
        let queue = |max: &u16| -> io::Result<Queue> {
            Ok(Queue {
                max: *max,
                size: *max,
                vector: NO_VECTOR,
                enabled: false,
                descriptors: 0,
                driver: 0,
                device: 0,
                kick: Arc::new(event::new()?),
            })
        };
        Ok(Self {
            offered: offered | VERSION_1,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            select: 0,
            queues: queues.iter().map(queue).collect::<io::Result<_>>()?,
            vectors,
            resetting: false,
            mirror,
            ram,
            nowhere: Arc::new(event::new()?),
            mistakes: 0,
            last_mistake: None,
        })
    }

    /// Queues it has.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// What the driver's notifications of a queue are written to.
    pub fn kick(&self, queue: u16) -> Option<&Arc<EventFd>> {
        Some(&self.queues.get(usize::from(queue))?.kick)
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        let queue = self.queues.get(usize::from(queue));
        queue.map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// The driver is ready.
    pub fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0 && !self.resetting
    }

    /// What the driver did wrong: how often, and the last of it.
    pub fn mistakes(&self) -> (u64, Option<&'static str>) {
        (self.mistakes, self.last_mistake)
    }

    /// Features that were agreed on.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// What the status register says.
    pub fn status(&mut self) -> u8 {
        if self.resetting && self.mirror.is_quiet() {
            self.resetting = false;
            self.status = 0;
        }
        match self.mirror.is_broken() && self.status & DRIVER_OK != 0 {
            true => self.status | NEEDS_RESET,
            false => self.status,
        }
    }

    /// Counts what the driver should not have done.
    pub(crate) fn mistake(&mut self, what: &'static str) {
        self.mistakes += 1;
        self.last_mistake = Some(what);
    }

    /// The guest reads.
    pub fn read(&mut self, offset: usize, data: &mut [u8]) {
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let half = |bits: u64, select: u32| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.offered_select.to_le_bytes());
        put(0x04, &half(self.offered, self.offered_select).to_le_bytes());
        put(0x08, &self.accepted_select.to_le_bytes());
        put(
            0x0c,
            &half(self.accepted, self.accepted_select).to_le_bytes(),
        );
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status(), self.mirror.generation()]);
        put(QUEUE_SELECT, &self.select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        }
        copy(&bytes, offset, data);
    }

    /// The guest writes. Each field is written alone, 64-bit ones in halves or
    /// at once (4.1.3.1).
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Asked {
        let mut value = [0; 8];
        let Some(place) = value.get_mut(..data.len()) else {
            return Asked::Nothing;
        };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        let settled = self.status & FEATURES_OK != 0;
        match (offset, data.len()) {
            (0x00, 4) => self.offered_select = value as u32,
            (0x08, 4) => self.accepted_select = value as u32,
            (0x0c, 4) if settled => self.mistake("it chose features after they were settled"),
            (0x0c, 4) => match self.accepted_select {
                0 => self.accepted = (self.accepted & !0xffff_ffff) | value,
                1 => self.accepted = (self.accepted & 0xffff_ffff) | (value << 32),
                _ => {}
            },
            (CONFIG_VECTOR, 2) => self.config_vector = self.vector(value as u16),
            (STATUS, 1) => return self.set_status(value as u8),
            (QUEUE_SELECT, 2) => self.select = value as u16,
            _ => return self.write_queue(offset, data.len(), value),
        }
        Asked::Nothing
    }

    /// A vector that does not exist is none, which the driver reads back.
    fn vector(&self, vector: u16) -> u16 {
        match vector < self.vectors {
            true => vector,
            false => NO_VECTOR,
        }
    }

    fn write_queue(&mut self, offset: usize, length: usize, value: u64) -> Asked {
        let active = self.is_active();
        let vector = self.vector(value as u16);
        let select = self.select;
        let Some(queue) = self.queues.get_mut(usize::from(select)) else {
            return Asked::Nothing;
        };
        match (offset, length) {
            (QUEUE_VECTOR, 2) => {
                queue.vector = vector;
                if active && queue.enabled {
                    return Asked::Vector(select);
                }
            }
            // A queue that is enabled stays as it is until the reset.
            _ if queue.enabled || active => {
                self.mistake("it changed a queue that was enabled");
            }
            (QUEUE_SIZE, 2) => queue.size = value as u16,
            (QUEUE_ENABLE, 2) if value == 1 => match queue.checked(&self.ram) {
                Ok(()) => queue.enabled = true,
                Err(why) => self.mistake(why),
            },
            (0x20..0x38, 4 | 8) => {
                let field = match offset & !7 {
                    0x20 => &mut queue.descriptors,
                    0x28 => &mut queue.driver,
                    _ => &mut queue.device,
                };
                *field = match (offset & 7, length) {
                    (0, 8) => value,
                    (0, _) => (*field & !0xffff_ffff) | value,
                    (4, 4) => (*field & 0xffff_ffff) | (value << 32),
                    _ => *field,
                };
            }
            _ => {}
        }
        Asked::Nothing
    }

    fn set_status(&mut self, status: u8) -> Asked {
        self.status();
        if status == 0 {
            return self.reset();
        }
        if self.resetting {
            self.mistake("it went on before its reset was done");
            return Asked::Nothing;
        }
        let before = self.status;
        // Bits are only ever added.
        let mut after = before | (status & KNOWN);
        let new = after & !before;
        let possible = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if new & FEATURES_OK != 0 && !possible {
            after &= !FEATURES_OK;
            self.mistake("it chose features that were not offered");
        }
        if after & DRIVER_OK != 0 && after & FEATURES_OK == 0 {
            after &= !DRIVER_OK;
            self.mistake("it was ready before its features were settled");
        }
        self.status = after;
        match after & !before & DRIVER_OK {
            0 => Asked::Nothing,
            _ => Asked::Activate,
        }
    }

    fn reset(&mut self) -> Asked {
        self.accepted = 0;
        (self.offered_select, self.accepted_select, self.select) = (0, 0, 0);
        self.config_vector = NO_VECTOR;
        self.queues.iter_mut().for_each(Queue::reset);
        if self.resetting {
            return Asked::Nothing;
        }
        if self.status & DRIVER_OK == 0 {
            self.status = 0;
            return Asked::Nothing;
        }
        self.resetting = true;
        Asked::Reset
    }

    /// What the driver that is ready has set up; `call` has what a vector's
    /// interrupt is written to.
    pub fn activation(&self, call: impl Fn(u16) -> Option<Arc<EventFd>>) -> Activation {
        let enabled = (0..).zip(&self.queues).filter(|(_, queue)| queue.enabled);
        let rings = enabled.map(|(index, queue)| Ring {
            index,
            size: queue.size,
            descriptors: queue.descriptors,
            available: queue.driver,
            used: queue.device,
            kick: Arc::clone(&queue.kick),
            call: call(queue.vector).unwrap_or_else(|| Arc::clone(&self.nowhere)),
        });
        Activation {
            features: self.accepted,
            rings: rings.collect(),
        }
    }

    /// What a queue without an interrupt has instead.
    pub fn nowhere(&self) -> Arc<EventFd> {
        Arc::clone(&self.nowhere)
    }

    /// Has the device reset by the machine instead of by its driver.
    pub fn force_reset(&mut self, back: &mut dyn Back) {
        if self.reset() == Asked::Reset {
            back.reset();
        }
    }
}

#[cfg(test)]
mod tests;
