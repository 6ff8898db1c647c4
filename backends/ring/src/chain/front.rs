//! What a device sets aside at the front of a chain's writable part, to fill it
//! in once it knows how the request went: FUSE puts its header there (virtio
//! 1.3, 5.11.6), before the data. And limits on how much of a chain is used.
#![expect(unsafe_code)]
// UNSAFETY: as in `chain`: guest memory is written through raw pointers.

use std::ptr;

use libc::iovec;

use super::Chain;

/// Pieces that a slot keeps room for between requests. A driver that is no test
/// has the header in one.
const KEPT_PIECES: usize = 4;

/// The memory that was set aside.
#[derive(Debug, Default)]
pub(super) struct Front(Vec<iovec>);

impl Front {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn trim(&mut self) {
        if self.0.capacity() > KEPT_PIECES {
            self.0 = Vec::new();
        }
    }
}

impl Chain<'_> {
    /// Sets the next `n` writable bytes aside, to be written by
    /// [`write_front`](Self::write_front) at any time before the request ends.
    /// False, with nothing changed, when there are fewer. Once for a request.
    #[must_use]
    pub fn take_front(&mut self, n: u64) -> bool {
        let s = &mut *self.segments;
        if n > s.writable_len {
            return false;
        }
        s.front.clear();
        let mut left = n as usize;
        for segment in &s.iov[s.writable.0..s.writable.1] {
            if left == 0 {
                break;
            }
            let iov_len = segment.iov_len.min(left);
            left -= iov_len;
            s.front.0.push(iovec {
                iov_len,
                ..*segment
            });
        }
        self.advance_writable(n);
        true
    }

    /// Fills what was set aside from its start on; bytes beyond it are dropped.
    pub fn write_front(&mut self, bytes: &[u8]) {
        let mut left = bytes;
        for piece in &self.segments.front.0 {
            let (now, rest) = left.split_at(piece.iov_len.min(left.len()));
            // SAFETY: the piece was found in shared memory that the queue keeps
            // mapped until the request ends, in a device-writable descriptor.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast(), now.len()) };
            left = rest;
        }
    }

    /// Leaves `n` bytes to read at most: what follows is not there any more.
    pub fn limit_readable(&mut self, n: u64) {
        let s = &mut *self.segments;
        if n < s.readable_len {
            s.readable.1 = cut(&mut s.iov, s.readable, n);
            s.readable_len = n;
        }
    }

    /// Leaves `n` bytes to write at most.
    pub fn limit_writable(&mut self, n: u64) {
        let s = &mut *self.segments;
        if n < s.writable_len {
            s.writable.1 = cut(&mut s.iov, s.writable, n);
            s.writable_len = n;
        }
    }
}

/// Keeps the first `n` bytes of `iov[start..end]`; returns the new end.
fn cut(iov: &mut [iovec], (start, end): (usize, usize), n: u64) -> usize {
    let mut left = n;
    for (index, segment) in iov[start..end].iter_mut().enumerate() {
        if left == 0 {
            return start + index;
        }
        segment.iov_len = segment
            .iov_len
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        left -= segment.iov_len as u64;
    }
    end
}

#[cfg(test)]
mod tests {
    use crate::testing::Guest;
    use crate::{Buffer, RequestQueue};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// A chain of 8 readable bytes and writable ones of these lengths, from
    /// 0x9000 on with a byte between any two.
    fn chain(lengths: &[u32]) -> (Guest, RequestQueue<()>, u16) {
        let mut guest = Guest::new(16);
        guest.descriptor(0, (0x1000, 8, NEXT, 1));
        let mut address = 0x9000;
        for (index, len) in (1u16..).zip(lengths) {
            let last = usize::from(index) == lengths.len();
            let flags = WRITE | if last { 0 } else { NEXT };
            guest.descriptor(index, (address, *len, flags, index + 1));
            address += u64::from(*len) + 1;
        }
        guest.offer(0);
        let mut queue = RequestQueue::new(guest.queue(false));
        let (head, loaded) = queue.pop().unwrap().unwrap();
        loaded.unwrap();
        (guest, queue, head)
    }

    #[test]
    fn a_header_is_written_after_the_data() {
        for lengths in [&[4, 8][..], &[12], &[1, 1, 1, 1, 8], &[3, 9]] {
            let (guest, mut queue, head) = chain(lengths);
            let (mut chain, ()) = queue.request(head);
            assert!(chain.take_front(4));
            assert_eq!(chain.writable_len(), 8);
            assert_eq!(chain.write(b"datadata"), 8);
            // More than was set aside is dropped.
            chain.write_front(b"HEADER");
            let mut seen: Vec<u8> = Vec::new();
            let mut address = 0x9000;
            for len in lengths {
                let bytes: [u8; 12] = guest.get(address);
                seen.extend(&bytes[..*len as usize]);
                address += u64::from(*len) + 1;
            }
            assert_eq!(seen, b"HEADdatadata", "{lengths:?}");
        }
    }

    #[test]
    fn nothing_is_set_aside_where_there_is_too_little() {
        let (_guest, mut queue, head) = chain(&[2, 1]);
        let (mut chain, ()) = queue.request(head);
        assert!(!chain.take_front(4));
        assert_eq!(chain.writable_len(), 3);
        chain.write_front(b"nowhere");
        assert_eq!(chain.write(b"abc"), 3);
    }

    #[test]
    fn limits_cut_what_is_left() {
        let (guest, mut queue, head) = chain(&[4, 8]);
        let (mut chain, ()) = queue.request(head);
        chain.limit_readable(5);
        chain.limit_readable(6);
        assert_eq!(chain.readable_len(), 5);
        assert!(!chain.read(&mut [0; 6]));
        assert!(chain.read(&mut [0; 5]));
        assert!(chain.take_front(2));
        chain.limit_writable(5);
        assert_eq!(chain.writable_len(), 5);
        assert_eq!(chain.write(b"abcdefgh"), 5);
        assert_eq!(guest.get::<2>(0x9002), *b"ab");
        assert_eq!(guest.get::<4>(0x9005), *b"cde\0");
        let (mut chain, ()) = queue.request(head);
        chain.limit_writable(0);
        assert!(queue.read_target(head, Buffer::Chain).is_empty());
    }

    #[test]
    fn a_slot_forgets_what_its_last_request_set_aside() {
        let (mut guest, mut queue, head) = chain(&[4, 4]);
        assert!(queue.request(head).0.take_front(4));
        assert_eq!(queue.finish(head, 0), None);
        guest.offer(0);
        let (head, loaded) = queue.pop().unwrap().unwrap();
        loaded.unwrap();
        queue.request(head).0.write_front(b"old!");
        assert_eq!(guest.get::<4>(0x9000), [0; 4]);
    }
}
