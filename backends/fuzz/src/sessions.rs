//! A hostile front end against a whole server: real sessions, a real worker,
//! over a socket.
//!
//! After every script the next front end must be served, correctly and soon,
//! and the process must hold as many descriptors as before: what a front end
//! did may end its own session and leave nothing behind.

mod client;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions};
use pericarp_uring::EngineKind;
use pericarp_vhost::{CrashSafety, Endpoint, Pool, PoolOptions, Reopener, Running, Server, Stop};

use crate::memory::memfd;
use crate::script::{KINDS, Script};
use client::{Client, SIZE, USED};

/// Nothing may take longer.
const LIMIT: Duration = Duration::from_secs(20);

/// Descriptors that whoever runs us may open meanwhile: under libFuzzer one more
/// than at the start was seen. A leak that repeats passes this soon.
const SLACK: usize = 4;

/// The server all scripts talk to.
struct Rig {
    address: SocketAddr,
    descriptors: usize,
    /// Kept, or the leak check counts the worker's handle.
    _running: Running<BlockDevice>,
}

fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| {
        ignore_broken_pipes();
        let disk = memfd(64 * 1024);
        for sector in 0..128u64 {
            disk.write_all_at(&[sector as u8; 512], sector * 512)
                .expect("a disk");
        }
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&disk));
        let options = DiskOptions {
            file: PathBuf::from(path),
            read_only: false,
            cache: CacheMode::Buffered,
            iopoll: false,
        };
        let disk = Disk::open(&options).expect("a disk");
        let device = Arc::new(BlockDevice::new(disk, "fuzz", 2, 64));
        let pool = Pool::new(&PoolOptions {
            workers: 1,
            engine: EngineKind::Auto,
            depth: 64,
            // As the program counts: four for each queue, one for each disk.
            files: 4 * 2 + 1,
            poll_limit: Duration::from_micros(5),
            commands: false,
            register_memory: false,
            polled: false,
            descriptors: false,
            threads: None,
            cpus: Vec::new(),
        })
        .expect("a pool");
        let name = format!("pericarp-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        let endpoint = Endpoint::from_descriptor(listener.into()).expect("a listening socket");
        let stop = Stop::new().expect("a stop");
        let mut server = Server::new(endpoint, device, 0, &pool);
        server.keep_records(CrashSafety {
            reopener: Reopener::new().ok().map(Arc::new),
            file: None,
        });
        let running = pool.start(&stop).expect("workers");
        server.start(&stop).expect("a session thread");
        healthy(&address, false);
        // Long enough for the session of that front end to end.
        std::thread::sleep(Duration::from_millis(300));
        let descriptors = descriptors();
        Rig {
            address,
            descriptors,
            _running: running,
        }
    })
}

/// Rust's own start-up does this for every program; libFuzzer's main does not,
/// and a call by a pipe without reader would end the process.
#[expect(unsafe_code, reason = "signal dispositions have no safe wrapper here")]
fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Waits until the last session let go of everything.
fn settled(want: usize) {
    let end = Instant::now() + LIMIT;
    while descriptors() > want {
        assert!(
            Instant::now() < end,
            "{} descriptors, {want} before",
            descriptors()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Plays one script.
///
/// # Panics
/// When the next front end is not served, or something was left behind.
pub fn play(bytes: &[u8]) {
    let rig = rig();
    let mut script = Script::new(bytes);
    let mut client = Client::new(&rig.address);
    for _ in 0..60 {
        if script.is_over() {
            break;
        }
        client.act(&mut script, &rig.address);
    }
    drop(client);
    healthy(&rig.address, bytes.len().is_multiple_of(2));
    settled(rig.descriptors + SLACK);
}

/// Hand-made scripts.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let set_up = 0u8;
    let request = |kind: u8| [5, kind, 1, 1];
    let mut seeds = Vec::new();
    for (kind, name) in KINDS {
        let mut script = vec![set_up];
        script.extend(request(kind));
        seeds.push((name.to_owned(), script));
    }
    let busy = |tail: &[u8]| {
        let mut script = vec![set_up];
        for _ in 0..4 {
            script.extend(request(1));
        }
        script.extend_from_slice(tail);
        script.extend(request(0));
        script
    };
    seeds.push(("reconnect".into(), busy(&[8, set_up])));
    seeds.push(("truncate".into(), busy(&[7, 0])));
    seeds.push(("same-memory".into(), busy(&[3, 0, 0])));
    seeds.push(("region-removed-and-added".into(), busy(&[3, 2, 0, 3, 1, 0])));
    seeds.push((
        "disabled-and-enabled".into(),
        busy(&[2, 18, 0, 0, 2, 18, 0, 1]),
    ));
    // Records: handed over, come back to, lied in, of another shape, cut short.
    seeds.push(("record-kept".into(), busy(&[11, 1, 5, 1, 2, 2, 11, 6])));
    let lies = [11, 1, 11, 4, 3, 0, 9, 3, 7, 15, 2, 0, 1, 11, 6];
    seeds.push(("record-lies".into(), busy(&lies)));
    seeds.push(("record-asked".into(), busy(&[11, 0, 1, 16, 0, 11, 1])));
    let again = [11, 1, 11, 2, 0, 2, 32, 11, 2, 1, 1, 16, 11, 2, 0xf0, 1, 16];
    seeds.push(("record-reshaped".into(), busy(&again)));
    seeds.push((
        "record-cut".into(),
        busy(&[11, 1, 11, 5, 0, 11, 6, 11, 5, 0]),
    ));
    let format = [
        11, 1, 11, 3, 0, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 11, 6,
    ];
    seeds.push(("record-of-another".into(), busy(&format)));
    seeds.push(("stopped".into(), busy(&[2, 11, 0, 0])));
    seeds.push(("renewed-kick".into(), busy(&[9, 12, 0, 0])));
    seeds.push((
        "strange-calls".into(),
        busy(&[9, 13, 0, 5, 9, 13, 0, 1, 9, 13, 0, 7]),
    ));
    seeds
}

/// A front end that does everything right is served, one that keeps the records
/// of requests in flight too.
fn healthy(address: &SocketAddr, record: bool) {
    let mut client = Client::new(address);
    if record {
        client.agree();
        client.hand_record(0, 1, SIZE);
    }
    client.set_up(0);
    let at = client.request(0, 5, 1);
    let end = Instant::now() + LIMIT;
    let mut used = [0; 2];
    while u16::from_le_bytes(used) == 0 {
        assert!(Instant::now() < end, "the next front end is not served");
        client
            .memory
            .read_exact_at(&mut used, USED + 2)
            .expect("guest memory");
        std::thread::yield_now();
    }
    let mut status = [0; 1];
    client
        .memory
        .read_exact_at(&mut status, at + 32)
        .expect("guest memory");
    assert_eq!(status, [0], "a good read fails for the next front end");
    assert_eq!(client.recorded(), u16::from(record), "the record");
}
