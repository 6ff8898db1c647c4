//! The frames of WebSockets (RFC 6455), as a server reads and writes them.

use thiserror::Error;

/// The largest frame that is read. Clients write much smaller ones.
const LARGEST: u64 = 4 << 20;

/// Why a client is not understood.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum FrameError {
    /// Against the protocol.
    #[error("a frame is not well formed")]
    Garbled,
    /// Too much at once.
    #[error("a frame is too large")]
    TooLarge,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

/// The head of a frame from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) last: bool,
    pub(super) opcode: Opcode,
    pub(super) mask: [u8; 4],
    pub(super) length: usize,
    /// Bytes of the head.
    pub(super) size: usize,
}

/// The head at the beginning of these bytes; `None` when it is not all there.
pub(super) fn head(bytes: &[u8]) -> Result<Option<Head>, FrameError> {
    let [first, second, rest @ ..] = bytes else {
        return Ok(None);
    };
    let opcode = match first & 0x0f {
        0 => Opcode::Continuation,
        1 => Opcode::Text,
        2 => Opcode::Binary,
        8 => Opcode::Close,
        9 => Opcode::Ping,
        10 => Opcode::Pong,
        _ => return Err(FrameError::Garbled),
    };
    let last = first & 0x80 != 0;
    // Nothing was agreed on that uses the other bits, and clients have to mask.
    if first & 0x70 != 0 || second & 0x80 == 0 {
        return Err(FrameError::Garbled);
    }
    let (length, rest, size) = match (second & 0x7f, rest) {
        (126, [a, b, rest @ ..]) => (u64::from(u16::from_be_bytes([*a, *b])), rest, 4),
        (127, [a, b, c, d, e, f, g, h, rest @ ..]) => {
            let length = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            (length, rest, 10)
        }
        (126 | 127, _) => return Ok(None),
        (short, rest) => (u64::from(short), rest, 2),
    };
    let control = matches!(opcode, Opcode::Close | Opcode::Ping | Opcode::Pong);
    if control && (!last || length > 125) {
        return Err(FrameError::Garbled);
    }
    if length > LARGEST {
        return Err(FrameError::TooLarge);
    }
    let [a, b, c, d, ..] = rest else {
        return Ok(None);
    };
    Ok(Some(Head {
        last,
        opcode,
        mask: [*a, *b, *c, *d],
        length: usize::try_from(length).map_err(|_| FrameError::TooLarge)?,
        size: size + 4,
    }))
}

/// Takes a client's mask off.
pub(super) fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    for (byte, mask) in bytes.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The head of a whole frame to a client.
pub(super) fn head_of(opcode: Opcode, length: usize) -> Vec<u8> {
    let opcode = match opcode {
        Opcode::Continuation => 0,
        Opcode::Text => 1,
        Opcode::Binary => 2,
        Opcode::Close => 8,
        Opcode::Ping => 9,
        Opcode::Pong => 10,
    };
    let mut head = vec![0x80 | opcode];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ ..126), _) => head.push(short),
        (_, Ok(medium)) => {
            head.push(126);
            head.extend(medium.to_be_bytes());
        }
        _ => {
            head.push(127);
            head.extend((length as u64).to_be_bytes());
        }
    }
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read() {
        // The example of RFC 6455, 5.7: a masked "Hello".
        let frame = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        let found = head(&frame).unwrap().unwrap();
        assert_eq!(
            (found.opcode, found.length, found.size),
            (Opcode::Text, 5, 6)
        );
        let mut text = frame[6..].to_vec();
        unmask(&mut text, found.mask);
        assert_eq!(text, b"Hello");
        for end in 0..6 {
            assert_eq!(head(&frame[..end]).unwrap(), None);
        }
        let medium = [0x82, 0xfe, 0x01, 0x00, 1, 2, 3, 4];
        assert_eq!(head(&medium).unwrap().unwrap().length, 256);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        // Unmasked, reserved bits, an unknown opcode, a long ping, a ping in pieces.
        for bad in [
            [0x81, 0x05],
            [0xf1, 0x85],
            [0x83, 0x85],
            [0x89, 0xfe],
            [0x09, 0x81],
        ] {
            let mut bytes = bad.to_vec();
            bytes.extend([0, 200, 0, 0, 0, 0]);
            assert_eq!(head(&bytes), Err(FrameError::Garbled), "{bad:x?}");
        }
        let huge = [0x82, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
        assert_eq!(head(&huge), Err(FrameError::TooLarge));
    }

    #[test]
    fn lengths_are_written_as_short_as_they_can_be() {
        assert_eq!(head_of(Opcode::Binary, 125), [0x82, 125]);
        assert_eq!(head_of(Opcode::Binary, 126), [0x82, 126, 0, 126]);
        assert_eq!(head_of(Opcode::Close, 0), [0x88, 0]);
        assert_eq!(head_of(Opcode::Binary, 65536)[..6], [0x82, 127, 0, 0, 0, 0]);
    }
}
