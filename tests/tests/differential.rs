//! Random sequences of good and bad requests, in random framing, played to
//! `pericarp-block` and to the reference backend on equal disks. Status bytes
//! and data must be equal, used lengths as the specification says, and the
//! disks equal at the end of every sequence.

use pericarp_tests::frontend::{Answer, Chain, DATA, Driver, HEADER, Op, STATUS, Setup};
use pericarp_tests::model::{Model, SECTOR, Sequence};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Small, so that random sectors overlap and hit the end often.
const SECTORS: u64 = 512;
const SERIAL: &str = "differential";
const OK: u8 = 0;

/// How a request lies in memory.
#[derive(Clone, Copy, Debug)]
struct Framing {
    /// Where the header is cut in two; 0 or 16 leaves it whole.
    header: u32,
    /// Bytes per data segment; 0 leaves the data whole.
    segment: u32,
    /// The status byte shares a descriptor with the data before it.
    joined: bool,
    indirect: bool,
}

fn framing() -> impl Strategy<Value = Framing> {
    let segment = prop_oneof![3 => Just(0), 2 => 512..4096_u32, 1 => 200..700_u32];
    (0..=16_u32, segment, any::<bool>(), any::<bool>()).prop_map(
        |(header, segment, joined, indirect)| Framing {
            header,
            segment,
            joined,
            indirect,
        },
    )
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..SECTORS,
        2 => SECTORS - 4..SECTORS + 4,
        1 => any::<u64>(),
        1 => (0..4_u64).prop_map(|back| u64::MAX - back),
        1 => (0..4_u64).prop_map(|around| (u64::MAX / SECTOR).wrapping_add(around) - 2),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => (1..17_u32).prop_map(|sectors| sectors * 512),
        1 => 1..5000_u32,
        1 => Just(65536),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (sector(), length()).prop_map(|(sector, len)| Op::Read { sector, len }),
        6 => (sector(), length(), any::<u64>()).prop_map(|(sector, len, seed)| Op::Write {
            sector,
            data: Sequence::new(seed).bytes(len as usize),
        }),
        1 => Just(Op::Flush),
        1 => Just(Op::GetId { len: 20 }),
        1 => (any::<u32>(), 0..600_u32).prop_map(|(kind, room)| Op::Other {
            // Not one that either device does.
            kind: if [0, 1, 4, 8].contains(&(kind & 0x7fff_ffff)) { 77 } else { kind & 0x7fff_ffff },
            sector: 0,
            room,
        }),
    ]
}

/// Cuts `len` bytes at `at` into segments.
fn segments(at: u64, len: u32, size: u32) -> Vec<(u64, u32)> {
    // A request has 100 segments at most, to fit the ring.
    let size = if size == 0 {
        len
    } else {
        size.max(len / 100 + 1)
    };
    (0..len)
        .step_by(size.max(1) as usize)
        .map(|start| (at + u64::from(start), size.min(len - start)))
        .collect()
}

/// Lays `op` out as `framing` says; the status byte's address comes with it.
fn lay_out(driver: &Driver, op: &Op, framing: Framing) -> (Chain, u64) {
    let plain = driver.prepare(0, op).expect("slot 0 is in memory");
    let data = plain.0.iter().find(|place| place.addr == DATA(0)).copied();
    let cut = framing.header.min(16);
    let mut chain = Chain::new();
    if cut > 0 {
        chain = chain.read(HEADER(0), cut);
    }
    if cut < 16 {
        chain = chain.read(HEADER(0) + u64::from(cut), 16 - cut);
    }
    let mut status = STATUS(0);
    if let Some(data) = data {
        let mut len = data.len;
        if framing.joined && data.write {
            status = data.addr + u64::from(len);
            len += 1;
        }
        for (at, len) in segments(data.addr, len, framing.segment) {
            chain = if data.write {
                chain.write(at, len)
            } else {
                chain.read(at, len)
            };
        }
    }
    if status == STATUS(0) {
        chain = chain.write(status, 1);
    }
    (chain, status)
}

/// Plays one request.
fn play(driver: &mut Driver, op: &Op, framing: Framing) -> Result<Answer, TestCaseError> {
    let fail = |error: &dyn std::fmt::Display| TestCaseError::fail(error.to_string());
    driver
        .poke(DATA(0), &[0xaa; 65537])
        .map_err(|error| fail(&error))?;
    let (chain, status) = lay_out(driver, op, framing);
    driver.poke(status, &[0xee]).map_err(|error| fail(&error))?;
    if framing.indirect {
        driver
            .place_indirect(0, 0, 0, &chain)
            .map_err(|error| fail(&error))?;
    } else {
        driver.place(0, 0, &chain);
    }
    driver.offer(0, 0);
    let used = driver.settled(0, 0).map_err(|error| fail(&error))?;
    let mut answer = driver.answer(0, op, used).map_err(|error| fail(&error))?;
    answer.status = driver.peek(status, 1).map_err(|error| fail(&error))?[0];
    Ok(answer)
}

/// What the used length must be for `op` when it went well.
fn written(op: &Op) -> u32 {
    match op {
        Op::Read { len, .. } | Op::GetId { len } => len + 1,
        _ => 1,
    }
}

/// What a device may have written at most.
fn room(op: &Op) -> u32 {
    match op {
        Op::Other { room, .. } => room + 1,
        op => written(op),
    }
}

fn agree(test: &str, options: Options) {
    if !Kind::Pericarp.usable(test) || !Kind::Reference.usable(test) {
        return;
    }
    let options = Options {
        serial: Some(SERIAL.into()),
        ..options
    };
    let scratch = Scratch::new();
    let content = Sequence::new(11).bytes((SECTORS * SECTOR) as usize);
    let [ours, theirs] = [Kind::Pericarp, Kind::Reference].map(|kind| {
        let disk = scratch.file(kind.part().program(), &content);
        Backend::start(kind, &scratch, &disk, &options).unwrap_or_else(|error| panic!("{error}"))
    });
    let config = Config {
        cases: 120,
        failure_persistence: None,
        ..Config::default()
    };
    let sequences = prop::collection::vec((op(), framing()), 1..30);
    let verdict = TestRunner::new(config).run(&sequences, |sequence| {
        let connect = |backend: &Backend| {
            Driver::connect(backend.socket(), &Setup::default())
                .map_err(|error| TestCaseError::fail(format!("{:?}: {error}", backend.kind())))
        };
        let (mut left, mut right) = (connect(&ours)?, connect(&theirs)?);
        for (op, framing) in &sequence {
            let a = play(&mut left, op, *framing)?;
            let b = play(&mut right, op, *framing)?;
            prop_assert_eq!(a.status, b.status, "ours against the reference: {:?}", op);
            if a.status == OK {
                prop_assert_eq!(a.used, written(op), "our used length: {:?}", op);
                prop_assert_eq!(b.used, written(op), "the reference's used length: {:?}", op);
                prop_assert!(a.data == b.data, "different data: {:?}", op);
            } else {
                prop_assert!(a.used <= room(op), "our used length {}: {:?}", a.used, op);
            }
        }
        let mut model = Model::zeroed(SECTORS * SECTOR);
        model.write(0, &std::fs::read(theirs.disk()).unwrap_or_default());
        prop_assert_eq!(model.differs(ours.disk()), None, "the disks differ");
        Ok(())
    });
    if let Err(error) = verdict {
        panic!("{error}");
    }
}

#[test]
fn direct_io_agrees_with_the_reference() {
    let options = Options {
        cache: Cache::Direct,
        ..Options::default()
    };
    agree("direct_io_agrees_with_the_reference", options);
}

#[test]
fn buffered_io_agrees_with_the_reference() {
    agree("buffered_io_agrees_with_the_reference", Options::default());
}

#[test]
fn the_sync_engine_agrees_with_the_reference() {
    let extra = vec!["--io-engine=sync".into()];
    agree(
        "the_sync_engine_agrees_with_the_reference",
        Options {
            extra,
            ..Options::default()
        },
    );
}

#[test]
fn read_only_agrees_with_the_reference() {
    agree(
        "read_only_agrees_with_the_reference",
        Options {
            read_only: true,
            ..Options::default()
        },
    );
}
