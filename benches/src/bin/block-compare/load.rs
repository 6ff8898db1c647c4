//! The load generator: keeps `depth` requests in flight on one queue of a
//! backend, batching as a guest would: it takes all that is back, offers as
//! many again, and kicks once.

use std::fs;
use std::time::{Duration, Instant};

use pericarp_tests::client::Client;
use pericarp_tests::peer::{Backend, Kind, Options};
use pericarp_tests::scratch::Scratch;

use crate::Outcome;
use crate::cases::{BLOCK, Case, Measured};

/// Requests before the clock starts.
const WARM_UP: usize = 2000;

/// One step of xorshift64*.
pub(crate) fn next_random(mut state: u64) -> u64 {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

pub(crate) fn run(
    case: &Case,
    kind: Kind,
    options: &crate::Options,
    scratch: &Scratch,
    turn: Duration,
) -> Outcome<Measured> {
    let how = Options {
        extra: options.extra.clone(),
        cache: case.cache,
        lifetime: turn + Duration::from_secs(60),
        ..Options::default()
    };
    let backend = Backend::start(kind, scratch, &options.file, &how)?;
    let mut client = Client::connect(backend.socket(), 1, case.depth)?;
    let blocks = client.capacity()? / BLOCK as u64;
    let mut generator = Generator {
        client: &mut client,
        write: case.write,
        blocks,
        random: 0x1234_5678_9abc_def1,
        started: vec![Instant::now(); case.depth],
        latencies: Vec::with_capacity(1 << 20),
        data: vec![0x5a; BLOCK],
    };
    for slot in 0..case.depth {
        generator.submit(slot)?;
    }
    generator.client.kick(0)?;
    while generator.latencies.len() < WARM_UP {
        generator.turn()?;
    }
    generator.latencies.clear();

    let cpu = cpu_time(backend.pid())?;
    let start = Instant::now();
    while start.elapsed() < turn {
        generator.turn()?;
    }
    let elapsed = start.elapsed();
    let cpu = cpu_time(backend.pid())?.saturating_sub(cpu);

    let mut latencies = std::mem::take(&mut generator.latencies);
    let count = latencies.len();
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = ((count as f64 * share) as usize).min(count.saturating_sub(1));
        latencies.get(index).map_or(0.0, |&ns| f64::from(ns) / 1e3)
    };
    Ok(Measured {
        iops: count as f64 / elapsed.as_secs_f64(),
        p50_us: at(0.50),
        p99_us: at(0.99),
        cpu_us: cpu.as_secs_f64() * 1e6 / count.max(1) as f64,
    })
}

struct Generator<'c> {
    client: &'c mut Client,
    write: bool,
    blocks: u64,
    random: u64,
    started: Vec<Instant>,
    /// Nanoseconds.
    latencies: Vec<u32>,
    data: Vec<u8>,
}

impl Generator<'_> {
    fn submit(&mut self, slot: usize) -> Outcome<()> {
        self.random = next_random(self.random);
        let offset = self.random % self.blocks * BLOCK as u64;
        self.started[slot] = Instant::now();
        if self.write {
            self.client.submit_write(0, slot, offset, &self.data)?;
        } else {
            self.client.submit_read(0, slot, offset, BLOCK)?;
        }
        Ok(())
    }

    /// Waits for at least one request and renews all that are back.
    fn turn(&mut self) -> Outcome<()> {
        let mut next = Some(self.client.finished(0)?);
        while let Some(done) = next {
            if done.ret != 0 {
                return Err(format!("a request failed with errno {}", -done.ret).into());
            }
            let took = self.started[done.slot].elapsed().as_nanos();
            self.latencies.push(u32::try_from(took).unwrap_or(u32::MAX));
            self.submit(done.slot)?;
            next = self.client.ready(0);
        }
        self.client.kick(0)?;
        Ok(())
    }
}

/// CPU time of all threads of a process, the kernel's workers for it included.
fn cpu_time(pid: i32) -> Outcome<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the look.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        let running = text.split_whitespace().next().unwrap_or("0");
        total += running.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}
