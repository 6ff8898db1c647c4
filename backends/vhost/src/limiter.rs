//! Limits on requests and bytes per second: one [`Limiter`] per device, shared
//! by all of its queues on all workers, without a lock.
//!
//! Each limit is a token bucket in the form of the generic cell rate
//! algorithm: one atomic, the theoretical arrival time (TAT), moves ahead by
//! what each request costs in time. A request may be popped while TAT is not
//! further ahead of now than the burst allows; it then pays its whole cost,
//! whatever its size, and so may leave the bucket in debt.
//!
//! A queue that meets a bucket in debt takes a [`Ticket`]: it pays for one
//! request at once and may pop it when the time it has paid for is there. Who
//! comes later gets a later time. So every waiting queue is served in turn,
//! also when another one on another worker never lets the bucket recover.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::oversight::Oversight;

/// Nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// The least that a bucket holds, as time at its rate. A worker that is woken
/// late by a timer or a busy machine catches up with it; with less, the rate
/// would stay below its limit.
const LEAST_BURST: u64 = SECOND / 100;

/// How long a worker sleeps at least when it must wait for a bucket: fast
/// rates are served in small batches instead of by one timer per request.
const QUANTUM: u64 = SECOND / 4000;

/// Limits of a device; 0 means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests per second, of every kind.
    pub iops: u64,
    /// Requests that may come at once after an idle time, beyond the rate.
    pub iops_burst: u64,
    /// Bytes per second, read and written.
    pub bandwidth: u64,
    /// Bytes that may come at once after an idle time, beyond the rate.
    pub bandwidth_burst: u64,
}

/// What an operator calls the four numbers of [`Limits`], in their order.
pub type LimitNames = [&'static str; 4];

/// What most devices call them.
pub const LIMIT_NAMES: LimitNames = ["iops", "iops-burst", "bandwidth", "bandwidth-burst"];

/// The most directions that a device limits apart.
pub const MAX_LANES: usize = 2;

impl Limits {
    /// The four numbers, in the order of their names.
    pub fn numbers(&self) -> [u64; 4] {
        [
            self.iops,
            self.iops_burst,
            self.bandwidth,
            self.bandwidth_burst,
        ]
    }

    /// The limits with these numbers.
    pub fn of([iops, iops_burst, bandwidth, bandwidth_burst]: [u64; 4]) -> Self {
        Self {
            iops,
            iops_burst,
            bandwidth,
            bandwidth_burst,
        }
    }

    /// Refuses a burst without the limit it belongs to.
    ///
    /// # Errors
    /// The number of the burst, and what is wrong.
    pub fn check(&self, names: &LimitNames) -> Result<(), (usize, String)> {
        for pair in self.numbers().chunks(2).enumerate() {
            if let (lane, [0, burst]) = pair
                && *burst > 0
            {
                let rule = format!(
                    "there is no limit that a burst could exceed: set {}, too",
                    names[2 * lane]
                );
                return Err((2 * lane + 1, rule));
            }
        }
        Ok(())
    }
}

/// One token bucket.
#[derive(Debug, Default)]
struct Bucket {
    /// Tokens per second; 0 lets everything pass.
    rate: AtomicU64,
    /// The burst in nanoseconds.
    tolerance: AtomicU64,
    /// Theoretical arrival time.
    tat: AtomicU64,
}

/// What `amount` tokens cost at a rate.
fn time(amount: u64, rate: u64) -> u64 {
    let cost = u128::from(amount) * u128::from(SECOND) / u128::from(rate.max(1));
    // Far from the end of time, so that sums of a few do not overflow.
    u64::try_from(cost).unwrap_or(u64::MAX).min(u64::MAX / 8)
}

impl Bucket {
    fn set(&self, rate: u64, burst: u64, now: u64) {
        let tolerance = if rate == 0 {
            0
        } else {
            time(burst, rate).max(LEAST_BURST)
        };
        self.rate.store(rate, Ordering::Relaxed);
        self.tolerance.store(tolerance, Ordering::Relaxed);
        // Debts were made at another rate: they are forgiven.
        let limit = now.saturating_add(tolerance);
        self.tat.fetch_min(limit, Ordering::Relaxed);
    }

    /// When a request may pass; a moment in the past if it may now.
    fn opens(&self) -> u64 {
        if self.rate.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let tolerance = self.tolerance.load(Ordering::Relaxed);
        self.tat.load(Ordering::Relaxed).saturating_sub(tolerance)
    }

    /// Pays for `amount`. Returns when the bucket would have opened before.
    fn charge(&self, now: u64, amount: u64) -> u64 {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 || amount == 0 {
            return self.opens();
        }
        let cost = time(amount, rate);
        let before = self.update(|tat| tat.max(now).saturating_add(cost).min(u64::MAX / 2));
        before.saturating_sub(self.tolerance.load(Ordering::Relaxed))
    }

    /// Takes a payment back.
    fn refund(&self, amount: u64) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate != 0 {
            self.update(|tat| tat.saturating_sub(time(amount, rate)));
        }
    }

    fn update(&self, apply: impl Fn(u64) -> u64) -> u64 {
        let relaxed = Ordering::Relaxed;
        match self
            .tat
            .fetch_update(relaxed, relaxed, |tat| Some(apply(tat)))
        {
            Ok(before) | Err(before) => before,
        }
    }
}

/// The limits of one device and how far they are used up. Times are those of
/// [`crate::clock::now`].
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    requests: Bucket,
    bytes: Bucket,
    iops_burst: AtomicU64,
    bandwidth_burst: AtomicU64,
    /// Counts changes of the limits: tickets from before mean nothing.
    generation: AtomicU32,
}

impl Limiter {
    /// Changes the limits, from now on. Workers that wait must be woken.
    /// Called by one thread at a time.
    pub(crate) fn set(&self, limits: &Limits, now: u64) {
        if *limits == self.get() {
            return;
        }
        self.requests.set(limits.iops, limits.iops_burst, now);
        self.bytes
            .set(limits.bandwidth, limits.bandwidth_burst, now);
        self.iops_burst.store(limits.iops_burst, Ordering::Relaxed);
        self.bandwidth_burst
            .store(limits.bandwidth_burst, Ordering::Relaxed);
        // Release: who sees the new generation sees the new limits.
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Limits {
        Limits {
            iops: self.requests.rate.load(Ordering::Relaxed),
            iops_burst: self.iops_burst.load(Ordering::Relaxed),
            bandwidth: self.bytes.rate.load(Ordering::Relaxed),
            bandwidth_burst: self.bandwidth_burst.load(Ordering::Relaxed),
        }
    }

    fn opens(&self) -> u64 {
        self.requests.opens().max(self.bytes.opens())
    }
}

/// A request that is paid for and waits for its time.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    at: u64,
    /// The bytes it has paid for: as many as the request before it had.
    bytes: u64,
    generation: u32,
}

/// A queue's way through its device's limits. The worker asks
/// [`open`](Self::open) before each pop, and [`wait`](Self::wait) when that
/// says no and there is a request to wait for.
#[derive(Debug)]
pub(crate) struct Gate {
    oversight: Arc<Oversight>,
    lane: usize,
    ticket: Option<Ticket>,
    last_bytes: u64,
}

impl Gate {
    /// A queue that counts in this direction of its device.
    pub(crate) fn new(oversight: Arc<Oversight>, lane: usize) -> Self {
        Self {
            oversight,
            lane: lane.min(MAX_LANES - 1),
            ticket: None,
            last_bytes: 0,
        }
    }

    fn limiter(&self) -> &Limiter {
        &self.oversight.lanes[self.lane]
    }

    /// Whether there is a limit at all.
    pub(crate) fn limits(&self) -> bool {
        self.limiter().get() != Limits::default()
    }

    /// Whether the next request may be popped.
    pub(crate) fn open(&mut self, now: u64) -> bool {
        if let Some(ticket) = self.ticket {
            if ticket.generation == self.limiter().generation.load(Ordering::Acquire) {
                return ticket.at <= now;
            }
            self.ticket = None;
        }
        self.limiter().opens() <= now
    }

    /// When to ask again. Takes a ticket, if there is none yet.
    pub(crate) fn wait(&mut self, now: u64) -> u64 {
        let ticket = match self.ticket {
            Some(ticket) => ticket,
            None => {
                let limiter = self.limiter();
                let generation = limiter.generation.load(Ordering::Acquire);
                let at = limiter
                    .requests
                    .charge(now, 1)
                    .max(limiter.bytes.charge(now, self.last_bytes));
                let bytes = self.last_bytes;
                *self.ticket.insert(Ticket {
                    at,
                    bytes,
                    generation,
                })
            }
        };
        ticket.at.max(now + QUANTUM)
    }

    /// A request of so many bytes was popped.
    pub(crate) fn charge(&mut self, now: u64, bytes: u64) {
        let ticket = self.ticket.take();
        let limiter = self.limiter();
        match ticket {
            Some(ticket) if bytes >= ticket.bytes => {
                limiter.bytes.charge(now, bytes - ticket.bytes);
            }
            Some(ticket) => limiter.bytes.refund(ticket.bytes - bytes),
            None => {
                limiter.requests.charge(now, 1);
                limiter.bytes.charge(now, bytes);
            }
        }
        self.last_bytes = bytes;
    }
}

impl Drop for Gate {
    /// A queue that stops while it waits did not use what it paid for.
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let limiter = self.limiter();
            if ticket.generation == limiter.generation.load(Ordering::Acquire) {
                limiter.requests.refund(1);
                limiter.bytes.refund(ticket.bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests;
