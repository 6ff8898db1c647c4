//! The tables of a run, and its raw numbers.

use std::fs;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use pericarp_benches::table::median;
use pericarp_benches::{Outcome, turns};
use serde_json::{Value, json};

use crate::guests::Spent;
use crate::iperf::Carried;

/// One run of iperf3.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) rig: &'static str,
    pub(crate) target: &'static str,
    pub(crate) case: &'static str,
    pub(crate) round: usize,
    pub(crate) carried: Carried,
    pub(crate) spent: Spent,
}

impl Turn {
    /// CPU for what arrived, all of it: seconds a GiB, or microseconds a packet.
    fn all(&self) -> f64 {
        self.each(self.spent.backend + self.spent.monitor + self.spent.guest)
    }

    /// The part that is not the guest's. User-mode Linux by itself has none that could be
    /// told apart.
    fn io(&self) -> Option<f64> {
        let io = self.spent.backend + self.spent.monitor;
        (!io.is_zero()).then(|| self.each(io))
    }

    fn each(&self, time: Duration) -> f64 {
        let unit = if is_packets(self.case) { 1e6 } else { 1.0 };
        time.as_secs_f64() * unit / self.carried.amount
    }

    fn raw(&self) -> Value {
        json!({
            "rig": self.rig,
            "case": self.case,
            "target": self.target,
            "round": self.round,
            "unit": if is_packets(self.case) { "packets" } else { "GiB" },
            "per_second": self.carried.rate,
            "sent_per_second": self.carried.offered,
            "amount": self.carried.amount,
            "cpu_s": {
                "backend": self.spent.backend.as_secs_f64(),
                "monitor": self.spent.monitor.as_secs_f64(),
                "guest": self.spent.guest.as_secs_f64(),
            },
        })
    }
}

fn is_packets(case: &str) -> bool {
    case.starts_with("udp")
}

/// All runs.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Turn>);

impl Report {
    /// One more, told at once: a run takes its time.
    pub(crate) fn add(&mut self, turn: Turn) {
        eprintln!(
            "{} {}: {} of round {}: {} a second",
            turn.rig,
            turn.case,
            turn.target,
            turn.round,
            amount(turn.case, turn.carried.rate)
        );
        self.0.push(turn);
    }

    /// A table for each rig and case; ratios are those of medians, to the first target.
    pub(crate) fn print(&self) {
        let mut tables: Vec<(&str, &str)> = Vec::new();
        for turn in &self.0 {
            if !tables.contains(&(turn.rig, turn.case)) {
                tables.push((turn.rig, turn.case));
            }
        }
        for (rig, case) in tables {
            let of = self.0.iter();
            let turns: Vec<&Turn> = of.filter(|t| (t.rig, t.case) == (rig, case)).collect();
            print!("\n{}", table(rig, case, &turns));
        }
    }

    /// Writes the raw numbers, or prints them.
    pub(crate) fn save(&self, path: Option<&Path>, seconds: u64) -> Outcome<()> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let raw = json!({
            "bench": "guest-net-compare",
            "machine": {"kernel": kernel.trim(), "cpus": available_parallelism()?.get()},
            "seconds": seconds,
            "results": self.0.iter().map(Turn::raw).collect::<Vec<_>>(),
        });
        match path {
            Some(path) => turns::write(path, &format!("{raw:#}\n"))?,
            None => println!("\n{raw}"),
        }
        Ok(())
    }
}

fn amount(case: &str, value: f64) -> String {
    match is_packets(case) {
        true => format!("{value:.0}"),
        false => format!("{value:.3}"),
    }
}

/// One of a turn's numbers.
type What<'a> = &'a dyn Fn(&Turn) -> Option<f64>;

fn table(rig: &str, case: &str, turns: &[&Turn]) -> String {
    let (unit, cost) = match is_packets(case) {
        true => ("packets/s", "us/packet"),
        false => ("GiB/s", "s/GiB"),
    };
    let mut targets: Vec<&str> = Vec::new();
    for turn in turns {
        if !targets.contains(&turn.target) {
            targets.push(turn.target);
        }
    }
    let of = |target: &str, what: What<'_>| -> Vec<f64> {
        let mine = turns.iter().filter(|turn| turn.target == target);
        mine.filter_map(|turn| what(turn)).collect()
    };
    let rate = |turn: &Turn| Some(turn.carried.rate);
    let io = |turn: &Turn| turn.io();
    let all = |turn: &Turn| Some(turn.all());
    let base = targets.first().copied().unwrap_or_default();
    let middle = |target: &str, what: What<'_>| median(of(target, what));
    let ratio = |target: &str, what: What<'_>| shown(middle(target, what) / middle(base, what), 2);
    let mut text = format!(
        "{:<20} {unit:>10} {:>21} {:>6} {:>14} {:>6} {:>14} {:>6}\n",
        format!("{case}, {rig}"),
        "min .. max",
        "ratio",
        format!("I/O {cost}"),
        "ratio",
        format!("all {cost}"),
        "ratio",
    );
    for target in targets {
        let rates = of(target, &rate);
        let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let most = rates.iter().copied().fold(0.0, f64::max);
        text += &format!(
            "{target:<20} {:>10} {:>21} {:>6} {:>14} {:>6} {:>14} {:>6}\n",
            amount(case, median(rates)),
            format!("{} .. {}", amount(case, least), amount(case, most)),
            ratio(target, &rate),
            shown(middle(target, &io), 3),
            ratio(target, &io),
            shown(middle(target, &all), 3),
            ratio(target, &all),
        );
    }
    text
}

/// A number, if it is one.
fn shown(value: f64, digits: usize) -> String {
    match value.is_finite() {
        true => format!("{value:.digits$}"),
        false => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(target: &'static str, rate: f64, backend: u64, monitor: u64) -> Turn {
        Turn {
            rig: "tcg",
            target,
            case: "tcp-out",
            round: 1,
            carried: Carried {
                amount: 2.0,
                rate,
                offered: rate,
            },
            spent: Spent {
                backend: Duration::from_secs(backend),
                monitor: Duration::from_secs(monitor),
                guest: Duration::from_secs(4),
            },
        }
    }

    #[test]
    fn cpu_of_the_guest_stands_apart() {
        let turns = [
            turn("tap", 1.0, 0, 4),
            turn("net", 3.0, 1, 0),
            turn("uml", 1.0, 0, 0),
        ];
        let turns: Vec<&Turn> = turns.iter().collect();
        let text = table("tcg", "tcp-out", &turns);
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines: Vec<String> = text.lines().map(words).collect();
        assert_eq!(
            lines[1],
            "tap 1.000 1.000 .. 1.000 1.00 2.000 1.00 4.000 1.00"
        );
        assert_eq!(
            lines[2],
            "net 3.000 3.000 .. 3.000 3.00 0.500 0.25 2.500 0.62"
        );
        assert_eq!(lines[3], "uml 1.000 1.000 .. 1.000 1.00 - - 2.000 0.50");
    }
}
