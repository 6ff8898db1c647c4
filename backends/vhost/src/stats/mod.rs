//! What one queue did and how long it took: plain counters and histograms,
//! written by the one worker that serves the queue and read by the control
//! thread. Nothing is locked, and a reader may see one event half counted.
//!
//! The life of a request is cut into three parts that add up to its whole:
//!
//! | part | from | until |
//! |---|---|---|
//! | queue wait | the worker first saw the request in the available ring, or would have seen it had it not left the ring alone because of a limit | the worker popped it |
//! | device | each operation of the request was handed to the kernel | the worker saw that it was done; the sum over all operations |
//! | backend | all the rest: checking, waiting for a bounce buffer, the other requests of the same turn | the used index was published |
//!
//! Clocks are read twice per turn, not per request: after the worker wakes, and
//! before it enters the kernel again. The first is the time of everything the
//! worker sees in that turn (requests and completions), the second of all it
//! does (operations handed over, used elements published). The synchronous
//! engine does an operation the moment it is handed over: there, device time
//! begins with the turn. How long a request lay in the ring while the worker
//! was busy with an earlier turn is not visible to it and not counted.

mod report;
mod timing;

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::device::Device;
use crate::histogram::Histogram;

pub(crate) use report::{json, prometheus};
pub(crate) use timing::Timing;

/// The most classes of requests a device can have.
const MOST_CLASSES: usize = 8;

/// Requests of one class that have ended.
#[derive(Debug, Default)]
struct ClassStats {
    requests: AtomicU64,
    /// Of those that succeeded.
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// One queue.
#[derive(Debug, Default)]
pub(crate) struct QueueStats {
    classes: [ClassStats; MOST_CLASSES],
    /// Times the driver woke us; several kicks in a row may count as one.
    kicks: AtomicU64,
    /// Times we called the driver.
    calls: AtomicU64,
    /// Turns in which a request was popped or finished.
    turns: AtomicU64,
    /// Turns in which a limit kept requests waiting.
    throttled: AtomicU64,
    /// Popped and not finished, as of the last turn.
    in_flight: AtomicU64,
    /// Requests popped in one turn, of turns that popped any.
    batch: Histogram,
    queue_wait: Histogram,
    backend: Histogram,
    device: Histogram,
    total: Histogram,
}

/// All queues of one device.
#[derive(Debug)]
pub(crate) struct DeviceStats {
    classes: &'static [&'static str],
    queues: Box<[CachePadded<QueueStats>]>,
}

impl DeviceStats {
    pub(crate) fn new<D: Device>(device: &D) -> Self {
        Self {
            classes: &D::CLASSES[..D::CLASSES.len().min(MOST_CLASSES)],
            queues: (0..device.queue_count())
                .map(|_| CachePadded::default())
                .collect(),
        }
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
