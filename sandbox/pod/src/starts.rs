//! How long the parts of a pod's start took, and of its containers': written by the pod's shim into
//! the pod's directory, read by `pericarp why` and by who measures.
//!
//! One JSON line for each part, in the order in which they ended, and a bounded number of them. It is
//! root's alone, and names nothing that the guest has said. Times are the host's, by a clock that
//! nobody sets.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use serde::{Deserialize, Serialize};

/// Its name in the pod's directory.
pub const FILE: &str = "start.jsonl";

/// A part of a start that is over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Whose it is, as containerd calls it: the pod itself, or a container of it.
    pub id: String,
    /// What was done.
    pub phase: String,
    /// When it was over, microseconds from the beginning of the pod's start.
    pub at_us: u64,
    /// How long it took, microseconds.
    pub took_us: u64,
}

/// Adds parts to those of a pod's directory.
///
/// # Errors
///
/// The kernel's.
pub fn append(directory: &Path, parts: &[Part]) -> io::Result<()> {
    let mut lines = Vec::new();
    for part in parts {
        serde_json::to_writer(&mut lines, part)?;
        lines.push(b'\n');
    }
    let mut options = OpenOptions::new();
    let mut file = options
        .append(true)
        .create(true)
        .mode(0o600)
        .open(directory.join(FILE))?;
    // In one piece, behind what other threads write.
    file.write_all(&lines)
}

/// Those of a pod's directory, as far as they can be read.
#[must_use]
pub fn read(directory: &Path) -> Vec<Part> {
    let text = fs::read_to_string(directory.join(FILE)).unwrap_or_default();
    let parts = text.lines().map(serde_json::from_str);
    parts.filter_map(Result::ok).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_in_the_order_in_which_they_were_written() {
        let directory =
            std::env::temp_dir().join(format!("pericarp-starts-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let part = |phase: &str, took_us| Part {
            id: "p".into(),
            phase: phase.into(),
            at_us: 7,
            took_us,
        };
        assert_eq!(read(&directory), []);
        append(&directory, &[part("shim", 1), part("call", 2)]).unwrap();
        append(&directory, &[part("kernel", 3)]).unwrap();
        let all = read(&directory);
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(all, [part("shim", 1), part("call", 2), part("kernel", 3)]);
    }
}
