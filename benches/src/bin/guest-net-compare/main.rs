//! `guest-net-compare`: what iperf3 gets through a guest's card, and what that costs the
//! host: `pericarp-net` beside whoever would carry the packets without it, in turns. The
//! same kernel of Debian's in machines of QEMU and ours, and User-mode Linux, whose guest
//! runs at native speed. As root:
//!
//! ```text
//! target/release/guest-net-compare --json FILE
//! cargo xtask lab -- target/release/guest-net-compare
//! ```
//!
//! Where KVM is backed by hardware the guests are KVM's, elsewhere (first line) they are
//! QEMU's with an emulated CPU and User-mode Linux's; `--rig` says otherwise.
//!
//! Each turn is a guest that boots in a network of its own and does all cases. The server
//! is in the guest and the client on the host, which sees CPU times from just before to
//! just after each of its runs. CPU is told by what it is for: `pericarp-net`, the threads
//! of the monitor that are no virtual CPUs, and the virtual CPUs, which do the guest's own
//! work and, where the CPU is emulated, mostly that. `I/O` is the first two. Where the CPU
//! is emulated that has QEMU's main thread in it with `pericarp-net`, too: it passes each
//! interrupt on, which KVM does by itself. User-mode Linux is one thread for all, so its
//! own drivers have no such number.
//!
//! Datagrams to the guest would drown a guest that drops most of them, so `udp-in` looks
//! first for the rate of which most arrives. The raw numbers go to `--json`, or are the
//! last line.

mod guests;
mod iperf;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_tests::bounded::Deadline;
use pericarp_tests::lab::Lab;
use pericarp_tests::network::Network;
use pericarp_tests::parts::{Part, missing};

use guests::{Ground, Guest, Rig, Spent, TARGETS, Target};
use iperf::{Carried, Load};
use report::{Report, Turn};

const HELP: &str = "\
guest-net-compare: iperf3 in guests over pericarp-net and over what there is without it

  --rounds N     how often each target has its turn (default 5)
  --seconds N    length of one run (default 4)
  --rig R        only this rig, of tcg, kvm, uml; may be repeated (default: kvm where it is
                 backed by hardware, else tcg and uml)
  --target T     only this target; may be repeated
  --case C       only this case; may be repeated
  --json PATH    where the raw numbers go
";

/// A case: its name, whether the guest sends, and whether datagrams.
type Case = (&'static str, bool, bool);

const CASES: [Case; 4] = [
    ("tcp-out", true, false),
    ("tcp-in", false, false),
    ("udp-out", true, true),
    ("udp-in", false, true),
];

/// How long a guest may take to boot, on an emulated CPU in an emulated CPU; and a server to
/// be there again after a client.
const BOOT: Duration = Duration::from_secs(240);
const AGAIN: Duration = Duration::from_secs(30);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);
/// Datagrams a second that the search begins and ends with.
const FIRST: u64 = 1000;
const LAST: u64 = 1 << 22;

struct Wanted {
    rounds: usize,
    seconds: u64,
    rigs: Vec<Rig>,
    targets: Vec<String>,
    cases: Vec<String>,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match wanted() {
        Ok(Some(wanted)) => match compare(&wanted) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("guest-net-compare: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(None) => {
            let cases = CASES.map(|(name, ..)| name).join(", ");
            let targets = TARGETS.map(|(rig, _, name)| format!("{name} ({})", rig.name()));
            println!("{HELP}\nCases: {cases}\nTargets: {}", targets.join(", "));
            ExitCode::SUCCESS
        }
        Err(mistake) => {
            eprintln!("guest-net-compare: {mistake}");
            ExitCode::from(2)
        }
    }
}

fn wanted() -> Result<Option<Wanted>, String> {
    use lexopt::prelude::*;
    let mut wanted = Wanted {
        rounds: 5,
        seconds: 4,
        rigs: Vec::new(),
        targets: Vec::new(),
        cases: Vec::new(),
        json: None,
    };
    let mut parser = lexopt::Parser::from_env();
    let text = |e: lexopt::Error| format!("{e}; see --help");
    while let Some(argument) = parser.next().map_err(text)? {
        let name = match argument {
            Long(name) => name.to_owned(),
            Short('h') => return Ok(None),
            other => return Err(text(other.unexpected())),
        };
        if name == "help" {
            return Ok(None);
        }
        let value = parser.value().and_then(|v| v.string()).map_err(text)?;
        let number = || {
            let number = value.parse().ok().filter(|n| (1..=100).contains(n));
            number.ok_or_else(|| format!("--{name} {value:?}: not a number from 1 to 100"))
        };
        let unknown = || format!("--{name} {value:?}: unknown; see --help");
        match name.as_str() {
            "rounds" => wanted.rounds = number()?,
            "seconds" => wanted.seconds = number()? as u64,
            "json" => wanted.json = Some(value.into()),
            "rig" => {
                let rigs = [Rig::Emulated, Rig::Kvm, Rig::Uml];
                let rig = rigs.into_iter().find(|rig| rig.name() == value);
                wanted.rigs.push(rig.ok_or_else(unknown)?);
            }
            "target" if TARGETS.iter().any(|(.., name)| *name == value) => {
                wanted.targets.push(value);
            }
            "case" if CASES.iter().any(|(case, ..)| *case == value) => wanted.cases.push(value),
            "target" | "case" => return Err(unknown()),
            _ => return Err(format!("--{name}: unknown option; see --help")),
        }
    }
    if wanted.rigs.is_empty() {
        wanted.rigs = match Lab::is_here() {
            true => vec![Rig::Kvm],
            false => vec![Rig::Emulated, Rig::Uml],
        };
    }
    Ok(Some(wanted))
}

/// Whether a list, empty when nothing was said, has it.
fn is_in(list: &[String], name: &str) -> bool {
    list.is_empty() || list.iter().any(|wanted| wanted == name)
}

fn compare(wanted: &Wanted) -> Outcome<()> {
    let mut parts = vec![Part::Iperf3, Part::Ip, Part::PERICARP_NET];
    for rig in &wanted.rigs {
        match rig {
            Rig::Uml => parts.push(Part::UserModeLinux),
            _ => parts.extend([Part::QemuSystem, Part::Busybox]),
        }
        if *rig == Rig::Kvm {
            parts.push(Part::Ours("pericarp-vmm"));
        }
    }
    if let Some(part) = missing(&parts) {
        return Err(part.into());
    }
    if wanted.rigs.contains(&Rig::Kvm) && !Lab::is_here() {
        let program = "target/release/guest-net-compare";
        let cure = format!("KVM is not backed by hardware here: cargo xtask lab -- {program}");
        return Err(cure.into());
    }
    let ground = Ground::make()?;
    let cases: Vec<Case> = CASES
        .into_iter()
        .filter(|(name, ..)| is_in(&wanted.cases, name))
        .collect();
    let (mut report, mut failed) = (Report::default(), 0);
    for rig in &wanted.rigs {
        let targets: Vec<_> = TARGETS
            .iter()
            .filter(|(of, _, name)| of == rig && is_in(&wanted.targets, name))
            .collect();
        for round in 1..=wanted.rounds {
            for (rig, target, name) in &targets {
                // A thread has a network, and takes it along when it ends.
                let turns = std::thread::scope(|scope| {
                    let turn = scope.spawn(|| {
                        turn((*rig, *target), &cases, wanted.seconds, &ground)
                            .map_err(|error| error.to_string())
                    });
                    turn.join().unwrap_or_else(|_| Err("panicked".to_owned()))
                });
                let turns = match turns {
                    Ok(turns) => turns,
                    // A guest may fall; what the others did is worth having.
                    Err(error) => {
                        eprintln!("{}, {name}, round {round}: {error}", rig.name());
                        failed += 1;
                        continue;
                    }
                };
                for (case, carried, spent) in turns {
                    report.add(Turn {
                        rig: rig.name(),
                        target: name,
                        case,
                        round,
                        carried,
                        spent,
                    });
                }
            }
        }
    }
    report.print();
    report.save(wanted.json.as_deref(), wanted.seconds)?;
    match failed {
        0 => Ok(()),
        _ => Err(format!("{failed} turns failed, see above").into()),
    }
}

/// A guest's life: what it carried in each case, and what that took.
fn turn(
    (rig, target): (Rig, Target),
    cases: &[Case],
    seconds: u64,
    ground: &Ground,
) -> Outcome<Vec<(&'static str, Carried, Spent)>> {
    let _network =
        Network::here("guest-net-compare", &[], 1).ok_or("it takes root, for a network")?;
    let mut guest = Guest::start(rig, target, ground)?;
    measure(&mut guest, Load::Stream, true, 1, BOOT)?;
    let mut turns = Vec::new();
    for &(case, out, datagrams) in cases {
        let load = match (datagrams, out) {
            (false, _) => Load::Stream,
            (true, true) => Load::Datagrams(None),
            (true, false) => Load::Datagrams(Some(most(&mut guest)?)),
        };
        let (carried, spent) = measure(&mut guest, load, out, seconds, AGAIN)?;
        turns.push((case, carried, spent));
    }
    Ok(turns)
}

/// Sends once, after as many tries as it takes in this time.
fn measure(
    guest: &mut Guest,
    load: Load,
    out: bool,
    seconds: u64,
    limit: Duration,
) -> Outcome<(Carried, Spent)> {
    let deadline = Deadline::after(limit);
    loop {
        let before = guest.spent()?;
        let why = match iperf::run(load, out, seconds)? {
            Ok(carried) => return Ok((carried, guest.spent()?.since(before))),
            Err(why) => why,
        };
        if guest.is_gone() || deadline.passed() {
            return Err(format!("{why}\nthe guest's last words:\n{}", guest.said()).into());
        }
        sleep(PAUSE);
    }
}

/// Datagrams a second to be sent to this guest, of which more arrive than of fewer or of
/// more: doubled as long as that helps, then in steps of a quarter.
fn most(guest: &mut Guest) -> Outcome<u64> {
    let mut arrive = |rate: u64| -> Outcome<f64> {
        let load = Load::Datagrams(Some(rate));
        Ok(measure(guest, load, false, 1, AGAIN)?.0.rate)
    };
    let mut best = (FIRST, arrive(FIRST)?);
    while best.0 < LAST {
        let rate = 2 * best.0;
        let got = arrive(rate)?;
        if got <= best.1 {
            break;
        }
        best = (rate, got);
    }
    let middle = best.0;
    // The step that was the best so far lost some, or the next one did.
    for quarters in [3, 5, 6, 7] {
        let rate = middle * quarters / 4;
        let got = arrive(rate)?;
        if got > best.1 {
            best = (rate, got);
        }
    }
    Ok(best.0)
}
