//! The last bytes of a stream that may never end.
//!
//! Used for guest consoles and for the error output of child processes. Holds a fixed number of
//! bytes whatever is pushed; what it returns is safe to print on a terminal.

use std::collections::VecDeque;

/// Longest line that is returned; the rest of it is cut.
const MAX_LINE: usize = 240;

/// Keeps the last `limit` bytes.
#[derive(Debug)]
pub struct Ring {
    bytes: VecDeque<u8>,
    limit: usize,
    total: u64,
}

impl Ring {
    /// A ring of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
            total: 0,
        }
    }

    /// Appends, and forgets the oldest bytes beyond the limit.
    pub fn push(&mut self, new: &[u8]) {
        self.total += new.len() as u64;
        let new = &new[new.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + new.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(new);
    }

    /// Bytes pushed since the beginning.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// What is held, oldest first.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// All lines held that are not blank, with control characters removed. When older bytes were
    /// forgotten the first line may be a fragment.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let contents = self.contents();
        String::from_utf8_lossy(&contents)
            .split(['\n', '\r'])
            .map(clean)
            .filter(|line| !line.is_empty())
            .collect()
    }

    /// The last `count` lines of [`Ring::lines`].
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let mut lines = self.lines();
        lines.drain(..lines.len().saturating_sub(count));
        lines
    }
}

/// One line without escape sequences and control characters, of bounded length.
fn clean(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // Firmware and kernels colour and position their text: `ESC c`, `ESC [ ... letter`.
            if chars.next_if_eq(&'[').is_some() {
                while chars.next_if(|c| !c.is_ascii_alphabetic()).is_some() {}
            }
            chars.next();
        } else if !c.is_control() {
            out.push(c);
            if out.len() >= MAX_LINE {
                break;
            }
        }
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keeps_the_last_bytes_only() {
        let mut ring = Ring::new(8);
        ring.push(b"abcdef");
        ring.push(b"ghij");
        assert_eq!(ring.contents(), b"cdefghij");
        ring.push(b"0123456789");
        assert_eq!(ring.contents(), b"23456789");
        assert_eq!(ring.total(), 20);
    }

    #[test]
    fn lines_are_safe_to_print() {
        let mut ring = Ring::new(1000);
        ring.push(b"\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\n\r\n[ 0.1] a\tb\x07\xff\n  last");
        assert_eq!(ring.lines(), ["SeaBIOS", "[ 0.1] ab\u{fffd}", "last"]);
        assert_eq!(ring.last_lines(1), ["last"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut ring = Ring::new(100_000);
        ring.push(&vec![b'x'; 100_000]);
        assert_eq!(ring.last_lines(5), ["x".repeat(MAX_LINE)]);
    }

    proptest! {
        #[test]
        fn holds_exactly_the_tail(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..30),
            limit in 1usize..100,
        ) {
            let mut ring = Ring::new(limit);
            for part in &parts {
                ring.push(part);
            }
            let all = parts.concat();
            prop_assert_eq!(ring.contents(), &all[all.len().saturating_sub(limit)..]);
            for line in ring.lines() {
                prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }
}
