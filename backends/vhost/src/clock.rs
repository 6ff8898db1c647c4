//! Time as workers, limits and statistics count it: nanoseconds since the
//! program first asked, in one word.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds since the start.
pub(crate) fn now() -> u64 {
    START.elapsed().as_nanos() as u64
}

/// A moment of ours as the engine takes it; far ones are a day away.
pub(crate) fn instant(at: u64) -> Instant {
    let day = 24 * 60 * 60;
    let at = at.min(now().saturating_add(day * 1_000_000_000));
    *START + Duration::from_nanos(at)
}
