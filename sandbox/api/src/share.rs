//! What may name a share, and where a container may have it.
//!
//! One set of rules for both sides: `pericarp` reports what breaks them before anything starts, and
//! the agent refuses it.

use thiserror::Error;

/// Longest tag a virtio-fs device can carry (virtio 1.3, 5.11.4).
pub const MAX_TAG: usize = 36;
/// Most shares of one container.
pub const MAX_SHARES: usize = 16;
/// Most parts of shares that one container's mounts come from.
pub const MAX_SOURCES: usize = 256;
/// The kernel takes no longer path (`PATH_MAX`, with the zero at its end).
const MAX_PATH: usize = 4095;
/// Where the container's own kernel file systems and devices are.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Why a container cannot have a share at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// It does not begin with a slash.
    #[error("is not an absolute path")]
    Relative,
    /// It has empty parts, `.`, `..`, a slash at its end or a zero byte.
    #[error("has an empty part, '.', '..' or a slash at its end")]
    NotNormal,
    /// Everything would be hidden.
    #[error("is the container's root")]
    Root,
    /// It lies where the kernel shows itself.
    #[error("lies in the container's own {0}")]
    Kernel(&'static str),
    /// No path is that long.
    #[error("is longer than {MAX_PATH} bytes")]
    Long,
}

/// Whether `tag` may name a share: like an id, but as short as a device's tag.
#[must_use]
pub fn is_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG && crate::is_id(tag)
}

/// Whether `path` may name a part of a share: relative, and nothing in it leads up.
#[must_use]
pub fn is_part(path: &str) -> bool {
    let odd = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
    path.len() <= MAX_PATH && !path.split('/').any(odd)
}

/// Checks where a container is to have a share.
///
/// # Errors
///
/// The rule that the path breaks.
pub fn check_place(path: &str) -> Result<(), PlaceError> {
    let Some(inside) = path.strip_prefix('/') else {
        return Err(PlaceError::Relative);
    };
    if inside.is_empty() {
        return Err(PlaceError::Root);
    }
    if path.len() > MAX_PATH {
        return Err(PlaceError::Long);
    }
    let odd = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
    if inside.split('/').any(odd) {
        return Err(PlaceError::NotNormal);
    }
    let within = |top: &&str| {
        path.strip_prefix(top)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    match KERNELS.into_iter().find(|top| within(top)) {
        Some(top) => Err(PlaceError::Kernel(top)),
        None => Ok(()),
    }
}

/// Checks where a container is to have a block device: anywhere that a share may be, and below
/// `/dev`.
///
/// # Errors
///
/// The rule that the path breaks.
pub fn check_node(path: &str) -> Result<(), PlaceError> {
    // The rest has to be a path of its own.
    match path
        .strip_prefix("/dev")
        .filter(|rest| rest.starts_with('/'))
    {
        Some(rest) => match check_place(rest) {
            Err(PlaceError::Kernel(_)) => Ok(()),
            Err(PlaceError::Root) => Err(PlaceError::NotNormal),
            other => other,
        },
        None => check_place(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_ids_a_device_can_carry() {
        for good in ["volume1", "a.b-c_d", &"t".repeat(36)] {
            assert!(is_tag(good), "{good}");
        }
        for bad in ["", "..", "a/b", "a,b", "a\0", &"t".repeat(37)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }

    #[test]
    fn parts_of_shares_do_not_lead_up() {
        for good in ["web/rootfs", "a", "..a/b..", "a b/.c"] {
            assert!(is_part(good), "{good}");
        }
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            ".",
            "a/../b",
            "..",
            "a\0",
            &"a/".repeat(2500),
        ] {
            assert!(!is_part(bad), "{bad}");
        }
    }

    #[test]
    fn places_are_absolute_plain_and_not_the_kernels() {
        for good in [
            "/data", "/a/b c/d", "/process", "/devices", "/a..b/.c", "/ä",
        ] {
            assert_eq!(check_place(good), Ok(()), "{good}");
        }
        let long = format!("/{}", "a/".repeat(2048));
        for (bad, why) in [
            ("", PlaceError::Relative),
            ("data", PlaceError::Relative),
            ("./data", PlaceError::Relative),
            ("/", PlaceError::Root),
            ("//", PlaceError::NotNormal),
            ("/a/", PlaceError::NotNormal),
            ("/a//b", PlaceError::NotNormal),
            ("/a/./b", PlaceError::NotNormal),
            ("/a/../proc", PlaceError::NotNormal),
            ("/..", PlaceError::NotNormal),
            ("/a\0b", PlaceError::NotNormal),
            ("/proc", PlaceError::Kernel("/proc")),
            ("/sys/fs", PlaceError::Kernel("/sys")),
            ("/dev/shm/x", PlaceError::Kernel("/dev")),
            (long.as_str(), PlaceError::Long),
        ] {
            assert_eq!(check_place(bad), Err(why), "{bad}");
        }
    }

    #[test]
    fn devices_are_below_dev_or_elsewhere() {
        for good in ["/dev/xvda", "/dev/disks/a", "/data/disk", "/dev/proc"] {
            assert_eq!(check_node(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("/dev", PlaceError::Kernel("/dev")),
            ("/dev/", PlaceError::NotNormal),
            ("/dev/../proc", PlaceError::NotNormal),
            ("/sys/x", PlaceError::Kernel("/sys")),
            ("dev/a", PlaceError::Relative),
            ("/", PlaceError::Root),
        ] {
            assert_eq!(check_node(bad), Err(why), "{bad}");
        }
    }
}
