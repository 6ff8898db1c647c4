//! Extended attributes, where the share has them, and access control lists among
//! them, whose ids are translated. No other name of `system.` is passed on: each
//! means something to the host's kernel that the guest's does not know.
//!
//! With a map names are others on the host. What is stored under another name
//! means nothing to the host's kernel: of access control lists it keeps bytes, and
//! of security.capability it does not know that a change of the file takes it
//! away. We do (CVE-2021-20263).

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::Share;
use crate::calls;
use crate::handles::OpenFile;
use crate::nodes::Found;
use crate::table::NodeId;
use crate::{ShareOptions, XattrMap};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const LARGEST: usize = 64 * 1024;
/// XATTR_NAME_MAX.
const LONGEST: usize = 255;

const LIST_VERSION: [u8; 4] = 2u32.to_le_bytes();
/// Entries whose third field is an id.
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Xattr {
    /// With a size of 0: how long it is.
    Size(usize),
    /// It.
    Value(Vec<u8>),
}

impl Share {
    /// An attribute of at most `size` bytes.
    ///
    /// # Errors
    /// The host's; ENOSYS where the share has none, ERANGE for a longer one.
    pub fn get_xattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<Xattr, Errno> {
        // As of one that is not there: the guest may know its name.
        let name = &*self.host_name(name).map_err(|errno| match errno {
            Errno::PERM => Errno::NODATA,
            other => other,
        })?;
        let node = self.nodes.get(node)?;
        let mut value = vec![0; (size as usize).min(LARGEST)];
        let path = DecInt::from_fd(&node);
        let proc = self.nodes.proc().as_fd();
        let got = calls::xattr_get(proc, path.as_c_str(), name, &mut value);
        let len = match got {
            Err(Errno::NOSYS) => {
                let file = self.readable(&node)?;
                match value.is_empty() {
                    // Into nothing rustix says that nothing came.
                    true => fgetxattr(file, name, &mut vec![0u8; LARGEST][..])?,
                    false => fgetxattr(file, name, &mut value[..])?,
                }
            }
            got => got?,
        };
        if value.is_empty() {
            return Ok(Xattr::Size(len));
        }
        value.truncate(len);
        if is_list(name) {
            let (uids, gids) = (&self.options.uid_map, &self.options.gid_map);
            translate(
                &mut value,
                |id| Some(uids.to_guest(id)),
                |id| Some(gids.to_guest(id)),
            )?;
        }
        Ok(Xattr::Value(value))
    }

    /// The names of all attributes that can be asked for, each with its NUL.
    ///
    /// # Errors
    /// As [`get_xattr`](Self::get_xattr).
    pub fn list_xattr(&self, node: NodeId, size: u32) -> Result<Xattr, Errno> {
        if !self.options.xattr {
            return Err(Errno::NOSYS);
        }
        let node = self.nodes.get(node)?;
        let mut list = vec![0; LARGEST];
        let path = DecInt::from_fd(&node);
        let proc = self.nodes.proc().as_fd();
        let len = match calls::xattr_list(proc, path.as_c_str(), &mut list) {
            Err(Errno::NOSYS) => flistxattr(self.readable(&node)?, &mut list[..])?,
            got => got?,
        };
        list.truncate(len);
        let shown = |name| {
            let name = CStr::from_bytes_with_nul(name).ok()?;
            self.check_host_name(name).ok()?;
            let shown = match &self.options.xattr_map {
                Some(map) => map.to_guest(name)?,
                None => name,
            };
            Some(shown.to_bytes_with_nul())
        };
        let names = list.split_inclusive(|byte| *byte == 0).filter_map(shown);
        let names: Vec<u8> = names.flatten().copied().collect();
        match size as usize {
            0 => Ok(Xattr::Size(names.len())),
            size if size < names.len() => Err(Errno::RANGE),
            _ => Ok(Xattr::Value(names)),
        }
    }

    /// Sets an attribute. With `kill_sgid` (a list set by somebody outside the
    /// file's group) the file loses setgid.
    ///
    /// # Errors
    /// The host's; ENOSYS, EINVAL for unknown flags.
    pub fn set_xattr(
        &self,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<(), Errno> {
        let name = &*self.host_name(name)?;
        self.writable()?;
        let known = XattrFlags::CREATE | XattrFlags::REPLACE;
        let wanted = XattrFlags::from_bits_retain(flags);
        if !known.contains(wanted) {
            return Err(Errno::INVAL);
        }
        if value.len() > LARGEST {
            return Err(Errno::TOOBIG);
        }
        let mut translated = value.to_vec();
        if is_list(name) {
            let (uids, gids) = (&self.options.uid_map, &self.options.gid_map);
            translate(
                &mut translated,
                |id| uids.to_host(id),
                |id| gids.to_host(id),
            )?;
        }
        let node = self.nodes.get(node)?;
        let path = DecInt::from_fd(&node);
        let proc = self.nodes.proc().as_fd();
        match calls::xattr_set(proc, path.as_c_str(), name, &translated, flags) {
            Err(Errno::NOSYS) => fsetxattr(self.readable(&node)?, name, &translated, wanted)?,
            result => result?,
        }
        if kill_sgid {
            let mode = rustix::fs::fstat(&node)?.st_mode;
            if mode & libc::S_ISGID != 0 {
                self.change_mode(node.as_fd(), mode & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    /// Takes an attribute away.
    ///
    /// # Errors
    /// The host's; ENOSYS.
    pub fn remove_xattr(&self, node: NodeId, name: &CStr) -> Result<(), Errno> {
        let name = &*self.host_name(name)?;
        self.writable()?;
        let node = self.nodes.get(node)?;
        let path = DecInt::from_fd(&node);
        let proc = self.nodes.proc().as_fd();
        match calls::xattr_remove(proc, path.as_c_str(), name) {
            Err(Errno::NOSYS) => fremovexattr(self.readable(&node)?, name),
            result => result,
        }
    }

    /// A name as the host has it.
    fn host_name<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>, Errno> {
        if !self.options.xattr {
            return Err(Errno::NOSYS);
        }
        if name.is_empty() {
            return Err(Errno::RANGE);
        }
        let name = match &self.options.xattr_map {
            Some(map) => map.to_host(name)?,
            None => Cow::Borrowed(name),
        };
        self.check_host_name(&name)?;
        Ok(name)
    }

    fn check_host_name(&self, name: &CStr) -> Result<(), Errno> {
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes.len() > LONGEST {
            return Err(Errno::RANGE);
        }
        let passed = !bytes.starts_with(b"system.") || is_list(name) && self.options.posix_acl;
        if passed {
            Ok(())
        } else {
            Err(Errno::OPNOTSUPP)
        }
    }

    /// Before Linux 6.13 an attribute takes an open file, which only these two
    /// kinds may be.
    fn readable(&self, node: &Found) -> Result<OwnedFd, Errno> {
        match node.kind {
            FileType::RegularFile | FileType::Directory => {
                self.reopen(node, OFlags::RDONLY | OFlags::NONBLOCK)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }
}

impl Share {
    /// A file is about to be written to, by whoever it is: capabilities that are
    /// stored under a name of ours go, as the kernel takes its own away.
    ///
    /// # Errors
    /// The host's.
    pub fn drop_capabilities_of(&self, file: &OpenFile) -> Result<(), Errno> {
        let Some(name) = &self.capability else {
            return Ok(());
        };
        self.writable()?;
        gone(fremovexattr(file, &**name))
    }

    /// The same before its node's owner or size changes.
    pub(super) fn drop_capabilities(&self, node: &Found) -> Result<(), Errno> {
        let Some(name) = &self.capability else {
            return Ok(());
        };
        if node.kind != FileType::RegularFile {
            return Ok(());
        }
        let path = DecInt::from_fd(node);
        let proc = self.nodes.proc().as_fd();
        gone(match calls::xattr_remove(proc, path.as_c_str(), name) {
            Err(Errno::NOSYS) => fremovexattr(self.readable(node)?, &**name),
            result => result,
        })
    }

    /// The name that security.capability has on the host, where it is another.
    pub(super) fn stored_capability(options: &ShareOptions) -> Option<CString> {
        const NAME: &CStr = c"security.capability";
        let map: &XattrMap = options.xattr_map.as_ref()?;
        let stored = map.to_host(NAME).ok()?;
        (*stored != *NAME).then(|| stored.into_owned())
    }
}

/// What is not there, or cannot be, is gone.
fn gone(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        result => result,
    }
}

fn is_list(name: &CStr) -> bool {
    name == c"system.posix_acl_access" || name == c"system.posix_acl_default"
}

/// Gives the ids in a list others (include/uapi/linux/posix_acl_xattr.h: a
/// version, then tag, permissions and id of each entry, all little-endian).
fn translate(
    list: &mut [u8],
    uid: impl Fn(u32) -> Option<u32>,
    gid: impl Fn(u32) -> Option<u32>,
) -> Result<(), Errno> {
    let Some((version, entries)) = list.split_first_chunk_mut::<4>() else {
        // Nothing at all takes the list away; the kernel judges other lengths.
        return Ok(());
    };
    if *version != LIST_VERSION {
        return Err(Errno::OPNOTSUPP);
    }
    let (entries, rest) = entries.as_chunks_mut::<8>();
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    for entry in entries {
        let [tag0, tag1, _, _, id @ ..] = entry;
        let now = u32::from_le_bytes(*id);
        let other = match u16::from_le_bytes([*tag0, *tag1]) {
            ACL_USER => uid(now),
            ACL_GROUP => gid(now),
            _ => Some(now),
        };
        *id = other.ok_or(Errno::INVAL)?.to_le_bytes();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_a_list_are_translated_and_others_are_not() {
        let entry = |tag: u16, id: u32| {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&tag.to_le_bytes());
            bytes[4..].copy_from_slice(&id.to_le_bytes());
            bytes
        };
        let list = |ids: [u32; 3]| {
            let mut list = LIST_VERSION.to_vec();
            for (tag, id) in [1, ACL_USER, ACL_GROUP].into_iter().zip(ids) {
                list.extend(entry(tag, id));
            }
            list
        };
        let mut value = list([u32::MAX, 5, 6]);
        translate(&mut value, |id| Some(id + 100), |id| Some(id + 200)).unwrap();
        assert_eq!(value, list([u32::MAX, 105, 206]));
        assert_eq!(translate(&mut value, |_| None, Some), Err(Errno::INVAL));
        assert_eq!(translate(&mut [], Some, Some), Ok(()));
        assert!(translate(&mut [1, 0, 0, 0], Some, Some).is_err());
        assert!(translate(&mut list([0; 3])[..11], Some, Some).is_err());
    }
}
