//! What makes something: directories, nodes, symbolic links, files, files
//! without a name. Each acts as the caller, and takes the descriptor that its
//! answer needs before anything is made.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags, mkdirat, mknodat, openat, symlinkat};
use rustix::io::Errno;

use super::{ATTEMPTS, Share, Within};
use crate::Entry;
use crate::attributes::decode_device;
use crate::credentials::{Caller, Umask};
use crate::handles::Opened;
use crate::name;
use crate::nodes::Found;
use crate::state::Spot;
use crate::table::{NodeId, Permit};

impl Share {
    /// Makes a directory.
    ///
    /// # Errors
    /// The host's.
    pub fn make_dir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> Result<Entry, Errno> {
        self.make(caller, parent, name, FileType::Directory, |parent, name| {
            let umask = self.umask(mode, umask);
            mkdirat(parent, name, umask.mode)
        })
    }

    /// Makes a regular file, fifo, socket or device node: `mode` says which,
    /// `rdev` has the kernel's 32-bit form.
    ///
    /// # Errors
    /// The host's; EINVAL for another kind.
    pub fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        umask: u32,
        rdev: u32,
    ) -> Result<Entry, Errno> {
        // None at all is a file, as mknod(2) has it.
        let kind = match mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            _ => FileType::from_raw_mode(mode),
        };
        let device = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => 0,
            FileType::CharacterDevice | FileType::BlockDevice => decode_device(rdev),
            _ => return Err(Errno::INVAL),
        };
        self.make(caller, parent, name, kind, |parent, name| {
            let umask = self.umask(mode, umask);
            mknodat(parent, name, kind, umask.mode, device)
        })
    }

    /// Makes a symbolic link. What it points to is the guest's affair: nobody
    /// here follows it.
    ///
    /// # Errors
    /// The host's.
    pub fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
    ) -> Result<Entry, Errno> {
        self.make(caller, parent, name, FileType::Symlink, |parent, name| {
            symlinkat(target, parent, name)
        })
    }

    /// Opens `name`, and makes it where it is not there. Without O_EXCL a file
    /// that is there is opened as [`open_file`](Self::open_file) would: never by
    /// its name, which may be a fifo's.
    ///
    /// # Errors
    /// The host's; EROFS only where there is something to make.
    #[expect(clippy::too_many_arguments)]
    pub fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: i32,
        mode: u32,
        umask: u32,
        kill_suid_gid: bool,
    ) -> Result<(Entry, Opened), Errno> {
        let name = name::check(name)?;
        let parent = self.directory(parent)?;
        let wanted = self.open_flags(flags)?;
        for _ in 0..ATTEMPTS {
            if !self.options.read_only {
                match self.create_new(caller, &parent, name, wanted, mode, umask) {
                    Err(Errno::EXIST) if flags & libc::O_EXCL == 0 => {}
                    result => return result,
                }
            }
            match self.lookup_in(parent.as_fd(), Within::of(&parent), name, None) {
                Ok(_) if flags & libc::O_EXCL != 0 => return Err(Errno::EXIST),
                Ok(mut entry) => {
                    let opened = self.open_file(entry.node, flags, kill_suid_gid);
                    let opened = opened.and_then(|opened| {
                        // O_TRUNC has changed them since.
                        let handle = Some(opened.handle);
                        entry.attributes = self.attributes(entry.node, handle)?;
                        Ok(opened)
                    });
                    return opened.map(|opened| (entry, opened)).inspect_err(|_| {
                        self.forget(entry.node, 1);
                    });
                }
                // Gone again since.
                Err(Errno::NOENT) if !self.options.read_only => {}
                Err(Errno::NOENT) => return Err(Errno::ROFS),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::AGAIN)
    }

    /// Makes a file without a name in a directory. [`link`](Self::link) can give
    /// it one, unless `flags` has O_EXCL.
    ///
    /// # Errors
    /// The host's.
    pub fn make_temporary(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(Entry, Opened), Errno> {
        self.writable()?;
        let parent = self.directory(parent)?;
        let mut wanted = self.open_flags(flags & !(libc::O_TMPFILE & !libc::O_DIRECTORY))?;
        wanted.remove(OFlags::TRUNC);
        if flags & libc::O_EXCL != 0 {
            wanted |= OFlags::EXCL;
        }
        let permits = (self.nodes.permit()?, self.handles.permit()?);
        let file = {
            let _caller = self.act_as(caller, true)?;
            let umask = self.umask(mode, umask);
            let flags = wanted | OFlags::TMPFILE | OFlags::CLOEXEC;
            openat(&parent, c".", flags, umask.mode)?
        };
        self.opened_new(&parent, None, file, wanted, permits)
    }

    /// Makes something by name and looks it up.
    fn make(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        kind: FileType,
        act: impl FnOnce(&Found, &CStr) -> Result<(), Errno>,
    ) -> Result<Entry, Errno> {
        let name = name::check(name)?;
        self.writable()?;
        let parent = self.directory(parent)?;
        let permit = self.nodes.permit()?;
        {
            let _caller = self.act_as(caller, true)?;
            act(&parent, name)?;
        }
        let entry = self.lookup_in(parent.as_fd(), Within::of(&parent), name, Some(permit))?;
        if FileType::from_raw_mode(entry.attributes.mode) != kind {
            // Somebody on the host has put something else there.
            self.forget(entry.node, 1);
            return Err(Errno::STALE);
        }
        Ok(entry)
    }

    fn create_new(
        &self,
        caller: &Caller,
        parent: &Found,
        name: &CStr,
        wanted: OFlags,
        mode: u32,
        umask: u32,
    ) -> Result<(Entry, Opened), Errno> {
        let permits = (self.nodes.permit()?, self.handles.permit()?);
        let file = {
            let _caller = self.act_as(caller, true)?;
            let umask = self.umask(mode, umask);
            let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            // Nothing to cut off, and O_DIRECT may not be to be had: it is the
            // last to be refused, with the file made.
            let flags = wanted - OFlags::TRUNC - OFlags::DIRECT;
            openat(parent, name, flags | new | OFlags::CLOEXEC, umask.mode)?
        };
        if wanted.contains(OFlags::DIRECT) {
            let flags = rustix::fs::fcntl_getfl(&file)? | OFlags::DIRECT;
            rustix::fs::fcntl_setfl(&file, flags)?;
        }
        self.opened_new(parent, Some(name), file, wanted, permits)
    }

    /// Answers with a file that was made just now. Its node comes from the file
    /// itself: the name may be another's by now.
    fn opened_new(
        &self,
        parent: &Found,
        name: Option<&CStr>,
        file: OwnedFd,
        wanted: OFlags,
        (node, handle): (Permit, Permit),
    ) -> Result<(Entry, Opened), Errno> {
        let path = self.reopen_fd(file.as_fd(), OFlags::PATH)?;
        let spot = name.map(|name| Spot {
            parent: parent.id,
            name,
        });
        let entry = self.intern(path, node, &parent.identity, spot)?;
        let mount = self.nodes.get(entry.node).map(|found| found.mount);
        match mount {
            Ok(mount) => {
                let opened = self.add_file(file, handle, entry.node, wanted, mount);
                let opened = opened.inspect_err(|_| self.forget(entry.node, 1))?;
                Ok((entry, opened))
            }
            Err(errno) => {
                self.forget(entry.node, 1);
                Err(errno)
            }
        }
    }

    fn umask(&self, mode: u32, umask: u32) -> Umask {
        Umask::new(mode, umask, self.options.posix_acl)
    }
}
