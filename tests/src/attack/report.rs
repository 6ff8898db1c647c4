//! What was done to whom, and what came of it: as a table, and as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::peer::Footprint;

/// A kind of attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// Requests that are right, or wrong in a field or two.
    Requests,
    /// Chains, tables and indices that are wrong.
    Rings,
    /// What changes while it is in flight.
    InFlight,
    /// Kicks without work; descriptors that are full or replaced.
    Notifications,
    /// Messages of a front end out of their order.
    Order,
    /// Messages that are none, or nearly right.
    Messages,
    /// Guest memory cut short.
    Truncation,
    /// Front ends that come and go.
    Connections,
}

impl Act {
    /// All of them, those that go on in a session more often.
    pub const ALL: [Act; 16] = [
        Act::Requests,
        Act::Requests,
        Act::Requests,
        Act::Requests,
        Act::Requests,
        Act::Rings,
        Act::Rings,
        Act::Rings,
        Act::Rings,
        Act::InFlight,
        Act::InFlight,
        Act::Notifications,
        Act::Order,
        Act::Messages,
        Act::Truncation,
        Act::Connections,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Act::Requests => "requests, right or nearly",
            Act::Rings => "chains and rings that are wrong",
            Act::InFlight => "memory changed in flight",
            Act::Notifications => "kicks and calls",
            Act::Order => "messages out of order, under load",
            Act::Messages => "messages, nearly right or noise",
            Act::Truncation => "guest memory cut short",
            Act::Connections => "connections dropped",
        }
    }

    /// What a try is.
    fn unit(self) -> &'static str {
        match self {
            Act::Requests | Act::Rings | Act::InFlight => "completed",
            Act::Notifications => "requests done beside",
            Act::Order => "accepted",
            Act::Messages => "answered",
            Act::Truncation => "refused by a seal",
            Act::Connections => "",
        }
    }
}

/// How often, and what the device made of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// What was tried.
    pub tries: u64,
    /// Of these, what was answered.
    pub answered: u64,
    /// Sessions that the device ended for it.
    pub hung_up: u64,
}

/// What was done to one device.
#[derive(Clone, Debug, Default)]
pub struct Siege {
    /// By kind.
    pub acts: BTreeMap<Act, Tally>,
    /// Sessions begun.
    pub sessions: u64,
    /// Times a driver that does all right came in between, and was served.
    pub probes: u64,
    /// Times guest memory was looked through for what is not the guest's.
    pub searches: u64,
}

/// One of the innocent.
#[derive(Clone, Debug, Default)]
pub struct Witness {
    /// Rounds of I/O, each of them compared with what it should be.
    pub rounds: u64,
}

/// A process over time.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Before the first attack, with the innocent connected.
    pub start: Option<Footprint>,
    /// The most of each that was seen.
    pub most: Option<Footprint>,
    /// When the attackers had gone.
    pub end: Option<Footprint>,
    /// The longest answer of its control socket, in milliseconds.
    pub stats_ms: u64,
    /// How often that was asked.
    pub asked: u64,
    /// CPU time of the last second, when all had gone, in milliseconds.
    pub idle_ms: u64,
}

impl Held {
    /// Takes note of what it holds now.
    pub(super) fn see(&mut self, now: Footprint) {
        let most = self.most.get_or_insert(now);
        most.fds = most.fds.max(now.fds);
        most.anon_kib = most.anon_kib.max(now.anon_kib);
        most.maps = most.maps.max(now.maps);
        most.threads = most.threads.max(now.threads);
    }
}

/// A machine whose guest attacks.
#[derive(Clone, Debug, Default)]
pub struct Machines {
    /// Whose it is.
    pub hypervisor: &'static str,
    /// Booted.
    pub boots: u64,
    /// Rounds of pokes begun.
    pub rounds: u64,
    /// Pokes counted by the rounds that came to their end.
    pub pokes: u64,
    /// Beside them, doorbells with a random ring behind them.
    pub doorbells: u64,
    /// How machines ended before they were told to.
    pub ends: BTreeMap<String, u64>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By which it can be done again.
    pub seed: u64,
    /// How long it went on.
    pub seconds: u64,
    /// By device.
    pub sieges: BTreeMap<&'static str, Siege>,
    /// By device.
    pub witnesses: BTreeMap<&'static str, Witness>,
    /// By process.
    pub held: BTreeMap<&'static str, Held>,
    /// Of the guest that attacks.
    pub machines: Option<Machines>,
    /// What should not have been. Nothing, if all is well.
    pub faults: Vec<String>,
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("seed {}, {} s\n\n", self.seed, self.seconds);
        text += &row(["device", "attack", "tries", "outcome"]);
        for (device, siege) in &self.sieges {
            for (act, tally) in &siege.acts {
                let mut outcome = match act.unit() {
                    "" => String::new(),
                    unit => format!("{} {unit}", tally.answered),
                };
                if tally.hung_up > 0 {
                    let ended = format!("{} sessions ended", tally.hung_up);
                    outcome = match outcome.is_empty() {
                        true => ended,
                        false => format!("{outcome}, {ended}"),
                    };
                }
                text += &row([device, act.name(), &tally.tries.to_string(), &outcome]);
            }
            text += &row([
                device,
                "all of it",
                &format!("{} sessions", siege.sessions),
                &format!(
                    "a driver that does right served {} times in between, memory searched {} times",
                    siege.probes, siege.searches
                ),
            ]);
        }
        text += "\n";
        for (device, witness) in &self.witnesses {
            let rounds = format!("{} rounds", witness.rounds);
            text += &row([device, "beside it, the innocent", &rounds, "each compared"]);
        }
        if let Some(machines) = &self.machines {
            let ends: Vec<String> = machines
                .ends
                .iter()
                .map(|(end, count)| format!("{end} ({count})"))
                .collect();
            text += &format!(
                "\nguest of {}: {} boots, {} rounds, {} pokes and {} doorbells; it ended: {}\n",
                machines.hypervisor,
                machines.boots,
                machines.rounds,
                machines.pokes,
                machines.doorbells,
                match ends.is_empty() {
                    true => "when it was told to".to_owned(),
                    false => ends.join(", "),
                }
            );
        }
        text += "\nprocess: descriptors, threads, memory (KiB), mappings at the start, at most, in \
                 the end; longest answer of the control socket; CPU of the last second\n";
        for (process, held) in &self.held {
            let three = |of: fn(&Footprint) -> u64| {
                let all = [held.start, held.most, held.end];
                let all = all.map(|one| one.map_or("-".to_owned(), |one| of(&one).to_string()));
                all.join("/")
            };
            text += &format!(
                "{process}: {}, {}, {}, {}; {} ms of {} answers; {} ms\n",
                three(|held| held.fds as u64),
                three(|held| held.threads as u64),
                three(|held| held.anon_kib),
                three(|held| held.maps as u64),
                held.stats_ms,
                held.asked,
                held.idle_ms
            );
        }
        match self.faults.as_slice() {
            [] => text += "\nnothing gave way\n",
            faults => {
                for fault in faults {
                    text += &format!("\nFAULT: {fault}\n");
                }
            }
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let print = |held: &Option<Footprint>| {
            held.map(|held| {
                json!({
                    "fds": held.fds,
                    "threads": held.threads,
                    "anon_kib": held.anon_kib,
                    "maps": held.maps,
                })
            })
        };
        let sieges: BTreeMap<_, _> = self
            .sieges
            .iter()
            .map(|(device, siege)| {
                let acts: BTreeMap<_, _> = siege
                    .acts
                    .iter()
                    .map(|(act, tally)| {
                        let tally = json!({
                            "tries": tally.tries,
                            "answered": tally.answered,
                            "sessions_ended": tally.hung_up,
                        });
                        (act.name(), tally)
                    })
                    .collect();
                let siege = json!({
                    "attacks": acts,
                    "sessions": siege.sessions,
                    "probes": siege.probes,
                    "searches": siege.searches,
                });
                (*device, siege)
            })
            .collect();
        let witnesses: BTreeMap<_, _> = self
            .witnesses
            .iter()
            .map(|(device, witness)| (*device, witness.rounds))
            .collect();
        let held: BTreeMap<_, _> = self
            .held
            .iter()
            .map(|(process, held)| {
                let held = json!({
                    "start": print(&held.start),
                    "most": print(&held.most),
                    "end": print(&held.end),
                    "stats_ms": held.stats_ms,
                    "stats": held.asked,
                    "idle_ms": held.idle_ms,
                });
                (*process, held)
            })
            .collect();
        let machines = self.machines.as_ref().map(|machines| {
            json!({
                "hypervisor": machines.hypervisor,
                "boots": machines.boots,
                "rounds": machines.rounds,
                "pokes": machines.pokes,
                "doorbells": machines.doorbells,
                "ends": machines.ends,
            })
        });
        json!({
            "seed": self.seed,
            "seconds": self.seconds,
            "devices": sieges,
            "witnesses": witnesses,
            "processes": held,
            "guest": machines,
            "faults": self.faults,
        })
    }
}

fn row([device, attack, tries, outcome]: [&str; 4]) -> String {
    format!("{device:<6} {attack:<34} {tries:>14}  {outcome}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_and_numbers_are_in_both_forms() {
        let mut report = Report {
            seed: 7,
            ..Report::default()
        };
        let siege = report.sieges.entry("block").or_default();
        siege.acts.entry(Act::Rings).or_default().tries = 1234;
        assert!(report.table().contains("1234") && report.table().contains("nothing gave way"));
        assert_eq!(report.json()["faults"], json!([]));
        report.faults.push("block ended".into());
        assert!(report.table().contains("FAULT: block ended"));
        let rings = &report.json()["devices"]["block"]["attacks"][Act::Rings.name()];
        assert_eq!(rings["tries"], 1234);
    }
}
