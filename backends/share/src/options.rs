//! What a share is made with, and why it could not be made.

use std::io;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use crate::{IdMap, XattrMap};

/// Descriptors kept for the rest of the program, for mounts, and for calls under
/// way.
const RESERVE: u64 = 128;
/// With fewer, calls of many threads could take each other's.
const FEWEST: u32 = 64;

/// How a tree is passed on.
#[derive(Debug, Clone)]
pub struct ShareOptions {
    /// Whatever would change something is EROFS.
    pub read_only: bool,
    /// Extended attributes; without, every call for one is ENOSYS.
    pub xattr: bool,
    /// What their names are on the host, where they are others. Needs `xattr`.
    pub xattr_map: Option<XattrMap>,
    /// POSIX access control lists as extended attributes; the umask is then left
    /// to the host, which ignores it below a default list. Needs `xattr`.
    pub posix_acl: bool,
    /// Let guests open files with O_DIRECT; without, the flag is dropped.
    pub direct_io: bool,
    /// Keep file handles of nodes that are not used, where the host gives them.
    pub file_handles: bool,
    /// Something below the root is served by another process or machine, as the
    /// root itself may be: every close is to be told.
    pub elsewhere: bool,
    /// Locks are the host's, too: every close is to be told.
    pub locks: bool,
    /// User ids.
    pub uid_map: IdMap,
    /// Group ids.
    pub gid_map: IdMap,
    /// Most descriptors that nodes have.
    pub descriptors: u32,
    /// Most files and directories open at a time.
    pub open_files: u32,
    /// Most nodes that a guest knows at a time: what bounds our memory, about
    /// 200 bytes each, and its name for one without a file handle.
    pub nodes: u32,
}

impl Default for ShareOptions {
    /// Everything off that asks for trust; half of the descriptors that the
    /// process may have for nodes, half for open files.
    fn default() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let half = (limit.saturating_sub(RESERVE) / 2).clamp(FEWEST.into(), 1 << 18);
        Self {
            read_only: false,
            xattr: false,
            xattr_map: None,
            posix_acl: false,
            direct_io: false,
            file_handles: true,
            elsewhere: false,
            locks: false,
            uid_map: IdMap::default(),
            gid_map: IdMap::default(),
            descriptors: half as u32,
            open_files: half as u32,
            nodes: 1 << 22,
        }
    }
}

/// Why a tree cannot be passed on.
#[derive(Debug, Error)]
pub enum ShareError {
    /// Not a directory.
    #[error("it is no directory: give one")]
    NotADirectory,
    /// The number of a descriptor leads nowhere.
    #[error("/proc/self/fd cannot be opened ({0}): mount proc on /proc")]
    NoProc(io::Error),
    /// Names cannot be confined.
    #[error("this system has no openat2 ({0}): Linux 5.6 or newer, and a filter that allows it")]
    NoOpenat2(io::Error),
    /// The root itself cannot be read.
    #[error("it cannot be examined ({0}): give a directory that this user may read and search")]
    Root(io::Error),
    /// Lists are extended attributes.
    #[error("access control lists need extended attributes: turn both on")]
    AclWithoutXattr,
    /// A map of nothing.
    #[error("a map of extended attributes needs extended attributes: turn both on")]
    MapWithoutXattr,
    /// Fewer than a share needs.
    #[error("{what} {value} is below {FEWEST}: give at least that")]
    TooFew {
        /// Which number.
        what: &'static str,
        /// As given.
        value: u32,
    },
    /// More than the process may have.
    #[error(
        "{wanted} descriptors are wanted and {limit} allowed: raise the limit (ulimit -n) or ask for fewer"
    )]
    Limit {
        /// Both numbers and the reserve.
        wanted: u64,
        /// RLIMIT_NOFILE.
        limit: u64,
    },
}

impl ShareOptions {
    pub(crate) fn check(&self) -> Result<(), ShareError> {
        if self.posix_acl && !self.xattr {
            return Err(ShareError::AclWithoutXattr);
        }
        if self.xattr_map.is_some() && !self.xattr {
            return Err(ShareError::MapWithoutXattr);
        }
        let numbers = [
            ("number of node descriptors", self.descriptors),
            ("number of open files", self.open_files),
            ("number of nodes", self.nodes),
        ];
        for (what, value) in numbers {
            if value < FEWEST {
                return Err(ShareError::TooFew { what, value });
            }
        }
        let wanted = u64::from(self.descriptors) + u64::from(self.open_files) + RESERVE;
        match getrlimit(Resource::Nofile).current {
            Some(limit) if limit < wanted => Err(ShareError::Limit { wanted, limit }),
            _ => Ok(()),
        }
    }
}
