//! The files of the sockets this program listens on: removed when their device
//! is, or at the end of the program.
//!
//! `main` collects them before it confines itself. A socket that comes later can
//! be removed only if it lies in a directory that one of these lies in.

use std::ffi::OsStr;
use std::io;

use log::warn;
use pericarp_confine::SocketFile;

/// All of them.
#[derive(Debug, Default)]
pub struct Sockets {
    files: Vec<SocketFile>,
    /// The device of each; none for the control socket.
    owners: Vec<Option<String>>,
}

impl Sockets {
    /// One more, of this device.
    pub fn push(&mut self, device: Option<&str>, file: SocketFile) {
        self.files.push(file);
        self.owners.push(device.map(str::to_owned));
    }

    /// For confinement, which leaves the right to remove them.
    pub fn files(&mut self) -> &mut [SocketFile] {
        &mut self.files
    }

    /// One more, with this name and this device and inode number, in a directory
    /// that is within reach. False where there is none.
    pub(crate) fn push_beside(&mut self, device: &str, name: &OsStr, id: (u64, u64)) -> bool {
        let found = self.files.iter().find_map(|file| file.beside(name, id));
        let within_reach = found.is_some();
        if let Some(file) = found {
            self.push(Some(device), file);
        }
        within_reach
    }

    /// Removes that of a device.
    ///
    /// # Errors
    /// The kernel's refusal. Success says whether it is removed now.
    pub(crate) fn remove_of(&mut self, device: &str) -> io::Result<bool> {
        let mut owners = self.owners.iter();
        let Some(index) = owners.position(|owner| owner.as_deref() == Some(device)) else {
            return Ok(false);
        };
        self.owners.remove(index);
        self.files.remove(index).remove()
    }

    /// Removes all.
    pub fn remove(&mut self) {
        self.owners.clear();
        for file in self.files.drain(..) {
            if let Err(e) = file.remove() {
                warn!("cannot remove a socket: {e}");
            }
        }
    }
}
