//! User and group ids: ranges of the guest's that are ranges of the host's, as
//! in `/proc/PID/uid_map`. Without ranges both have the same.

use thiserror::Error;

/// What an id is shown as that has no counterpart, as the kernel does.
const OVERFLOW: u32 = 65534;

/// `count` ids from `guest` on are the host's from `host` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id in the guest.
    pub guest: u32,
    /// First id on the host.
    pub host: u32,
    /// How many.
    pub count: u32,
}

/// Why ranges are no map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdMapError {
    /// Empty, or beyond the last id.
    #[error("a range must have at least one id and end below 4294967295")]
    Range(IdRange),
    /// One id in two ranges.
    #[error("two ranges have an id in common")]
    Overlap(IdRange, IdRange),
}

/// Ranges that have no id in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap(Vec<IdRange>);

impl IdMap {
    /// No ranges map every id to itself.
    ///
    /// # Errors
    /// [`IdMapError`].
    pub fn new(ranges: Vec<IdRange>) -> Result<Self, IdMapError> {
        let overlap = |a: u32, b: u32, x: &IdRange, y: &IdRange| {
            u64::from(a) < u64::from(b) + u64::from(y.count)
                && u64::from(b) < u64::from(a) + u64::from(x.count)
        };
        for (place, range) in ranges.iter().enumerate() {
            let last = range.count.checked_sub(1);
            let fits = |first: u32| {
                last.and_then(|last| first.checked_add(last))
                    .is_some_and(|last| last != u32::MAX)
            };
            if !fits(range.guest) || !fits(range.host) {
                return Err(IdMapError::Range(*range));
            }
            for other in &ranges[..place] {
                if overlap(range.guest, other.guest, range, other)
                    || overlap(range.host, other.host, range, other)
                {
                    return Err(IdMapError::Overlap(*other, *range));
                }
            }
        }
        Ok(Self(ranges))
    }

    /// The host's id of one of the guest's; the id that means "none" has none.
    pub fn to_host(&self, id: u32) -> Option<u32> {
        if self.0.is_empty() {
            return (id != u32::MAX).then_some(id);
        }
        self.find(|r| (r.guest, r.host), id)
    }

    /// The guest's id of one of the host's, 65534 where it has none.
    pub fn to_guest(&self, id: u32) -> u32 {
        if self.0.is_empty() {
            return id;
        }
        self.find(|r| (r.host, r.guest), id).unwrap_or(OVERFLOW)
    }

    fn find(&self, ends: impl Fn(&IdRange) -> (u32, u32), id: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let (from, to) = ends(range);
            let place = id.checked_sub(from)?;
            (place < range.count).then(|| to + place)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(guest: u32, host: u32, count: u32) -> IdRange {
        IdRange { guest, host, count }
    }

    #[test]
    fn ids_go_there_and_back_and_unknown_ones_nowhere() {
        let map = IdMap::new(vec![range(0, 100_000, 1000), range(1000, 5, 1)]).unwrap();
        for (guest, host) in [(0, 100_000), (999, 100_999), (1000, 5)] {
            assert_eq!(map.to_host(guest), Some(host));
            assert_eq!(map.to_guest(host), guest);
        }
        assert_eq!(map.to_host(1001), None);
        assert_eq!(map.to_guest(0), OVERFLOW);
        assert_eq!(IdMap::default().to_host(7), Some(7));
        assert_eq!(IdMap::default().to_host(u32::MAX), None);
    }

    #[test]
    fn ranges_that_are_no_map_are_refused() {
        for bad in [
            vec![range(0, 0, 0)],
            vec![range(u32::MAX, 0, 1)],
            vec![range(1, 0, u32::MAX)],
            vec![range(0, 10, 5), range(4, 100, 1)],
            vec![range(0, 10, 5), range(100, 14, 1)],
        ] {
            assert!(IdMap::new(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
