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
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions, Request};
use pericarp_ring::{GuestMemory, QueueLayout, Region, RegionSpec, RequestQueue, SplitQueue};
use pericarp_vhost::{Device, Step};
use rustix::fs::{MemfdFlags, memfd_create};

const SIZE: u16 = 256;
const BATCH: u16 = 64;
const MEMORY: u64 = 16 << 20;
const AVAILABLE: u64 = 0x8000;
const DATA: u64 = 0x10_0000;
const BLOCK: u32 = 4096;

fn memory(size: u64) -> File {
    let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(size).expect("memory");
    file
}

/// [`BATCH`] reads of different blocks on heads 0, 3, 6, ...
fn guest() -> (File, RequestQueue<Request>) {
    let file = memory(MEMORY);
    let put = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).expect("guest memory");
    for n in 0..BATCH {
        let data = DATA + u64::from(n) * 0x2000;
        let parts = [
            (data, 16, 1),
            (data + 0x1000, BLOCK, 3),
            (data + 0x800, 1, 2u16),
        ];
        for (i, (address, len, flags)) in (0..).zip(parts) {
            let index = 3 * n + i;
            let mut raw = address.to_le_bytes().to_vec();
            raw.extend_from_slice(&len.to_le_bytes());
            raw.extend_from_slice(&flags.to_le_bytes());
            raw.extend_from_slice(&(index + 1).to_le_bytes());
            put(&raw, 16 * u64::from(index));
        }
        // struct virtio_blk_req: type IN, reserved, sector.
        put(&(8 * u64::from(n)).to_le_bytes(), data + 8);
    }
    for slot in 0..SIZE {
        let head = 3 * (slot % BATCH);
        put(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(slot));
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

fn device() -> (File, BlockDevice) {
    let file = memory(u64::from(BATCH) * u64::from(BLOCK));
    let options = DiskOptions {
        file: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        read_only: false,
        cache: CacheMode::Buffered,
    };
    let disk = Disk::open(&options).expect("a disk in memory");
    let device = BlockDevice::new(disk, "bench", 1, SIZE);
    device.negotiated(device.features());
    (file, device)
}

fn requests(criterion: &mut Criterion) {
    let (file, mut queue) = guest();
    let (_disk, device) = device();
    let mut index = 0u16;
    let mut heads = Vec::with_capacity(usize::from(BATCH));
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    group.bench_function("read/64", |bencher| {
        bencher.iter(|| {
            index = index.wrapping_add(BATCH);
            // One system call per batch, by which the driver offers it.
            file.write_all_at(&index.to_le_bytes(), AVAILABLE + 2)
                .expect("guest memory is there");
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
