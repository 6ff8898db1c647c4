//! The load, and what is counted while it runs.
//!
//! The driver offers a whole batch, kicks once, and then looks at the ring only
//! after it was called, as a guest with interrupts does. The worker calls with
//! the same system call that it sleeps in, so it is asleep when the next batch
//! comes: from a warm page cache every batch takes the same way, and the counts
//! are exact. Direct reads come back when the disk likes; those of one batch
//! are taken in more or fewer turns, so those counts have a spread.
//!
//! The worker does not poll (`--poll-us 0`): whether it finds something while
//! it does is a matter of luck.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pericarp_benches::Outcome;
use pericarp_benches::disk::next_random;
use pericarp_tests::bounded::poll;
use pericarp_tests::client::Client;
use pericarp_tests::parts::Part;
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;
use rustix::process::{Pid, Signal, kill_process};

const BLOCK: usize = 4096;
/// Requests before anything is counted.
const WARM_UP: usize = 640;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Parts of the time, of which the fastest counts.
const SLICES: usize = 10;
/// Where a tool writes.
const REPORT: &str = "report";

/// One load.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    depth: usize,
    cache: &'static str,
    /// Whether its instructions can be counted: where every request is a turn of
    /// its own, what the worker does in between is a matter of time, and where
    /// the disk has a say, of luck.
    instructions: bool,
}

const fn case(name: &'static str, depth: usize, cache: &'static str) -> Case {
    Case {
        name,
        depth,
        cache,
        instructions: false,
    }
}

/// All loads.
pub(crate) const CASES: &[Case] = &[
    case("cached-1", 1, "buffered"),
    Case {
        instructions: true,
        ..case("cached-32", 32, "buffered")
    },
    case("direct-1", 1, "direct"),
    case("direct-32", 32, "direct"),
];

/// What one request cost.
#[derive(Debug)]
pub(crate) struct Costs {
    /// Instructions of the whole process, outside the kernel.
    pub(crate) instructions: Option<f64>,
    /// System calls of the whole process.
    pub(crate) syscalls: f64,
    /// Kicks that the device asked for.
    pub(crate) kicks: f64,
    /// Calls that it made.
    pub(crate) calls: f64,
    /// Microseconds, in the fastest tenth.
    pub(crate) us: f64,
}

/// Measures one build on one load.
pub(crate) fn measure(case: &Case, program: &Path, file: &Path, requests: usize) -> Outcome<Costs> {
    if case.cache == "buffered" {
        std::io::copy(&mut File::open(file)?, &mut std::io::sink())?;
    }
    let build = Build {
        case,
        program,
        file,
    };
    // Start and end of the process cost something, too, and the same in both.
    let more = |tool: Tool| -> Outcome<f64> {
        let short = build.watched(tool, WARM_UP)?;
        let long = build.watched(tool, WARM_UP + requests)?;
        Ok(long.saturating_sub(short) as f64 / requests as f64)
    };
    let syscalls = more(Tool::Calls)?;
    let instructions = case
        .instructions
        .then(|| more(Tool::Instructions))
        .transpose()?;

    let scratch = Scratch::new();
    let mut served = Served::start(&build, &scratch, None)?;
    served.requests(WARM_UP)?;
    let (kicks, calls) = (served.client.kicks, served.calls);
    let mut fastest = f64::INFINITY;
    let slice = requests / SLICES / 32 * 32;
    for _ in 0..SLICES {
        let start = Instant::now();
        served.requests(slice)?;
        fastest = fastest.min(start.elapsed().as_secs_f64() * 1e6 / slice as f64);
    }
    let counted = (SLICES * slice) as f64;
    Ok(Costs {
        instructions,
        syscalls,
        kicks: (served.client.kicks - kicks) as f64 / counted,
        calls: (served.calls - calls) as f64 / counted,
        us: fastest,
    })
}

/// A program that counts what another does.
#[derive(Clone, Copy)]
enum Tool {
    /// System calls, by strace.
    Calls,
    /// Instructions outside the kernel, by callgrind. It runs one thread at a
    /// time and does not know that io_uring sleeps, so the engine is the
    /// synchronous one; and it is no confined program. Strace keeps the place of
    /// the kernel's vDSO from the program, which callgrind has removed.
    Instructions,
}

impl Tool {
    /// A command for `program` under the tool, which writes to `report`.
    fn wrap(self, program: &Path, report: &Path) -> Outcome<Command> {
        let find = |part: Part| {
            part.find()
                .ok_or(format!("no {}: install it", part.program()))
        };
        let mut command = command(&find(Part::Strace)?);
        command.arg("-f").arg("-o");
        match self {
            Tool::Calls => {
                command.arg(report).args(["-c", "-U", "calls,name", "--"]);
                mortal(&mut command, program);
            }
            Tool::Instructions => {
                command.args(["/dev/null", "--seccomp-bpf", "-e", "trace=prctl"]);
                command.args(["-e", "inject=prctl:error=EINVAL", "--"]);
                command.arg(find(Part::Valgrind)?).arg("--tool=callgrind");
                command.arg(format!("--callgrind-out-file={}", report.display()));
                command.arg(program);
            }
        }
        Ok(command)
    }

    /// The total in its report.
    fn total(self, report: &str) -> Option<u64> {
        report.lines().rev().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match (self, words.as_slice()) {
                (Tool::Calls, [count, "total"]) | (Tool::Instructions, ["totals:", count]) => {
                    count.parse().ok()
                }
                _ => None,
            }
        })
    }
}

/// Adds `program`, so that it ends when its tracer is killed, which would only
/// let go of it. It takes calls that must not be made to fail.
fn mortal(tracer: &mut Command, program: &Path) {
    let inner = command(program);
    tracer.arg(inner.get_program()).args(inner.get_args());
}

/// What is measured, on what.
struct Build<'a> {
    case: &'a Case,
    program: &'a Path,
    file: &'a Path,
}

impl Build<'_> {
    /// What a process costs that serves so many requests, from its start to its
    /// end.
    fn watched(&self, tool: Tool, requests: usize) -> Outcome<u64> {
        let scratch = Scratch::new();
        let mut served = Served::start(self, &scratch, Some(tool))?;
        served.requests(requests)?;
        let Served {
            client,
            mut process,
            ..
        } = served;
        drop(client);
        // Strace passes no signal on: its child has to be told.
        let strace = process.pid();
        let children = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children"))?;
        let child = Pid::from_raw(children.trim().parse()?).ok_or("strace has no child")?;
        kill_process(child, Signal::TERM)?;
        process.wait(LIMIT).ok_or("it did not end on SIGTERM")?;
        let report = fs::read_to_string(scratch.path(REPORT))?;
        let total = tool.total(&report);
        total.ok_or_else(|| format!("a report without a total:\n{report}").into())
    }
}

/// A running program and its driver.
struct Served {
    client: Client,
    process: Process,
    depth: usize,
    blocks: u64,
    random: u64,
    /// Calls taken so far.
    calls: u64,
}

impl Served {
    fn start(build: &Build<'_>, scratch: &Scratch, tool: Option<Tool>) -> Outcome<Self> {
        let Build {
            case,
            program,
            file,
        } = build;
        let socket = scratch.path("s");
        let mut command = match tool {
            None => command(program),
            Some(tool) => tool.wrap(program, &scratch.path(REPORT))?,
        };
        if matches!(tool, Some(Tool::Instructions)) {
            command.args(["--no-confine", "--io-engine=sync"]);
        }
        command
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--blk-file={}", file.display()))
            .arg(format!("--cache={}", case.cache))
            .args(["--read-only", "--workers=1", "--poll-us=0"]);
        let mut process = Process::start(&mut command, LIMIT)?;
        let there = poll(LIMIT, || {
            (socket.exists() || process.ended().is_some()).then(|| socket.exists())
        });
        if there != Some(true) {
            let (how, said) = (process.epitaph(), process.output().last(10));
            return Err(format!("{} {how}; it wrote:\n{said}", program.display()).into());
        }
        let client = Client::connect(&socket, 1, case.depth)?;
        let blocks = client.capacity()? / BLOCK as u64;
        Ok(Self {
            client,
            process,
            depth: case.depth,
            blocks,
            random: 0x1234_5678_9abc_def1,
            calls: 0,
        })
    }

    /// So many reads, a batch at a time.
    fn requests(&mut self, count: usize) -> Outcome<()> {
        for _ in 0..count / self.depth {
            for slot in 0..self.depth {
                self.random = next_random(self.random);
                let offset = self.random % self.blocks * BLOCK as u64;
                self.client.submit_read(0, slot, offset, BLOCK)?;
            }
            self.client.kick(0)?;
            let mut back = 0;
            while back < self.depth {
                self.calls += self.client.called(0)?;
                while let Some(done) = self.client.ready(0) {
                    if done.ret != 0 {
                        return Err(format!("a read failed with errno {}", -done.ret).into());
                    }
                    back += 1;
                }
            }
        }
        Ok(())
    }
}
