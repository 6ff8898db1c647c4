//! Processes killed at random, one or several at a time, while every pod writes and compares. After each
//! kill the pod has to go on within a bound, or to end with its reason and be replaced by another on the
//! same volumes, which has to find all that was flushed. Called by `pericarp-endure` and the suite `endure`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::site::{Site, each, sums};
use super::tenant::{Kind, Tenant};
use crate::model::Sequence;

/// Deaths of one process that a pod has to stand within [`MINUTE`]; one more than five end it.
const DEATHS: usize = 4;
const MINUTE: Duration = Duration::from_secs(65);

/// How many kinds of processes are killed.
pub const KINDS: usize = Kind::ALL.len();

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many pods.
    pub pods: usize,
    /// For how long, seconds.
    pub seconds: u64,
    /// After how many kills it is over, even before.
    pub most: u64,
    /// The same seed makes the same choices, but for who is spared.
    pub seed: u64,
    /// The longest time between two rounds of kills.
    pub apart: Duration,
    /// Between two steps of a writer's target.
    pub pause: Duration,
}

/// What came of the kills of one kind of process.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// How many were killed.
    pub killed: u64,
    /// How often the pod went on.
    pub went_on: u64,
    /// How often it ended, with its reason.
    pub ended: u64,
    /// The longest time for which some target stood still where the pod went on, milliseconds.
    pub pause: u64,
    /// The longest time until the end was known, milliseconds.
    pub told: u64,
    /// The longest time that it took to take the pod away, milliseconds.
    pub gone: u64,
    /// The longest time from the kill until the next pod had found everything and wrote, milliseconds.
    pub back: u64,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// For each process.
    pub rows: BTreeMap<Kind, Row>,
    /// How long kills went on, seconds.
    pub seconds: u64,
    /// Steps that writers have told of: blocks flushed, trees, packets.
    pub steps: u64,
    /// Blocks and files that were read and compared.
    pub compared: u64,
    /// Blocks that were flushed in a pod that ended, and looked for by the next.
    pub checked: u64,
    /// What was wrong.
    pub faults: Vec<String>,
    pods: usize,
    seed: u64,
}

/// What came of a kill.
struct Outcome {
    kind: Kind,
    ended: bool,
    pause: u64,
    told: u64,
    gone: u64,
    back: u64,
}

/// Kills for as long as the options say.
///
/// # Errors
/// What keeps it from beginning. What goes wrong later is in the report.
pub fn run(options: &Options) -> Result<Report, String> {
    let mut site = Site::start("endure", options.seconds)?;
    let mut tenants = site.tenants(options.pods, options.pause)?;
    println!("{} {} pods write", site.clock(), options.pods);
    let mut report = Report {
        pods: options.pods,
        seed: options.seed,
        ..Report::default()
    };
    let mut choices = Choices::new(options.seed, options.pods);
    let begun = Instant::now();
    let end = begun + Duration::from_secs(options.seconds);
    let mut killed = 0;
    while Instant::now() < end && killed < options.most {
        let apart = choices.sequence.below(options.apart.as_millis() as u64 + 1);
        sleep(Duration::from_millis(apart));
        let victims = choices.round(options.most - killed);
        killed += victims.len() as u64;
        report.round(&mut site, &mut tenants, &mut choices, &victims);
    }
    report.seconds = begun.elapsed().as_secs();
    report.faults.extend(site.end(&mut tenants));
    [report.steps, report.compared, report.checked] = sums(&tenants);
    Ok(report)
}

/// Who is killed next.
struct Choices {
    sequence: Sequence,
    pods: usize,
    bag: Vec<Kind>,
    /// What was killed of which pod, and when.
    past: Vec<(usize, Kind, Instant)>,
}

impl Choices {
    fn new(seed: u64, pods: usize) -> Self {
        Self {
            sequence: Sequence::new(seed),
            pods,
            bag: Vec::new(),
            past: Vec::new(),
        }
    }

    /// Victims of different pods, or containerd, at once. Every kind has its turn before one comes again.
    fn round(&mut self, most: u64) -> Vec<(Option<usize>, Kind)> {
        let at_once = 1 + self.sequence.below(1 + self.pods as u64 / 2).min(most - 1);
        let mut victims: Vec<(Option<usize>, Kind)> = Vec::new();
        for _ in 0..at_once {
            if self.bag.is_empty() {
                self.bag = Kind::ALL.to_vec();
            }
            let next = self.sequence.below(self.bag.len() as u64) as usize;
            let kind = self.bag[next];
            let pod = match kind {
                Kind::Containerd => None,
                _ => Some(self.sequence.below(self.pods as u64) as usize),
            };
            let taken = victims.iter().any(|(other, _)| *other == pod);
            if !taken && pod.is_none_or(|pod| self.may(pod, kind)) {
                self.bag.swap_remove(next);
                victims.push((pod, kind));
            }
        }
        victims
    }

    fn may(&self, pod: usize, kind: Kind) -> bool {
        let lately = |(one, other, at): &&(usize, Kind, Instant)| {
            *one == pod && *other == kind && at.elapsed() < MINUTE
        };
        self.past.iter().filter(lately).count() < DEATHS
    }
}

impl Report {
    fn round(
        &mut self,
        site: &mut Site,
        tenants: &mut [Tenant],
        choices: &mut Choices,
        victims: &[(Option<usize>, Kind)],
    ) {
        let mut plans: Vec<Option<(Kind, bool)>> = vec![None; tenants.len()];
        let mut pids = Vec::new();
        for &(pod, kind) in victims {
            let Some(pod) = pod else { continue };
            let members = tenants[pod].members();
            let Some(member) = members.iter().find(|one| kind.is(one)) else {
                let what = format!("pod {pod}: has no {} to kill", kind.name());
                self.fault(site, what);
                continue;
            };
            plans[pod] = Some((kind, kind.is_replaced(&members)));
            pids.push(member.pid);
            choices.past.push((pod, kind, Instant::now()));
        }
        for tenant in tenants.iter_mut() {
            if let Err(fault) = tenant.follow() {
                self.fault(site, format!("pod {}: {fault}", tenant.number));
            }
            tenant.ledger.mark();
        }
        let at = Instant::now();
        for pid in pids {
            let pid = Pid::from_raw(pid);
            if let Some(Err(error)) = pid.map(|pid| kill_process(pid, Signal::KILL)) {
                self.fault(site, format!("nothing to kill: {error}"));
            }
        }
        let containerd = victims.iter().any(|(_, kind)| *kind == Kind::Containerd);
        if containerd {
            site.node.restart();
        }
        tenants
            .iter_mut()
            .for_each(|tenant| tenant.cut = containerd);
        let words: Vec<String> = victims.iter().map(|&(pod, kind)| told(pod, kind)).collect();
        println!("{} killed: {}", site.clock(), words.join(", "));
        let plans = &plans;
        let here = &*site;
        let done = each(tenants, |tenant| {
            judge(here, tenant, plans[tenant.number], at)
        });
        let mut longest = 0;
        for (pod, done) in done.into_iter().enumerate() {
            let kind = plans[pod].map(|(kind, _)| kind);
            match done {
                Ok(outcome) => {
                    longest = longest.max(outcome.pause);
                    self.count(kind.is_some().then_some(outcome));
                }
                Err(fault) => {
                    if let Some(kind) = kind {
                        self.rows.entry(kind).or_default().killed += 1;
                    }
                    let of = kind.map_or("nothing of its own", Kind::name);
                    self.fault(site, format!("pod {pod}, after {of}: {fault}"));
                }
            }
        }
        if containerd {
            self.count(Some(Outcome {
                kind: Kind::Containerd,
                ended: false,
                pause: longest,
                told: 0,
                gone: 0,
                back: 0,
            }));
        }
    }

    fn count(&mut self, outcome: Option<Outcome>) {
        let Some(outcome) = outcome else { return };
        let row = self.rows.entry(outcome.kind).or_default();
        row.killed += 1;
        row.went_on += u64::from(!outcome.ended);
        row.ended += u64::from(outcome.ended);
        row.pause = row.pause.max(outcome.pause);
        row.told = row.told.max(outcome.told);
        row.gone = row.gone.max(outcome.gone);
        row.back = row.back.max(outcome.back);
    }

    fn fault(&mut self, site: &Site, what: String) {
        println!("{} FAULT: {what}", site.clock());
        self.faults.push(what);
    }

    /// How many were killed.
    pub fn killed(&self) -> u64 {
        self.rows.values().map(|row| row.killed).sum()
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<16}{:>7}{:>9}{:>7}{:>15}{:>14}{:>12}{:>16}\n",
            "killed",
            "times",
            "went on",
            "ended",
            "longest pause",
            "end known in",
            "removed in",
            "next writes in"
        );
        let time = |milliseconds: u64| match milliseconds {
            0 => "-".to_owned(),
            some => format!("{:.1} s", some as f64 / 1000.0),
        };
        for (kind, row) in &self.rows {
            let _ = writeln!(
                text,
                "{:<16}{:>7}{:>9}{:>7}{:>15}{:>14}{:>12}{:>16}",
                kind.name(),
                row.killed,
                row.went_on,
                row.ended,
                time(row.pause),
                time(row.told),
                time(row.gone),
                time(row.back)
            );
        }
        let _ = writeln!(
            text,
            "{} pods, {} s, seed {}: {} killed, {} steps flushed, {} compared, {} flushed blocks looked \
             for by the next pod, {} faults",
            self.pods,
            self.seconds,
            self.seed,
            self.killed(),
            self.steps,
            self.compared,
            self.checked,
            self.faults.len()
        );
        for fault in &self.faults {
            let _ = writeln!(text, "FAULT: {fault}");
        }
        text
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|(kind, row)| {
            json!({
                "process": kind.name(),
                "killed": row.killed,
                "went-on": row.went_on,
                "ended": row.ended,
                "longest-pause-ms": row.pause,
                "end-known-ms": row.told,
                "removed-in-ms": row.gone,
                "next-writes-ms": row.back,
            })
        });
        json!({
            "pods": self.pods,
            "seconds": self.seconds,
            "seed": self.seed,
            "processes": rows.collect::<Vec<_>>(),
            "flushed": self.steps,
            "compared": self.compared,
            "looked-for": self.checked,
            "faults": self.faults,
        })
    }
}

fn told(pod: Option<usize>, kind: Kind) -> String {
    let of = pod.map_or(String::new(), |pod| format!(" of pod {pod}"));
    format!("{}{of}", kind.name())
}

/// What becomes of a pod after a kill, which may have been of another's process. A pod that is at
/// fault is replaced all the same, so that the others are tried on.
fn judge(
    site: &Site,
    tenant: &mut Tenant,
    plan: Option<(Kind, bool)>,
    at: Instant,
) -> Result<Outcome, String> {
    let passed = || at.elapsed().as_millis() as u64;
    let (kind, goes_on) = plan.unwrap_or((Kind::Containerd, true));
    let mut outcome = Outcome {
        kind,
        ended: !goes_on,
        pause: 0,
        told: 0,
        gone: 0,
        back: 0,
    };
    let mut fault = Ok(());
    if goes_on {
        match tenant.goes_on(site) {
            Ok(pause) => {
                outcome.pause = pause;
                return Ok(outcome);
            }
            Err(why) => fault = Err(why),
        }
    } else {
        fault = fault.and(tenant.ends(site, kind));
        outcome.told = passed();
    }
    let begun = Instant::now();
    fault = fault.and(tenant.remove(site));
    outcome.gone = begun.elapsed().as_millis() as u64;
    fault = fault.and(tenant.start(site));
    outcome.back = passed();
    fault.map(|()| outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_turn_and_no_pod_more_than_one() {
        let mut choices = Choices::new(5, 4);
        let mut seen = BTreeMap::new();
        let mut count = 0;
        while count < 70 {
            let round = choices.round(100);
            assert!(round.len() <= 3);
            for (index, (pod, kind)) in round.iter().enumerate() {
                assert_eq!(pod.is_none(), *kind == Kind::Containerd);
                assert!(round[..index].iter().all(|(other, _)| other != pod));
                *seen.entry(*kind).or_insert(0) += 1;
                count += 1;
            }
        }
        assert_eq!(seen.len(), Kind::ALL.len());
        assert!(
            seen.values().all(|times| (9..=11).contains(times)),
            "{seen:?}"
        );
        // The same seed is the same run.
        let (mut one, mut two) = (Choices::new(9, 8), Choices::new(9, 8));
        assert!((0..20).all(|_| one.round(9) == two.round(9)));
        assert!((0..20).all(|_| one.round(1).len() <= 1));
    }

    #[test]
    fn what_dies_too_often_is_spared() {
        let mut choices = Choices::new(5, 2);
        choices.past = vec![(0, Kind::Net, Instant::now()); DEATHS];
        assert!(!choices.may(0, Kind::Net));
        assert!(choices.may(1, Kind::Net) && choices.may(0, Kind::Block));
    }

    #[test]
    fn a_report_says_its_faults() {
        let mut report = Report::default();
        report.count(Some(Outcome {
            kind: Kind::Fs,
            ended: true,
            pause: 0,
            told: 1200,
            gone: 700,
            back: 9000,
        }));
        report.faults.push("pod 0: LOST".into());
        let table = report.table();
        assert!(table.contains("pericarp-fs") && table.contains("FAULT: pod 0: LOST"));
        assert_eq!(report.json()["processes"][0]["ended"], 1);
    }
}
