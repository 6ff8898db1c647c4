//! What a completion is about, packed into the 64 bits the kernel carries.

/// The kind is in the top byte that is ours.
const KIND_SHIFT: u32 = 56;
const KIND_IO: u64 = 0;
const KIND_KICK: u64 = 1;
const KIND_MAILBOX: u64 = 2;
const KIND_SYNC: u64 = 3;
const KIND_INPUT: u64 = 4;

/// Names what a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// The I/O of a request: the queue's slot on this worker, and its head.
    Io {
        /// Index of the queue.
        slot: usize,
        /// Descriptor head.
        head: u16,
    },
    /// A kick; nothing but a reason to look at the rings. The slot may have
    /// another queue by now.
    Kick {
        /// Index of the queue.
        slot: usize,
    },
    /// A file has packets for a queue. The slot may have another queue by now.
    Input {
        /// Index of the queue.
        slot: usize,
    },
    /// Orders in the mailbox.
    Mailbox,
    /// The sync that several requests wait for: its place in [`super::syncs`].
    Sync(usize),
}

impl Token {
    /// The token of a request's I/O.
    pub(super) fn io(slot: usize, head: u16) -> u64 {
        KIND_IO << KIND_SHIFT | (slot as u64 & 0xffff) << 16 | u64::from(head)
    }

    /// The token of a kick watch. `generation` tells it from earlier watches of
    /// the same slot.
    pub(super) fn kick(slot: usize, generation: u32) -> u64 {
        KIND_KICK << KIND_SHIFT | u64::from(generation) << 16 | slot as u64 & 0xffff
    }

    /// The token of a watch on what a queue's packets come from, likewise.
    pub(super) fn input(slot: usize, generation: u32) -> u64 {
        KIND_INPUT << KIND_SHIFT | u64::from(generation) << 16 | slot as u64 & 0xffff
    }

    /// The token of the mailbox.
    pub(super) const MAILBOX: u64 = KIND_MAILBOX << KIND_SHIFT;

    /// The token of a shared sync.
    pub(super) fn sync(index: usize) -> u64 {
        KIND_SYNC << KIND_SHIFT | index as u64 & 0xffff_ffff
    }

    /// Reads a token back.
    pub(super) fn parse(token: u64) -> Self {
        match token >> KIND_SHIFT {
            KIND_IO => Self::Io {
                slot: (token >> 16) as usize & 0xffff,
                head: token as u16,
            },
            KIND_MAILBOX => Self::Mailbox,
            KIND_SYNC => Self::Sync(token as u32 as usize),
            KIND_INPUT => Self::Input {
                slot: token as usize & 0xffff,
            },
            _ => Self::Kick {
                slot: token as usize & 0xffff,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        for (slot, head) in [(0, 0), (7, 1023), (0xffff, 0xffff)] {
            assert_eq!(
                Token::parse(Token::io(slot, head)),
                Token::Io { slot, head }
            );
        }
        for slot in [0, 7, 0xffff] {
            let token = Token::kick(slot, u32::MAX);
            assert_eq!(Token::parse(token), Token::Kick { slot });
            let token = Token::input(slot, u32::MAX);
            assert_eq!(Token::parse(token), Token::Input { slot });
        }
        assert_eq!(Token::parse(Token::MAILBOX), Token::Mailbox);
        assert_eq!(Token::parse(Token::sync(70_000)), Token::Sync(70_000));
    }
}
