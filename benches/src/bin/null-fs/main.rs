//! `null-fs`: a virtio-fs device that keeps names and sizes in memory and no
//! data at all. What a guest reaches on it is what its own kernel, the ring and
//! the wake-ups leave to any server of the same workers: the ceiling in the
//! tables of `bench-compare`, which starts it for the target of that name.
//!
//! It is no file system for use: everything belongs to root, reads give zeroes,
//! and whoever connects is trusted. A file of some size may be there from the
//! start.

mod device;
mod tree;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use device::NullFs;
use pericarp_benches::Outcome;
use pericarp_uring::EngineKind;
use pericarp_vhost::program::table_size;
use pericarp_vhost::{Endpoint, Fleet, Meeting, Pool, PoolOptions, Server, Stop};

const HELP: &str = "null-fs --socket-path PATH --tag TAG [--file NAME BYTES]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (socket, tag, file) = match words[..] {
        ["--socket-path", socket, "--tag", tag] => (socket, tag, None),
        ["--socket-path", socket, "--tag", tag, "--file", name, bytes] => {
            (socket, tag, bytes.parse().ok().map(|bytes| (name, bytes)))
        }
        _ => ("", "", None),
    };
    if socket.is_empty() || (words.len() > 4 && file.is_none()) {
        eprintln!("null-fs: usage: {HELP}");
        return ExitCode::from(2);
    }
    match serve(Path::new(socket), NullFs::new(tag, file)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null-fs: {error}");
            ExitCode::FAILURE
        }
    }
}

/// As `pericarp-fs` has its workers.
fn serve(socket: &Path, device: NullFs) -> Outcome<()> {
    let stop = Stop::new()?;
    let device = Arc::new(device);
    let pool = Pool::new(&PoolOptions {
        workers: 1,
        engine: EngineKind::Auto,
        depth: 256,
        files: table_size(2, 0, 0),
        poll_limit: Duration::from_micros(20),
        commands: false,
        register_memory: false,
        threads: None,
        polled: false,
        descriptors: false,
        cpus: Vec::new(),
    })?;
    let endpoint = Endpoint::bind(socket)?;
    let meeting = Meeting::new(1)?;
    let fleet = Fleet::new(&pool, &meeting, &stop);
    let server = Server::new(endpoint, device, 0, &pool);
    let running = pool.start(&stop)?;
    fleet.start(vec![("null", server)])?;
    stop.wait();
    for thread in fleet.end() {
        let _ = thread.join();
    }
    running.end();
    Ok(())
}
