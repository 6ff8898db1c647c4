//! A virtio device as a PCI function (virtio 1.3, 4.1): capabilities that say
//! where in its memory each structure is, and what an access there does. Held by
//! [`crate::pci::bus`] behind a lock, since every virtual CPU may come.
//!
//! Notifications of the driver do not come here while the device is active: the
//! hypervisor writes them to the queues' eventfds itself.

use std::io;
use std::sync::Arc;

use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::common::{Asked, Common, NO_VECTOR};
use super::{Back, Mirror};
use crate::layout;
use crate::memory::Ram;
use crate::pci::bus::PLACES;
use crate::pci::config::{BAR0, COMMAND, Config, Identity};
use crate::pci::copy;
use crate::pci::msix::{self, Msix};
use crate::wiring::Wiring;

/// The vendor of virtio devices.
const TOO_FAST: &str = "it asked for more than its backend takes in";
const VENDOR: u16 = 0x1af4;
/// Devices have this plus their virtio id.
const DEVICE: u16 = 0x1040;

/// Capability id, "vendor specific".
const VENDOR_CAPABILITY: u8 = 0x09;
/// Kinds of it (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// What lies where in the function's memory, a page or more each.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
/// Bytes of it, a power of two.
pub const MEMORY_SIZE: u64 = 0x8000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;
/// Most queues: their vectors, and one, fit the table and the interrupts of a place.
pub const QUEUES_MAX: usize = 128;
/// Interrupts of a place.
const MESSAGES: u32 = QUEUES_MAX as u32 + 1;
/// What KVM has of them (KVM_MAX_IRQ_ROUTES); the bridge takes none.
const _: () = assert!(layout::FIRST_MESSAGE + (PLACES as u32 - 1) * MESSAGES <= 4096);

/// What a function is made of.
#[derive(Debug)]
pub struct Parts {
    /// Virtio device id (5): 2 is block.
    pub device_id: u16,
    /// Features the device has.
    pub features: u64,
    /// Largest size of each queue.
    pub queues: Vec<u16>,
    /// The other half.
    pub back: Box<dyn Back>,
    /// What both halves know.
    pub mirror: Arc<Mirror>,
    /// What configuration changes are told by.
    pub changed: ConfigCall,
}

/// Where the other half tells the driver of a new configuration: the eventfd of
/// the vector that the driver has chosen for it.
pub type ConfigCall = Arc<std::sync::Mutex<Option<Arc<EventFd>>>>;

/// A device on the bus.
#[derive(Debug)]
pub struct Function {
    config: Config,
    msix: Msix,
    msix_at: usize,
    window_at: usize,
    common: Common,
    /// Set when configuration changed, read to clear (4.1.4.5).
    seen_generation: u8,
    back: Box<dyn Back>,
    mirror: Arc<Mirror>,
    changed: ConfigCall,
    wiring: Arc<dyn Wiring>,
    place: u8,
    device_id: u16,
    /// Where the queues' doorbells are, while there are any.
    doorbells: Option<u64>,
    /// Notifications that came here.
    slow_kicks: u64,
}

impl Function {
    /// A function at this place of the bus, with its memory in the place's slot.
    ///
    /// # Errors
    /// No eventfds.
    pub fn new(
        place: u8,
        parts: Parts,
        ram: Arc<Ram>,
        wiring: Arc<dyn Wiring>,
    ) -> io::Result<Self> {
        let vectors = parts.queues.len() as u16 + 1;
        // The bridge at place 0 has none.
        let first = layout::FIRST_MESSAGE + u32::from(place.saturating_sub(1)) * MESSAGES;
        let msix = Msix::new(vectors, first, Arc::clone(&wiring))?;
        let mirror = Arc::clone(&parts.mirror);
        let common = Common::new(parts.features, &parts.queues, vectors, mirror, ram)?;
        let (config, msix_at, window_at) =
            configuration(place, parts.device_id, &msix, parts.queues.len());
        Ok(Self {
            config,
            msix,
            msix_at,
            window_at,
            common,
            seen_generation: parts.mirror.generation(),
            back: parts.back,
            mirror: parts.mirror,
            changed: parts.changed,
            wiring,
            place,
            device_id: parts.device_id,
            doorbells: None,
            slow_kicks: 0,
        })
    }

    /// Its place on the bus.
    pub fn place(&self) -> u8 {
        self.place
    }

    /// What it is (virtio 1.3, 5).
    pub fn device_id(&self) -> u16 {
        self.device_id
    }

    /// For the control socket: is the driver ready, the features, and what went wrong.
    pub fn report(&self) -> Report {
        let (mistakes, last_mistake) = self.common.mistakes();
        Report {
            driver_ready: self.common.is_active(),
            features: self.common.accepted(),
            slow_kicks: self.slow_kicks,
            unwired: self.msix.failures(),
            mistakes,
            last_mistake,
        }
    }

    /// The offset of `address` in its memory, if it is there.
    pub fn memory_offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.config.memory()?)?;
        (offset < MEMORY_SIZE).then_some(offset)
    }

    /// The guest reads configuration space.
    pub fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window_at + WINDOW_DATA
            && let Some((at, length)) = self.window(data.len())
        {
            let mut value = [0; 4];
            self.read_memory(at, &mut value[..length]);
            return copy(&value[..length], 0, data);
        }
        self.config.read(offset, data);
    }

    /// The guest writes configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.memory();
        self.config.write(offset, data);
        let touches = |at: usize, size: usize| offset < at + size && at < offset + data.len();
        if touches(self.msix_at + 2, 2) {
            self.msix.set_control(self.config.half(self.msix_at + 2));
        }
        if (touches(COMMAND, 2) || touches(BAR0, 8)) && self.config.memory() != before {
            self.move_doorbells();
        }
        if offset == self.window_at + WINDOW_DATA
            && let Some((at, length)) = self.window(data.len())
        {
            self.write_memory(at, &data[..length]);
        }
    }

    /// Offset and length that the window in configuration space is set to
    /// (4.1.4.9), if it is a place and within `size` bytes.
    fn window(&self, size: usize) -> Option<(u64, usize)> {
        let bar = self.config.word(self.window_at + 4) & 0xff;
        let offset = u64::from(self.config.word(self.window_at + 8));
        let length = self.config.word(self.window_at + 12) as usize;
        let fits = bar == 0 && matches!(length, 1 | 2 | 4) && length <= size;
        let aligned = offset.is_multiple_of(length.max(1) as u64) && offset < MEMORY_SIZE;
        (fits && aligned).then_some((offset, length))
    }

    /// The guest reads its memory.
    pub fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = |start: u64| (offset - start) as usize;
        match offset {
            COMMON..ISR => self.common.read(within(COMMON), data),
            ISR => {
                let generation = self.mirror.generation();
                let changed = std::mem::replace(&mut self.seen_generation, generation);
                if let Some(first) = data.first_mut() {
                    *first = u8::from(changed != generation) << 1;
                }
            }
            DEVICE_CONFIG..NOTIFY => self.mirror.read_config(within(DEVICE_CONFIG), data),
            TABLE..PENDING => self.msix.read_table(within(TABLE), data),
            PENDING.. => self.msix.read_pending(within(PENDING), data),
            _ => {}
        }
    }

    /// The guest writes its memory.
    pub fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let at = (offset - COMMON) as usize;
                match self.common.write(at, data) {
                    Asked::Nothing => {}
                    Asked::Activate => self.activate(),
                    Asked::Reset => self.stop(),
                    Asked::Vector(queue) => {
                        let call = self.call_of(self.common.queue_vector(queue));
                        if !self.back.set_call(queue, call) {
                            self.common.mistake(TOO_FAST);
                        }
                    }
                }
                self.follow_config_vector();
            }
            DEVICE_CONFIG..NOTIFY => {
                let at = offset - DEVICE_CONFIG;
                self.mirror.write_config(at as usize, data);
                if !self.back.write_config(at as u32, data) {
                    self.common.mistake(TOO_FAST);
                }
            }
            NOTIFY..TABLE => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_STEP);
                if let Some(kick) = self.common.kick(queue as u16) {
                    self.slow_kicks += 1;
                    let _ = kick.write(1);
                }
            }
            TABLE..PENDING => self.msix.write_table((offset - TABLE) as usize, data),
            _ => {}
        }
    }

    fn call_of(&self, vector: u16) -> Arc<EventFd> {
        let event = self.msix.event(vector);
        event.unwrap_or_else(|| self.common.nowhere())
    }

    fn follow_config_vector(&self) {
        let vector = self.common.config_vector();
        let call = (vector != NO_VECTOR)
            .then(|| self.msix.event(vector))
            .flatten();
        let mut changed = self
            .changed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *changed = call;
    }

    fn activate(&mut self) {
        let activation = self.common.activation(|vector| self.msix.event(vector));
        // Doorbells first: what is rung before the backend listens stays in the eventfds.
        self.move_doorbells();
        self.mirror.set_busy(true);
        self.back.activate(activation);
    }

    fn stop(&mut self) {
        self.move_doorbells();
        self.back.reset();
    }

    /// Has the doorbells where the function's memory is, while it is active, and
    /// nowhere else.
    fn move_doorbells(&mut self) {
        let wanted = match self.common.is_active() {
            true => self.config.memory(),
            false => None,
        };
        if wanted == self.doorbells {
            return;
        }
        if let Some(old) = self.doorbells.take() {
            self.each_doorbell(old, |wiring, address, kick| {
                wiring.remove_doorbell(address, kick)
            });
        }
        if let Some(new) = wanted {
            self.each_doorbell(new, |wiring, address, kick| {
                wiring.add_doorbell(address, kick)
            });
            self.doorbells = Some(new);
        }
    }

    fn each_doorbell(
        &self,
        memory: u64,
        ring: impl Fn(&dyn Wiring, u64, &EventFd) -> io::Result<()>,
    ) {
        for queue in 0..self.common.queue_count() {
            let Some(kick) = self.common.kick(queue) else {
                continue;
            };
            let address = memory + NOTIFY + u64::from(queue) * u64::from(NOTIFY_STEP);
            // Without it notifications come as writes, slower and right.
            if let Err(e) = ring(&*self.wiring, address, kick) {
                debug!("a doorbell at {address:#x}: {e}");
            }
        }
    }

    /// Switches it off and on, for a machine that starts again. The other half
    /// still has to come to rest: see [`Mirror::is_quiet`].
    pub fn reset(&mut self) {
        self.common.force_reset(&mut *self.back);
        self.move_doorbells();
        self.msix.reset();
        let (config, ..) = configuration(
            self.place,
            self.device_id,
            &self.msix,
            usize::from(self.common.queue_count()),
        );
        self.config = config;
        self.follow_config_vector();
    }

    /// True when a reset is over.
    pub fn is_quiet(&self) -> bool {
        self.mirror.is_quiet()
    }

    /// The hypervisor's machine is another, in which nothing is wired.
    pub fn forget_wiring(&mut self) {
        self.msix.forget();
        self.doorbells = None;
    }

    /// Takes it out of the machine: what is wired is not any more, and the other
    /// half ends.
    pub fn remove(&mut self) {
        self.reset();
        self.back.remove();
    }
}

/// What the control socket says of a function.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// The driver has set it up.
    pub driver_ready: bool,
    /// Features both have.
    pub features: u64,
    /// Notifications that took the long way.
    pub slow_kicks: u64,
    /// Interrupts that the hypervisor did not take.
    pub unwired: u64,
    /// What the driver did against the rules.
    pub mistakes: u64,
    /// The last of it.
    pub last_mistake: Option<&'static str>,
}

/// Offset of the data in the window's capability.
const WINDOW_DATA: usize = 16;

/// The space as it is at first, and where two of its capabilities are.
fn configuration(place: u8, id: u16, msix: &Msix, queues: usize) -> (Config, usize, usize) {
    let mut config = Config::new(Identity {
        vendor: VENDOR,
        device: DEVICE + id,
        subsystem: DEVICE + id,
        class: class(id),
        revision: 1,
    });
    let address = layout::WINDOW64 + u64::from(place) * layout::BAR_SLOT;
    config.set_memory(address, MEMORY_SIZE);
    let msix_at = config.add_capability(
        msix::CAPABILITY,
        &msix.capability(TABLE as u32, PENDING as u32),
    );
    config.allow(msix_at + 2, &msix::CONTROL_MASK.to_le_bytes());
    let capability = |kind: u8, offset: u64, length: u64, more: &[u8]| {
        let mut body = vec![(16 + more.len()) as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        body
    };
    let notify = queues as u64 * u64::from(NOTIFY_STEP);
    for (kind, offset, length, more) in [
        (COMMON_CFG, COMMON, super::common::SIZE as u64, &[][..]),
        (NOTIFY_CFG, NOTIFY, notify, &NOTIFY_STEP.to_le_bytes()),
        (ISR_CFG, ISR, 1, &[]),
        (DEVICE_CFG, DEVICE_CONFIG, NOTIFY - DEVICE_CONFIG, &[]),
    ] {
        config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, length, more));
    }
    let window = capability(PCI_CFG, 0, 0, &[0; 4]);
    let window_at = config.add_capability(VENDOR_CAPABILITY, &window);
    config.allow(window_at + 4, &[0xff]);
    config.allow(window_at + 8, &[0xff; 8 + 4]);
    (config, msix_at, window_at)
}

/// The PCI class of a virtio device, which drivers do not ask for but people do.
fn class(id: u16) -> [u8; 3] {
    match id {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x00, 0x00],
        26 => [0x01, 0x80, 0x00],
        _ => [0xff, 0x00, 0x00],
    }
}

#[cfg(test)]
mod tests;
