//! System calls that rustix does not have: file handles, modes and extended
//! attributes of what a descriptor names without having it open, locks of open
//! files, a thread's own umask, and what a close says. Called by `mounts`, `share` and `credentials`.
#![expect(unsafe_code)]
// UNSAFETY: raw system calls that read and write the buffers they are given.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use libc::{c_int, c_long, c_uint};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// MAX_HANDLE_SZ, include/linux/exportfs.h.
const HANDLE_SIZE: usize = 128;

/// `struct file_handle` with room for the largest.
#[repr(C, align(8))]
struct RawHandle {
    bytes: c_uint,
    kind: c_int,
    handle: [u8; HANDLE_SIZE],
}

/// Names an inode of a mount for as long as it exists, across reuse of its
/// number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileHandle {
    kind: c_int,
    bytes: Box<[u8]>,
}

impl FileHandle {
    /// As it is written down.
    pub(crate) fn parts(&self) -> (c_int, &[u8]) {
        (self.kind, &self.bytes)
    }

    /// As it was written down; at most as many bytes as a handle can have.
    pub(crate) fn from_parts(kind: c_int, bytes: &[u8]) -> Self {
        let bytes = bytes[..bytes.len().min(HANDLE_SIZE)].into();
        Self { kind, bytes }
    }
}

fn check(result: c_long) -> Result<c_long, Errno> {
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(result)
}

/// Closes it, and gives what its file system says of that: one that is served from elsewhere writes
/// back what it has.
pub(crate) fn close(file: OwnedFd) -> Result<(), Errno> {
    // SAFETY: it was ours, and nobody knows its number any more.
    check(unsafe { libc::close(file.into_raw_fd()) }.into()).map(drop)
}

/// The handle of what a descriptor names, O_PATH or not.
pub(crate) fn handle_of(file: impl AsFd) -> Result<FileHandle, Errno> {
    let mut raw = RawHandle {
        bytes: HANDLE_SIZE as c_uint,
        kind: 0,
        handle: [0; HANDLE_SIZE],
    };
    let mut mount: c_int = 0;
    // SAFETY: the kernel writes at most `bytes` bytes of the handle, which are
    // there, and the mount's number.
    check(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    let len = (raw.bytes as usize).min(HANDLE_SIZE);
    Ok(FileHandle {
        kind: raw.kind,
        bytes: raw.handle[..len].into(),
    })
}

/// Opens by handle, as O_PATH; `mount` is open (not O_PATH) on the same mount.
pub(crate) fn open_handle(mount: BorrowedFd<'_>, handle: &FileHandle) -> Result<OwnedFd, Errno> {
    let mut raw = RawHandle {
        bytes: handle.bytes.len() as c_uint,
        kind: handle.kind,
        handle: [0; HANDLE_SIZE],
    };
    raw.handle[..handle.bytes.len()].copy_from_slice(&handle.bytes);
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: the kernel reads `bytes` bytes of the handle, which are there.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut raw,
            flags,
        )
    })?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// fchmodat2 on what an O_PATH descriptor names (Linux 6.6, else ENOSYS).
pub(crate) fn change_mode(file: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    // SAFETY: the path is empty and static.
    check(unsafe {
        libc::syscall(
            libc::SYS_fchmodat2,
            file.as_raw_fd(),
            c"".as_ptr(),
            mode,
            libc::AT_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Whether the thread's effective ids may do `mask` to what a descriptor names.
pub(crate) fn access(file: BorrowedFd<'_>, mask: c_int) -> Result<(), Errno> {
    // SAFETY: the path is empty and static.
    check(unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            file.as_raw_fd(),
            c"".as_ptr(),
            mask,
            libc::AT_EMPTY_PATH | libc::AT_EACCESS,
        )
    })?;
    Ok(())
}

/// Takes, changes or looks for a lock of an open file description
/// (F_OFD_SETLK, F_OFD_GETLK).
pub(crate) fn record_lock(
    file: BorrowedFd<'_>,
    command: c_int,
    lock: &mut libc::flock,
) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes one such structure, which is there.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
    check(result.into()).map(drop)
}

/// Gives the calling thread an umask (and a working directory) of its own.
pub(crate) fn own_umask() -> Result<(), Errno> {
    // SAFETY: CLONE_FS shares no memory and no descriptors; what it unshares is
    // the umask, the root and the working directory, whose values stay.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// Linux 6.13; the same numbers on all architectures that Linux still gains
/// calls on together.
const SETXATTRAT: c_long = 463;
const GETXATTRAT: c_long = 464;
const LISTXATTRAT: c_long = 465;
const REMOVEXATTRAT: c_long = 466;

/// `struct xattr_args`.
#[repr(C)]
struct XattrArgs {
    value: u64,
    size: u32,
    flags: u32,
}

/// The extended attribute of a path below `dir` (the last component is
/// followed); the size alone where the buffer is empty.
pub(crate) fn xattr_get(
    dir: BorrowedFd<'_>,
    path: &CStr,
    name: &CStr,
    value: &mut [u8],
) -> Result<usize, Errno> {
    let mut args = XattrArgs {
        value: value.as_mut_ptr() as u64,
        size: value.len() as u32,
        flags: 0,
    };
    // SAFETY: strings and arguments outlive the call; at most `size` bytes of
    // the value are written, which are there.
    let len = check(unsafe {
        libc::syscall(
            GETXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            name.as_ptr(),
            &raw mut args,
            size_of::<XattrArgs>(),
        )
    })?;
    Ok(len as usize)
}

pub(crate) fn xattr_set(
    dir: BorrowedFd<'_>,
    path: &CStr,
    name: &CStr,
    value: &[u8],
    flags: u32,
) -> Result<(), Errno> {
    let args = XattrArgs {
        value: value.as_ptr() as u64,
        size: value.len() as u32,
        flags,
    };
    // SAFETY: strings and arguments outlive the call; `size` bytes of the value
    // are read, which are there.
    check(unsafe {
        libc::syscall(
            SETXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            name.as_ptr(),
            &raw const args,
            size_of::<XattrArgs>(),
        )
    })?;
    Ok(())
}

pub(crate) fn xattr_list(
    dir: BorrowedFd<'_>,
    path: &CStr,
    list: &mut [u8],
) -> Result<usize, Errno> {
    // SAFETY: the path outlives the call; at most the list's length is written.
    let len = check(unsafe {
        libc::syscall(
            LISTXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            list.as_mut_ptr(),
            list.len(),
        )
    })?;
    Ok(len as usize)
}

pub(crate) fn xattr_remove(dir: BorrowedFd<'_>, path: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both strings outlive the call.
    check(unsafe {
        libc::syscall(
            REMOVEXATTRAT,
            dir.as_raw_fd(),
            path.as_ptr(),
            0,
            name.as_ptr(),
        )
    })?;
    Ok(())
}
