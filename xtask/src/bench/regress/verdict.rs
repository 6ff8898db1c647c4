//! Limits, and what is beyond them.
//!
//! What each number is worth, from the spread of an unchanged commit on a busy
//! machine with two CPUs:
//!
//! | metric | spread | limit |
//! |---|---|---|
//! | instructions of a piece | none: the same program runs the same way | 3 %, at least one instruction: a compiler may arrange a loop differently |
//! | instructions/cached-32, of the whole process | 0.5 %: how often a thread looks before it sleeps | 3 % |
//! | system calls, kicks and calls, cached or at depth 1 | 0.1 % | 3 % |
//! | syscalls/direct-32 | 5 %: the disk decides how many reads come back at once | 15 % |
//! | calls/direct-32 | up to twice, for the same reason | 100 %: a batch that gets a call for each read is 20 times as much |
//! | time | 10 % and more, whatever else runs here | 30 % |
//!
//! Counts are medians of all rounds. A time is beyond its limit when the shortest
//! and the median both are: what is slower is slower in every round, while under
//! other load one round may be lucky, and a median may not be.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

/// Values of one metric, in the order of the rounds.
#[derive(Debug, Default)]
struct Values {
    base: Vec<f64>,
    this: Vec<f64>,
}

/// All values measured so far.
#[derive(Debug, Default)]
pub(super) struct Samples(BTreeMap<String, Values>);

impl Samples {
    pub(super) fn add_base(&mut self, metric: String, value: f64) {
        self.0.entry(metric).or_default().base.push(value);
    }

    pub(super) fn add_this(&mut self, metric: String, value: f64) {
        self.0.entry(metric).or_default().this.push(value);
    }
}

/// A regression that a commit owns up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Accepted {
    /// The metric's name, or its beginning and a star.
    pub(super) metric: String,
    pub(super) reason: String,
    pub(super) commit: String,
}

impl Accepted {
    /// `METRIC REASON` of a commit's trailer.
    pub(super) fn parse(commit: &str, value: &str) -> Option<Self> {
        let (metric, reason) = value.trim().split_once(char::is_whitespace)?;
        Some(Self {
            metric: metric.to_owned(),
            reason: reason.trim().to_owned(),
            commit: commit.to_owned(),
        })
    }

    fn covers(&self, metric: &str) -> bool {
        match self.metric.strip_suffix('*') {
            Some(beginning) => metric.starts_with(beginning),
            None => metric == self.metric,
        }
    }
}

/// How far above the base a metric may be: a share of it, and at least so much.
fn tolerance(metric: &str) -> (f64, f64) {
    match metric.split_once('/') {
        Some(("time", _)) => (0.30, 0.0),
        Some(("instructions", _)) => (0.03, 1.0),
        Some(("syscalls", "direct-32")) => (0.15, 0.0),
        Some(("calls", "direct-32")) => (1.00, 0.0),
        _ => (0.03, 0.0),
    }
}

fn unit(metric: &str) -> &'static str {
    if metric.starts_with("time/") {
        " ns"
    } else {
        ""
    }
}

/// One metric of both sides.
#[derive(Debug)]
struct Row {
    metric: String,
    base: f64,
    this: f64,
    limit: f64,
    /// Values of this tree so far.
    rounds: usize,
    accepted: Option<Accepted>,
}

impl Row {
    fn of(metric: &str, values: &Values, accepted: &[Accepted]) -> Option<Self> {
        let sorted = |values: &[f64]| {
            let mut sorted = values.to_vec();
            sorted.sort_by(f64::total_cmp);
            sorted
        };
        let (base, this) = (sorted(&values.base), sorted(&values.this));
        let median = (*base.get(base.len() / 2)?, *this.get(this.len() / 2)?);
        let shortest = (*base.first()?, *this.first()?);
        let ratio = |(base, this): (f64, f64)| this / base;
        let is_time = metric.starts_with("time/");
        let (base, this) = if is_time && ratio(shortest) < ratio(median) {
            shortest
        } else {
            median
        };
        let (share, least) = tolerance(metric);
        Some(Self {
            metric: metric.to_owned(),
            base,
            this,
            limit: base + (base * share).max(least),
            rounds: values.this.len(),
            accepted: accepted.iter().find(|a| a.covers(metric)).cloned(),
        })
    }

    fn is_slower(&self) -> bool {
        // A number that is none is no pass.
        self.this > self.limit || self.this.is_nan()
    }

    fn is_faster(&self) -> bool {
        let (share, least) = tolerance(&self.metric);
        self.this < self.base - (self.base * share).max(least)
    }

    fn is_red(&self) -> bool {
        self.is_slower() && self.accepted.is_none()
    }

    /// What is wrong, in one line.
    fn line(&self) -> String {
        let Self {
            metric,
            base,
            this,
            limit,
            ..
        } = self;
        let (share, unit) = (tolerance(metric).0 * 100.0, unit(metric));
        format!(
            "{metric}: {this:.3}{unit} per request, the base has {base:.3}{unit}: \
             {} is above the limit of {limit:.3}{unit} ({share:.0} %)",
            percent(*this, *base)
        )
    }
}

fn percent(this: f64, base: f64) -> String {
    format!("{:+.1} %", (this / base - 1.0) * 100.0)
}

/// All metrics of both sides, as measured so far.
#[derive(Debug)]
pub(super) struct Report(Vec<Row>);

/// What comes of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A line for each metric beyond its limit.
    Slower(Vec<String>),
    /// The last line.
    Fine(String),
}

impl Report {
    pub(super) fn of(samples: &Samples, accepted: &[Accepted]) -> Self {
        let rows = samples.0.iter();
        Self(
            rows.filter_map(|(metric, values)| Row::of(metric, values, accepted))
                .collect(),
        )
    }

    /// True when more rounds could change the verdict.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.in_doubt().next().is_some()
    }

    fn in_doubt(&self) -> impl Iterator<Item = &Row> {
        // What is exact is counted once.
        let rows = self.0.iter().filter(|row| row.is_red());
        rows.filter(|row| row.rounds > 1)
    }

    /// The metrics that are in doubt.
    pub(super) fn doubts(&self) -> String {
        let names: Vec<&str> = self.in_doubt().map(|row| row.metric.as_str()).collect();
        names.join(", ")
    }

    /// Those that accept nothing that was compared.
    pub(super) fn idle<'a>(
        &'a self,
        accepted: &'a [Accepted],
    ) -> impl Iterator<Item = &'a Accepted> {
        let idle = |a: &&Accepted| !self.0.iter().any(|row| a.covers(&row.metric));
        accepted.iter().filter(idle)
    }

    pub(super) fn verdict(&self) -> Verdict {
        let red: Vec<String> = self
            .0
            .iter()
            .filter(|r| r.is_red())
            .map(Row::line)
            .collect();
        if !red.is_empty() {
            return Verdict::Slower(red);
        }
        let accepted = self.0.iter().filter(|row| row.is_slower()).count();
        let but = match accepted {
            0 => String::new(),
            n => format!(", but for {n} that the commits accept"),
        };
        Verdict::Fine(format!(
            "{} metrics compared, none is beyond its limit{but}",
            self.0.len()
        ))
    }

    /// Every value of every round.
    pub(super) fn json(&self, samples: &Samples) -> Value {
        let rows = self.0.iter().map(|row| {
            let values = &samples.0[&row.metric];
            let entry = json!({
                "base": row.base, "this": row.this, "limit": row.limit,
                "slower": row.is_slower(),
                "accepted": row.accepted.as_ref().map(|a| &a.reason),
                "base_rounds": values.base, "this_rounds": values.this,
            });
            (row.metric.clone(), entry)
        });
        Value::Object(rows.collect())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ("metric, per request", "base", "this", "ratio", "limit");
        let (metric, base, this, ratio, limit) = head;
        writeln!(
            out,
            "{metric:<28} {base:>10} {this:>10} {ratio:>7} {limit:>10}"
        )?;
        for row in &self.0 {
            let verdict = match &row.accepted {
                _ if row.is_faster() => "faster".to_owned(),
                _ if !row.is_slower() => "same".to_owned(),
                Some(a) => format!("slower, accepted by {}: {}", a.commit, a.reason),
                None => "SLOWER".to_owned(),
            };
            let name = format!("{}{}", row.metric, unit(&row.metric).replace(' ', ", "));
            writeln!(
                out,
                "{name:<28} {:>10.3} {:>10.3} {:>7.3} {:>10.3}  {verdict}",
                row.base,
                row.this,
                row.this / row.base,
                row.limit,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(metric: &str, base: &[f64], this: &[f64]) -> Samples {
        let mut samples = Samples::default();
        for &value in base {
            samples.add_base(metric.to_owned(), value);
        }
        for &value in this {
            samples.add_this(metric.to_owned(), value);
        }
        samples
    }

    fn red(metric: &str, base: &[f64], this: &[f64], accepted: &[Accepted]) -> bool {
        let report = Report::of(&samples(metric, base, this), accepted);
        matches!(report.verdict(), Verdict::Slower(_))
    }

    #[test]
    fn fifteen_percent_more_instructions_or_calls_are_red_and_two_are_not() {
        for metric in [
            "instructions/pop",
            "instructions/cached-32",
            "syscalls/cached-32",
            "kicks/direct-1",
            "calls/cached-1",
        ] {
            assert!(red(metric, &[100.0], &[115.0], &[]), "{metric}");
            assert!(!red(metric, &[100.0], &[102.0], &[]), "{metric}");
            assert!(!red(metric, &[100.0], &[50.0], &[]), "{metric}");
        }
    }

    #[test]
    fn one_instruction_more_is_none_too_many_and_two_are() {
        assert!(!red("instructions/pop", &[16.5], &[17.5], &[]));
        assert!(red("instructions/pop", &[16.5], &[18.5], &[]));
    }

    #[test]
    fn time_counts_beyond_thirty_percent_in_its_best_round_and_its_median() {
        assert!(!red("time/pop", &[2.0], &[2.5], &[]));
        assert!(red("time/pop", &[2.0], &[2.7], &[]));
        // One round of the base was lucky.
        assert!(!red("time/pop", &[1.1, 2.0, 2.1], &[1.7, 2.1, 2.2], &[]));
        // Most rounds of this tree were disturbed.
        assert!(!red("time/pop", &[2.0, 2.1, 2.1], &[2.2, 8.0, 9.0], &[]));
        assert!(red("time/pop", &[2.0, 2.1, 9.0], &[2.7, 2.8, 2.9], &[]));
    }

    #[test]
    fn counts_are_medians() {
        let metric = "syscalls/cached-1";
        assert!(!red(metric, &[2.0; 3], &[2.0, 9.0, 2.0], &[]));
        assert!(red(metric, &[2.0; 3], &[3.0, 2.0, 3.0], &[]));
    }

    #[test]
    fn what_is_no_number_is_red() {
        assert!(red("time/pop", &[1.0], &[f64::NAN], &[]));
    }

    #[test]
    fn the_line_names_metric_values_and_limit() {
        let samples = samples("instructions/pop", &[100.0], &[115.0]);
        assert_eq!(
            Report::of(&samples, &[]).verdict(),
            Verdict::Slower(vec![
                "instructions/pop: 115.000 per request, the base has 100.000: \
                 +15.0 % is above the limit of 103.000 (3 %)"
                    .to_owned()
            ])
        );
    }

    #[test]
    fn a_regression_is_accepted_by_name_or_beginning_and_shown() {
        let of = |value| Accepted::parse("1234abc", value).unwrap();
        let metric = "instructions/pop";
        assert!(!red(metric, &[1.0], &[9.0], &[of("instructions/pop why")]));
        assert!(!red(metric, &[1.0], &[9.0], &[of("instructions/* why")]));
        assert!(red(metric, &[1.0], &[9.0], &[of("instructions/po why")]));
        let samples = samples(metric, &[1.0], &[9.0]);
        let shown = Report::of(&samples, &[of("instructions/pop two checks more")]).to_string();
        assert!(shown.contains("slower, accepted by 1234abc: two checks more"));
        assert_eq!(Accepted::parse("1234abc", "instructions/pop"), None);
    }

    #[test]
    fn a_trailer_that_names_no_metric_is_known_as_such() {
        let accepted = ["time/pop why", "time/pup why"].map(|a| Accepted::parse("1", a).unwrap());
        let report = Report::of(&samples("time/pop", &[1.0], &[1.0]), &accepted);
        let idle: Vec<_> = report.idle(&accepted).map(|a| a.metric.as_str()).collect();
        assert_eq!(idle, ["time/pup"]);
    }

    #[test]
    fn what_has_rounds_is_in_doubt_when_it_is_red_and_what_is_exact_is_not() {
        let doubt = |metric, base: &[f64], this: &[f64]| {
            Report::of(&samples(metric, base, this), &[]).is_in_doubt()
        };
        assert!(doubt("calls/direct-32", &[1.0; 3], &[3.0; 3]));
        assert!(!doubt("calls/direct-32", &[1.0; 3], &[1.5; 3]));
        assert!(!doubt("instructions/pop", &[10.0], &[20.0]));
    }

    #[test]
    fn what_one_side_lacks_is_not_compared() {
        assert!(!red("instructions/new", &[], &[9.0], &[]));
    }
}
