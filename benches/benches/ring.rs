//! What one request costs in the ring alone: pop, walk the chain, finish,
//! publish. Run with `cargo bench -p pericarp-benches`.
//!
//! The driver's half (offering the heads again) is part of the loop, so the
//! figures compare commits with each other, not with other implementations.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pericarp_gate::guest::{Guest, Layout};

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("request");
    for (name, layout) in [("direct", Layout::Direct), ("indirect", Layout::Indirect)] {
        for batch in [1u16, 32] {
            let (mut guest, mut queue) = Guest::with_requests::<u64>(batch, layout);
            group.throughput(Throughput::Elements(u64::from(batch)));
            group.bench_function(BenchmarkId::new(name, batch), |bencher| {
                bencher.iter(|| {
                    guest.offer();
                    while let Ok(Some((head, loaded))) = queue.pop() {
                        let (mut chain, state) = queue.request(head);
                        let mut header = [0; 16];
                        let sound =
                            loaded.is_ok() && chain.take_status() && chain.read(&mut header);
                        assert!(sound, "the driver's chains are sound");
                        *state = chain.writable_len();
                        black_box(queue.read_target(head, pericarp_ring::Buffer::Chain));
                        queue.request(head).0.write_status(0);
                        queue.finish(head, 4097);
                    }
                    black_box(queue.publish())
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
