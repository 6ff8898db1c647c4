//! Every piece that the regression gate counts the instructions of, in time:
//! pop, publish, kicks, chains, the parsing of a block request, whole requests,
//! the histogram. Run with `cargo bench -p pericarp-benches --bench pieces`.
//!
//! Only the device's half is timed; figures are per request.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pericarp_gate::ALL;

fn pieces(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pieces");
    for entry in ALL {
        let mut piece = entry.make();
        group.throughput(Throughput::Elements(entry.count));
        group.bench_function(entry.name, |bencher| {
            bencher.iter_custom(|turns| {
                let mut took = Duration::ZERO;
                for _ in 0..turns {
                    piece.prepare();
                    let start = Instant::now();
                    piece.run();
                    took += start.elapsed();
                }
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, pieces);
criterion_main!(benches);
