//! A pod with a writer in it, and its volumes: a block device and a directory, which the pods that come
//! after it have, too. Called by `site`, `kills` and `soak`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::store::SIZE;
use super::{Ledger, Site};
use crate::audit::{Member, running};
use crate::bounded::poll;
use crate::cri::proto::ContainerState;
use crate::cri::{Disk, container, log, mount, pod};

/// How long a pod may take to come up, where all CPUs are emulated and others come up, too.
const UP: Duration = Duration::from_secs(150);
/// How long I/O may stand still, and an end may take to be known.
pub(super) const BOUND: Duration = Duration::from_secs(60);
/// Steps of each target that show that it goes on: one may have been told before.
const STEPS: u64 = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// A process that is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `pericarp-block`.
    Block,
    /// `pericarp-net`.
    Net,
    /// `pericarp-fs`.
    Fs,
    /// `pericarp-vsock`, and with it every connection to the agent.
    Vsock,
    /// QEMU, or `pericarp-vmm`.
    Machine,
    /// The pod's shim.
    Shim,
    /// containerd, which is started again at once.
    Containerd,
}

impl Kind {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Block,
        Self::Net,
        Self::Fs,
        Self::Vsock,
        Self::Machine,
        Self::Shim,
        Self::Containerd,
    ];

    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "pericarp-block",
            Self::Net => "pericarp-net",
            Self::Fs => "pericarp-fs",
            Self::Vsock => "pericarp-vsock",
            Self::Machine => "the machine",
            Self::Shim => "the shim",
            Self::Containerd => "containerd",
        }
    }

    /// Whether a process of a pod is this one.
    pub fn is(self, member: &Member) -> bool {
        match self {
            Self::Machine => matches!(
                member.program.as_str(),
                "qemu-system-x86_64" | "pericarp-vmm"
            ),
            Self::Shim => member.program == "containerd-shim-pericarp-v2",
            Self::Containerd => false,
            _ => member.program == self.name(),
        }
    }

    /// Whether a pod with these processes goes on without it.
    pub fn is_replaced(self, members: &[Member]) -> bool {
        let finds_shares = members.iter().any(|one| one.program == "pericarp-vmm");
        match self {
            Self::Block | Self::Net | Self::Containerd => true,
            Self::Fs => finds_shares,
            Self::Vsock | Self::Machine | Self::Shim => false,
        }
    }

    /// What is said of a pod that it has ended. Nobody is left to say it of a shim's.
    fn reason(self) -> &'static str {
        match self {
            Self::Machine => "the virtual machine died",
            Self::Shim => "",
            other => other.name(),
        }
    }
}

/// A pod, and what outlives it.
#[derive(Debug)]
pub struct Tenant {
    /// Which of the run's.
    pub number: usize,
    /// What its writers have said.
    pub ledger: Ledger,
    /// A line may be cut: containerd was killed while it wrote one.
    pub(super) cut: bool,
    disk: Disk,
    data: PathBuf,
    pause: Duration,
    lives: u32,
    name: String,
    pod: Option<String>,
    container: String,
    log: PathBuf,
    read: u64,
}

impl Tenant {
    pub(super) fn new(site: &Site, number: usize, pause: Duration) -> Result<Self, String> {
        let scratch = site.node.scratch();
        let disk = Disk::new(scratch, &format!("disk-{number}"), SIZE);
        let data = scratch.path(&format!("data-{number}"));
        fs::create_dir(&data).map_err(|error| format!("{}: {error}", data.display()))?;
        Ok(Self {
            number,
            ledger: Ledger::default(),
            cut: false,
            disk: disk.ok_or("no loop device can be had")?,
            data,
            pause,
            lives: 0,
            name: String::new(),
            pod: None,
            container: String::new(),
            log: PathBuf::new(),
            read: 0,
        })
    }

    /// Runs a pod on the volumes, and waits until its writer works and has found what there should be.
    pub(super) fn start(&mut self, site: &Site) -> Result<(), String> {
        self.lives += 1;
        self.name = format!("tenant-{}-{}", self.number, self.lives);
        let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let run = site.node.run_pod(pod(&self.name), "pericarp");
        let run = run.map_err(|error| failed("no pod", &error))?;
        self.pod = Some(run.id.clone());
        let words = site.writer(self.number, self.pause);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut config = container("writer", &words);
        config.devices = vec![self.disk.device("/dev/xvda", "mrw")];
        config.mounts = vec![
            mount(&self.data, "/data", false),
            mount(&site.tools, "/tools", true),
        ];
        self.ledger.begin();
        self.read = 0;
        let logs = PathBuf::from(&run.config.log_directory);
        self.log = logs.join(&config.log_path);
        let made = run
            .start(&config)
            .map_err(|error| failed("no container", &error))?;
        self.container = made.id;
        self.until(site, UP, 1).map(drop)
    }

    /// Waits until each target is so many steps further; the longest pause of one, milliseconds.
    fn until(&mut self, site: &Site, limit: Duration, steps: u64) -> Result<u64, String> {
        let before = self.ledger.told();
        let end = Instant::now() + limit;
        let mut look = Instant::now();
        loop {
            self.follow()?;
            let now = self.ledger.told();
            let behind = before.iter().find(|(name, at)| now[*name] < *at + steps);
            let Some((behind, _)) = behind else {
                return Ok(self.ledger.pause());
            };
            if look.elapsed() > Duration::from_secs(1) {
                look = Instant::now();
                if let Some(code) = self.code(site) {
                    self.follow()?;
                    let why = self.why(site);
                    return Err(format!("the pod has ended with {code}: {why}"));
                }
            }
            if Instant::now() > end {
                let why = self.why(site);
                return Err(format!("{behind} stands still for {limit:?}: {why}"));
            }
            sleep(PAUSE);
        }
    }

    /// Waits until it is seen that everything goes on; the longest pause, milliseconds.
    pub(super) fn goes_on(&mut self, site: &Site) -> Result<u64, String> {
        self.until(site, BOUND, STEPS)
    }

    /// Waits until containerd knows that it has ended, with the reason that it must have.
    pub(super) fn ends(&mut self, site: &Site, kind: Kind) -> Result<(), String> {
        let code = poll(BOUND, || {
            sleep(PAUSE);
            self.code(site)
        });
        let Some(code) = code else {
            return Err(format!("it has not ended after {BOUND:?}"));
        };
        if ![137, 255].contains(&code) {
            return Err(format!("it has ended with {code}"));
        }
        let mut why = String::new();
        let told = poll(Duration::from_secs(10), || {
            why = self.why(site);
            why.contains(kind.reason()).then_some(())
        });
        told.ok_or(format!("of its end is said {why:?}"))
    }

    /// The code with which the writer has ended, if it has.
    fn code(&self, site: &Site) -> Option<i32> {
        // Another connection: that of before may be to a containerd that is gone.
        let status = site.node.client().container_status(&self.container).ok()?;
        let ended = status.state == ContainerState::CONTAINER_EXITED.into();
        ended.then_some(status.exit_code)
    }

    /// What is known of what has gone wrong in it.
    fn why(&self, site: &Site) -> String {
        let (_, said, errors) = site.node.pericarp(&["why", &self.name, "--json"]);
        let said: Value = serde_json::from_str(&said).unwrap_or_default();
        let sentence = said["cause"]["sentence"].as_str();
        sentence.map_or_else(|| errors.trim().to_owned(), str::to_owned)
    }

    /// Takes the pod away, as a kubelet does: again, until it is.
    pub(super) fn remove(&mut self, site: &Site) -> Result<(), String> {
        let Some(id) = self.pod.take() else {
            return Ok(());
        };
        let mut last = String::new();
        let gone = poll(BOUND, || {
            let client = site.node.client();
            let done = client.stop_pod(&id).and_then(|()| client.remove_pod(&id));
            match done {
                Ok(()) => Some(()),
                Err(error) => {
                    last = error.to_string();
                    sleep(Duration::from_millis(500));
                    None
                }
            }
        });
        gone.ok_or(format!("pod {}: cannot be removed: {last}", self.name))?;
        self.follow()?;
        let mut left = Vec::new();
        let clean = poll(Duration::from_secs(20), || {
            sleep(PAUSE);
            let all = site.node.left().into_iter();
            left = all.filter(|trace| trace.contains(&id)).collect();
            left.is_empty().then_some(())
        });
        let what = || format!("pod {}: is left: {}", self.name, left.join("; "));
        clean.ok_or_else(what)
    }

    /// Its processes.
    pub fn members(&self) -> Vec<Member> {
        let Some(id) = &self.pod else {
            return Vec::new();
        };
        let pods = running().unwrap_or_default();
        let own = pods.into_iter().find(|pod| pod.is_called(id));
        own.map_or_else(Vec::new, |pod| pod.members)
    }

    /// Reads what has come in its log.
    pub(super) fn follow(&mut self) -> Result<(), String> {
        let Ok(file) = File::open(&self.log) else {
            return Ok(());
        };
        let bytes = rest(&file, self.read).map_err(|error| error.to_string())?;
        let Some(end) = bytes.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(());
        };
        self.read += end as u64 + 1;
        let text = String::from_utf8_lossy(&bytes[..=end]);
        let mut done = Ok(());
        for line in log::parse(&text).map_err(|error| error.to_string())? {
            let taken = self.ledger.take(line.time, &line.text);
            // What containerd had read and not written when it was killed is gone, up to the middle of
            // a line.
            let cut = matches!(&taken, Err(why) if why.starts_with("the writer says"));
            let cut = cut && !line.text.starts_with("error");
            if !(cut && std::mem::take(&mut self.cut)) {
                done = done.and(taken);
            }
        }
        done
    }

    pub(super) fn is_free(&self) -> bool {
        self.disk.is_free()
    }
}

fn rest(file: &File, from: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len().saturating_sub(from);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}
