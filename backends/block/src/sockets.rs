//! The files of the sockets this program listens on: removed when their device
//! is, or at the end of the program.
//!
//! `main` collects them before it confines itself. A socket that comes later can
//! be removed only if it lies in a directory that one of these lies in.

use std::ffi::OsStr;
use std::io;

use log::warn;
use pericarp_confine::SocketFile;

/// Whose socket it is.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Program,
    Device(String),
    /// It is removed; its directory is still within reach.
    Nobody,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Sockets {
    files: Vec<SocketFile>,
    /// Of each.
    owners: Vec<Owner>,
    /// So many were there before confinement. They stay, for their directories.
    first: usize,
}

impl Sockets {
    /// One more, of this device.
    pub fn push(&mut self, device: Option<&str>, file: SocketFile) {
        self.files.push(file);
        let device = device.map(|id| Owner::Device(id.to_owned()));
        self.owners.push(device.unwrap_or(Owner::Program));
        self.first = self.files.len();
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
            self.files.push(file);
            self.owners.push(Owner::Device(device.to_owned()));
        }
        within_reach
    }

    /// Removes that of a device.
    ///
    /// # Errors
    /// The kernel's refusal. Success says whether it is removed now.
    pub(crate) fn remove_of(&mut self, device: &str) -> io::Result<bool> {
        let mut owners = self.owners.iter();
        let owns = |owner: &Owner| matches!(owner, Owner::Device(id) if id == device);
        let Some(index) = owners.position(owns) else {
            return Ok(false);
        };
        if index < self.first {
            self.owners[index] = Owner::Nobody;
            return self.files[index].remove();
        }
        self.owners.remove(index);
        self.files.remove(index).remove()
    }

    /// Removes all.
    pub fn remove(&mut self) {
        for (file, owner) in self.files.iter().zip(&mut self.owners) {
            if std::mem::replace(owner, Owner::Nobody) != Owner::Nobody
                && let Err(e) = file.remove()
            {
                warn!("cannot remove a socket: {e}");
            }
        }
    }
}
