//! A load that notices every lost, torn, repeated or late write: each block
//! carries its number and how often it was written, at most one request is in
//! flight for it, and every read is compared whole. Buffers are used again at
//! once, so that a read which lands late spoils a write, or the next read.
//! Looks at the used ring only when called, as a guest does.
//! Used by `tests/crash.rs` and `tests/handover.rs`; what a block holds is also what pods write in `endure`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::frontend::{DATA, Driver, Op, STATUS};
use crate::model::{SECTOR, Sequence};

/// Requests in flight at a time.
pub const DEPTH: usize = 64;
/// Bytes of one block, several pages so that it can be torn.
pub const BLOCK: usize = 16 * 1024;
/// Blocks of the disk.
pub const BLOCKS: usize = 1024;

/// What a slot is doing: a read, or the write of a generation.
#[derive(Clone, Copy, Debug)]
struct Job {
    block: usize,
    writes: Option<u32>,
}

/// The load and what it knows of the disk.
pub struct Load {
    generations: Vec<u32>,
    busy: Vec<bool>,
    jobs: [Option<Job>; DEPTH],
    sequence: Sequence,
    /// Requests completed.
    pub done: u64,
    last: Instant,
    /// The longest time without a completion, since somebody set it to zero.
    pub longest: Duration,
}

/// What a block of this generation holds; the zeroth is that of an empty disk.
pub fn pattern(block: usize, generation: u32) -> Vec<u8> {
    let word = |at: usize| match generation {
        0 => 0,
        _ => (block as u64) << 48 | u64::from(generation) << 16 | at as u64,
    };
    (0..BLOCK / 8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

/// The block and generation that some bytes come from, for the message.
pub fn origin(bytes: &[u8]) -> String {
    let word = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
    let torn = (1..BLOCK / 8).find(|at| {
        let other = u64::from_le_bytes(bytes[at * 8..][..8].try_into().unwrap_or_default());
        other >> 16 != word >> 16
    });
    format!(
        "block {} generation {}{}",
        word >> 48,
        word >> 16 & 0xffff_ffff,
        torn.map_or(String::new(), |at| format!(", torn at byte {}", at * 8))
    )
}

impl Load {
    /// A load on an empty disk.
    pub fn new(seed: u64) -> Self {
        Load {
            generations: vec![0; BLOCKS],
            busy: vec![false; BLOCKS],
            jobs: [None; DEPTH],
            sequence: Sequence::new(seed),
            done: 0,
            last: Instant::now(),
            longest: Duration::ZERO,
        }
    }

    /// The next number of its random sequence below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.sequence.below(end)
    }

    /// Offers a request in every free slot.
    fn fill(&mut self, driver: &mut Driver) -> Result<(), String> {
        let mut offered = false;
        for slot in 0..DEPTH {
            if self.jobs[slot].is_some() {
                continue;
            }
            let block = loop {
                let block = self.sequence.below(BLOCKS as u64) as usize;
                if !self.busy[block] {
                    break block;
                }
            };
            let sector = (block * BLOCK) as u64 / SECTOR;
            let (op, writes) = if self.sequence.below(5) < 3 {
                let generation = self.generations[block] + 1;
                let data = pattern(block, generation);
                (Op::Write { sector, data }, Some(generation))
            } else {
                let spoil = vec![0x5a; BLOCK];
                driver
                    .poke(DATA(slot as u64), &spoil)
                    .map_err(|e| e.to_string())?;
                let len = BLOCK as u32;
                (Op::Read { sector, len }, None)
            };
            let chain = driver
                .prepare(slot as u64, &op)
                .map_err(|e| e.to_string())?;
            driver.place(0, slot as u16 * 3, &chain);
            driver.rings[0].queue(slot as u16 * 3);
            self.busy[block] = true;
            self.jobs[slot] = Some(Job { block, writes });
            offered = true;
        }
        if offered {
            driver.rings[0].publish();
            driver.rings[0].notify();
        }
        Ok(())
    }

    /// Judges what is completed, if there was a call.
    fn reap(&mut self, driver: &mut Driver) -> Result<(), String> {
        if !driver.rings[0].called() {
            return Ok(());
        }
        loop {
            for used in driver.rings[0].take() {
                self.judge(driver, used.head)?;
            }
            let ring = &driver.rings[0];
            ring.set_used_event(ring.seen());
            if ring.used_idx() == ring.seen() {
                return Ok(());
            }
        }
    }

    fn judge(&mut self, driver: &Driver, head: u32) -> Result<(), String> {
        let slot = head as usize / 3;
        let job = (head.is_multiple_of(3) && slot < DEPTH).then(|| self.jobs[slot].take());
        let Some(Some(Job { block, writes })) = job else {
            return Err(format!(
                "head {head} was completed and never asked for, or twice"
            ));
        };
        let at = slot as u64;
        let status = driver.peek(STATUS(at), 1).map_err(|e| e.to_string())?[0];
        if status != 0 {
            return Err(format!("block {block}: status {status}"));
        }
        let data = driver.peek(DATA(at), BLOCK).map_err(|e| e.to_string())?;
        let want = writes.unwrap_or(self.generations[block]);
        if data != pattern(block, want) {
            let what = if writes.is_some() {
                "write buffer"
            } else {
                "read"
            };
            let found = origin(&data);
            return Err(format!(
                "{what} of block {block} generation {want} holds {found}"
            ));
        }
        self.generations[block] = want;
        self.busy[block] = false;
        self.done += 1;
        self.longest = self.longest.max(self.last.elapsed());
        self.last = Instant::now();
        Ok(())
    }

    /// Keeps the queue full for `time`.
    ///
    /// # Errors
    /// What is wrong with a request or its data.
    pub fn run(&mut self, driver: &mut Driver, time: Duration) -> Result<(), String> {
        let begin = Instant::now();
        self.last = begin;
        while begin.elapsed() < time {
            self.fill(driver)?;
            self.turn(driver)?;
        }
        Ok(())
    }

    fn turn(&mut self, driver: &mut Driver) -> Result<(), String> {
        let before = self.done;
        self.reap(driver)?;
        if self.done == before {
            std::thread::sleep(Duration::from_micros(50));
        }
        let waited = self.last.elapsed();
        if waited > Duration::from_secs(30) {
            let lost = self.jobs.iter().flatten().count();
            return Err(format!(
                "{lost} requests are not completed after {waited:?}"
            ));
        }
        Ok(())
    }

    /// Waits for all that is in flight.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn drain(&mut self, driver: &mut Driver) -> Result<(), String> {
        self.last = Instant::now();
        while self.jobs.iter().any(Option::is_some) {
            self.turn(driver)?;
        }
        Ok(())
    }

    /// Compares the whole disk.
    ///
    /// # Errors
    /// The first block that differs.
    pub fn compare(&self, disk: &Path) -> Result<(), String> {
        let disk = File::open(disk).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; BLOCK];
        for (block, &generation) in self.generations.iter().enumerate() {
            disk.read_exact_at(&mut bytes, (block * BLOCK) as u64)
                .map_err(|e| e.to_string())?;
            if bytes != pattern(block, generation) {
                let found = origin(&bytes);
                return Err(format!(
                    "on the disk, block {block} is generation {generation} and holds {found}"
                ));
            }
        }
        Ok(())
    }
}
