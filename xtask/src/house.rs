//! House rules no compiler knows: every Rust file opens with `//!`, and none
//! is longer than a reader can hold.
//!
//! Called by `check`. Reads the source tree, changes nothing.

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::Failure;

/// Longer than this and a file has to become a folder.
const MOST_LINES: usize = 800;

/// Prints every broken rule and fails when there is one.
pub(crate) fn inspect(root: &Path) -> Result<(), Failure> {
    let mut files = Vec::new();
    collect(root, &mut files).map_err(|e| format!("cannot list the source tree: {e}"))?;
    files.sort();
    let mut broken = 0;
    for file in &files {
        let text =
            fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
        for rule in broken_rules(&text) {
            let shown = file.strip_prefix(root).unwrap_or(file);
            eprintln!("{}: {rule}", shown.display());
            broken += 1;
        }
    }
    if broken == 0 {
        Ok(())
    } else {
        Err(format!("{broken} broken in {} files", files.len()).into())
    }
}

fn broken_rules(text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if !text.starts_with("//!") {
        broken.push("must open with //! (what it is, who calls it)".to_owned());
    }
    let lines = text.lines().count();
    if lines > MOST_LINES {
        broken.push(format!(
            "has {lines} lines, more than {MOST_LINES}: make it a folder"
        ));
    }
    broken
}

/// All Rust files below `dir`, without hidden directories and build output.
pub(crate) fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        let hidden = name.as_encoded_bytes().starts_with(b".");
        if entry.file_type()?.is_dir() {
            // Cargo marks a build directory whatever its name is.
            if !hidden && !path.join("CACHEDIR.TAG").exists() && name != "target" {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_opens_with_what_it_is() {
        assert!(broken_rules("//! A file.\n").is_empty());
        assert_eq!(broken_rules("use std::fs;\n").len(), 1);
        assert_eq!(broken_rules("").len(), 1);
    }

    #[test]
    fn the_longest_file_is_800_lines() {
        let text = |lines: usize| "//! A file.\n".repeat(lines);
        assert!(broken_rules(&text(800)).is_empty());
        assert_eq!(broken_rules(&text(801)).len(), 1);
    }
}
