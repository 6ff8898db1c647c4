//! Flow control (virtio 1.3, 5.10.6.3): who may still send how much. All
//! counters are modulo 2^32, as the specification has them.
//!
//! [`Inbound`] bounds our own memory and is enforced; [`Outbound`] protects the
//! guest's and is only as good as what the guest says.

/// Receive buffer of a connection, and thereby the most memory that a guest can
/// make one connection hold.
pub(crate) const BUF_ALLOC: u32 = 64 * 1024;
/// That of one that comes when there are [`MANY`]: a guest with thousands of
/// connections that nobody reads has the host hold 31 MiB, not 256.
pub(crate) const LITTLE: u32 = 4 * 1024;
/// Connections of which each has [`BUF_ALLOC`].
pub(crate) const MANY: usize = 256;

/// What the guest sends to us.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inbound {
    /// Bytes of the buffer, which never change: what was promised holds.
    room: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl Inbound {
    /// An empty buffer of so many bytes.
    pub(crate) fn new(room: u32) -> Self {
        Self {
            room,
            received: 0,
            forwarded: 0,
            announced: 0,
        }
    }

    /// What the guest is told of the buffer's size.
    pub(crate) fn room(&self) -> u32 {
        self.room
    }

    /// Counts `len` bytes from the guest; `false` when it had no room for them.
    #[must_use]
    pub(crate) fn accept(&mut self, len: u32) -> bool {
        let free = self.room - self.received.wrapping_sub(self.forwarded);
        if len > free {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        true
    }

    /// Counts bytes that have left the buffer; never more than came in.
    pub(crate) fn forward(&mut self, len: u32) {
        debug_assert!(len <= self.received.wrapping_sub(self.forwarded));
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// The value for `fwd_cnt` of a packet that goes out now.
    pub(crate) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }

    /// True when the guest should hear of the room it has: it knows of less
    /// than half of the buffer.
    pub(crate) fn due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= self.room / 2
    }
}

/// What we send to the guest.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outbound {
    sent: u32,
    forwarded: u32,
    capacity: u32,
}

impl Outbound {
    /// Takes what a packet of the guest says.
    ///
    /// A `fwd_cnt` which lies before the last one or beyond what was sent is
    /// left alone. It may be a lie, or two threads of an honest driver that
    /// queued their packets the other way round; either way the older claim
    /// stands, and it allows less.
    pub(crate) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.capacity = buf_alloc;
        if self.sent.wrapping_sub(fwd_cnt) <= self.in_flight() {
            self.forwarded = fwd_cnt;
        }
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.forwarded)
    }

    /// Bytes the guest has room for.
    pub(crate) fn available(&self) -> u32 {
        self.capacity.saturating_sub(self.in_flight())
    }

    /// Counts bytes sent; never more than [`available`](Self::available).
    pub(crate) fn send(&mut self, len: u32) {
        debug_assert!(len <= self.available());
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against counters that cannot wrap.
        #[test]
        fn inbound_never_holds_more_than_the_buffer(
            start: u32,
            room in prop_oneof![Just(BUF_ALLOC), Just(LITTLE)],
            steps in proptest::collection::vec((0..BUF_ALLOC + 10, 0..BUF_ALLOC + 10), 0..200),
        ) {
            let mut inbound = Inbound { room, received: start, forwarded: start, announced: start };
            let (mut held, mut unsaid) = (0u64, 0u64);
            for (arrive, leave) in steps {
                let fits = held + u64::from(arrive) <= u64::from(room);
                prop_assert_eq!(inbound.accept(arrive), fits);
                held += if fits { u64::from(arrive) } else { 0 };
                let leave = u64::from(leave).min(held);
                inbound.forward(leave as u32);
                held -= leave;
                unsaid += leave;
                prop_assert_eq!(inbound.due(), unsaid >= u64::from(room / 2));
                if inbound.due() {
                    inbound.announce();
                    unsaid = 0;
                }
                prop_assert!(held <= u64::from(room));
            }
        }

        /// Whatever the guest claims, what is unacknowledged stays below the
        /// largest buffer it ever named, and honest claims are taken.
        #[test]
        fn outbound_bears_lies(
            start: u32,
            steps in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 0..200),
        ) {
            let mut out = Outbound { sent: start, forwarded: start, capacity: 0 };
            let mut largest = 0;
            for (alloc, claim, honest) in steps {
                let claim = if honest {
                    out.forwarded.wrapping_add(claim.checked_rem(out.in_flight()).unwrap_or(0))
                } else {
                    claim
                };
                let before = out.in_flight();
                out.update(alloc, claim);
                largest = largest.max(alloc);
                prop_assert!(out.in_flight() <= before);
                if honest {
                    prop_assert_eq!(out.forwarded, claim);
                }
                out.send(out.available().min(100_000));
                prop_assert!(out.in_flight() <= largest);
            }
        }
    }

    #[test]
    fn a_shrinking_buffer_stops_us_and_a_growing_one_frees_us() {
        let mut out = Outbound::default();
        out.update(1000, 0);
        out.send(1000);
        assert_eq!(out.available(), 0);
        out.update(10, 500);
        assert_eq!(out.available(), 0);
        out.update(2000, 500);
        assert_eq!(out.available(), 1500);
    }

    #[test]
    fn counts_from_the_future_or_the_past_are_not_taken() {
        let mut out = Outbound::default();
        out.update(1000, 0);
        out.send(600);
        out.update(1000, 300);
        for lie in [601, 299, 0, u32::MAX, 1 << 31] {
            out.update(1000, lie);
            assert_eq!(out.available(), 700, "{lie}");
        }
    }
}
