//! Gives a volume to a group, as a kubelet does for a pod with one (`fsGroup`): all files are the
//! group's, which may read and write them, and directories pass that on to what is made in them.
//!
//! Called by `volumes` for what it has just mounted, before a container is shown it. Links are not
//! followed, and nothing is opened: what lies there was written by somebody's container.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, Gid, Mode, chownat};

/// What a kubelet gives the group of each file (`rwMask`).
const FILES: u32 = 0o660;
/// What it adds for directories (`execMask`, and the group for what is made there).
const DIRECTORIES: u32 = 0o2110;

/// Gives everything below `top`, and it, to the group; nothing where `top` is the group's and that is
/// enough for the caller.
pub(crate) fn give(top: &Path, group: u32, only_on_mismatch: bool) -> io::Result<()> {
    let there = fs::symlink_metadata(top)?;
    if only_on_mismatch && fits(&there, group) {
        return Ok(());
    }
    // Depth first, and the top last: one that fits says that all of it does.
    let mut directories = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = directories.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let there = fs::symlink_metadata(&path)?;
            match there.is_dir() {
                true => directories.push(path),
                false => give_one(&path, &there, group)?,
            }
        }
    }
    while let Some(directory) = directories.pop() {
        let there = fs::symlink_metadata(&directory)?;
        give_one(&directory, &there, group)?;
    }
    Ok(())
}

fn wanted(there: &fs::Metadata) -> u32 {
    match there.is_dir() {
        true => FILES | DIRECTORIES,
        false => FILES,
    }
}

fn fits(there: &fs::Metadata, group: u32) -> bool {
    there.gid() == group && there.mode() & wanted(there) == wanted(there)
}

fn give_one(path: &PathBuf, there: &fs::Metadata, group: u32) -> io::Result<()> {
    if fits(there, group) {
        return Ok(());
    }
    let no_link = AtFlags::SYMLINK_NOFOLLOW;
    chownat(CWD, path, None, Some(Gid::from_raw(group)), no_link)?;
    // A link has no mode, and neither changes whoever it leads to.
    if there.is_symlink() {
        return Ok(());
    }
    // After it: a change of the owner takes the set-group-id bit of programs away.
    let mode = Mode::from_raw_mode((there.mode() | wanted(there)) & 0o7777);
    rustix::fs::chmod(path, mode)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_volume_is_the_groups_and_nothing_else_is() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let base = std::env::temp_dir().join(format!("pericarp-group-{}", std::process::id()));
        let (top, outside) = (base.join("top"), base.join("outside"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(&outside, "").unwrap();
        fs::write(top.join("a/b/file"), "").unwrap();
        let set = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&top.join("a/b/file"), 0o600);
        set(&outside, 0o600);
        symlink(&outside, top.join("link")).unwrap();
        give(&top, 4242, false).unwrap();
        let seen = |path: &Path| {
            let there = fs::symlink_metadata(path).unwrap();
            (there.gid(), there.mode() & 0o7777)
        };
        assert_eq!(seen(&top.join("a/b/file")), (4242, 0o660));
        assert_eq!(seen(&top.join("a/b")), (4242, 0o2775));
        assert_eq!(seen(&top), (4242, 0o2775));
        assert_eq!(seen(&top.join("link")).0, 4242);
        assert_eq!(seen(&outside).1, 0o600);
        assert_ne!(seen(&outside).0, 4242);
        // The top is the group's: for one who asks for no more, so is the rest.
        set(&top.join("a/b/file"), 0o600);
        give(&top, 4242, true).unwrap();
        assert_eq!(seen(&top.join("a/b/file")).1, 0o600);
        give(&top, 4242, false).unwrap();
        assert_eq!(seen(&top.join("a/b/file")).1, 0o660);
        fs::remove_dir_all(&base).unwrap();
    }
}
