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
use crate::limiter::{LIMIT_NAMES, LimitNames, Limiter, Limits, MAX_LANES};
use crate::stats::DeviceStats;

pub(crate) use notice::Notices;
pub use notice::Told;
pub use operations::{Overseen, device_named, metrics_of, with_operations};

/// Statistics, limits and the front end's ear of one device.
#[derive(Debug)]
pub struct Oversight {
    /// One for each direction that is limited apart, and what its limits are called.
    pub(crate) lanes: [Limiter; MAX_LANES],
    names: &'static [LimitNames],
    pub(crate) stats: Option<DeviceStats>,
    pub(crate) notices: Mutex<Option<Notices>>,
}

impl Default for Oversight {
    fn default() -> Self {
        Self {
            lanes: Default::default(),
            names: &[LIMIT_NAMES],
            stats: None,
            notices: Mutex::default(),
        }
    }
}

impl Oversight {
    /// Limits, and nobody counts.
    pub fn new(limits: &Limits) -> Self {
        Self::with_lanes(&[LIMIT_NAMES], &[*limits])
    }

    /// Limits for each of these directions.
    pub fn with_lanes(names: &'static [LimitNames], limits: &[Limits]) -> Self {
        let names = &names[..names.len().min(MAX_LANES)];
        let oversight = Self {
            names,
            ..Self::default()
        };
        for ((_, lane), limits) in oversight.limited().zip(limits) {
            lane.set(limits, clock::now());
        }
        oversight
    }

    /// What is limited apart, with its names.
    pub(crate) fn limited(&self) -> impl Iterator<Item = (&'static LimitNames, &Limiter)> {
        self.names.iter().zip(&self.lanes)
    }

    /// Counts what the queues of `device` do, too.
    #[must_use]
    pub fn counting<D: Device>(mut self, device: &D) -> Self {
        self.stats = Some(DeviceStats::new(device));
        self
    }

    /// The limits as they are, of the first direction if there are several.
    pub fn limits(&self) -> Limits {
        self.lanes[0].get()
    }

    /// Changes these limits. The workers have to be woken after that
    /// ([`Pool::waker`](crate::Pool::waker)), or they wait as long as the old
    /// ones said.
    pub fn set_limits(&self, limits: &Limits) {
        self.lanes[0].set(limits, clock::now());
    }

    /// The limits of each direction, as they are.
    pub(crate) fn all_limits(&self) -> Vec<Limits> {
        self.limited().map(|(_, lane)| lane.get()).collect()
    }

    /// Changes those of each direction, as [`set_limits`](Self::set_limits) does.
    pub(crate) fn set_all_limits(&self, limits: &[Limits]) {
        for ((_, lane), limits) in self.limited().zip(limits) {
            lane.set(limits, clock::now());
        }
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
