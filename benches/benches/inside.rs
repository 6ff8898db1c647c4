//! Pieces that are private to their crates: translation of guest addresses, the
//! limiter, the mailbox. Run with `cargo bench -p pericarp-benches --bench
//! inside`.
//!
//! The crates show them in hidden items, for this bench and nobody else.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pericarp_ring::{GuestMemory, Region, RegionSpec};
use pericarp_vhost::Limits;
use pericarp_vhost::measured::{Limited, Orders};

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
        let mut queue = Limited::new(&limits);
        let mut now = 1;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                now += 1000;
                let passed = queue.pass(black_box(now), black_box(PAGE));
                assert!(passed, "far below the limit");
            });
        });
    }
    group.finish();
}

/// An order left and taken: most of it is the eventfd.
fn orders(criterion: &mut Criterion) {
    let mailbox = Orders::new().expect("eventfd");
    criterion.bench_function("mailbox/send and take", |bencher| {
        bencher.iter(|| {
            mailbox.send();
            assert!(black_box(mailbox.take()));
        });
    });
    criterion.bench_function("mailbox/look", |bencher| {
        bencher.iter(|| assert!(!black_box(mailbox.take())));
    });
}

criterion_group!(benches, translation, limits, orders);
criterion_main!(benches);
