//! As much of SPDY/3.1 as a client of containerd's streams needs, and a server of ports.
//!
//! Neither containerd nor kubectl has flow control; what a stream is, its headers say. Headers are
//! compressed against a dictionary; ours are sent as blocks that are stored, which need none, those
//! of containerd's answers say nothing that we need, and a client's are for `headers`.

use bytes::{Buf as _, Bytes, BytesMut};

/// The largest frame that is taken; others copy in pieces of 32 KiB.
const LARGEST: usize = 1 << 20;
const FIN: u8 = 1;

/// A frame that means something here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A new stream, and its headers as they are compressed.
    Open(u32, Bytes),
    /// Bytes of a stream, and whether they were the last.
    Data(u32, Bytes, bool),
    /// A stream that ends without its bytes.
    Reset(u32),
    /// Wants the same back.
    Ping(u32),
    /// No more streams.
    GoAway,
    /// Headers and settings.
    Other,
}

/// Writes frames. Compression has one state for all of them.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    begun: bool,
}

impl Encoder {
    /// Opens a stream of this type; ours have odd numbers.
    pub(super) fn open(&mut self, stream: u32, of: &str) -> Vec<u8> {
        let mut block = Vec::new();
        block.extend(1_u32.to_be_bytes());
        for text in ["streamtype", of] {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
        let mut body = stream.to_be_bytes().to_vec();
        // No parent, no priority.
        body.extend([0; 6]);
        self.headers(&mut body, &block);
        control(1, &body)
    }

    /// Takes a client's stream.
    pub(super) fn reply(&mut self, stream: u32) -> Vec<u8> {
        let mut body = stream.to_be_bytes().to_vec();
        // There are no headers.
        self.headers(&mut body, &[0; 4]);
        control(2, &body)
    }

    /// Refuses it.
    pub(super) fn refuse(&self, stream: u32) -> Vec<u8> {
        let mut body = stream.to_be_bytes().to_vec();
        body.extend(3_u32.to_be_bytes());
        control(3, &body)
    }

    /// Adds a block of headers, which is stored and not compressed.
    fn headers(&mut self, body: &mut Vec<u8>, block: &[u8]) {
        if !self.begun {
            // RFC 1950: deflate, a window of 32 KiB, no dictionary.
            body.extend([0x78, 0x01]);
            self.begun = true;
        }
        // RFC 1951, 3.2.4: a stored block that is not the last, its length, its complement.
        let length = block.len() as u16;
        body.push(0);
        body.extend(length.to_le_bytes());
        body.extend((!length).to_le_bytes());
        body.extend(block);
        // An empty one: Go's reader hands nothing out before it has seen it.
        body.extend([0, 0, 0, 0xff, 0xff]);
    }

    /// Bytes of a stream, and whether they are the last.
    pub(super) fn data(&self, stream: u32, bytes: &[u8], last: bool) -> Vec<u8> {
        let mut frame = Vec::with_capacity(8 + bytes.len());
        frame.extend(stream.to_be_bytes());
        let flags = if last { FIN } else { 0 };
        frame.extend((u32::from(flags) << 24 | bytes.len() as u32).to_be_bytes());
        frame.extend(bytes);
        frame
    }

    /// A ping, as it was received.
    pub(super) fn ping(&self, id: u32) -> Vec<u8> {
        control(6, &id.to_be_bytes())
    }
}

/// A control frame of version 3 without flags.
fn control(of: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(8 + body.len());
    frame.extend(0x8003_u16.to_be_bytes());
    frame.extend(of.to_be_bytes());
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(body);
    frame
}

/// The next frame of these bytes; `None` when it is not all there, an error when it is none.
pub(super) fn decode(bytes: &mut BytesMut) -> Result<Option<Frame>, &'static str> {
    let Some([a, b, c, d, flags, x, y, z]) = bytes.first_chunk::<8>().copied() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([0, x, y, z]) as usize;
    if length > LARGEST {
        return Err("a frame of SPDY is too large");
    }
    if bytes.len() < 8 + length {
        return Ok(None);
    }
    bytes.advance(8);
    let body = bytes.split_to(length).freeze();
    let number = || {
        body.first_chunk::<4>()
            .map(|four| u32::from_be_bytes(*four) & !(1 << 31))
    };
    if a & 0x80 == 0 {
        let stream = u32::from_be_bytes([a, b, c, d]);
        return Ok(Some(Frame::Data(stream, body, flags & FIN != 0)));
    }
    if (a, b) != (0x80, 3) {
        return Err("the other side speaks another version of SPDY");
    }
    let cut = "a frame of SPDY is cut short";
    Ok(Some(match u16::from_be_bytes([c, d]) {
        // Its number, its parent, its priority, its slot, and then headers.
        1 if body.len() > 10 => Frame::Open(number().ok_or(cut)?, body.slice(10..)),
        3 => Frame::Reset(number().ok_or(cut)?),
        6 => Frame::Ping(
            body.first_chunk::<4>()
                .map(|n| u32::from_be_bytes(*n))
                .ok_or(cut)?,
        ),
        7 => Frame::GoAway,
        _ => Frame::Other,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_written() {
        let mut encoder = Encoder::default();
        let frame = encoder.open(1, "error");
        assert_eq!(frame[..8], [0x80, 3, 0, 1, 0, 0, 0, frame.len() as u8 - 8]);
        assert_eq!(frame[8..18], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame[18..20], [0x78, 0x01]);
        // RFC 1950: the check of the head.
        assert_eq!((0x78 * 256 + 0x01) % 31, 0);
        assert_eq!(frame[20..25], [0, 27, 0, !27, 0xff]);
        assert_eq!(frame[25 + 27..], [0, 0, 0, 0xff, 0xff]);
        assert_eq!(encoder.open(3, "error").len(), frame.len() - 2);
        assert_eq!(
            encoder.data(5, b"ab", true),
            [0, 0, 0, 5, 1, 0, 0, 2, b'a', b'b']
        );
    }

    #[test]
    fn frames_are_read_whole() {
        let encoder = Encoder::default();
        let mut all = encoder.data(3, b"hello", false);
        all.extend(encoder.ping(2));
        all.extend(control(3, &[0, 0, 0, 5, 0, 0, 0, 1]));
        all.extend(control(2, &[1, 2, 3]));
        all.extend(control(1, &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 42]));
        all.extend(control(7, &[0; 8]));
        let mut bytes = BytesMut::new();
        let mut seen = Vec::new();
        for byte in all {
            bytes.extend_from_slice(&[byte]);
            seen.extend(decode(&mut bytes).unwrap());
        }
        assert_eq!(
            seen,
            [
                Frame::Data(3, Bytes::from_static(b"hello"), false),
                Frame::Ping(2),
                Frame::Reset(5),
                Frame::Other,
                Frame::Open(7, Bytes::from_static(&[42])),
                Frame::GoAway,
            ]
        );
        for bad in [
            &[0_u8, 0, 0, 1, 0, 0xff, 0xff, 0xff][..],
            &[0x80, 2, 0, 1, 0, 0, 0, 0],
            &[0x80, 3, 0, 6, 0, 0, 0, 2, 1, 2],
        ] {
            assert!(decode(&mut BytesMut::from(bad)).is_err(), "{bad:x?}");
        }
    }
}
