//! Directories on the user's disk that a comparison works in: named after our
//! process, so that the next run finds and removes what a killed one left.
//! `bench-compare` and `tree-compare` make one for each turn.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Outcome;

/// How they are called; the number of our process follows, and what it is for.
const NAME: &str = "pericarp-bench-tree-";

/// A directory that goes away with all that is in it.
#[derive(Debug)]
pub struct Tree(PathBuf);

impl Tree {
    /// An empty one in `parent`; of each kind there is one at a time.
    ///
    /// # Errors
    /// When it cannot be made, or is there.
    pub fn make(parent: &Path, kind: &str) -> Outcome<Self> {
        let path = parent.join(format!("{NAME}{}-{kind}", std::process::id()));
        fs::create_dir(&path).map_err(|e| format!("cannot make {}: {e}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the trees of runs that were killed.
pub fn remove_old(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(NAME));
        let pid = rest.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_tests::scratch::Scratch;

    use super::*;

    #[test]
    fn trees_of_dead_processes_are_removed_and_nothing_else() {
        let scratch = Scratch::new();
        let own = Tree::make(scratch.dir(), "turn").unwrap();
        let dead = format!("{NAME}{}-turn", i32::MAX);
        for name in [&*dead, "pericarp-bench-tree-x", "tree"] {
            fs::create_dir(scratch.path(name)).unwrap();
        }
        remove_old(scratch.dir());
        assert!(!scratch.path(&dead).exists());
        assert!(own.path().exists());
        for name in ["pericarp-bench-tree-x", "tree"] {
            assert!(scratch.path(name).exists(), "{name}");
        }
    }
}
