//! Random sequences of good and bad requests of every type, in random framing
//! and broken chains, played to
//! `pericarp-block` and to the reference backend on equal disks. Status bytes
//! and data must be equal, used lengths as the specification says, and the
//! disks equal at the end of every sequence.

use pericarp_tests::frontend::{Answer, Chain, DATA, Driver, HEADER, Op, STATUS, Setup, TABLE};
use pericarp_tests::model::{Model, SECTOR, Sequence};
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Small, so that random sectors overlap and hit the end often.
const SECTORS: u64 = 512;
const SERIAL: &str = "differential";
const OK: u8 = 0;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const DISCARD_BIT: u32 = 13;
const ZEROES_BIT: u32 = 14;
/// Between the regions of guest memory.
const NOWHERE: u64 = 1 << 35;

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
    damage: Damage,
}

/// What is wrong with the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    None,
    /// Fewer bytes than a header has, and no data.
    ShortHeader(u32),
    /// Nothing the device may write.
    NoStatus,
    /// A segment of the other direction behind the status byte.
    ReadableLast,
    /// The data lie outside guest memory.
    Nowhere,
    /// The status is the last of four bytes.
    LongStatus,
    /// The last descriptor goes on, beyond its table.
    Endless,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        12 => Just(Damage::None),
        1 => (1..16u32).prop_map(Damage::ShortHeader),
        1 => Just(Damage::NoStatus),
        1 => Just(Damage::ReadableLast),
        1 => Just(Damage::Nowhere),
        1 => Just(Damage::LongStatus),
        1 => Just(Damage::Endless),
    ]
}

fn framing() -> impl Strategy<Value = Framing> {
    let segment = prop_oneof![3 => Just(0), 2 => 512..4096_u32, 1 => 200..700_u32];
    let shape = (0..=16_u32, segment, any::<bool>(), any::<bool>(), damage());
    shape.prop_map(|(header, segment, joined, indirect, damage)| Framing {
        header,
        segment,
        joined,
        indirect,
        damage,
    })
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
        1 => prop_oneof![Just(20), 0..40u32].prop_map(|len| Op::GetId { len }),
        3 => (any::<bool>(), list()).prop_map(|(discard, list)| Op::Ranges {
            kind: if discard { DISCARD } else { WRITE_ZEROES },
            list,
        }),
        1 => (any::<u32>(), 0..600_u32).prop_map(|(kind, room)| Op::Other {
            // Not one that either device does.
            kind: if [0, 1, 4, 8, 11, 13].contains(&(kind & 0x7fff_ffff)) { 77 } else { kind & 0x7fff_ffff },
            sector: 0,
            room,
        }),
    ]
}

/// The bytes of a list of ranges.
fn list() -> impl Strategy<Value = Vec<u8>> {
    let sectors = prop_oneof![8 => 1..20u32, 1 => Just(0), 1 => any::<u32>()];
    let flags = prop_oneof![8 => Just(0), 3 => Just(1), 1 => any::<u32>()];
    let range = (sector(), sectors, flags).prop_map(|(sector, sectors, flags)| {
        [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    });
    let range = range.boxed();
    let cut = prop_oneof![12 => Just(0), 1 => 1..16usize];
    // More than the 16 ranges that a WRITE_ZEROES may have, at times.
    let ranges = prop_oneof![8 => 0..4usize, 1 => 15..20usize];
    let ranges = ranges.prop_flat_map(move |n| prop::collection::vec(range.clone(), n));
    (ranges, cut).prop_map(|(ranges, cut)| {
        let mut bytes = ranges.concat();
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
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
    let damage = framing.damage;
    let (whole, cut) = match damage {
        Damage::ShortHeader(len) => (len, framing.header.min(len)),
        _ => (16, framing.header.min(16)),
    };
    let mut chain = Chain::new();
    if cut > 0 {
        chain = chain.read(HEADER(0), cut);
    }
    if cut < whole {
        chain = chain.read(HEADER(0) + u64::from(cut), whole - cut);
    }
    let mut status = STATUS(0);
    if let Some(mut data) = data.filter(|_| whole == 16) {
        if framing.joined && data.write && damage == Damage::None {
            status = data.addr + u64::from(data.len);
            data.len += 1;
        }
        if damage == Damage::Nowhere {
            data.addr = NOWHERE;
        }
        for (at, len) in segments(data.addr, data.len, framing.segment) {
            chain = if data.write && damage != Damage::NoStatus {
                chain.write(at, len)
            } else {
                chain.read(at, len)
            };
        }
    }
    if status == STATUS(0) {
        chain = match damage {
            Damage::NoStatus => chain.read(status, 1),
            Damage::LongStatus => chain.write(status - 3, 4),
            Damage::ReadableLast => chain.write(status, 1).read(status + 1, 1),
            _ => chain.write(status, 1),
        };
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
    let endless = framing.damage == Damage::Endless;
    let last = chain.0.len() as u16 - 1;
    if framing.indirect {
        driver
            .place_indirect(0, 0, 0, &chain)
            .map_err(|error| fail(&error))?;
        if endless {
            // NEXT, to where the table has nothing.
            let at = TABLE(0) + 16 * u64::from(last) + 12;
            let flags = driver.peek(at, 1).map_err(|error| fail(&error))?[0] | 1;
            driver
                .poke(at, &[flags, 0, 0xff, 0xff])
                .map_err(|error| fail(&error))?;
        }
    } else {
        driver.place(0, 0, &chain);
        if endless {
            let mut desc = chain.descs(0)[usize::from(last)];
            desc.flags |= 1;
            desc.next = u16::MAX;
            driver.rings[0].set_desc(last, desc);
        }
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
        Op::Read { len, .. } => len + 1,
        Op::GetId { len } => len.min(&20) + 1,
        _ => 1,
    }
}

/// What a device may have written at most.
fn room(op: &Op) -> u32 {
    match op {
        Op::Other { room, .. } => room + 1,
        Op::GetId { len } => len + 1,
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
            let setup = Setup {
                extra: 1 << DISCARD_BIT | 1 << ZEROES_BIT,
                ..Setup::default()
            };
            Driver::connect(backend.socket(), &setup)
                .map_err(|error| TestCaseError::fail(format!("{:?}: {error}", backend.kind())))
        };
        let (mut left, mut right) = (connect(&ours)?, connect(&theirs)?);
        for (op, framing) in &sequence {
            let a = play(&mut left, op, *framing)?;
            let b = play(&mut right, op, *framing)?;
            if matches!(framing.damage, Damage::Endless | Damage::ReadableLast) {
                // Where the status byte of such a chain is, nobody knows.
                let refused = |answer: &Answer| answer.status != OK && answer.used <= 1;
                prop_assert!(refused(&a) && refused(&b), "{:?} as {:?}", op, framing);
                continue;
            }
            let case = format!("{op:?} as {framing:?}");
            prop_assert_eq!(a.status, b.status, "ours against the reference: {}", case);
            prop_assert_eq!(a.used, b.used, "used lengths: {}", case);
            prop_assert!(a.used <= room(op) + 3, "our used length: {}", case);
            if a.status == OK {
                prop_assert!(a.data == b.data, "different data: {}", case);
            }
            if a.status == OK && framing.damage == Damage::None {
                prop_assert_eq!(a.used, written(op), "our used length: {}", case);
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
fn registered_memory_agrees_with_the_reference() {
    let options = Options {
        cache: Cache::Direct,
        extra: vec!["--register-memory".into()],
        ..Options::default()
    };
    agree("registered_memory_agrees_with_the_reference", options);
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
