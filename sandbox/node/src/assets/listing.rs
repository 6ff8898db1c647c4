//! The list of a version's files, with the digest of each. The same files make the same list to the
//! byte, so that its own digest is that of the version.

use std::{fs, io, path::Path};

use pericarp_oci::digest::Digest;
use pericarp_pod::{Assets, assets::place::MANIFEST};
use serde::{Deserialize, Serialize};

const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) path: String,
    bytes: u64,
    sha256: String,
}

impl Entry {
    pub(super) fn of(path: String, contents: &[u8]) -> Self {
        Self {
            path,
            bytes: contents.len() as u64,
            sha256: Digest::of(contents).hex(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listing {
    format: u32,
    /// In the order of their names.
    pub(super) files: Vec<Entry>,
}

impl Listing {
    pub(super) fn new(files: Vec<Entry>) -> Self {
        Self {
            format: FORMAT,
            files,
        }
    }

    pub(super) fn read(directory: &Path) -> io::Result<Self> {
        let bytes = fs::read(directory.join(MANIFEST))?;
        let listing: Self = serde_json::from_slice(&bytes)?;
        match listing.format {
            FORMAT => Ok(listing),
            other => Err(io::Error::other(format!(
                "has the format {other}, and {FORMAT} is known"
            ))),
        }
    }

    /// As it is written.
    pub(super) fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    pub(super) fn digest(&self) -> Digest {
        Digest::of(&self.text())
    }

    pub(super) fn bytes(&self) -> u64 {
        let all = self.files.iter().map(|one| one.bytes);
        all.fold(0, u64::saturating_add)
    }

    /// The first file in which another list is different, as a rule that it breaks.
    pub(super) fn difference(&self, found: &Self) -> Option<String> {
        let there = |path: &str| found.files.iter().find(|one| one.path == path);
        for said in &self.files {
            match there(&said.path) {
                None => return Some(format!("has no '{}', which it should have", said.path)),
                Some(one) if one != said => {
                    return Some(format!(
                        "has been changed: '{}' is not as it was",
                        said.path
                    ));
                }
                Some(_) => {}
            }
        }
        let known = |path: &str| self.files.iter().any(|one| one.path == path);
        let odd = found.files.iter().find(|one| !known(&one.path))?;
        Some(format!("has '{}', which it should not have", odd.path))
    }
}

/// Reads all that a guest is given of a version, and compares it with its list.
pub(super) fn verify(directory: &Path) -> Result<(), String> {
    let said = Listing::read(directory).map_err(|error| format!("has no list: {error}"))?;
    let assets = Assets::open(directory).map_err(|error| error.rule)?;
    let mut files = Vec::new();
    for (name, path) in assets.files() {
        let contents =
            fs::read(&path).map_err(|error| format!("'{name}' cannot be read: {error}"))?;
        files.push(Entry::of(name, &contents));
    }
    said.difference(&Listing::new(files)).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_named() {
        let entry = |path: &str, text: &str| Entry::of(path.into(), text.as_bytes());
        let said = Listing::new(vec![entry("a", "1"), entry("b", "2")]);
        let against = |files| said.difference(&Listing::new(files));
        assert_eq!(against(said.files.clone()), None);
        let changed = against(vec![entry("a", "1"), entry("b", "3")]).unwrap();
        assert!(changed.contains("'b' is not as it was"), "{changed}");
        let missing = against(vec![entry("a", "1")]).unwrap();
        assert!(missing.contains("has no 'b'"), "{missing}");
        let more = against(vec![entry("a", "1"), entry("b", "2"), entry("c", "")]).unwrap();
        assert!(more.contains("has 'c'"), "{more}");
    }

    #[test]
    fn a_list_is_the_same_to_the_byte() {
        let listing = Listing::new(vec![Entry::of("a".into(), b"1")]);
        let text = String::from_utf8(listing.text()).unwrap();
        assert!(
            text.starts_with("{\n  \"format\": 1,\n  \"files\": [\n"),
            "{text}"
        );
        let read: Listing = serde_json::from_str(&text).unwrap();
        assert_eq!(read.text(), listing.text());
    }
}
