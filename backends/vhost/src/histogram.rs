//! A histogram of fixed size for latencies, log-linear as HDR's: every power
//! of two is divided into 32 buckets of equal width, so a bucket's middle is
//! within 1.6 % of every value in it.
//!
//! One thread records with relaxed stores, and any thread takes a [`Snapshot`]
//! meanwhile; what is read may be in the middle of an update, by one value.

use std::sync::atomic::{AtomicU64, Ordering};

/// Buckets per power of two, as a power of two.
const PRECISION: u32 = 5;
const LINEAR: u64 = 1 << PRECISION;

/// Values up to 2^40 (in nanoseconds, 18 minutes) have a bucket of their own
/// precision; all above are in the last one.
const POWERS: u32 = 40;
const BUCKETS: usize = ((POWERS - PRECISION + 1) as usize) << PRECISION;

/// The histogram one thread records into.
#[derive(Debug)]
pub struct Histogram {
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

/// Adds without a locked instruction: there is one writer.
#[inline]
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
    counter.store(sum, Ordering::Relaxed);
}

#[inline]
fn bucket(value: u64) -> usize {
    if value < LINEAR {
        return value as usize;
    }
    let shift = value.ilog2() - PRECISION;
    let index = (u64::from(shift) << PRECISION) + (value >> shift);
    (index as usize).min(BUCKETS - 1)
}

/// The smallest value of a bucket and the number of values in it.
fn range(index: usize) -> (u64, u64) {
    let index = index as u64;
    if index < LINEAR {
        return (index, 1);
    }
    let shift = (index >> PRECISION) - 1;
    ((LINEAR + (index & (LINEAR - 1))) << shift, 1 << shift)
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts a value. Only one thread may do this.
    #[inline]
    pub fn record(&self, value: u64) {
        add(&self.counts[bucket(value)], 1);
        add(&self.sum, value);
        if value > self.max.load(Ordering::Relaxed) {
            self.max.store(value, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> Snapshot {
        let load = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Snapshot {
            counts: self.counts.iter().map(load).collect(),
            sum: load(&self.sum),
            max: load(&self.max),
        }
    }
}

/// The contents of a histogram at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    counts: Vec<u64>,
    sum: u64,
    max: u64,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            sum: 0,
            max: 0,
        }
    }
}

impl Snapshot {
    /// Values counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum, exact as long as it fits 64 bits.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The largest, exact.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that a share `q` of all values does not exceed, within 1.6 %;
    /// 0 of an empty histogram.
    pub fn quantile(&self, q: f64) -> u64 {
        let count = self.count();
        // The rank of the value, from 1; in floats, which is exact enough up
        // to 2^53 values.
        let rank = ((q.clamp(0.0, 1.0) * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        for (index, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                let (low, width) = range(index);
                let last = index == BUCKETS - 1;
                return if last {
                    self.max
                } else {
                    (low + width / 2).min(self.max)
                };
            }
        }
        self.max
    }

    /// What was counted: the middle of each bucket that has anything, as
    /// [`quantile`](Self::quantile) tells it, and how much that is. In order.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let counted = self.counts.iter().enumerate().filter(|(_, n)| **n > 0);
        counted.map(|(index, n)| {
            let (low, width) = range(index);
            (low + width / 2, *n)
        })
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.sum = self.sum.wrapping_add(other.sum);
        self.max = self.max.max(other.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[u64]) -> Snapshot {
        let histogram = Histogram::default();
        values.iter().for_each(|v| histogram.record(*v));
        histogram.snapshot()
    }

    #[test]
    fn buckets_cover_every_value_once_and_in_order() {
        let mut next = 0;
        for index in 0..BUCKETS {
            let (low, width) = range(index);
            assert_eq!(low, next);
            assert_eq!((bucket(low), bucket(low + width - 1)), (index, index));
            next = low + width;
        }
        assert_eq!(next, 1 << POWERS);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn buckets_are_told_with_the_values_of_quantiles() {
        let some = of(&[7, 7, 1_000_000, 3_000_000]);
        let buckets: Vec<_> = some.buckets().collect();
        assert_eq!(buckets.len(), 3);
        assert_eq!(buckets[0], (7, 2));
        assert_eq!(buckets[1], (some.quantile(0.75), 1));
        assert_eq!(of(&[]).buckets().count(), 0);
    }

    #[test]
    fn nothing_and_the_largest() {
        assert_eq!(of(&[]).quantile(0.5), 0);
        let huge = of(&[1, u64::MAX / 2]);
        assert_eq!((huge.quantile(0.5), huge.quantile(1.0)), (1, u64::MAX / 2));
    }

    fn values() -> impl Strategy<Value = Vec<u64>> {
        // All magnitudes alike, not mostly the largest.
        let value = (0u32..POWERS, any::<u64>()).prop_map(|(bits, n)| n & ((1 << bits) - 1));
        prop::collection::vec(value, 1..300)
    }

    proptest! {
        #[test]
        fn quantiles_are_within_three_percent(mut values in values(), q in 0.0..=1.0f64) {
            let got = of(&values).quantile(q);
            values.sort_unstable();
            let rank = ((q * values.len() as f64).ceil() as usize).clamp(1, values.len());
            let want = values[rank - 1];
            prop_assert!(got.abs_diff(want) as f64 <= 0.03 * want as f64, "{got} for {want}");
        }

        #[test]
        fn merging_is_recording_all(a in values(), b in values()) {
            let mut merged = of(&a);
            merged.merge(&of(&b));
            prop_assert_eq!(merged, of(&[a, b].concat()));
        }
    }
}
