//! Reading directories. An entry's cookie is the host's own (`d_off`), which
//! names a place in the directory and not a count: it stays right when entries
//! before it go (on tmpfs since Linux 6.6).

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, fdatasync, fsync, seek};
use rustix::io::Errno;

use super::{Share, Within};
use crate::Entry;
use crate::handles::{Handle, Open};
use crate::mounts::Mount;
use crate::name;
use crate::nodes::Found;
use crate::table::{Budget, Identity, NodeId, Permit};

/// What is read of a directory at once: some 400 entries.
const BATCH: usize = 16 * 1024;
/// Open directories that keep what was read and not asked for yet, some 40 KiB
/// each. A guest may have hundreds of thousands open: the others read anew.
pub(crate) const BATCHES: u32 = 256;
/// The cursor of a directory that has to be read anew: no cookie.
const NOWHERE: u64 = u64::MAX;

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Inode number, as in [`Attributes`](crate::Attributes) but for a
    /// directory that something is mounted on.
    pub ino: u64,
    /// Where reading goes on after it.
    pub offset: u64,
    /// Kind, as `d_type` has it; 0 where the file system does not say.
    pub kind: u32,
    /// Its name; `.` and `..` are among them.
    pub name: &'a CStr,
}

/// An open directory: what making it durable has to know.
#[derive(Debug)]
pub struct OpenDirectory {
    // Closed before the permit is given back.
    file: OwnedFd,
    _permit: Permit,
    node: NodeId,
    identity: Identity,
    mount: Arc<Mount>,
    cursor: Mutex<Cursor>,
    batches: Arc<Budget>,
}

/// What was read of a directory and not asked for yet.
#[derive(Debug, Default)]
struct Cursor {
    items: Vec<Item>,
    names: Vec<u8>,
    /// The first that is left of `items`.
    next: usize,
    /// Where it stands.
    position: u64,
    /// The right to keep it.
    kept: Option<Permit>,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    ino: u64,
    offset: u64,
    kind: u32,
    name: usize,
}

impl Share {
    /// Opens a directory.
    ///
    /// # Errors
    /// The host's; ENOTDIR.
    pub fn open_dir(&self, node: NodeId) -> Result<Handle, Errno> {
        let directory = self.opened_dir(node)?;
        self.handles.add(Open::Directory(Arc::new(directory)), 0)
    }

    /// A directory, open.
    pub(super) fn opened_dir(&self, node: NodeId) -> Result<OpenDirectory, Errno> {
        let node = self.directory(node)?;
        self.open_directory_of(node, self.handles.permit()?)
    }

    pub(super) fn open_directory_of(
        &self,
        node: Found,
        permit: Permit,
    ) -> Result<OpenDirectory, Errno> {
        let file = self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let directory = self.directory_of(file, node, permit);
        Ok(OpenDirectory {
            cursor: Mutex::default(),
            ..directory
        })
    }

    /// One that is open, and stands anywhere.
    pub(super) fn directory_of(&self, file: OwnedFd, node: Found, permit: Permit) -> OpenDirectory {
        OpenDirectory {
            file,
            _permit: permit,
            node: node.id,
            identity: node.identity,
            mount: node.mount,
            cursor: Mutex::new(Cursor {
                position: NOWHERE,
                ..Cursor::default()
            }),
            batches: self.batches.clone(),
        }
    }

    /// Gives the sink entry after entry, from the cookie `offset` on (0 is the
    /// start), until it takes one no more or there are none.
    ///
    /// # Errors
    /// The host's; EINVAL for a cookie that is none. After an entry was given
    /// an error waits for the next call.
    pub fn read_dir(
        &self,
        handle: Handle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        self.handles.directory(handle)?.read(offset, sink)
    }

    /// The same with a lookup of each. An entry that could not be looked up is
    /// given without; `.` and `..` are never looked up. What the sink does not
    /// take is forgotten again.
    ///
    /// # Errors
    /// As [`read_dir`](Self::read_dir).
    pub fn read_dir_plus(
        &self,
        handle: Handle,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> bool,
    ) -> Result<(), Errno> {
        self.read_dir_plus_of(&*self.handles.directory(handle)?, offset, sink)
    }

    /// The same of a directory that was looked up before.
    ///
    /// # Errors
    /// As [`read_dir`](Self::read_dir).
    pub fn read_dir_plus_of(
        &self,
        directory: &OpenDirectory,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> bool,
    ) -> Result<(), Errno> {
        let within = Within {
            node: directory.node,
            identity: directory.identity,
        };
        directory.read(offset, &mut |entry| {
            // A limit of ours must not hide files (EMFILE in other servers does).
            let looked_up = name::check(entry.name).and_then(|name| {
                let parent = directory.file.as_fd();
                self.lookup_in(parent, within, name, None)
            });
            let node = looked_up.ok();
            let taken = sink(entry, node.as_ref());
            if let Some(node) = node.filter(|_| !taken) {
                self.forget(node.node, 1);
            }
            taken
        })
    }

    /// A directory by the handle that a guest gives, to write it back.
    ///
    /// # Errors
    /// EBADF.
    pub fn open_directory(&self, handle: Handle) -> Result<Arc<OpenDirectory>, Errno> {
        self.handles.directory(handle)
    }

    /// Writes a directory back.
    ///
    /// # Errors
    /// The host's.
    pub fn sync_dir(&self, handle: Handle, data_only: bool) -> Result<(), Errno> {
        let directory = self.handles.directory(handle)?;
        match data_only {
            true => fdatasync(&directory.file),
            false => fsync(&directory.file),
        }
    }

    /// Writes all of the file system back that a directory is on. May take long.
    ///
    /// # Errors
    /// The host's.
    pub fn sync_all(&self, node: NodeId) -> Result<(), Errno> {
        let node = self.directory(node)?;
        rustix::fs::syncfs(self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    /// Takes a handle back.
    ///
    /// # Errors
    /// EBADF.
    pub fn close_dir(&self, handle: Handle) -> Result<(), Errno> {
        self.handles.directory(handle)?;
        drop(self.handles.remove(handle)?);
        Ok(())
    }
}

impl AsFd for OpenDirectory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl OpenDirectory {
    /// Whose.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Any call on it may wait for another process or machine.
    pub fn waits(&self) -> bool {
        self.mount.waits()
    }

    /// As [`Share::read_dir`].
    ///
    /// # Errors
    /// The host's; EINVAL for a cookie that is none.
    pub fn read(
        &self,
        offset: u64,
        sink: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        if offset > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        // From the start always anew: that is what rewinddir promises.
        if offset == 0 || offset != cursor.position {
            *cursor = Cursor::default();
            cursor.position = NOWHERE;
            seek(&self.file, SeekFrom::Start(offset))?;
            cursor.position = offset;
        }
        let result = self.give(&mut cursor, sink);
        cursor.settle(&self.batches);
        result
    }

    /// Entries from where the cursor stands.
    fn give(
        &self,
        cursor: &mut Cursor,
        sink: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let mut given = false;
        loop {
            let Some(item) = cursor.items.get(cursor.next).copied() else {
                match cursor.fill(&self.file) {
                    Ok(true) => continue,
                    Err(errno) if !given => return Err(errno),
                    _ => return Ok(()),
                }
            };
            let Ok(name) = CStr::from_bytes_until_nul(&cursor.names[item.name..]) else {
                return Err(Errno::IO);
            };
            // Above the root there is nothing.
            let above = self.node == NodeId::ROOT && name == c"..";
            let ino = if above { self.identity.ino } else { item.ino };
            let entry = DirEntry {
                ino: self.mount.shown(ino),
                offset: item.offset,
                kind: item.kind,
                name,
            };
            if !sink(entry) {
                return Ok(());
            }
            given = true;
            cursor.next += 1;
            cursor.position = item.offset;
        }
    }
}

impl Cursor {
    /// Lets what is used up go, and what is left where too many have some.
    fn settle(&mut self, batches: &Arc<Budget>) {
        let left = self.next < self.items.len();
        if left && self.kept.is_none() {
            self.kept = batches.take();
        }
        let position = match left {
            true if self.kept.is_some() => return,
            // The descriptor stands behind what is dropped.
            true => NOWHERE,
            false => self.position,
        };
        *self = Self {
            position,
            ..Self::default()
        };
    }

    /// Reads on where the descriptor stands. False at the end.
    fn fill(&mut self, file: &OwnedFd) -> Result<bool, Errno> {
        self.items.clear();
        self.names.clear();
        self.next = 0;
        let mut space = [MaybeUninit::uninit(); BATCH];
        let mut batch = RawDir::new(file, &mut space);
        while let Some(entry) = batch.next() {
            let entry = entry?;
            self.items.push(Item {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                kind: match entry.file_type() {
                    FileType::Unknown => 0,
                    kind => kind.as_raw_mode() >> 12,
                },
                name: self.names.len(),
            });
            self.names.extend(entry.file_name().to_bytes_with_nul());
            if batch.is_buffer_empty() {
                break;
            }
        }
        Ok(!self.items.is_empty())
    }
}
