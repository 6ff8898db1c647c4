//! Files and directories of a guest that opens nothing: it was told that it need
//! not (FUSE's no_open), and names nodes where others name handles. What such a
//! node's file takes to be read is opened at its first use, and stays open until
//! another node wants its place, or the node is forgotten.
//!
//! A node has one place, as an address has one in a direct-mapped cache: to look
//! is one lock and one comparison, and nothing is to be kept in order. Whoever
//! reads keeps the file, so losing the place costs the next reader an open.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::Share;
use super::directories::OpenDirectory;
use crate::handles::{Open, OpenFile};
use crate::table::{NodeId, Permit};

/// The most places. What is in them counts as open files do, and takes at most a
/// quarter of those.
const PLACES: u32 = 1024;

/// Whose file is here, and it.
type Place = Option<(NodeId, Open)>;

#[derive(Debug)]
pub(crate) struct Unopened {
    places: Box<[Mutex<Place>]>,
    /// Something was put into one since they were cleared.
    used: AtomicBool,
}

impl Unopened {
    pub(crate) fn new(open_files: u32) -> Self {
        let places = (open_files / 4).clamp(1, PLACES);
        Self {
            places: (0..places).map(|_| Mutex::default()).collect(),
            used: AtomicBool::new(false),
        }
    }

    fn place(&self, node: NodeId) -> MutexGuard<'_, Place> {
        // The lower half is the place in the table of nodes.
        let index = (node.0 & 0xffff_ffff) as usize % self.places.len();
        self.places[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, node: NodeId) -> Option<Open> {
        let place = self.place(node);
        let (whose, open) = place.as_ref()?;
        (*whose == node).then(|| open.clone())
    }

    fn put(&self, node: NodeId, open: Open) {
        self.used.store(true, Ordering::Relaxed);
        let before = self.place(node).replace((node, open));
        // Closing may take long: not under the lock.
        drop(before);
    }

    pub(crate) fn forget(&self, node: NodeId) {
        if !self.used.load(Ordering::Relaxed) {
            return;
        }
        let mut place = self.place(node);
        let gone = place.take_if(|(whose, _)| *whose == node);
        drop(place);
        drop(gone);
    }

    pub(crate) fn clear(&self) {
        if !self.used.swap(false, Ordering::Relaxed) {
            return;
        }
        for place in &self.places {
            let gone = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(gone);
        }
    }
}

impl Share {
    /// A regular file that nobody has opened, for reading.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file).
    pub fn unopened_file(&self, node: NodeId) -> Result<Arc<OpenFile>, Errno> {
        match self.unopened.get(node) {
            Some(Open::File(file)) => return Ok(file),
            Some(Open::Directory(_)) => return Err(Errno::ISDIR),
            None => {}
        }
        let found = self.nodes.get(node)?;
        if found.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let flags = self.open_flags(libc::O_RDONLY)?;
        let permit = self.unopened_permit()?;
        let file = self.reopen(&found, flags)?;
        let file = Self::open_of(file, permit, node, flags, found.mount);
        self.unopened.put(node, Open::File(file.clone()));
        Ok(file)
    }

    /// A directory that nobody has opened. Readers share it: each says where it
    /// goes on.
    ///
    /// # Errors
    /// As [`open_dir`](Self::open_dir).
    pub fn unopened_directory(&self, node: NodeId) -> Result<Arc<OpenDirectory>, Errno> {
        match self.unopened.get(node) {
            Some(Open::Directory(directory)) => return Ok(directory),
            Some(Open::File(_)) => return Err(Errno::NOTDIR),
            None => {}
        }
        let found = self.directory(node)?;
        let directory = Arc::new(self.open_directory_of(found, self.unopened_permit()?)?);
        let kept = Open::Directory(directory.clone());
        self.unopened.put(node, kept);
        Ok(directory)
    }

    /// The right to open one more, if need be instead of all that is open by
    /// itself.
    fn unopened_permit(&self) -> Result<Permit, Errno> {
        self.handles.permit().or_else(|_| {
            self.unopened.clear();
            self.handles.permit()
        })
    }
}
