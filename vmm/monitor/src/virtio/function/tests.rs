//! The function as a guest sees it, with a fake other half.

use std::sync::Mutex;

use proptest::prelude::*;

use super::super::{Activation, VERSION_1};
use super::*;
use crate::memory::{Backing, GRAIN};
use crate::wiring::tests::Recorder;

/// What was asked of the other half.
#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<Vec<String>>>);

impl Fake {
    fn say(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Back for Fake {
    fn activate(&mut self, activation: Activation) {
        self.say(format!("activate {}", activation.rings.len()));
    }

    fn reset(&mut self) {
        self.say("reset".into());
    }

    fn set_call(&mut self, ring: u16, _: Arc<EventFd>) -> bool {
        self.say(format!("call {ring}"));
        true
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool {
        self.say(format!("config {offset} {data:?}"));
        true
    }

    fn remove(&mut self) {
        self.say("remove".into());
    }
}

const PLACE: u8 = 2;
const MEMORY: u64 = layout::WINDOW64 + 2 * layout::BAR_SLOT;

fn function() -> (Function, Fake, Arc<Recorder>) {
    let (fake, recorder) = (Fake::default(), Recorder::new());
    let parts = Parts {
        device_id: 2,
        features: 0,
        queues: vec![128, 128],
        back: Box::new(fake.clone()),
        mirror: Arc::new(Mirror::new((0..60).collect())),
        changed: ConfigCall::default(),
    };
    let ram = Arc::new(Ram::new(GRAIN, Backing::default()).unwrap());
    let wiring: Arc<dyn Wiring> = Arc::<Recorder>::clone(&recorder);
    (
        Function::new(PLACE, parts, ram, wiring).unwrap(),
        fake,
        recorder,
    )
}

fn config(function: &mut Function, offset: usize, size: usize) -> u64 {
    let mut data = [0; 8];
    function.read_config(offset, &mut data[..size]);
    u64::from_le_bytes(data)
}

/// As a driver finds them: kind and offset in memory of each structure.
fn structures(function: &mut Function) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = config(function, 0x34, 1) as usize;
    while at != 0 {
        if config(function, at, 1) == u64::from(VENDOR_CAPABILITY) {
            found.push((config(function, at + 3, 1), config(function, at + 8, 4)));
        }
        at = config(function, at + 1, 1) as usize;
    }
    found
}

fn write(function: &mut Function, offset: u64, size: usize, value: u64) {
    function.write_memory(offset, &value.to_le_bytes()[..size]);
}

fn make_ready(function: &mut Function) {
    function.write_config(COMMAND, &[6, 4]);
    for (offset, size, value) in [
        (0x14, 1, 1),
        (0x14, 1, 3),
        (0x08, 4, 1),
        (0x0c, 4, VERSION_1 >> 32),
        (0x14, 1, 0xb),
        (0x10, 2, 0),
        (0x1a, 2, 1),
        (0x20, 8, 0x1000),
        (0x28, 8, 0x2000),
        (0x30, 8, 0x3000),
        (0x1c, 2, 1),
        (0x14, 1, 0xf),
    ] {
        write(function, COMMON + offset, size, value);
    }
}

#[test]
fn a_driver_finds_every_structure() {
    let (mut function, ..) = function();
    assert_eq!(config(&mut function, 0, 4), 0x1042_1af4);
    let found = structures(&mut function);
    let kinds: Vec<u64> = found.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert_eq!(found[1].1, NOTIFY);
}

#[test]
fn doorbells_are_where_the_memory_is_while_the_driver_is_ready() {
    let (mut function, fake, recorder) = function();
    let doorbells = |recorder: &Recorder| -> Vec<u64> {
        recorder.doorbells.lock().unwrap().iter().copied().collect()
    };
    function.write_config(COMMAND, &[2]);
    assert!(doorbells(&recorder).is_empty());
    make_ready(&mut function);
    assert_eq!(fake.heard(), ["activate 1"]);
    assert_eq!(doorbells(&recorder), [MEMORY + NOTIFY, MEMORY + NOTIFY + 4]);
    // The guest moves the memory, in two halves.
    function.write_config(BAR0, &0x1000_0000u32.to_le_bytes());
    function.write_config(BAR0 + 4, &0u32.to_le_bytes());
    assert_eq!(doorbells(&recorder)[0], 0x1000_0000 + NOTIFY);
    function.write_config(COMMAND, &[0]);
    assert!(doorbells(&recorder).is_empty());
    function.write_config(COMMAND, &[2]);
    assert_eq!(doorbells(&recorder).len(), 2);
    write(&mut function, COMMON + 0x14, 1, 0);
    assert!(doorbells(&recorder).is_empty());
    assert_eq!(fake.heard(), ["reset"]);
}

#[test]
fn a_vector_that_changes_is_told() {
    let (mut function, fake, _) = function();
    make_ready(&mut function);
    fake.heard();
    write(&mut function, COMMON + 0x1a, 2, 0xffff);
    assert_eq!(fake.heard(), ["call 0"]);
    let config_call = function.changed.lock().unwrap().clone().unwrap();
    assert!(Arc::ptr_eq(&config_call, &function.msix.event(0).unwrap()));
}

#[test]
fn configuration_goes_both_ways() {
    let (mut function, fake, _) = function();
    let mut data = [0; 4];
    function.read_memory(DEVICE_CONFIG + 58, &mut data);
    assert_eq!(data, [58, 59, 0, 0]);
    write(&mut function, DEVICE_CONFIG + 32, 1, 0);
    assert_eq!(fake.heard(), ["config 32 [0]"]);
    function.mirror.set_config(&[9; 8]);
    let mut isr = [0];
    function.read_memory(ISR, &mut isr);
    assert_eq!(isr, [2]);
    function.read_memory(ISR, &mut isr);
    assert_eq!(isr, [0]);
}

#[test]
fn the_window_in_configuration_space_reaches_memory() {
    let (mut function, ..) = function();
    let at = function.window_at;
    function.write_config(at + 8, &(DEVICE_CONFIG as u32 + 4).to_le_bytes());
    function.write_config(at + 12, &4u32.to_le_bytes());
    assert_eq!(config(&mut function, at + 16, 4), 0x0706_0504);
    function.write_config(at + 8, &(COMMON as u32 + 0x16).to_le_bytes());
    function.write_config(at + 12, &2u32.to_le_bytes());
    function.write_config(at + 16, &1u16.to_le_bytes());
    let mut selected = [0; 2];
    function.read_memory(COMMON + 0x16, &mut selected);
    assert_eq!(selected, [1, 0]);
    // What reaches nowhere does nothing.
    function.write_config(at + 8, &u32::MAX.to_le_bytes());
    function.write_config(at + 16, &[1, 2, 3, 4]);
}

#[test]
fn a_reset_leaves_it_as_it_was_made() {
    let (mut function, fake, recorder) = function();
    let fresh: Vec<u64> = (0..256).map(|at| config(&mut function, at, 1)).collect();
    make_ready(&mut function);
    let msix_at = function.msix_at;
    function.write_config(msix_at + 2, &[0, 0x80]);
    write(&mut function, TABLE + 12, 4, 0);
    assert_eq!(recorder.connected.lock().unwrap().len(), 1);
    fake.heard();
    function.reset();
    assert_eq!(fake.heard(), ["reset"]);
    let after: Vec<u64> = (0..256).map(|at| config(&mut function, at, 1)).collect();
    assert_eq!(after, fresh);
    assert!(recorder.connected.lock().unwrap().is_empty());
    assert!(recorder.doorbells.lock().unwrap().is_empty());
    // The machine is another: nothing is taken from it that it never had.
    function.mirror.set_busy(false);
    make_ready(&mut function);
    recorder.doorbells.lock().unwrap().clear();
    function.forget_wiring();
    function.remove();
    assert_eq!(fake.heard(), ["activate 1", "reset", "remove"]);
}

proptest! {
    /// Any accesses to all of it: no panic, and no wiring is left behind.
    #[test]
    fn a_hostile_guest_gets_nowhere(
        accesses in proptest::collection::vec(
            (any::<bool>(), any::<bool>(),
             prop_oneof![0u64..0x140, 0x1000u64..0x1004, 0x2000u64..0x2100, 0x3000u64..0x3020,
                         0x4000u64..0x4040, 0x6000u64..0x6010, 0u64..0x8000],
             1usize..9, any::<u64>()),
            1..200,
        )
    ) {
        let (mut function, _, recorder) = function();
        for (memory, write, offset, size, value) in accesses {
            let mut data = value.to_le_bytes();
            let data = &mut data[..size];
            match (memory, write) {
                (true, true) => function.write_memory(offset, data),
                (true, false) => function.read_memory(offset, data),
                (false, true) => function.write_config(offset as usize, data),
                (false, false) => function.read_config(offset as usize, data),
            }
        }
        function.remove();
        prop_assert!(recorder.connected.lock().unwrap().is_empty());
        prop_assert!(recorder.doorbells.lock().unwrap().is_empty());
    }
}
