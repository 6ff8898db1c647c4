//! Runs a table of hostile acts against one backend. After each act the
//! backend must still serve a well-behaved client, and the disk must hold
//! what it held. All acts are played before the verdict, so that one run
//! shows everything a backend gets wrong.

use std::error::Error;
use std::thread::sleep;
use std::time::Duration;

use crate::frontend::{Driver, Op, Setup};
use crate::model::{Model, SECTOR, Sequence};
use crate::peer::{Backend, Footprint, Kind, Options};
use crate::scratch::Scratch;

/// What an act returns: an error says what the backend got wrong.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Bytes of the disk. The first half is never to be written.
pub const DISK: u64 = 2 << 20;
/// First sector an act may write.
pub const SCRATCH_SECTOR: u64 = DISK / 2 / SECTOR;
/// Sectors an act may write.
pub const SCRATCH_SECTORS: u64 = DISK / 4 / SECTOR;
/// The sector the well-behaved client writes.
const HEALTH: u64 = DISK / 8 * 7 / SECTOR;
/// What GET_ID must say, where a backend can be told.
pub const SERIAL: &str = "PERICARP-0123456789";

/// What is left of the connection after an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Requests on the same ring must work.
    Usable,
    /// The ring may be broken or the connection closed; the next one must work.
    Reconnect,
}

/// One act.
pub struct Case {
    /// What is done.
    pub name: &'static str,
    /// How the front end is set up for it.
    pub setup: Setup,
    /// Does it, and judges the answer.
    pub act: fn(&mut Driver) -> Outcome,
    /// What must hold after it.
    pub after: After,
    /// Peers that are known to do otherwise, and what they do.
    pub differs: Vec<(Kind, &'static str)>,
}

impl Case {
    /// An act after which the same ring must work.
    pub fn new(name: &'static str, act: fn(&mut Driver) -> Outcome) -> Self {
        Case {
            name,
            setup: Setup::default(),
            act,
            after: After::Usable,
            differs: Vec::new(),
        }
    }

    /// The connection need not survive the act.
    pub fn reconnect(mut self) -> Self {
        self.after = After::Reconnect;
        self
    }

    /// Another set-up.
    pub fn with(mut self, change: fn(&mut Setup)) -> Self {
        change(&mut self.setup);
        self
    }

    /// `kind` is known to behave differently.
    pub fn differs(mut self, kind: Kind, how: &'static str) -> Self {
        self.differs.push((kind, how));
        self
    }
}

/// The disk's content before the first act.
pub fn content() -> Model {
    let mut model = Model::zeroed(DISK);
    model.write(0, &Sequence::new(77).bytes(DISK as usize));
    model
}

/// One backend and the disk it serves.
pub struct Stage {
    scratch: Scratch,
    kind: Kind,
    options: Options,
    model: Model,
    backend: Backend,
}

impl Stage {
    /// Starts `kind` on a disk with [`content`].
    ///
    /// # Panics
    /// When it does not start.
    pub fn new(kind: Kind, options: Options) -> Self {
        let scratch = Scratch::new();
        let model = content();
        let disk = scratch.file("disk", model.read(0, DISK as usize));
        let options = Options {
            serial: Some(SERIAL.into()),
            ..options
        };
        let backend = Backend::start(kind, &scratch, &disk, &options)
            .unwrap_or_else(|error| panic!("{error}"));
        Stage {
            scratch,
            kind,
            options,
            model,
            backend,
        }
    }

    /// The running backend.
    pub fn backend(&mut self) -> &mut Backend {
        &mut self.backend
    }

    fn play(&mut self, case: &Case) -> Outcome {
        let mut driver = Driver::connect(self.backend.socket(), &case.setup)?;
        let done = (case.act)(&mut driver);
        let usable = match case.after {
            After::Usable if done.is_ok() && case.setup.enable && self.backend.is_alive() => {
                well_behaved(&mut driver, self.options.read_only)
                    .map_err(|error| format!("the ring is unusable after it: {error}").into())
            }
            _ => Ok(()),
        };
        drop(driver);
        done.and(usable)
    }

    fn next_client(&self) -> Outcome {
        let mut driver = Driver::connect(self.backend.socket(), &Setup::default())?;
        well_behaved(&mut driver, self.options.read_only)
    }

    /// One act, then all that must hold after it.
    fn judge(&mut self, case: &Case) -> Result<(), String> {
        let mut wrong = Vec::new();
        if let Err(error) = self.play(case) {
            wrong.push(error.to_string());
        }
        // A peer that still hangs up on the last front end may turn one away.
        let patient = self.kind != Kind::Pericarp;
        let mut next = self.next_client();
        if next.is_err() && patient && self.backend.is_alive() {
            next = self.next_client();
        }
        if let Err(error) = next {
            wrong.push(format!("the next client is not served: {error}"));
        }
        if !self.backend.is_alive() {
            wrong.push(format!("the backend {}", self.backend.epitaph()));
        }
        let mut safe = Model::zeroed(DISK / 2);
        safe.write(0, self.model.read(0, DISK as usize / 2));
        if let Some(difference) = safe.differs(self.backend.disk()) {
            wrong.push(format!("the disk changed: {difference}"));
        }
        if wrong.is_empty() {
            return Ok(());
        }
        // A fresh one for the next act.
        let disk = self.backend.disk().to_owned();
        self.backend.crash();
        self.backend = Backend::start(self.kind, &self.scratch, &disk, &self.options)
            .map_err(|error| error.to_string())?;
        Err(wrong.join("; "))
    }

    /// Plays all acts; panics with everything that went wrong.
    ///
    /// # Panics
    /// When an act shows a fault that is not a known difference of this peer.
    pub fn run(&mut self, cases: Vec<Case>) {
        let total = cases.len();
        let mut faults = Vec::new();
        let mut before: Option<(i32, Footprint)> = None;
        for mut case in cases {
            let known = case
                .differs
                .iter()
                .find(|(kind, _)| *kind == self.kind)
                .map(|(_, how)| *how);
            if known.is_some() {
                // It will probably not come; no need to wait long.
                case.setup.limit = Duration::from_millis(300);
            }
            let verdict = self.judge(&case);
            match (verdict, known) {
                (Ok(()), None) => {}
                (Ok(()), Some(how)) => {
                    eprintln!("{}: fine, although known to differ: {how}", case.name)
                }
                (Err(fault), Some(how)) => eprintln!("{}: differs ({how}): {fault}", case.name),
                (Err(fault), None) => faults.push(format!("{}: {fault}", case.name)),
            }
            if before.is_none_or(|(pid, _)| pid != self.backend.pid()) {
                before = self
                    .backend
                    .footprint()
                    .map(|now| (self.backend.pid(), now));
            }
        }
        sleep(Duration::from_millis(100));
        // The reference leaks an eventfd per front end, through its crate; the
        // storage daemon's thread pool and coroutines grow with the load.
        if let (Some((pid, before)), Some(after)) = (before, self.backend.footprint())
            && pid == self.backend.pid()
            && self.kind != Kind::Reference
            && (after.fds > before.fds + 12
                || (self.kind == Kind::Pericarp && after.maps > before.maps + 24))
        {
            faults.push(format!(
                "left behind by all acts together: {before:?} -> {after:?}"
            ));
        }
        assert!(
            faults.is_empty(),
            "{:?}: {} of {total} acts failed:\n  {}",
            self.kind,
            faults.len(),
            faults.join("\n  ")
        );
    }
}

/// Writes, reads back and flushes like any driver.
fn well_behaved(driver: &mut Driver, read_only: bool) -> Outcome {
    if !read_only {
        let data = Sequence::new(3).bytes(4096);
        let write = driver.request(
            0,
            &Op::Write {
                sector: HEALTH,
                data: data.clone(),
            },
        )?;
        let read = driver.request(
            0,
            &Op::Read {
                sector: HEALTH,
                len: 4096,
            },
        )?;
        if write.status != 0 || read.status != 0 || read.data != data {
            return Err(format!(
                "a good write got {}, its read back {}, {}",
                write.status,
                read.status,
                if read.data == data {
                    "with the right data"
                } else {
                    "with wrong data"
                }
            )
            .into());
        }
    }
    let read = driver.request(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    let flush = driver.request(0, &Op::Flush)?;
    if read.status != 0 || read.data != content().read(0, 512) || flush.status != 0 {
        return Err(format!("a good read got {}, a flush {}", read.status, flush.status).into());
    }
    Ok(())
}
