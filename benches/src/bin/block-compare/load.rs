//! The load generator: keeps requests in flight on the queues of a backend,
//! batching as a guest would: it takes all that is back, offers as many again,
//! and kicks once.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pericarp_benches::disk::next_random;
use pericarp_benches::options::Options as Ask;
use pericarp_benches::turns::Measured;
use pericarp_benches::{Outcome, cpu};
use pericarp_tests::client::{Client, SLOT};
use pericarp_tests::parts::Part;
use pericarp_tests::peer::{Backend, Footprint, Kind, Options};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

use crate::cases::Case;

/// Requests before the clock starts.
const WARM_UP: usize = 2000;

/// How long one completion may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What is special about a backend.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Another build than the one that is found.
    pub(crate) build: Option<PathBuf>,
    /// How `qemu-storage-daemon` does its I/O.
    pub(crate) aio: Option<&'static str>,
}

/// One backend with one disk.
pub(crate) fn one(
    case: &Case,
    kind: Kind,
    peer: Peer,
    options: &Ask,
    scratch: &Scratch,
) -> Outcome<Measured> {
    let turn = Duration::from_secs(options.seconds);
    let how = Options {
        extra: options.extra.clone(),
        cache: case.cache,
        num_queues: case.queues as u16,
        aio: peer.aio,
        build: peer.build,
        lifetime: turn + Duration::from_secs(60),
        ..Options::default()
    };
    let backend = Backend::start(kind, scratch, &options.file, &how)?;
    let depth = case.depth / case.queues;
    let room = SLOT.max(case.block);
    let client = Client::with_slots(backend.socket(), case.queues, depth, room)?;
    measure(case, vec![client], backend.pid(), turn)
}

/// `pericarp-block` with so many disks, all on one file, and so many workers.
pub(crate) fn disks(
    case: &Case,
    (count, workers): (usize, usize),
    options: &Ask,
    scratch: &Scratch,
) -> Outcome<Measured> {
    let turn = Duration::from_secs(options.seconds);
    let path = Part::PERICARP_BLOCK.find().ok_or("no pericarp-block")?;
    let mut program = command(&path);
    program
        .arg(format!("--workers={workers}"))
        .args(&options.extra);
    let sockets: Vec<PathBuf> = (0..count)
        .map(|n| scratch.path(&format!("disks-{n}.sock")))
        .collect();
    for (n, socket) in sockets.iter().enumerate() {
        let _ = fs::remove_file(socket);
        program.arg(format!(
            "--device=id=d{n},socket={},file={}",
            socket.display(),
            options.file.display()
        ));
    }
    let mut process = Process::start(&mut program, turn + Duration::from_secs(60))?;
    let connect = |socket: &PathBuf| {
        let there = pericarp_tests::bounded::poll(LIMIT, || socket.exists().then_some(()));
        there.ok_or("no socket")?;
        Ok(Client::connect(socket, 1, case.depth / count)?)
    };
    let clients: Outcome<Vec<Client>> = sockets.iter().map(connect).collect();
    let measured = measure(case, clients?, process.pid(), turn);
    let held = Footprint::of(process.pid());
    process.kill();
    Ok(Measured {
        memory_kib: held.map(|held| held.anon_kib as f64),
        ..measured?
    })
}

fn measure(case: &Case, clients: Vec<Client>, pid: i32, turn: Duration) -> Outcome<Measured> {
    let blocks = clients[0].capacity()? / case.block as u64;
    let depth = case.depth / (clients.len() * case.queues);
    let lanes = (0..clients.len())
        .flat_map(|client| (0..case.queues).map(move |queue| (client, queue)))
        .map(|(client, queue)| Lane {
            client,
            queue,
            started: vec![Instant::now(); depth],
            done: 0,
        })
        .collect();
    let mut generator = Generator {
        clients,
        lanes,
        case: *case,
        blocks,
        random: 0x1234_5678_9abc_def1,
        next: 0,
        first: 0,
        latencies: Vec::with_capacity(1 << 20),
        data: vec![0x5a; case.block],
    };
    for lane in 0..generator.lanes.len() {
        for slot in 0..depth {
            generator.submit(lane, slot)?;
        }
        generator.kick(lane)?;
    }
    while generator.latencies.len() < WARM_UP {
        generator.turn()?;
    }
    generator.latencies.clear();
    generator.lanes.iter_mut().for_each(|lane| lane.done = 0);

    let cpu = cpu::time(pid)?;
    let start = Instant::now();
    while start.elapsed() < turn {
        generator.turn()?;
    }
    let elapsed = start.elapsed();
    let cpu = cpu::time(pid)?.saturating_sub(cpu);
    let done = generator.lanes.iter().map(|lane| lane.done);
    let (fewest, most) = (done.clone().min(), done.max());
    let several = generator.clients.len() > 1;
    let fairness = fewest.zip(most).filter(|_| several);
    Ok(Measured {
        fairness: fairness.map(|(fewest, most)| fewest as f64 / most.max(1) as f64),
        ..summary(&mut generator.latencies, elapsed, cpu)
    })
}

/// What a turn gave, from the latencies in nanoseconds.
fn summary(latencies: &mut [u32], elapsed: Duration, cpu: Duration) -> Measured {
    let count = latencies.len();
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = ((count as f64 * share) as usize).min(count.saturating_sub(1));
        latencies.get(index).map_or(0.0, |&ns| f64::from(ns) / 1e3)
    };
    Measured {
        iops: count as f64 / elapsed.as_secs_f64(),
        p50_us: at(0.50),
        p99_us: at(0.99),
        cpu_us: cpu.as_secs_f64() * 1e6 / count.max(1) as f64,
        ..Measured::default()
    }
}

/// One queue of one client.
struct Lane {
    client: usize,
    queue: usize,
    /// When the request of each slot was offered.
    started: Vec<Instant>,
    /// Requests that came back.
    done: u64,
}

struct Generator {
    clients: Vec<Client>,
    lanes: Vec<Lane>,
    case: Case,
    blocks: u64,
    random: u64,
    /// The block a sequential load is at.
    next: u64,
    /// The lane that is looked at first.
    first: usize,
    /// Nanoseconds.
    latencies: Vec<u32>,
    data: Vec<u8>,
}

impl Generator {
    fn submit(&mut self, lane: usize, slot: usize) -> Outcome<()> {
        let block = if self.case.sequential {
            self.next += 1;
            self.next
        } else {
            self.random = next_random(self.random);
            self.random
        };
        let offset = block % self.blocks * self.case.block as u64;
        let lane = &mut self.lanes[lane];
        lane.started[slot] = Instant::now();
        let client = &mut self.clients[lane.client];
        if self.case.write {
            client.submit_write(lane.queue, slot, offset, &self.data)?;
        } else {
            client.submit_read(lane.queue, slot, offset, self.case.block)?;
        }
        Ok(())
    }

    fn kick(&mut self, lane: usize) -> Outcome<()> {
        let lane = &self.lanes[lane];
        Ok(self.clients[lane.client].kick(lane.queue)?)
    }

    /// Waits for at least one request and renews all that are back.
    fn turn(&mut self) -> Outcome<()> {
        if self.renew()? {
            return Ok(());
        }
        let lanes: Vec<_> = self
            .lanes
            .iter()
            .map(|lane| (&self.clients[lane.client], lane.queue))
            .collect();
        Client::wait_any(&lanes, LIMIT)?;
        self.renew()?;
        Ok(())
    }

    /// True when something was back.
    fn renew(&mut self) -> Outcome<bool> {
        let mut any = false;
        // Another one first each time, or the same would always be early.
        let count = self.lanes.len();
        self.first = (self.first + 1) % count;
        for index in (self.first..count).chain(0..self.first) {
            let (client, queue) = (self.lanes[index].client, self.lanes[index].queue);
            let mut some = false;
            while let Some(done) = self.clients[client].ready(queue) {
                if done.ret != 0 {
                    return Err(format!("a request failed with errno {}", -done.ret).into());
                }
                let took = self.lanes[index].started[done.slot].elapsed().as_nanos();
                self.lanes[index].done += 1;
                self.latencies.push(u32::try_from(took).unwrap_or(u32::MAX));
                self.submit(index, done.slot)?;
                some = true;
            }
            if some {
                self.kick(index)?;
            }
            any |= some;
        }
        Ok(any)
    }
}

/// Two threads that wake each other by eventfds: what a kick and a call cost at
/// least on this machine.
pub(crate) fn round_trip(turn: Duration) -> Outcome<Measured> {
    use rustix::event::{EventfdFlags, eventfd};
    let make = || eventfd(0, EventfdFlags::CLOEXEC);
    let (kick, call) = (make()?, make()?);
    let one = 1u64.to_ne_bytes();
    let over = 2u64.to_ne_bytes();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut word = [0; 8];
            while rustix::io::read(&kick, &mut word).is_ok() && word == one {
                let _ = rustix::io::write(&call, &one);
            }
        });
        let mut latencies = Vec::with_capacity(1 << 20);
        let begin = Instant::now();
        let mut word = [0; 8];
        while begin.elapsed() < turn {
            let start = Instant::now();
            rustix::io::write(&kick, &one)?;
            rustix::io::read(&call, &mut word)?;
            latencies.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
        let elapsed = begin.elapsed();
        rustix::io::write(&kick, &over)?;
        let _ = other.join();
        Ok(summary(&mut latencies, elapsed, Duration::ZERO))
    })
}
