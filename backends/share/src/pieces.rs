//! How a share is written down for another process: lines of words, and a
//! descriptor for those that begin with a capital letter. `share::hand_over` says
//! what they mean. What arrives was written by our own user's process, and is
//! checked all the same.

use std::ffi::CString;
use std::fmt::{self, Display, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::str::SplitAsciiWhitespace;
use std::sync::Arc;

/// Something with a descriptor that is to be passed on.
pub type Passed = Arc<dyn AsFd + Send + Sync>;

/// So many bytes, and descriptors, fit a piece.
const BYTES: usize = 48 * 1024;
const DESCRIPTORS: usize = 200;

/// A part of what a share knows: at most 64 KiB and 200 descriptors.
#[derive(Default)]
pub struct Piece<D> {
    /// Lines.
    pub text: String,
    /// Descriptors, in the order of the lines that have one.
    pub descriptors: Vec<D>,
}

impl<D> fmt::Debug for Piece<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Piece")
            .field("bytes", &self.text.len())
            .field("descriptors", &self.descriptors.len())
            .finish()
    }
}

/// Why what a predecessor handed over is of no use.
pub(crate) const MALFORMED: &str = "what it says of its files makes no sense";

/// Lines are added to the last piece until it is full.
#[derive(Debug, Default)]
pub(crate) struct Pieces(Vec<Piece<Passed>>);

impl Pieces {
    /// Adds a line of these words; the first is of small letters.
    pub(crate) fn line(&mut self, words: fmt::Arguments<'_>, descriptor: Option<Passed>) {
        let full = |piece: &Piece<Passed>| {
            piece.text.len() >= BYTES || piece.descriptors.len() >= DESCRIPTORS
        };
        if self.0.last().is_none_or(full) {
            self.0.push(Piece {
                text: String::new(),
                descriptors: Vec::new(),
            });
        }
        let Some(piece) = self.0.last_mut() else {
            return;
        };
        let begin = piece.text.len();
        // A String takes all that is written.
        let _ = writeln!(piece.text, "{words}");
        if let Some(descriptor) = descriptor {
            piece.text[begin..=begin].make_ascii_uppercase();
            piece.descriptors.push(descriptor);
        }
    }

    pub(crate) fn finish(self) -> Vec<Piece<Passed>> {
        self.0
    }
}

/// The words of a line after the first.
pub(crate) struct Words<'a>(SplitAsciiWhitespace<'a>);

impl Words<'_> {
    pub(crate) fn number(&mut self) -> Result<u64, &'static str> {
        let word = self.0.next().ok_or(MALFORMED)?;
        word.parse().map_err(|_| MALFORMED)
    }

    pub(crate) fn small<T: TryFrom<u64>>(&mut self) -> Result<T, &'static str> {
        self.number()?.try_into().map_err(|_| MALFORMED)
    }

    /// Bytes that [`Hex`] wrote.
    pub(crate) fn bytes(&mut self) -> Result<Vec<u8>, &'static str> {
        let word = self.0.next().ok_or(MALFORMED)?;
        if word == "-" {
            return Ok(Vec::new());
        }
        let digit = |byte: u8| (byte as char).to_digit(16).ok_or(MALFORMED);
        word.as_bytes()
            .chunks(2)
            .map(|pair| match pair {
                [high, low] => Ok((digit(*high)? << 4 | digit(*low)?) as u8),
                _ => Err(MALFORMED),
            })
            .collect()
    }

    /// A name that [`Hex`] wrote; none for an empty one.
    pub(crate) fn name(&mut self) -> Result<Option<CString>, &'static str> {
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let name = CString::new(bytes).map_err(|_| MALFORMED)?;
        crate::name::check(&name).map_err(|_| MALFORMED)?;
        Ok(Some(name))
    }

    /// There is no word more.
    pub(crate) fn end(mut self) -> Result<(), &'static str> {
        match self.0.next() {
            None => Ok(()),
            Some(_) => Err(MALFORMED),
        }
    }
}

/// Calls `line` for each line: its first word in small letters, the others, and
/// its descriptor.
pub(crate) fn read(
    pieces: Vec<Piece<OwnedFd>>,
    mut line: impl FnMut(&str, Words<'_>, Option<OwnedFd>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    for piece in pieces {
        let mut descriptors = piece.descriptors.into_iter();
        for text in piece.text.lines() {
            let mut words = text.split_ascii_whitespace();
            let first = words.next().ok_or(MALFORMED)?;
            let descriptor = match first.starts_with(|c: char| c.is_ascii_uppercase()) {
                true => Some(descriptors.next().ok_or(MALFORMED)?),
                false => None,
            };
            line(&first.to_ascii_lowercase(), Words(words), descriptor)?;
        }
        if descriptors.next().is_some() {
            return Err(MALFORMED);
        }
    }
    Ok(())
}

/// Bytes as a word.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_char('-');
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(pieces: Vec<Piece<Passed>>) -> Vec<Piece<OwnedFd>> {
        pieces
            .into_iter()
            .map(|piece| Piece {
                text: piece.text,
                descriptors: piece
                    .descriptors
                    .iter()
                    .map(|fd| fd.as_fd().try_clone_to_owned().unwrap())
                    .collect(),
            })
            .collect()
    }

    #[test]
    fn lines_come_back_with_their_descriptors() {
        let file: Passed = Arc::new(std::fs::File::open("/").unwrap());
        let mut pieces = Pieces::default();
        for number in 0..3000u64 {
            let descriptor = (number % 3 == 0).then(|| file.clone());
            pieces.line(format_args!("n {number} {}", Hex(b"name")), descriptor);
        }
        let pieces = pieces.finish();
        assert!(pieces.len() > 4);
        assert!(
            pieces
                .iter()
                .all(|p| p.text.len() < 1 << 16 && p.descriptors.len() <= 200)
        );
        let mut next = 0;
        read(moved(pieces), |first, mut words, descriptor| {
            assert_eq!(first, "n");
            assert_eq!(words.number()?, next);
            assert_eq!(words.name()?.as_deref(), Some(c"name"));
            assert_eq!(descriptor.is_some(), next % 3 == 0);
            next += 1;
            words.end()
        })
        .unwrap();
        assert_eq!(next, 3000);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let parse = |text: &str| {
            let piece = Piece {
                text: text.to_owned(),
                descriptors: Vec::new(),
            };
            read(vec![piece], |_, mut words, _| {
                words.small::<u32>()?;
                words.name()?;
                words.end()
            })
        };
        assert_eq!(parse("n 1 61\nn 2 -\n"), Ok(()));
        for wrong in [
            "n",
            "n x 61",
            "n 4294967296 61",
            "n 1",
            "n 1 6",
            "n 1 6g",
            "n 1 00",
            "n 1 2f",
            "n 1 2e2e",
            "n 1 61 2",
            "N 1 61",
            "\n",
        ] {
            assert_eq!(parse(wrong), Err(MALFORMED), "{wrong}");
        }
    }
}
