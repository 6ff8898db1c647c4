//! Pods that write, compare, make trees of files and send for hours, and whether what their processes
//! hold of the host grows. Called by `pericarp-endure`.
//!
//! The rule: the first eighth of the run is for warming up. Of what is left, the first and the last
//! quarter are compared, for each process of each pod. A process fails whose memory (PSS without the
//! guest's, or private memory) is in the mean more than a tenth and 1 MiB larger, or which has at the
//! least two more descriptors or threads, or eight more of the kernel's threads for its rings: what a
//! guest has open at a moment comes and goes, so that the least of each quarter counts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::site::{Site, sums};
use super::tenant::Tenant;
use crate::usage::Usage;

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many pods.
    pub pods: usize,
    /// For how long, seconds.
    pub seconds: u64,
    /// Seconds between two looks.
    pub every: u64,
    /// Between two steps of a writer's target.
    pub pause: Duration,
}

/// Fewer looks than this are no measurement: one for warming up, and two in each quarter.
pub const LEAST: u64 = 9;

/// What is measured of a process.
struct Measure {
    name: &'static str,
    counts: Of,
    of: fn(&Usage) -> u64,
    /// What share of it, and how many beside that, it may be more at the end.
    more: (f64, f64),
}

impl Measure {
    const fn new(name: &'static str, counts: Of, more: (f64, f64), of: fn(&Usage) -> u64) -> Self {
        Self {
            name,
            counts,
            of,
            more,
        }
    }
}

const MEASURES: [Measure; 5] = [
    Measure::new("pss-kib", Of::Mean, (0.1, 1024.0), |usage| usage.pss_kib),
    Measure::new("private-kib", Of::Mean, (0.1, 1024.0), |usage| {
        usage.anon_kib
    }),
    Measure::new("descriptors", Of::Least, (0.0, 1.0), |usage| usage.fds),
    Measure::new("threads", Of::Least, (0.0, 1.0), |usage| usage.threads),
    Measure::new("ring-threads", Of::Least, (0.0, 7.0), |usage| usage.workers),
];

/// What of a quarter counts.
#[derive(Clone, Copy, Debug)]
enum Of {
    Mean,
    Least,
}

impl Of {
    fn quarter(self, looks: &[Usage], of: fn(&Usage) -> u64) -> f64 {
        let values = looks.iter().map(of);
        match self {
            Self::Mean => values.sum::<u64>() as f64 / looks.len() as f64,
            Self::Least => values.min().unwrap_or(0) as f64,
        }
    }
}

/// A process's measure at the beginning and at the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Trend {
    /// The pod's number and the program.
    pub process: String,
    /// What is measured.
    pub measure: &'static str,
    /// The mean or the least of the first quarter after warming up.
    pub first: f64,
    /// That of the last.
    pub last: f64,
    /// Of all looks.
    pub most: u64,
    /// Whether it has grown by more than the rule allows.
    pub grown: bool,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Each process and measure.
    pub trends: Vec<Trend>,
    /// What was wrong.
    pub faults: Vec<String>,
    pods: usize,
    seconds: u64,
    looks: usize,
    sums: [u64; 3],
}

/// All looks at one process.
type Looks = BTreeMap<String, Vec<Usage>>;

/// Runs for as long as the options say.
///
/// # Errors
/// What keeps it from beginning. What goes wrong later is in the report.
pub fn run(options: &Options) -> Result<Report, String> {
    let site = Site::start("endure", options.seconds)?;
    let mut tenants = site.tenants(options.pods, options.pause)?;
    println!("{} {} pods write", site.clock(), options.pods);
    let mut report = Report {
        pods: options.pods,
        ..Report::default()
    };
    let mut looks = Looks::new();
    let begun = Instant::now();
    let mut next = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(options.seconds) {
        next += Duration::from_secs(options.every);
        sleep(next.saturating_sub(begun.elapsed()));
        for tenant in &mut tenants {
            tenant.ledger.mark();
            look(tenant, &mut looks);
            if let Err(fault) = tenant.goes_on(&site) {
                println!("{} FAULT: pod {}: {fault}", site.clock(), tenant.number);
                report
                    .faults
                    .push(format!("pod {}: {fault}", tenant.number));
            }
        }
        report.looks += 1;
        println!("{} {}", site.clock(), line(&looks));
        if !report.faults.is_empty() {
            break;
        }
    }
    report.seconds = begun.elapsed().as_secs();
    report.trends = trends(&looks, report.looks);
    report.faults.extend(site.end(&mut tenants));
    report.sums = sums(&tenants);
    Ok(report)
}

fn look(tenant: &Tenant, looks: &mut Looks) {
    for member in tenant.members() {
        if let Some(usage) = Usage::of(member.pid) {
            // A process that was started again is another.
            let name = format!("{} {} {}", tenant.number, member.program, member.pid);
            looks.entry(name).or_default().push(usage);
        }
    }
}

/// All processes together, as they are now.
fn line(looks: &Looks) -> String {
    let mut text = String::new();
    for measure in MEASURES {
        let all = looks.values().filter_map(|looks| looks.last());
        let sum = all.map(measure.of).sum::<u64>();
        let _ = write!(text, "{} {sum} ", measure.name);
    }
    text.trim_end().to_owned()
}

/// Compares the quarters. A process that was not there all the time is one that was started again,
/// which nobody has asked for: it has grown in all respects.
fn trends(looks: &Looks, count: usize) -> Vec<Trend> {
    let mut trends = Vec::new();
    for (process, looks) in looks {
        let warm = &looks[looks.len() / 8..];
        let quarter = (warm.len() / 4).max(1);
        for measure in MEASURES {
            let of = |looks: &[Usage]| measure.counts.quarter(looks, measure.of);
            let (first, last) = (of(&warm[..quarter]), of(&warm[warm.len() - quarter..]));
            let (share, more) = measure.more;
            trends.push(Trend {
                process: process.clone(),
                measure: measure.name,
                first,
                last,
                most: looks.iter().map(measure.of).max().unwrap_or(0),
                grown: last > first * (1.0 + share) + more || looks.len() != count,
            });
        }
    }
    trends
}

impl Report {
    /// Whether nothing was wrong and nothing has grown.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty() && self.trends.iter().all(|trend| !trend.grown)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<44}{:<14}{:>10}{:>10}{:>10}\n",
            "pod, process", "measure", "first", "last", "most"
        );
        for trend in &self.trends {
            let _ = writeln!(
                text,
                "{:<44}{:<14}{:>10.1}{:>10.1}{:>10}{}",
                trend.process,
                trend.measure,
                trend.first,
                trend.last,
                trend.most,
                if trend.grown { "  GROWN" } else { "" }
            );
        }
        let [steps, compared, _] = self.sums;
        let grown = self.trends.iter().filter(|trend| trend.grown).count();
        let _ = writeln!(
            text,
            "{} pods, {} s, {} looks: {steps} steps flushed, {compared} compared, {grown} grown, {} faults",
            self.pods,
            self.seconds,
            self.looks,
            self.faults.len()
        );
        for fault in &self.faults {
            let _ = writeln!(text, "FAULT: {fault}");
        }
        text
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let trends = self.trends.iter().map(|trend| {
            json!({
                "process": trend.process,
                "measure": trend.measure,
                "first": trend.first,
                "last": trend.last,
                "most": trend.most,
                "grown": trend.grown,
            })
        });
        json!({
            "pods": self.pods,
            "seconds": self.seconds,
            "looks": self.looks,
            "flushed": self.sums[0],
            "compared": self.sums[1],
            "trends": trends.collect::<Vec<_>>(),
            "faults": self.faults,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grown(usage: impl Fn(u64) -> Usage) -> Vec<&'static str> {
        let looks = Looks::from([("0 x 1".to_owned(), (0..40).map(usage).collect())]);
        let all = trends(&looks, 40).into_iter();
        all.filter(|trend| trend.grown)
            .map(|trend| trend.measure)
            .collect()
    }

    #[test]
    fn what_leaks_is_found_and_what_warms_up_is_not() {
        let steady = Usage {
            pss_kib: 9000,
            anon_kib: 4000,
            fds: 40,
            threads: 6,
            workers: 3,
        };
        assert_eq!(grown(|_| steady), Vec::<&str>::new());
        let warm = |at| Usage {
            anon_kib: if at < 5 { 100 } else { 4000 },
            workers: at % 7,
            ..steady
        };
        assert_eq!(grown(warm), Vec::<&str>::new());
        let leak = |at| Usage {
            pss_kib: 9000 + 100 * at,
            anon_kib: 4000 + 100 * at,
            ..steady
        };
        assert_eq!(grown(leak), ["pss-kib", "private-kib"]);
        let busy = |at: u64| Usage {
            fds: 40 + at * 7 % 16,
            ..steady
        };
        assert_eq!(grown(busy), Vec::<&str>::new());
        let open = |at| Usage {
            fds: 40 + at / 8,
            ..steady
        };
        assert_eq!(grown(open), ["descriptors"]);
        let threads = |at| Usage {
            threads: 6 + at / 8,
            workers: 3 + at / 2,
            ..steady
        };
        assert_eq!(grown(threads), ["threads", "ring-threads"]);
    }

    #[test]
    fn one_that_was_started_again_is_found() {
        let looks = Looks::from([
            ("0 a 1".to_owned(), vec![Usage::default(); 20]),
            ("0 a 2".to_owned(), vec![Usage::default(); 20]),
        ]);
        assert!(trends(&looks, 40).iter().all(|trend| trend.grown));
    }
}
