//! Pieces that are private to their crates: translation of guest addresses, the
//! limiter, the mailbox. Run with `cargo bench -p pericarp-benches --bench
//! inside`.
//!
//! Their source is taken in by `build.rs`, so nothing has to be public for it;
//! the modules `oversight`, `device` and `session` stand for the parts of their
//! crate that they name.

/// A module of another crate, without its tests.
macro_rules! inside {
    ($name:ident, $file:literal) => {
        #[allow(
            unsafe_code,
            dead_code,
            unreachable_pub,
            reason = "a module of another crate, which has reasons of its own"
        )]
        mod $name {
            include!(concat!(env!("OUT_DIR"), $file));
        }
    };
}

inside!(memory, "/memory.rs");
inside!(sigbus, "/sigbus.rs");
inside!(limiter, "/limiter.rs");
inside!(mailbox, "/mailbox.rs");

mod oversight {
    //! As far as the limiter and the mailbox know it.
    use std::sync::Arc;

    #[derive(Debug, Default)]
    pub(crate) struct Oversight {
        pub(crate) limiter: crate::limiter::Limiter,
    }

    pub(crate) type MaybeOverseen = Option<Arc<Oversight>>;
}

mod device {
    //! As far as the mailbox knows it.
    pub(crate) trait Device {}
    impl Device for () {}
}

mod session {
    //! As far as the mailbox knows it.
    #[derive(Debug)]
    pub(crate) struct Kept;
}

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use limiter::{Gate, Limits};
use mailbox::{Command, Mailbox, QueueId};
use memory::{GuestMemory, Region, RegionSpec};
use oversight::Oversight;

const PAGE: u64 = 4096;
/// Pages of one region.
const PAGES: u64 = 256;

fn translation(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("translation");
    for count in [1, 2, 8, 32] {
        let size = PAGES * PAGE;
        let file = pericarp_gate::guest::memory(count * size);
        let regions = (0..count).map(|n| {
            let spec = RegionSpec {
                // Apart, as with a hole for devices.
                guest_address: 2 * n * size,
                size,
                user_address: n * size,
                file_offset: n * size,
            };
            Region::map(file.try_clone().expect("descriptor"), spec).expect("mapping")
        });
        let memory = GuestMemory::new(regions.collect()).expect("apart");
        let addresses: Vec<u64> = (0..PAGES)
            .map(|n| n % count * 2 * size + n * 97 % PAGES * PAGE)
            .collect();
        group.throughput(Throughput::Elements(PAGES));
        group.bench_function(BenchmarkId::new("regions", count), |bencher| {
            bencher.iter(|| {
                for &address in &addresses {
                    let piece = memory.piece(black_box(address), PAGE);
                    assert!(black_box(piece).is_some_and(|(_, got)| got == PAGE));
                }
            });
        });
    }
    group.finish();
}

/// What one request pays for being limited, while the limit is not reached.
fn limits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("limiter");
    let iops = Limits {
        iops: 1 << 40,
        ..Limits::default()
    };
    let both = Limits {
        bandwidth: 1 << 60,
        ..iops
    };
    for (name, limits) in [("none", Limits::default()), ("iops", iops), ("both", both)] {
        let oversight = Arc::new(Oversight::default());
        oversight.limiter.set(&limits, 0);
        let mut gate = Gate::new(oversight);
        let mut now = 1;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                now += 1000;
                assert!(gate.open(black_box(now)), "far below the limit");
                gate.charge(now, black_box(PAGE));
            });
        });
    }
    group.finish();
}

/// An order left and taken: most of it is the eventfd.
fn orders(criterion: &mut Criterion) {
    let mailbox: Mailbox<()> = Mailbox::new().expect("eventfd");
    criterion.bench_function("mailbox/send and take", |bencher| {
        bencher.iter(|| {
            let id = QueueId {
                device: 1,
                queue: 2,
            };
            mailbox.send(Command::GoOn(black_box(id)));
            assert!(matches!(mailbox.take(), Some(Command::GoOn(got)) if got == id));
        });
    });
    criterion.bench_function("mailbox/look", |bencher| {
        bencher.iter(|| assert!(black_box(mailbox.take()).is_none()));
    });
}

criterion_group!(benches, translation, limits, orders);
criterion_main!(benches);
