//! Programs of Debian that run in the guest: crun and the libraries it loads,
//! as a tree to be packed into the initramfs.
//!
//! Called by `assets`. Every file stands where the loader looks for it; links
//! are followed, so the tree holds plain files and directories only.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use crate::command::{Failure, capture, find_program};

/// Changes whenever the way the tree is made changes.
const RECIPE: &str = "1";

/// Brings `assets/guest` up to date; gives the bytes its files have.
///
/// The tree is made again when any file it was made from is another one than
/// then: packages bring new versions of crun and of its libraries.
pub(crate) fn prepare(assets: &Path) -> Result<u64, Failure> {
    let crun = find_program("crun").ok_or("crun is missing; run cargo xtask setup")?;
    let mut parts = vec![(PathBuf::from("bin/crun"), crun.clone())];
    for library in libraries(&capture(Command::new("ldd").arg(&crun))?)? {
        let place = library.strip_prefix("/").unwrap_or(&library).to_path_buf();
        parts.push((place, library));
    }
    let mut made_from = format!("recipe {RECIPE}\n");
    let mut bytes = 0;
    for (place, file) in &parts {
        let (len, changed) = identity(file)?;
        bytes += len;
        made_from += &format!("{} {} {len} {changed}\n", place.display(), file.display());
    }
    let tree = assets.join("guest");
    // Beside the tree, all of which goes to the guest.
    let record = assets.join("guest.made-from");
    if fs::read_to_string(&record).is_ok_and(|old| old == made_from) && tree.exists() {
        return Ok(bytes);
    }
    let unfinished = assets.join(format!("guest.{}", std::process::id()));
    let made = copy_all(&parts, &unfinished)
        .and_then(|()| put_in_place(&unfinished, &tree, &record, &made_from));
    if made.is_err() {
        let _ = fs::remove_dir_all(&unfinished);
    }
    made.map(|()| bytes)
}

/// The paths in what `ldd` prints, the loader's among them.
fn libraries(text: &str) -> Result<BTreeSet<PathBuf>, Failure> {
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        return Err(format!("crun cannot run here: {}", line.trim()).into());
    }
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// Length and time of change: enough to tell one version from the next.
fn identity(file: &Path) -> Result<(u64, u128), Failure> {
    let meta = fs::metadata(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    let changed = meta
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok((meta.len(), changed.map_or(0, |age| age.as_nanos())))
}

fn copy_all(parts: &[(PathBuf, PathBuf)], to: &Path) -> Result<(), Failure> {
    for (place, file) in parts {
        let place = to.join(place);
        place
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::copy(file, &place))
            .map_err(|e| format!("cannot copy {} to {}: {e}", file.display(), place.display()))?;
    }
    Ok(())
}

/// Whatever interrupts this, a record never stands beside a tree it does not
/// describe.
fn put_in_place(new: &Path, tree: &Path, record: &Path, made_from: &str) -> Result<(), Failure> {
    let failed = |e: std::io::Error| format!("cannot replace {}: {e}", tree.display());
    if record.exists() {
        fs::remove_file(record).map_err(failed)?;
    }
    if tree.exists() {
        fs::remove_dir_all(tree).map_err(failed)?;
    }
    fs::rename(new, tree)
        .and_then(|()| fs::write(record, made_from))
        .map_err(|e| failed(e).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_taken_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibcap.so.2 => /lib/x86_64-linux-gnu/libcap.so.2 (0x00007f65)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f51)\n";
        let paths: Vec<_> = libraries(text).unwrap().into_iter().collect();
        assert_eq!(
            paths,
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libcap.so.2"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2"),
            ]
        );
        assert_eq!(libraries("\tstatically linked\n").unwrap().len(), 0);
        let failure = libraries("\tlibx.so.1 => not found\n").unwrap_err();
        assert_eq!(
            failure.to_string(),
            "crun cannot run here: libx.so.1 => not found"
        );
    }

    #[test]
    fn the_tree_is_replaced_as_a_whole() {
        let dir = std::env::temp_dir().join(format!("pericarp-guest-tree-{}", std::process::id()));
        let (new, tree, record) = (dir.join("new"), dir.join("tree"), dir.join("record"));
        for round in ["one", "two"] {
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(round), round).unwrap();
            let parts = [(PathBuf::from("lib").join(round), dir.join(round))];
            copy_all(&parts, &new).unwrap();
            put_in_place(&new, &tree, &record, round).unwrap();
            assert_eq!(fs::read_to_string(&record).unwrap(), round);
            assert_eq!(
                fs::read_to_string(tree.join("lib").join(round)).unwrap(),
                round
            );
            assert_eq!(fs::read_dir(tree.join("lib")).unwrap().count(), 1);
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
