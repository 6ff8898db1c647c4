//! What one 4 KiB read costs `pericarp-block` besides the kernel: from the
//! available ring through the block device's state machine to the used ring,
//! with a store that has every block at once. Run with
//! `cargo bench -p pericarp-benches --bench engine`.
//!
//! The driver is in the process and offers 64 requests at a time; its half of
//! the work is counted, too.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions, Request};
use pericarp_gate::guest::{Guest, Layout, memory};
use pericarp_vhost::{Device, Step};

const BATCH: u16 = 64;
const BLOCK: u32 = 4096;

fn device() -> (File, BlockDevice) {
    let file = memory(u64::from(BATCH) * u64::from(BLOCK));
    let options = DiskOptions {
        file: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        read_only: false,
        cache: CacheMode::Buffered,
        iopoll: false,
    };
    let disk = Disk::open(&options).expect("a disk in memory");
    let device = BlockDevice::new(disk, "bench", 1, 256);
    device.negotiated(device.features());
    (file, device)
}

fn requests(criterion: &mut Criterion) {
    let (mut guest, mut queue) = Guest::with_requests::<Request>(BATCH, Layout::Direct);
    let (_disk, device) = device();
    let mut heads = Vec::with_capacity(usize::from(BATCH));
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    group.bench_function("read/64", |bencher| {
        bencher.iter(|| {
            guest.offer();
            while let Ok(Some((head, loaded))) = queue.pop() {
                let (chain, request) = queue.request(head);
                let step = device.start(loaded, chain, request);
                let Step::Read { buffer, .. } = step else {
                    panic!("{step:?} for a read");
                };
                black_box(queue.read_target(head, buffer));
                heads.push((head, buffer));
            }
            for (head, buffer) in heads.drain(..) {
                queue.read_done(head, buffer, u64::from(BLOCK));
                let (chain, request) = queue.request(head);
                let step = device.resume(chain, request, BLOCK as i32);
                let Step::Done { written } = step else {
                    panic!("{step:?} for a finished read");
                };
                queue.finish(head, written);
            }
            black_box(queue.publish())
        });
    });
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
