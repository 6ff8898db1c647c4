//! What one request costs in the ring alone: pop, walk the chain, finish,
//! publish. Run with `cargo bench -p pericarp-benches`.
//!
//! The driver's half (offering the heads again) is part of the loop, so the
//! figures compare commits with each other, not with other implementations.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pericarp_ring::{GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue};
use rustix::fs::{MemfdFlags, memfd_create};

const SIZE: u16 = 256;
const MEMORY: u64 = 16 << 20;
const AVAILABLE: u64 = 0x8000;
const TABLES: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;

/// How a 4 KiB read is laid out by the driver.
#[derive(Clone, Copy)]
enum Layout {
    /// Header, data and status in the ring itself.
    Direct,
    /// The same three behind one indirect descriptor, as Linux does it.
    Indirect,
}

fn descriptor(file: &File, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    let mut raw = address.to_le_bytes().to_vec();
    raw.extend_from_slice(&len.to_le_bytes());
    raw.extend_from_slice(&flags.to_le_bytes());
    raw.extend_from_slice(&next.to_le_bytes());
    file.write_all_at(&raw, at).expect("guest memory is there");
}

/// `batch` read requests on heads 0, 3, 6, ...
fn guest(batch: u16, layout: Layout) -> (File, RequestQueue<u64>) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(MEMORY).expect("guest memory");
    for n in 0..batch {
        let data = DATA + u64::from(n) * 0x2000;
        let parts = [
            (data, 16, 1),
            (data + 0x1000, 4096, 3),
            (data + 0x800, 1, 2),
        ];
        let (base, first) = match layout {
            Layout::Direct => (u64::from(n) * 48, 3 * n),
            Layout::Indirect => {
                let table = TABLES + u64::from(n) * 48;
                descriptor(&file, u64::from(n) * 48, (table, 48, 4, 0));
                (table, 0)
            }
        };
        for (i, (address, len, flags)) in parts.into_iter().enumerate() {
            let next = first + i as u16 + 1;
            descriptor(&file, base + 16 * i as u64, (address, len, flags, next));
        }
    }
    for slot in 0..SIZE {
        let head = 3 * (slot % batch);
        file.write_all_at(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(slot))
            .expect("guest memory is there");
    }
    let spec = RegionSpec {
        guest_address: 0,
        size: MEMORY,
        user_address: 0,
        file_offset: 0,
    };
    let region = Region::map(file.try_clone().expect("descriptor"), spec).expect("mapping");
    let memory = Arc::new(GuestMemory::new(vec![region]).expect("one region"));
    let layout = QueueLayout {
        size: SIZE,
        descriptors: 0,
        available: AVAILABLE,
        used: 0xc000,
    };
    let queue = SplitQueue::new(memory, layout, 0, true).expect("valid layout");
    (file, RequestQueue::new(queue))
}

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("request");
    for (name, layout) in [("direct", Layout::Direct), ("indirect", Layout::Indirect)] {
        for batch in [1u16, 32] {
            let (file, mut queue) = guest(batch, layout);
            let mut index = 0u16;
            group.throughput(Throughput::Elements(u64::from(batch)));
            group.bench_function(BenchmarkId::new(name, batch), |bencher| {
                bencher.iter(|| {
                    index = index.wrapping_add(batch);
                    // One system call per batch, by which the driver offers it.
                    file.write_all_at(&index.to_le_bytes(), AVAILABLE + 2)
                        .expect("guest memory is there");
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
