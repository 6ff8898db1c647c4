//! The bus: who is at which of its 32 places, and who answers an access of the
//! guest to configuration space or device memory. Called by the virtual CPUs'
//! threads for each such access, and by the control socket to add and remove.
//!
//! At place 0 is a host bridge, which does nothing. Every other device has one
//! function. A device that comes while the guest runs is found when the guest
//! rescans the bus (`/sys/bus/pci/rescan`); one that the guest has let go of
//! (`remove` beside it) can be taken away.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::layout;
use crate::pci::config::{Config, Identity};
use crate::virtio::function::Function;

/// Places.
pub const PLACES: usize = 32;
/// Bytes of configuration space of one function.
const FUNCTION_SPACE: u64 = 4096;
/// Functions of a place; the first alone is there.
const FUNCTIONS: u64 = 8;

type Shared = Arc<Mutex<Function>>;

/// The bus.
#[derive(Debug)]
pub struct Bus {
    bridge: Config,
    places: RwLock<[Option<Shared>; PLACES]>,
    /// Where a device was put last.
    last: AtomicUsize,
}

impl Default for Bus {
    fn default() -> Self {
        // A bridge of Red Hat's, of the class of host bridges.
        let bridge = Config::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            subsystem: 0x1100,
            class: [0x06, 0x00, 0x00],
            revision: 0,
        });
        Self {
            bridge,
            places: RwLock::default(),
            last: AtomicUsize::new(0),
        }
    }
}

impl Bus {
    /// The next free place, for a device to be made there. All have their turn: a guest that has not
    /// let go of a device takes whoever comes to its place for that one, and does not see another.
    pub fn free_place(&self) -> Option<u8> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let last = self.last.load(Ordering::Relaxed);
        let mut turn = (last + 1..PLACES).chain(1..=last);
        let free = turn.find(|place| places[*place].is_none())?;
        Some(free as u8)
    }

    /// Puts a device at its place.
    pub fn add(&self, place: u8, function: Shared) {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let place = usize::from(place) % PLACES;
        places[place] = Some(function);
        self.last.store(place, Ordering::Relaxed);
    }

    /// Takes the device from its place.
    pub fn remove(&self, place: u8) -> Option<Shared> {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        places[usize::from(place) % PLACES].take()
    }

    /// All that are there, and where.
    pub fn devices(&self) -> Vec<(u8, Shared)> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let devices = (0..).zip(places.iter());
        devices
            .filter_map(|(place, device)| Some((place, Arc::clone(device.as_ref()?))))
            .collect()
    }

    /// True where `address` belongs to configuration space or to the window of
    /// device memory.
    pub fn covers(address: u64) -> bool {
        let within = |start: u64, size: u64| (start..start + size).contains(&address);
        within(layout::ECAM, layout::ECAM_SIZE) || within(layout::WINDOW64, layout::WINDOW64_SIZE)
    }

    /// The guest reads. False where nobody is there, and `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        if let Some((place, offset)) = configuration(address) {
            return match place {
                0 => {
                    self.bridge.read(offset, data);
                    true
                }
                _ => {
                    let device = self.at(place);
                    device.is_some_and(|device| {
                        lock(&device).read_config(offset, data);
                        true
                    })
                }
            };
        }
        self.with_memory(address, |function, offset| {
            function.read_memory(offset, data);
        })
    }

    /// The guest writes. False where nobody is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        if let Some((place, offset)) = configuration(address) {
            return match place {
                0 => true,
                _ => self.at(place).is_some_and(|device| {
                    lock(&device).write_config(offset, data);
                    true
                }),
            };
        }
        self.with_memory(address, |function, offset| {
            function.write_memory(offset, data);
        })
    }

    fn at(&self, place: usize) -> Option<Shared> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.get(place)?.clone()
    }

    fn with_memory(&self, address: u64, access: impl FnOnce(&mut Function, u64)) -> bool {
        // Guests leave memory where it was put, so the place is mostly known.
        let likely = address.wrapping_sub(layout::WINDOW64) / layout::BAR_SLOT;
        let likely = usize::try_from(likely)
            .ok()
            .and_then(|place| self.at(place));
        let others = || self.devices().into_iter().map(|(_, device)| device);
        for device in likely.into_iter().chain(others()) {
            let mut function = lock(&device);
            if let Some(offset) = function.memory_offset(address) {
                access(&mut function, offset);
                return true;
            }
        }
        false
    }
}

/// The function, whoever panicked with it.
pub fn lock(function: &Shared) -> MutexGuard<'_, Function> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Place and offset of an access to configuration space; a place beyond the
/// last for functions that nobody has.
fn configuration(address: u64) -> Option<(usize, usize)> {
    let offset = address.checked_sub(layout::ECAM)?;
    if offset >= layout::ECAM_SIZE {
        return None;
    }
    let function = offset / FUNCTION_SPACE;
    let place = match function % FUNCTIONS {
        0 => (function / FUNCTIONS) as usize,
        _ => PLACES,
    };
    Some((place, (offset % FUNCTION_SPACE) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_is_split_by_place_and_function() {
        assert_eq!(configuration(layout::ECAM + 4), Some((0, 4)));
        assert_eq!(configuration(layout::ECAM + 0x8010), Some((1, 0x10)));
        assert_eq!(configuration(layout::ECAM + 0x1010), Some((PLACES, 0x10)));
        let end = layout::ECAM + layout::ECAM_SIZE;
        assert_eq!(configuration(end - 0x8000), Some((31, 0)));
        assert_eq!(configuration(end), None);
        assert_eq!(configuration(layout::ECAM - 1), None);
    }

    #[test]
    fn an_empty_place_is_all_ones_and_the_bridge_is_there() {
        let bus = Bus::default();
        let mut data = [0; 4];
        assert!(bus.read(layout::ECAM, &mut data));
        assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
        assert!(!bus.read(layout::ECAM + 0x8000, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.read(layout::WINDOW64 + 5, &mut data));
        assert!(!bus.write(layout::WINDOW64, &[0; 8]));
        assert!(bus.write(layout::ECAM, &[0; 4]));
        assert_eq!(bus.free_place(), Some(1));
        for (last, next) in [(1, 2), (30, 31), (31, 1)] {
            bus.last.store(last, Ordering::Relaxed);
            assert_eq!(bus.free_place(), Some(next));
        }
    }
}
