//! Drivers that keep to the order and drivers that do not.

use proptest::prelude::*;

use super::*;
use crate::memory::{Backing, GRAIN};

const OFFERED: u64 = VERSION_1 | 0b1010;

fn common() -> (Common, Arc<Mirror>) {
    let mirror = Arc::new(Mirror::new(vec![1, 2, 3, 4]));
    let ram = Arc::new(Ram::new(GRAIN, Backing::default()).unwrap());
    let common = Common::new(OFFERED, &[256, 64], 3, Arc::clone(&mirror), ram).unwrap();
    (common, mirror)
}

fn get(common: &mut Common, offset: usize, size: usize) -> u64 {
    let mut data = [0; 8];
    common.read(offset, &mut data[..size]);
    u64::from_le_bytes(data)
}

fn set(common: &mut Common, offset: usize, size: usize, value: u64) -> Asked {
    common.write(offset, &value.to_le_bytes()[..size])
}

/// As Linux does it, with these features.
fn negotiate(common: &mut Common, features: u64) {
    set(common, STATUS, 1, 1);
    set(common, STATUS, 1, 3);
    for half in [0, 1] {
        set(common, 0x08, 4, half);
        set(common, 0x0c, 4, (features >> (32 * half)) & 0xffff_ffff);
    }
    set(common, STATUS, 1, 0xb);
}

fn enable(common: &mut Common, queue: u64, at: u64) {
    set(common, QUEUE_SELECT, 2, queue);
    set(common, QUEUE_SIZE, 2, 64);
    set(common, QUEUE_VECTOR, 2, queue + 1);
    set(common, 0x20, 4, at);
    set(common, 0x24, 4, 0);
    set(common, 0x28, 8, at + 0x1000);
    set(common, 0x30, 8, at + 0x2000);
    set(common, QUEUE_ENABLE, 2, 1);
}

#[test]
fn a_driver_sets_a_device_up_and_resets_it() {
    let (mut common, mirror) = common();
    set(&mut common, 0x00, 4, 1);
    assert_eq!(get(&mut common, 0x04, 4), OFFERED >> 32);
    negotiate(&mut common, VERSION_1 | 2);
    assert_eq!(get(&mut common, STATUS, 1), 0xb);
    enable(&mut common, 1, 0x1_0000);
    assert_eq!(get(&mut common, QUEUE_ENABLE, 2), 1);
    assert_eq!(get(&mut common, 0x1e, 2), 1);
    assert_eq!(set(&mut common, STATUS, 1, 0xf), Asked::Activate);
    let activation = common.activation(|vector| {
        assert_eq!(vector, 2);
        None
    });
    assert_eq!(activation.features, VERSION_1 | 2);
    assert_eq!(activation.rings.len(), 1);
    let ring = &activation.rings[0];
    assert_eq!((ring.index, ring.size), (1, 64));
    assert_eq!((ring.descriptors, ring.used), (0x1_0000, 0x1_2000));

    mirror.set_busy(true);
    assert_eq!(set(&mut common, STATUS, 1, 0), Asked::Reset);
    // The other half still has requests.
    assert_eq!(get(&mut common, STATUS, 1), 0xf);
    assert_eq!(set(&mut common, STATUS, 1, 1), Asked::Nothing);
    mirror.set_busy(false);
    assert_eq!(get(&mut common, STATUS, 1), 0);
    set(&mut common, QUEUE_SELECT, 2, 1);
    assert_eq!(get(&mut common, QUEUE_ENABLE, 2), 0);
    assert_eq!(get(&mut common, QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
    negotiate(&mut common, VERSION_1);
    assert_eq!(set(&mut common, STATUS, 1, 0xf), Asked::Activate);
}

#[test]
fn features_that_were_not_offered_are_not_settled() {
    for features in [VERSION_1 | 4, 2] {
        let (mut common, _) = common();
        negotiate(&mut common, features);
        assert_eq!(get(&mut common, STATUS, 1), 3);
        assert_eq!(set(&mut common, STATUS, 1, 0xf), Asked::Nothing);
        assert_eq!(get(&mut common, STATUS, 1) & 4, 0);
        assert!(common.mistakes().0 > 0);
    }
    let (mut common, _) = common();
    negotiate(&mut common, VERSION_1);
    set(&mut common, 0x08, 4, 0);
    set(&mut common, 0x0c, 4, 0b1010);
    assert_eq!(common.accepted(), VERSION_1);
}

#[test]
fn a_queue_that_is_not_in_memory_is_not_enabled() {
    let end = GRAIN - 0x3000;
    for (descriptors, driver, device, size) in [
        (GRAIN - 512, 0x1000, 0x2000, 64),
        (0x1000, GRAIN, 0x2000, 64),
        (0x1000, 0x2000, u64::MAX - 3, 64),
        (0x1008, 0x2000, 0x3000, 64),
        (0x1000, 0x2001, 0x3000, 64),
        (0x1000, 0x2000, 0x3002, 64),
        (0x1000, 0x2000, 0x3000, 48),
        (0x1000, 0x2000, 0x3000, 0),
        (0x1000, 0x2000, 0x3000, 512),
        (end, end + 0x1000, end + 0x2000, 64),
    ] {
        let (mut common, _) = common();
        set(&mut common, QUEUE_SIZE, 2, size);
        set(&mut common, 0x20, 8, descriptors);
        set(&mut common, 0x28, 8, driver);
        set(&mut common, 0x30, 8, device);
        set(&mut common, QUEUE_ENABLE, 2, 1);
        let enabled = get(&mut common, QUEUE_ENABLE, 2) == 1;
        assert_eq!(enabled, descriptors == end, "{descriptors:#x} {size}");
    }
}

#[test]
fn a_vector_that_is_none_reads_back_as_none() {
    let (mut common, _) = common();
    set(&mut common, CONFIG_VECTOR, 2, 2);
    assert_eq!(get(&mut common, CONFIG_VECTOR, 2), 2);
    set(&mut common, CONFIG_VECTOR, 2, 3);
    assert_eq!(get(&mut common, CONFIG_VECTOR, 2), u64::from(NO_VECTOR));
    negotiate(&mut common, VERSION_1);
    enable(&mut common, 0, 0x1000);
    set(&mut common, STATUS, 1, 0xf);
    assert_eq!(set(&mut common, QUEUE_VECTOR, 2, 0), Asked::Vector(0));
    assert_eq!(common.queue_vector(0), 0);
    set(&mut common, QUEUE_SELECT, 2, 9);
    assert_eq!(set(&mut common, QUEUE_VECTOR, 2, 1), Asked::Nothing);
    assert_eq!(get(&mut common, QUEUE_SIZE, 2), 0);
}

#[test]
fn what_is_broken_asks_for_a_reset() {
    let (mut common, mirror) = common();
    mirror.set_broken(true);
    assert_eq!(get(&mut common, STATUS, 1), 0);
    negotiate(&mut common, VERSION_1);
    set(&mut common, STATUS, 1, 0xf);
    assert_eq!(get(&mut common, STATUS, 1), 0x4f);
    assert_eq!(get(&mut common, 0x15, 1), 0);
    assert!(mirror.set_config(&[4, 3]) && !mirror.set_config(&[4, 3]));
    assert_eq!(get(&mut common, 0x15, 1), 1);
}

proptest! {
    /// Any accesses in any order: no panic, and what is activated is in memory.
    #[test]
    fn a_hostile_driver_gets_nowhere(
        accesses in proptest::collection::vec(
            (0usize..0x48, prop_oneof![Just(1usize), Just(2), Just(4), Just(8), Just(3)],
             prop_oneof![Just(0u64), Just(1), Just(0xf), Just(0xb), Just(0x1000), any::<u64>()],
             any::<bool>(), any::<bool>()),
            1..200,
        )
    ) {
        let (mut common, mirror) = common();
        for (offset, size, value, write, quiet) in accesses {
            mirror.set_busy(!quiet);
            if !write {
                get(&mut common, offset, size);
                continue;
            }
            if set(&mut common, offset, size, value) == Asked::Activate {
                let activation = common.activation(|_| None);
                prop_assert_eq!(activation.features & !OFFERED, 0);
                for ring in activation.rings {
                    prop_assert!(ring.size.is_power_of_two() && ring.size <= 256);
                    prop_assert!(common.ram.holds(ring.descriptors, 16 * u64::from(ring.size)));
                }
            }
        }
    }
}
