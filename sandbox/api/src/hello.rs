//! The agent's greeting, and its last words.
//!
//! The greeting is 16 bytes: the four letters `PRCP`, then version, milliseconds from the start of
//! the kernel to that of the agent, and milliseconds to now, each 32 bits in network byte order. A
//! greeting of another version has the same first eight bytes. Last words are one line of text at
//! the end of the same connection, sent when the agent cannot go on.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::{VERSION, host::left};

const MAGIC: [u8; 4] = *b"PRCP";
const SIZE: usize = 16;
/// Longest last words that are read.
pub const MAX_LAST_WORDS: usize = 1024;
/// How long all of them may take: they are there when the end is seen.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

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
    /// How long before the greeting the agent began. The guest's clock may say anything: this only
    /// divides a time that has passed on the host.
    #[must_use]
    pub fn in_agent(self) -> Duration {
        Duration::from_millis(self.agent_ms.saturating_sub(self.kernel_ms).into())
    }

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
/// more than [`MAX_LAST_WORDS`], and not longer than a second however slowly they come.
pub fn last_words(from: &UnixStream) -> Option<String> {
    let end = Instant::now() + LAST_WORDS_LIMIT;
    let mut bytes = [0; MAX_LAST_WORDS];
    let mut count = 0;
    let mut from = from;
    while let Some(rest) = bytes.get_mut(count..).filter(|rest| !rest.is_empty()) {
        let read = left(end)
            .and_then(|left| from.set_read_timeout(Some(left)))
            .and_then(|()| from.read(rest));
        match read {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What arrived before an error still counts.
            Err(_) => break,
        }
    }
    let text = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default());
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
    use std::thread;

    use super::*;

    const HELLO: Hello = Hello {
        kernel_ms: 900,
        agent_ms: 1000,
    };

    #[test]
    fn a_greeting_comes_back() {
        let (mut agent, mut host) = UnixStream::pair().unwrap();
        HELLO.write(&mut agent).unwrap();
        agent.write_all(b"the end\n\x1b[2J").unwrap();
        drop(agent);
        assert_eq!(Hello::read(&mut host).unwrap(), HELLO);
        assert_eq!(last_words(&host).unwrap(), "the end\u{fffd}\u{fffd}[2J");
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
        let (agent, host) = UnixStream::pair().unwrap();
        drop(agent);
        assert_eq!(last_words(&host), None);
        let (mut agent, host) = UnixStream::pair().unwrap();
        agent.write_all(&[b'x'; 2 * MAX_LAST_WORDS]).unwrap();
        assert_eq!(last_words(&host).unwrap().len(), MAX_LAST_WORDS);
    }

    #[test]
    fn last_words_that_drip_are_not_waited_for() {
        let (mut agent, host) = UnixStream::pair().unwrap();
        let talk = thread::spawn(move || {
            // Each in time for a limit that begins anew.
            while agent.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(100));
            }
        });
        let begin = Instant::now();
        let words = last_words(&host).unwrap();
        assert!(begin.elapsed() < 5 * LAST_WORDS_LIMIT);
        assert!(words.len() < MAX_LAST_WORDS);
        drop(host);
        talk.join().unwrap();
    }
}
