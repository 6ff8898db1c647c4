//! Attacks on four confined sidecars at once, by front ends and drivers that do wrong at native
//! speed, and by a guest with an init of its own; and the innocent beside them, who must notice
//! nothing. Used by `pericarp-attack` and by the suite `attack`.
//!
//! Every device of a sidecar is attacked by a thread of its own (`session`). Beside it, in the
//! same process where it serves more than one device, somebody does I/O and compares it
//! (`witness`). Whoever watches sees to it that no process ends, hangs or grows, and that
//! nothing turns up where it should not (`stage`). In between and in the end a driver that does
//! all right comes to the device that is attacked, and must be served.

mod block;
mod chance;
mod files;
mod machine;
mod messages;
mod network;
mod report;
mod session;
mod sockets;
mod stage;
mod witness;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub use report::{Act, Held, Machines, Report, Siege, Tally, Witness};

use crate::guest::Assets;
use crate::parts::Part;
use chance::Chance;
use session::{Next, Session, Victim};
use stage::{Sidecar, Stage, holds};
use witness::Innocent;

/// What is attacked.
const DEVICES: [&str; 4] = ["block", "fs", "net", "vsock"];
/// Acts of a session, at most.
const ACTS: u64 = 60;
/// Sessions from one driver that does right to the next, and from one search of guest memory to
/// the next.
const PROBE_EVERY: u64 = 16;
/// What a process may have more of than at the start, when the attackers have gone.
const MORE_DESCRIPTORS: usize = 16;
/// The same of memory, in KiB: what allocators keep of what they once had.
const MORE_MEMORY: u64 = 48 << 10;
/// The same of threads: the kernel's own, for what a ring cannot do at once, go after some seconds.
const MORE_THREADS: usize = 8;
/// Times that one who does right may try.
const TRIES: usize = 5;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How long.
    pub seconds: u64,
    /// What it begins with: the same has the same happen, but for its timing.
    pub seed: u64,
    /// Front ends and drivers attack.
    pub native: bool,
    /// A guest of QEMU's attacks.
    pub guest: bool,
}

/// Attacks. `Ok(None)` is a machine that cannot do it, and says so. The calling thread is in a
/// network and mounts of its own afterwards.
///
/// # Errors
/// What keeps the attack from beginning. What comes of it is in the report.
pub fn run(test: &str, plan: &Plan) -> Result<Option<Report>, String> {
    let parts: &[Part] = match plan.guest {
        true => &[
            Part::QemuSystem,
            Part::Busybox,
            Part::Ours("pericarp-poker"),
        ],
        false => &[],
    };
    let assets = match plan.guest {
        true => match Assets::for_test(test, parts) {
            Some(assets) => Some(assets),
            None => return Ok(None),
        },
        false => None,
    };
    let Some(mut stage) = Stage::set(test, parts, plan)? else {
        return Ok(None);
    };
    let mut report = Report {
        seed: plan.seed,
        seconds: plan.seconds,
        ..Report::default()
    };
    let image = match &assets {
        Some(assets) => Some(machine::image(&stage, assets)?),
        None => None,
    };
    let shared = Shared::default();
    let mut sidecars = std::mem::take(&mut stage.sidecars);
    std::thread::scope(|scope| {
        let (stage, shared) = (&stage, &shared);
        for device in DEVICES {
            scope.spawn(move || shared.bear_witness(stage, device));
        }
        // What is held with the innocent there, and nobody else.
        sleep(Duration::from_secs(1));
        for sidecar in &sidecars {
            let now = sidecar.footprint();
            shared.with(|report| report.held.entry(sidecar.name).or_default().start = now);
        }
        if plan.native {
            for device in DEVICES {
                scope.spawn(move || shared.besiege(stage, device, plan.seed));
            }
        }
        for device in ["vsock", "vsock-guest"] {
            scope.spawn(move || {
                let mut chance = Chance::new(plan.seed, device);
                let uds = stage.path(&format!("{device}-host"));
                sockets::host(&uds, &shared.stop, &shared.quiet, &mut chance);
            });
        }
        if let (Some(assets), Some(image)) = (&assets, &image) {
            scope.spawn(move || shared.besiege_from_a_guest(stage, assets, image));
        }
        // A guest has to boot before it can do anything.
        let time = Duration::from_secs(plan.seconds);
        let mut end = Instant::now() + time;
        while Instant::now() < end && !shared.stopped() {
            shared.watch(&mut sidecars);
            sleep(Duration::from_millis(500));
            if plan.guest && !shared.begun.load(Ordering::Relaxed) {
                end = Instant::now() + time;
            }
        }
        shared.stop.store(true, Ordering::Relaxed);
    });
    let mut done = shared
        .report
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    report.sieges = std::mem::take(&mut done.sieges);
    report.witnesses = std::mem::take(&mut done.witnesses);
    report.held = std::mem::take(&mut done.held);
    report.machines = done.machines.take();
    report.faults = std::mem::take(&mut done.faults);
    afterwards(&stage, &mut sidecars, &mut report);
    // In the order in which they are to go.
    drop(sidecars);
    Ok(Some(report))
}

/// What those who attack, watch and bear witness have in common.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The guest is at work.
    begun: AtomicBool,
    /// Held by one who is to be left alone by the host's programs.
    quiet: Mutex<()>,
    report: Mutex<Report>,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn with<T>(&self, change: impl FnOnce(&mut Report) -> T) -> T {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Something gave way: all of it ends.
    fn fault(&self, what: String) {
        self.with(|report| report.faults.push(what));
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Looks at the processes once.
    fn watch(&self, sidecars: &mut [Sidecar]) {
        for sidecar in sidecars {
            if let Some(end) = sidecar.ended() {
                self.fault(end);
                continue;
            }
            let (now, stats) = (sidecar.footprint(), sidecar.stats());
            self.with(|report| {
                let held = report.held.entry(sidecar.name).or_default();
                if let Some(now) = now {
                    held.see(now);
                }
                if let Some(Ok(took)) = stats {
                    held.stats_ms = held.stats_ms.max(took.as_millis() as u64);
                    held.asked += 1;
                }
            });
            if let Some(Err(error)) = stats {
                self.fault(error);
            }
        }
    }

    /// Somebody innocent with a device of this kind, until it is over.
    fn bear_witness(&self, stage: &Stage, device: &'static str) {
        let socket = stage.path(&format!("{device}-own"));
        let content = stage.canary.repeat(8);
        let innocent = || -> Result<Box<dyn Innocent>, String> {
            Ok(match device {
                "block" => {
                    let tail = stage
                        .canary
                        .repeat(block::TAIL as usize / stage.canary.len());
                    Box::new(block::Neighbour::connect(
                        &socket,
                        &stage.path("disk-own"),
                        tail,
                    )?)
                }
                "fs" => Box::new(files::Neighbour::connect(&socket, content)?),
                "net" => Box::new(network::Neighbour::connect(&socket, content, network::OWN)?),
                _ => {
                    let uds = stage.path("vsock-own-host");
                    Box::new(sockets::Neighbour::connect(&socket, &uds, content)?)
                }
            })
        };
        let told = caught(|| {
            let mut innocent = innocent()?;
            while !self.stopped() {
                innocent.turn()?;
                self.with(|report| report.witnesses.entry(device).or_default().rounds += 1);
                // Not to have the CPUs for itself.
                sleep(Duration::from_millis(10));
            }
            innocent.finish()
        });
        if let Err(error) = told {
            self.fault(format!("the innocent at {device}: {error}"));
        }
    }

    /// One hostile session after another on a device, until it is over.
    fn besiege(&self, stage: &Stage, device: &'static str, seed: u64) {
        let mut victim: Box<dyn Victim> = match device {
            "block" => Box::new(block::Disk),
            "fs" => Box::new(files::Directory::default()),
            "net" => Box::new(network::Card),
            _ => Box::new(sockets::Streams),
        };
        let socket = stage.path(device);
        let mut chance = Chance::new(seed, device);
        let mut siege = Siege::default();
        let mut refused = 0;
        while !self.stopped() {
            siege.sessions += 1;
            let search = siege
                .sessions
                .is_multiple_of(PROBE_EVERY)
                .then_some(&*stage.canary);
            let played = caught(|| {
                play(
                    &socket,
                    &mut *victim,
                    &mut chance,
                    &mut siege,
                    search,
                    &self.stop,
                )
            });
            match played {
                Ok(Played::Well) => refused = 0,
                Ok(Played::NotBegun(error)) => {
                    refused += 1;
                    if refused == TRIES {
                        self.fault(format!("{device}, session {}: {error}", siege.sessions));
                    }
                }
                Ok(Played::Leak) => self.fault(format!(
                    "{device}, session {}: its guest got what is not its own",
                    siege.sessions
                )),
                Err(error) => {
                    self.fault(format!("{device}, session {}: {error}", siege.sessions));
                }
            }
            if siege.sessions.is_multiple_of(PROBE_EVERY) {
                self.probe(stage, device, &mut siege);
            }
        }
        self.with(|report| {
            report.sieges.insert(device, siege);
        });
    }

    /// A driver that does all right is served.
    fn probe(&self, stage: &Stage, device: &'static str, siege: &mut Siege) {
        match probed(stage, device, &self.quiet) {
            Ok(()) => siege.probes += 1,
            Err(error) => {
                let sessions = siege.sessions;
                self.fault(format!("{device} after {sessions} sessions: {error}"));
            }
        }
    }

    /// A guest on devices of its own, until it is over. Between two boots a driver that does right
    /// comes to each of them.
    fn besiege_from_a_guest(&self, stage: &Stage, assets: &Assets, image: &Path) {
        let between = || {
            for device in DEVICES {
                let device = format!("{device}-guest");
                if let Err(error) = probed(stage, &device, &self.quiet) {
                    self.fault(format!("{device}, after a guest: {error}"));
                }
            }
        };
        let told = machine::besiege(stage, assets, image, &self.stop, &self.begun, between);
        match told {
            Ok(machines) => self.with(|report| report.machines = Some(machines)),
            Err(error) => self.fault(format!("the guest: {error}")),
        }
    }
}

/// What came of a session.
enum Played {
    Well,
    NotBegun(String),
    /// What is not the guest's is in its memory.
    Leak,
}

fn play(
    socket: &Path,
    victim: &mut dyn Victim,
    chance: &mut Chance,
    siege: &mut Siege,
    search: Option<&[u8]>,
    stop: &AtomicBool,
) -> Result<Played, String> {
    let mut session = match Session::begin(socket, victim, chance) {
        Ok(session) => session,
        Err(error) => return Ok(Played::NotBegun(error.to_string())),
    };
    let mut next = Next::More;
    for _ in 0..1 + chance.below(ACTS) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let act = chance.pick(&Act::ALL);
        let tally = siege.acts.entry(act).or_default();
        // A device that has hung up is no error here.
        next = session
            .act(act, victim, chance, tally)
            .unwrap_or(Next::Over);
        if next != Next::Cut && session.is_over() {
            tally.hung_up += 1;
            next = Next::Over;
        }
        if next != Next::More {
            break;
        }
    }
    if let (Some(canary), true) = (search, next != Next::Cut) {
        siege.searches += 1;
        let memory = session.memory().map_err(|error| error.to_string())?;
        if holds(&memory, canary) {
            return Ok(Played::Leak);
        }
    }
    Ok(Played::Well)
}

/// Has a driver that does right come to the device that is attacked. On a busy machine it may
/// have to try again.
fn probed(stage: &Stage, device: &str, quiet: &Mutex<()>) -> Result<(), String> {
    let socket = stage.path(device);
    let _quiet = quiet.lock().unwrap_or_else(PoisonError::into_inner);
    let mut last = Ok(());
    for _ in 0..TRIES {
        last = caught(|| match device {
            "block" | "block-guest" => block::probe(&socket),
            "fs" => files::probe(&socket, &stage.path("tree")),
            "fs-guest" => files::probe(&socket, &stage.path("tree-guest")),
            "net" => network::probe(&socket, network::ATTACKED),
            "net-guest" => network::probe(&socket, network::GUESTS),
            device => sockets::probe(&socket, &stage.path(&format!("{device}-host"))),
        });
        if last.is_ok() {
            break;
        }
    }
    last.map_err(|error| format!("a driver that does right is not served: {error}"))
}

/// The rigs panic where something is not as it should be.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(text.unwrap_or_else(|| "a panic".into()))
    })
}

/// When all have gone: who does right is served, nothing is held, nothing runs, nothing was
/// touched.
fn afterwards(stage: &Stage, sidecars: &mut [Sidecar], report: &mut Report) {
    let quiet = Mutex::new(());
    for device in DEVICES {
        match probed(stage, device, &quiet) {
            Ok(()) => report.sieges.entry(device).or_default().probes += 1,
            Err(error) => report.faults.push(format!("{device}, in the end: {error}")),
        }
    }
    for sidecar in sidecars {
        if let Some(end) = sidecar.ended() {
            report.faults.push(end);
            continue;
        }
        let held = report.held.entry(sidecar.name).or_default();
        let mut wrong = None;
        // What is closed late is closed all the same, and then nothing is left to do.
        for _ in 0..40 {
            let before = sidecar.cpu();
            sleep(Duration::from_secs(1));
            held.idle_ms = sidecar.cpu().saturating_sub(before).as_millis() as u64;
            held.end = sidecar.footprint();
            wrong = grown(held);
            if wrong.is_none() {
                break;
            }
        }
        if let Some(wrong) = wrong {
            report.faults.push(format!("{}: {wrong}", sidecar.name));
        }
    }
    report.faults.extend(stage.damage());
}

/// What a process holds, or does, that it did not before.
fn grown(held: &Held) -> Option<String> {
    let (Some(start), Some(end)) = (held.start, held.end) else {
        return Some("it is gone".into());
    };
    if end.fds > start.fds + MORE_DESCRIPTORS {
        return Some(format!(
            "{} descriptors, {} at the start",
            end.fds, start.fds
        ));
    }
    if end.threads > start.threads + MORE_THREADS {
        return Some(format!(
            "{} threads, {} at the start",
            end.threads, start.threads
        ));
    }
    if end.anon_kib > start.anon_kib + MORE_MEMORY {
        let (end, start) = (end.anon_kib, start.anon_kib);
        return Some(format!("{end} KiB of memory, {start} at the start"));
    }
    // With nothing to do it does nothing: not even half of the time.
    (held.idle_ms > 500)
        .then(|| format!("{} ms of CPU in a second with nothing to do", held.idle_ms))
}
