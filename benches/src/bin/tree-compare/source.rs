//! The trees: one of sources, as an archive that every turn unpacks into an empty
//! directory, and one of very many small files. Both are the same on every machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pericarp_benches::Outcome;
use pericarp_benches::trees::Tree;

/// Files of the source tree, and in each of its directories.
const FILES: usize = 3000;
const PER_DIRECTORY: usize = 15;
/// The same of the tree that is walked through.
const WALKED: usize = 300_000;
const WALKED_PER_DIRECTORY: usize = 1000;
/// The source tree.
#[derive(Debug)]
pub(crate) struct Source {
    parent: PathBuf,
    _own: Tree,
    pub(crate) archive: PathBuf,
    pub(crate) files: usize,
}

impl Source {
    pub(crate) fn make(parent: &Path) -> Outcome<Self> {
        let own = Tree::make(parent, "source")?;
        let mut random = Random(1);
        for number in 0..FILES {
            let directory = own
                .path()
                .join(format!("tree/part{:03}", number / PER_DIRECTORY));
            if number % PER_DIRECTORY == 0 {
                fs::create_dir_all(&directory)?;
            }
            fs::write(directory.join(format!("file{number}.c")), text(&mut random))?;
        }
        let archive = own.path().join("tree.tar");
        let status = Command::new("tar")
            .arg("cf")
            .arg(&archive)
            .arg("-C")
            .args([own.path(), Path::new("tree")])
            .status()?;
        if !status.success() {
            return Err(format!("tar ended with {status}").into());
        }
        fs::remove_dir_all(own.path().join("tree"))?;
        Ok(Self {
            parent: parent.to_owned(),
            _own: own,
            archive,
            files: FILES,
        })
    }

    /// An empty directory for a turn.
    pub(crate) fn directory(&self) -> Outcome<Tree> {
        Tree::make(&self.parent, "turn")
    }
}

/// The tree that is walked through.
#[derive(Debug)]
pub(crate) struct Walked {
    pub(crate) directory: Tree,
    pub(crate) files: usize,
}

impl Walked {
    pub(crate) fn make(parent: &Path) -> Outcome<Self> {
        let directory = Tree::make(parent, "walked")?;
        for number in 0..WALKED {
            let name = format!("{:04}", number / WALKED_PER_DIRECTORY);
            let inner = directory.path().join(name);
            if number % WALKED_PER_DIRECTORY == 0 {
                fs::create_dir(&inner)?;
            }
            fs::write(inner.join(format!("{number}")), [])?;
        }
        Ok(Self {
            directory,
            files: WALKED,
        })
    }
}

/// xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A file of sources: most are small, some have tens of kilobytes, and they can
/// be compressed about as well as sources can.
fn text(random: &mut Random) -> String {
    let size = match random.below(16) {
        0..6 => 200 + random.below(1800),
        6..13 => 2048 + random.below(14 << 10),
        _ => (16 << 10) + random.below(48 << 10),
    };
    let mut text = String::new();
    while (text.len() as u64) < size {
        let (a, b) = (random.below(1000), random.below(50));
        text += &format!("    field_{b} = lookup(table_{b}, {a});\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_sources_come_out_every_time() {
        let make = || {
            let mut random = Random(1);
            (0..100).map(|_| text(&mut random)).collect::<Vec<_>>()
        };
        let (one, other) = (make(), make());
        assert_eq!(one, other);
        let bytes: usize = one.iter().map(String::len).sum();
        assert!((500_000..2_500_000).contains(&bytes), "{bytes}");
    }
}
