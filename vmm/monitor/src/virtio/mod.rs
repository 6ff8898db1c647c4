//! A virtio device on the PCI bus, whichever it is (virtio 1.3, 4.1): the
//! registers by which a driver sets it up, and nothing of what it does. Rings
//! are the backend's; this never looks into one.
//!
//! [`common`] is the state machine of the common configuration, [`function`] puts
//! it behind PCI, and [`Back`] is what it asks of the device's other half, which
//! [`crate::backend`] gives over vhost-user and tests fake.

pub mod common;
pub mod function;

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Feature bits that concern the transport (virtio 1.3, 6).
pub const VERSION_1: u64 = 1 << 32;

/// A ring as the driver set it up, checked: it lies in guest memory.
#[derive(Debug, Clone)]
pub struct Ring {
    /// Which.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// Guest address of the descriptors.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// The driver's notifications.
    pub kick: Arc<EventFd>,
    /// The device's.
    pub call: Arc<EventFd>,
}

/// What a driver that is ready wants.
#[derive(Debug, Clone)]
pub struct Activation {
    /// Features it has accepted.
    pub features: u64,
    /// Rings it has enabled.
    pub rings: Vec<Ring>,
}

/// The other half of a device. None of this waits: what takes time goes on by
/// itself and shows in [`Mirror`].
pub trait Back: Send + Debug {
    /// The driver is ready.
    fn activate(&mut self, activation: Activation);

    /// The driver resets the device: all rings are stopped, and
    /// [`Mirror::is_quiet`] says when.
    fn reset(&mut self);

    /// A ring's notifications of the driver go here from now on. False when the
    /// driver asks for such things faster than the backend takes them in: then
    /// this one is passed over.
    #[must_use]
    fn set_call(&mut self, ring: u16, call: Arc<EventFd>) -> bool;

    /// The driver writes device configuration. False as above.
    #[must_use]
    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool;

    /// The device goes for good.
    fn remove(&mut self);
}

/// What both halves know of each other. Written by the other half, read when the
/// guest asks.
#[derive(Debug, Default)]
pub struct Mirror {
    config: Mutex<Vec<u8>>,
    /// Changes with the configuration.
    generation: AtomicU32,
    /// Rings are active, or being stopped.
    busy: AtomicBool,
    /// The device cannot go on (DEVICE_NEEDS_RESET).
    broken: AtomicBool,
}

impl Mirror {
    /// One with this device configuration.
    pub fn new(config: Vec<u8>) -> Self {
        Self {
            config: Mutex::new(config),
            ..Self::default()
        }
    }

    /// The device configuration now.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        crate::pci::copy(&config, offset, data);
    }

    /// Puts the driver's own bytes where it will read them.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(data.len());
        if let Some(place) = config.get_mut(offset..end) {
            place.copy_from_slice(data);
        }
    }

    /// Replaces the device configuration. True where it is another.
    pub fn set_config(&self, new: &[u8]) -> bool {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *config != new;
        if changed {
            config.clear();
            config.extend_from_slice(new);
            self.generation.fetch_add(1, Ordering::Release);
        }
        changed
    }

    /// A number that changes with the configuration.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire) as u8
    }

    /// No ring is active: the guest's memory is its own.
    pub fn is_quiet(&self) -> bool {
        !self.busy.load(Ordering::Acquire)
    }

    /// Rings are active from now on, or are not.
    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Release);
    }

    /// The device cannot go on until the driver resets it.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// It is broken, or whole again.
    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Release);
    }
}
