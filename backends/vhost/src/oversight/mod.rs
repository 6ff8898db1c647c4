//! What an operator watches and steers one device by: its statistics, its
//! limits, and the way to tell its front end that its configuration changed.
//!
//! A program makes one per device if somebody may look or limits are set, and
//! gives it to the device's [`Server`](crate::Server). Without it the data path
//! neither counts nor reads a clock.

mod notice;
mod operations;

use std::sync::{Arc, Mutex, PoisonError};

use crate::clock;
use crate::device::Device;
use crate::limiter::{Limiter, Limits};
use crate::stats::DeviceStats;

pub(crate) use notice::Notices;
pub use notice::Told;
pub use operations::{Overseen, device_named, metrics_of, with_operations};

/// Statistics, limits and the front end's ear of one device.
#[derive(Debug, Default)]
pub struct Oversight {
    pub(crate) limiter: Limiter,
    pub(crate) stats: Option<DeviceStats>,
    pub(crate) notices: Mutex<Option<Notices>>,
}

impl Oversight {
    /// Limits, and nobody counts.
    pub fn new(limits: &Limits) -> Self {
        let oversight = Self::default();
        oversight.set_limits(limits);
        oversight
    }

    /// Counts what the queues of `device` do, too.
    #[must_use]
    pub fn counting<D: Device>(mut self, device: &D) -> Self {
        self.stats = Some(DeviceStats::new(device));
        self
    }

    /// The limits as they are.
    pub fn limits(&self) -> Limits {
        self.limiter.get()
    }

    /// Changes the limits. The workers have to be woken after that
    /// ([`Pool::waker`](crate::Pool::waker)), or they wait as long as the old
    /// ones said.
    pub fn set_limits(&self, limits: &Limits) {
        self.limiter.set(limits, clock::now());
    }

    /// Tells the front end, if there is one that wants to know, to read the
    /// configuration space again. Never waits.
    pub fn config_changed(&self) -> Told {
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        match &*notices {
            None => Told::Nobody,
            Some(channel) => {
                let told = channel.config_changed();
                if told == Told::Nobody {
                    *notices = None;
                }
                told
            }
        }
    }

    /// A session has a channel for notices now, or none any more.
    pub(crate) fn hear(&self, channel: Option<Notices>) {
        *self.notices.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }
}

/// The oversight of a device, where it has any.
pub(crate) type MaybeOverseen = Option<Arc<Oversight>>;
