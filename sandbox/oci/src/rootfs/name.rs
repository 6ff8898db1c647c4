//! Names of entries: taken apart once, and safe from there on.
//!
//! Used by `rootfs`. A [`Name`] has no `..`, no empty part and nothing the kernel could read as the
//! end of a name; whether its parts are symbolic links is for `tree` to care about.

use super::error::Problem;

/// The kernel's limit for one part.
const MOST_PART: usize = 255;
/// Deeper than any tree people make, and few enough for a file descriptor each.
pub(super) const MOST_DEPTH: usize = 128;
/// Longest path below the root: leaves room before it within the kernel's 4096.
pub(super) const MOST_PATH: usize = 3072;
const WHITEOUT: &[u8] = b".wh.";

/// A path below the root; without parts it is the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name(Vec<Vec<u8>>);

/// What a name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The thing itself.
    Thing(Name),
    /// What lower layers have by this name is gone.
    Whiteout(Name),
    /// All that lower layers have in this directory is gone.
    Opaque(Name),
    /// Notes that aufs left for itself.
    Nothing,
}

impl Name {
    /// Leading slashes mean nothing: everything is below the root.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let mut parts = Vec::new();
        for part in bytes.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(Problem::Outside),
                part if part.len() > MOST_PART => {
                    return Err(Problem::Name("has a part longer than 255 bytes"));
                }
                part if part.contains(&0) => return Err(Problem::Name("contains a zero byte")),
                part => parts.push(part.to_vec()),
            }
        }
        if bytes.is_empty() {
            return Err(Problem::Name("is empty"));
        }
        if parts.len() > MOST_DEPTH {
            return Err(Problem::Name("has more than 128 parts"));
        }
        if bytes.len() > MOST_PATH {
            return Err(Problem::Name("is longer than 3072 bytes"));
        }
        Ok(Self(parts))
    }

    /// The directory and the name in it; `None` for the root.
    pub(super) fn split(&self) -> Option<(&[Vec<u8>], &[u8])> {
        self.0.split_last().map(|(last, way)| (way, &last[..]))
    }

    pub(super) fn parts(&self) -> &[Vec<u8>] {
        &self.0
    }

    /// Reads the conventions for deletions (image specification, layer.md, "Whiteouts").
    pub(super) fn meaning(mut self) -> Result<Meaning, Problem> {
        let marked = |part: &Vec<u8>| part.starts_with(WHITEOUT);
        let Some(at) = self.0.iter().position(marked) else {
            return Ok(Meaning::Thing(self));
        };
        let is_last = at + 1 == self.0.len();
        let hidden = self.0[at][WHITEOUT.len()..].to_vec();
        match &hidden[..] {
            b".wh..opq" if is_last => {
                self.0.pop();
                Ok(Meaning::Opaque(self))
            }
            part if part.starts_with(WHITEOUT) => Ok(Meaning::Nothing),
            _ if !is_last => Err(Problem::Name(
                "has a directory that begins with .wh., which marks deletions",
            )),
            b"" | b"." | b".." => Err(Problem::Name("marks no name as deleted")),
            _ => {
                self.0[at] = hidden;
                Ok(Meaning::Whiteout(self))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name(
            text.split_terminator('/')
                .map(|part| part.as_bytes().to_vec())
                .collect(),
        )
    }

    #[test]
    fn names_are_cleaned_but_never_climb() {
        for text in ["a/b", "/a/b", "./a//b/", "a/./b", "////a/b/."] {
            assert_eq!(Name::parse(text.as_bytes()).unwrap(), name("a/b"), "{text}");
        }
        for text in [".", "./", "/"] {
            assert_eq!(Name::parse(text.as_bytes()).unwrap(), name(""), "{text}");
        }
        for text in ["..", "../a", "a/../b", "/..", "a/.."] {
            assert!(
                matches!(Name::parse(text.as_bytes()), Err(Problem::Outside)),
                "{text}"
            );
        }
        for text in ["", "a\0b", &"x".repeat(256), &"a/".repeat(129)] {
            assert!(
                matches!(Name::parse(text.as_bytes()), Err(Problem::Name(_))),
                "{text}"
            );
        }
        assert!(Name::parse("...".as_bytes()).is_ok());
    }

    #[test]
    fn deletions_are_told_from_things() {
        let meaning = |text: &str| Name::parse(text.as_bytes()).unwrap().meaning();
        for (text, expected) in [
            ("a/b", Meaning::Thing(name("a/b"))),
            ("a/.wh.b", Meaning::Whiteout(name("a/b"))),
            (".wh.b", Meaning::Whiteout(name("b"))),
            ("a/.wh..wh..opq", Meaning::Opaque(name("a"))),
            (".wh..wh..opq", Meaning::Opaque(name(""))),
            (".wh..wh.plnk/1.2", Meaning::Nothing),
            (".wh..wh.aufs", Meaning::Nothing),
            ("a.wh.b", Meaning::Thing(name("a.wh.b"))),
            (".wh..b", Meaning::Whiteout(name(".b"))),
        ] {
            assert_eq!(meaning(text).unwrap(), expected, "{text}");
        }
        for text in [
            ".wh.",
            "a/.wh...",
            "a/.wh..",
            ".wh.a/b",
            "x/.wh..wh..opq/b/.wh.c",
        ] {
            let found = meaning(text);
            assert!(
                matches!(found, Err(Problem::Name(_)) | Ok(Meaning::Nothing)),
                "{text}: {found:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_has_only_plain_parts(bytes in "[a./\0]{0,40}") {
            let parts = match Name::parse(bytes.as_bytes()).and_then(Name::meaning) {
                Ok(Meaning::Thing(it) | Meaning::Whiteout(it) | Meaning::Opaque(it)) => it.0,
                _ => Vec::new(),
            };
            for part in parts {
                prop_assert!(!part.is_empty() && part != b"." && part != b"..");
                prop_assert!(!part.contains(&b'/') && !part.contains(&0));
            }
        }
    }
}
