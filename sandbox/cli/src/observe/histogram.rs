//! How long requests took, as a sidecar counts it: values in nanoseconds with how often each was
//! seen, within 1.6 %.
//!
//! Read by `device`. Two of them taken one after the other say what lies between.

use std::collections::BTreeMap;

use serde::Deserialize;

/// More than a sidecar has buckets.
const MOST: usize = 8192;

/// One as the control socket tells it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Said {
    sum: u64,
    /// Values with how often each was seen.
    buckets: Vec<(u64, u64)>,
}

/// A histogram.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Histogram {
    /// Nanoseconds, and how many requests took that long.
    buckets: BTreeMap<u64, u64>,
    /// Of all, exact; ns.
    sum: u64,
}

impl Histogram {
    /// Adds one as the control socket tells it.
    pub(crate) fn add(&mut self, said: &Said) {
        self.sum = self.sum.saturating_add(said.sum);
        for (value, count) in &said.buckets {
            if self.buckets.len() < MOST || self.buckets.contains_key(value) {
                let sum = self.buckets.entry(*value).or_default();
                *sum = sum.saturating_add(*count);
            }
        }
    }

    /// What came after `earlier`, which this one has in it unless the sidecar has begun anew.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let count = |value: &u64| self.buckets.get(value).copied().unwrap_or(0);
        let mut of_earlier = earlier.buckets.iter();
        if of_earlier.any(|(value, before)| count(value) < *before) {
            return self.clone();
        }
        let before = |value: &u64| earlier.buckets.get(value).copied().unwrap_or(0);
        let all = self.buckets.iter();
        let rest = all.map(|(value, count)| (*value, count - before(value)));
        Self {
            buckets: rest.filter(|(_, count)| *count > 0).collect(),
            sum: self.sum.saturating_sub(earlier.sum),
        }
    }

    /// Requests in it.
    pub(crate) fn count(&self) -> u64 {
        self.buckets.values().fold(0, sum)
    }

    /// The sum of all, in seconds.
    pub(crate) fn seconds(&self) -> f64 {
        self.sum as f64 / 1e9
    }

    /// Those that took no longer than this, ns.
    pub(crate) fn at_most(&self, ns: u64) -> u64 {
        let some = self.buckets.range(..=ns);
        some.map(|(_, count)| count).fold(0, sum)
    }

    /// What a share `q` of the requests did not exceed, in microseconds; none without requests.
    pub(crate) fn quantile_us(&self, q: f64) -> Option<f64> {
        let rank = (q * self.count() as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (value, count) in &self.buckets {
            seen = sum(seen, count);
            if seen >= rank {
                return Some(*value as f64 / 1e3);
            }
        }
        None
    }
}

/// Of counts that others tell.
fn sum(all: u64, one: &u64) -> u64 {
    all.saturating_add(*one)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(buckets: &[(u64, u64)], sum: u64) -> Histogram {
        let mut histogram = Histogram::default();
        let said = json!({"count": 0, "sum": sum, "buckets": buckets});
        histogram.add(&serde_json::from_value(said).unwrap());
        histogram
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let some = of(&[(1_000, 50), (9_000, 49), (700_000, 1)], 5);
        assert_eq!(some.quantile_us(0.5), Some(1.0));
        assert_eq!(some.quantile_us(0.99), Some(9.0));
        assert_eq!(some.quantile_us(1.0), Some(700.0));
        assert_eq!((some.at_most(8_999), some.at_most(9_000)), (50, 99));
        assert_eq!(Histogram::default().quantile_us(0.5), None);
    }

    #[test]
    fn what_lies_between_two_is_known() {
        let earlier = of(&[(10, 4), (20, 1)], 60);
        let later = of(&[(10, 4), (20, 3), (50, 2)], 200);
        assert_eq!(later.since(&earlier), of(&[(20, 2), (50, 2)], 140));
        assert_eq!(later.since(&Histogram::default()), later);
        // Another sidecar, which counts from nothing.
        assert_eq!(earlier.since(&later), earlier);
    }

    #[test]
    fn lies_are_bounded() {
        let lie = of(&[(4, u64::MAX), (5, u64::MAX)], u64::MAX);
        assert_eq!((lie.count(), lie.at_most(5)), (u64::MAX, u64::MAX));
        assert_eq!(lie.quantile_us(1.0), Some(0.004));
        let mut twice = lie.clone();
        let said = json!({"sum": 9, "buckets": [[4, 9]]});
        twice.add(&serde_json::from_value(said).unwrap());
        assert_eq!(twice, lie);
        let many: Vec<(u64, u64)> = (0..20_000).map(|value| (value, 1)).collect();
        assert_eq!(of(&many, 0).count(), MOST as u64);
    }
}
