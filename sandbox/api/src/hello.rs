//! The agent's greeting, and its last words.
//!
//! The greeting is 16 bytes: the four letters `PRCP`, then version, milliseconds from the start of
//! the kernel to that of the agent, and milliseconds to now, each 32 bits in network byte order. A
//! greeting of another version has the same first eight bytes. Last words are one line of text at
//! the end of the same connection, sent when the agent cannot go on.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::VERSION;

const MAGIC: [u8; 4] = *b"PRCP";
const SIZE: usize = 16;
/// Longest last words that are read.
pub const MAX_LAST_WORDS: usize = 1024;

/// The agent is there and can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// From the start of the kernel to that of the agent, milliseconds.
    pub kernel_ms: u32,
    /// From the start of the kernel to this greeting, milliseconds.
    pub agent_ms: u32,
}

/// No greeting to go on with.
#[derive(Debug, Error)]
pub enum HelloError {
    /// The connection failed or ended early.
    #[error("the agent's greeting cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Something else than an agent.
    #[error("what connected is not the agent")]
    NotAnAgent,
    /// An agent of another version.
    #[error("the agent speaks version {0} of the protocol instead of {VERSION}")]
    Version(u32),
}

impl Hello {
    /// Writes the greeting.
    ///
    /// # Errors
    ///
    /// The connection's.
    pub fn write(self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(SIZE);
        bytes.extend(MAGIC);
        for number in [VERSION, self.kernel_ms, self.agent_ms] {
            bytes.extend(number.to_be_bytes());
        }
        to.write_all(&bytes)
    }

    /// Reads the greeting. Takes no more from the connection than that.
    ///
    /// # Errors
    ///
    /// [`HelloError`].
    pub fn read(from: &mut impl Read) -> Result<Self, HelloError> {
        let mut bytes = [0; SIZE];
        from.read_exact(&mut bytes[..8])?;
        let (magic, rest) = bytes.split_at(4);
        if magic != MAGIC {
            return Err(HelloError::NotAnAgent);
        }
        let version = number(rest, 0);
        if version != VERSION {
            return Err(HelloError::Version(version));
        }
        from.read_exact(&mut bytes[8..])?;
        Ok(Self {
            kernel_ms: number(&bytes, 2),
            agent_ms: number(&bytes, 3),
        })
    }
}

/// The 32-bit number at this place.
fn number(bytes: &[u8], index: usize) -> u32 {
    bytes
        .chunks_exact(4)
        .nth(index)
        .and_then(|chunk| chunk.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

/// What the agent said at its end, made safe to print. Reads to the end of the connection, but not
/// more than [`MAX_LAST_WORDS`].
pub fn last_words(from: impl Read) -> Option<String> {
    let mut bytes = Vec::new();
    // What arrived before an error still counts.
    let _ = from.take(MAX_LAST_WORDS as u64).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    (!text.is_empty()).then(|| printable(text))
}

/// `text` as one line without control characters.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello {
        kernel_ms: 900,
        agent_ms: 1000,
    };

    #[test]
    fn a_greeting_comes_back() {
        let mut bytes = Vec::new();
        HELLO.write(&mut bytes).unwrap();
        bytes.extend(b"the end\n\x1b[2J");
        let mut from = bytes.as_slice();
        assert_eq!(Hello::read(&mut from).unwrap(), HELLO);
        assert_eq!(last_words(from).unwrap(), "the end\u{fffd}\u{fffd}[2J");
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        let mut bytes = Vec::new();
        HELLO.write(&mut bytes).unwrap();
        let other = format!(
            "the agent speaks version {} of the protocol instead of {VERSION}",
            VERSION ^ 1
        );
        for (spoil, text) in [(0, "what connected is not the agent"), (7, &other)] {
            let mut bytes = bytes.clone();
            bytes[spoil] ^= 1;
            // Another version's greeting may be shorter.
            let error = Hello::read(&mut &bytes[..8]).unwrap_err();
            assert_eq!(error.to_string(), text);
        }
        assert!(matches!(
            Hello::read(&mut &bytes[..12]),
            Err(HelloError::Io(_))
        ));
    }

    #[test]
    fn last_words_are_bounded() {
        assert_eq!(last_words(&[][..]), None);
        let flood = io::repeat(b'x');
        assert_eq!(last_words(flood).unwrap().len(), MAX_LAST_WORDS);
    }
}
