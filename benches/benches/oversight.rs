//! What counting and limits cost: the histogram alone, and cached 4 KiB reads
//! through `pericarp-block` with nobody looking, with a control socket, and
//! with a limit that is never reached. `PERICARP_BLOCK_BASE` names another
//! build of the program to compare with.
//!
//! Run with `cargo bench -p pericarp-benches --bench oversight` after
//! `cargo build --release -p pericarp-block`.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pericarp_tests::client::Client;
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use pericarp_vhost::histogram::Histogram;

const DEPTH: usize = 32;
const DISK: u64 = 64 << 20;

fn histogram(criterion: &mut Criterion) {
    let histogram = Histogram::default();
    let mut value = 1u64;
    criterion.bench_function("histogram/record", |bencher| {
        bencher.iter(|| {
            // Spread over many buckets, as latencies are.
            value = value
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            histogram.record(black_box(value >> 44));
        });
    });
    let snapshot = histogram.snapshot();
    criterion.bench_function("histogram/quantile", |bencher| {
        bencher.iter(|| black_box(&snapshot).quantile(0.99));
    });
}

/// CPU time of a process so far.
fn cpu(pid: i32) -> Duration {
    pericarp_benches::cpu::time(pid).expect("the backend runs")
}

/// CPU time of the backend for `rounds` batches of [`DEPTH`] reads.
fn reads(client: &mut Client, pid: i32, rounds: u64) -> Duration {
    let before = cpu(pid);
    for round in 0..rounds {
        for slot in 0..DEPTH {
            let offset = (round * DEPTH as u64 + slot as u64) * 4096 % DISK;
            client
                .submit_read(0, slot, offset, 4096)
                .expect("the ring has room");
        }
        client.kick(0).expect("a kick");
        for _ in 0..DEPTH {
            client.finished(0).expect("a completion");
        }
    }
    cpu(pid) - before
}

fn requests(criterion: &mut Criterion) {
    let ours = Part::PERICARP_BLOCK
        .find()
        .expect("build it first: cargo build --release -p pericarp-block");
    let base = std::env::var_os("PERICARP_BLOCK_BASE").map(PathBuf::from);
    let mut cases: Vec<(&str, PathBuf, &[&str])> = vec![
        ("unseen", ours.clone(), &[]),
        ("counted", ours.clone(), &["--control-path=@/control"]),
        ("limited", ours, &["--iops=1G"]),
    ];
    cases.extend(base.map(|base| ("base", base, &[][..])));
    let mut group = criterion.benchmark_group("cpu per cached 4 KiB read");
    group.throughput(Throughput::Elements(1)).sample_size(20);
    for (name, program, extra) in cases {
        let scratch = Scratch::new();
        let (socket, disk) = (
            scratch.path("socket"),
            scratch.file("disk", &vec![1; DISK as usize]),
        );
        let mut command = command(&program);
        command.arg(format!("--socket-path={}", socket.display()));
        command
            .arg(format!("--blk-file={}", disk.display()))
            .arg("--cache=buffered");
        command.args(
            extra
                .iter()
                .map(|e| e.replace('@', &scratch.dir().display().to_string())),
        );
        let process = Process::start(&mut command, Duration::from_secs(600)).expect("it starts");
        let start = Instant::now();
        while !socket.exists() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut client = Client::connect(&socket, 1, DEPTH).expect("it serves");
        reads(&mut client, process.pid(), 2000);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let rounds = count.div_ceil(DEPTH as u64).max(100);
                let time = reads(&mut client, process.pid(), rounds);
                time.mul_f64(count as f64 / (rounds * DEPTH as u64) as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, histogram, requests);
criterion_main!(benches);
