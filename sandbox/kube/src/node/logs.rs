//! Keeps the logs of containers from filling the disk: one that is large is moved aside, and
//! containerd writes a new one. Called by `watching`. Who follows a log sees that its file is
//! another.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A log is moved aside when it has more bytes; a kubelet's own default.
const LARGEST: u64 = 10 << 20;
/// So many files of one container are kept, the one that is written among them.
const KEPT: usize = 5;

/// Moves a log aside if it is too large; where it is then.
pub(super) fn move_aside(log: &Path, now: SystemTime) -> io::Result<Option<PathBuf>> {
    let size = match fs::metadata(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        data => data?.len(),
    };
    if size <= LARGEST {
        return Ok(None);
    }
    let mut old = moved(log)?;
    old.sort();
    // With the one that comes and the new one there are as many as are kept.
    let many = (old.len() + 2).saturating_sub(KEPT);
    for file in old.iter().take(many) {
        fs::remove_file(file)?;
    }
    let stamp = humantime::format_rfc3339_millis(now).to_string();
    let stamp = stamp.replace([':', '-', 'Z'], "").replace('T', "-");
    let mut name = log.as_os_str().to_owned();
    name.push(format!(".{stamp}"));
    let aside = PathBuf::from(name);
    fs::rename(log, &aside)?;
    Ok(Some(aside))
}

/// Removes a log with all that was moved aside of it.
pub(super) fn remove(log: &Path) -> io::Result<()> {
    for file in moved(log)? {
        fs::remove_file(file)?;
    }
    match fs::remove_file(log) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What was moved aside of a log.
fn moved(log: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name()) else {
        return Ok(Vec::new());
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::testing::Scratch;
    use std::time::Duration;

    #[test]
    fn large_logs_are_moved_aside_and_the_oldest_goes() {
        let scratch = Scratch::new();
        let log = scratch.path().join("0.log");
        let at = |second| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        assert_eq!(move_aside(&log, at(0)).unwrap(), None);
        fs::write(&log, "small").unwrap();
        assert_eq!(move_aside(&log, at(0)).unwrap(), None);
        fs::write(scratch.path().join("10.log"), "another").unwrap();
        for second in 0..7 {
            let file = fs::File::create(&log).unwrap();
            file.set_len(LARGEST + 1).unwrap();
            let aside = move_aside(&log, at(second)).unwrap().unwrap();
            assert!(aside.exists() && !log.exists());
        }
        let mut names: Vec<_> = moved(&log).unwrap();
        names.sort();
        assert_eq!(names.len(), KEPT - 1);
        assert!(names[0].ends_with("0.log.19700101-000003.000"), "{names:?}");
        fs::write(&log, "small").unwrap();
        remove(&log).unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        remove(&log).unwrap();
    }
}
