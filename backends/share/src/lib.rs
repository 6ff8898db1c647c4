//! A host directory tree as a file server sees it: nodes with lookup counts,
//! open files, and the system calls between them. `pericarp-fs` calls it from
//! all its threads; nothing here knows FUSE, virtio or a ring.
//!
//! Whoever asks is hostile. A node id, a handle, a name, flags and offsets may
//! be anything; what is unknown is ESTALE or EBADF, and no answer reaches
//! outside the tree:
//!
//! - every name is one component, looked up below a descriptor of its directory
//!   by `openat2` with `RESOLVE_BENEATH | NO_SYMLINKS | NO_MAGICLINKS`;
//!   `.` and `..` are refused, so there is no way up;
//! - a node is held as an O_PATH descriptor, which opens nothing: fifos, sockets
//!   and devices are never opened in any other way (CVE-2020-35517);
//! - symbolic links are read and never followed.
//!
//! # Descriptors
//!
//! [`ShareOptions::descriptors`] bounds those that nodes have. Where the host
//! gives file handles (CAP_DAC_READ_SEARCH, and a file system that has them) the
//! nodes used least lately keep a handle instead; elsewhere, where the file system
//! says when a file was made, nothing but the name and the directory that they
//! were seen in. ENFILE is answered when neither helps, and at the limit of
//! [`ShareOptions::open_files`]. Beyond both come two descriptors for the share,
//! one for each mount and at most three for each call under way.
//!
//! A node that has only its place is ESTALE once others have moved or removed the
//! file, until it is looked up again; what the guest itself moves is known, and
//! what it removes keeps a descriptor.
//!
//! # After pivot_root
//!
//! A node is opened for reading or writing through its number in
//! `/proc/self/fd`, of which a share keeps a descriptor: it works with an
//! empty root, without a mounted proc, and with Landlock, which judges the file
//! that is reached. It is bound to the process: take it after the last `fork`,
//! and before `pivot_root` ([`Share::own_descriptors`]); the share itself may be
//! opened after that ([`Share::open_with`]).
//!
//! # Threads
//!
//! Creation takes on the caller's ids on the calling thread and puts its own
//! back before it returns. A thread that creates gets an umask of its own
//! (`unshare(CLONE_FS)`), which stays 0. A filter for system calls has to allow
//! those of [`credentials`] on every thread that calls.
//!
//! # Appending
//!
//! No file is opened with O_APPEND, whatever the guest says. It may take the
//! flag back later without a word (fcntl), and pages of a mapping that it writes
//! back through the same open file belong where they are, not at the end. Who
//! writes adds RWF_APPEND to each write that is to go there.
//!
//! A guest that caches writes ([`Share::set_writeback`]) also reads what it has
//! open for writing: its files are opened for both.

//!
//! # Successors
//!
//! A share that has a [`State`] ([`Share::remember`]) writes down what its guest
//! knows and has open; one that is made with it after the process was killed
//! goes on with all of it but files without a name. Which requests are done
//! again, and whether they were done already, is for the caller to find out: a
//! [`Slot`] for each of them keeps its notes, [`Share::glimpse`] and
//! [`Share::entry_again`] tell what became of a name.

mod attributes;
mod calls;
pub mod credentials;
mod handles;
mod id_map;
mod mounts;
mod name;
mod nodes;
mod options;
mod pieces;
mod share;
mod state;
mod table;
mod xattr_map;

pub use attributes::{Attributes, Entry, FileSystem, SetAttributes, Time};
pub use credentials::Caller;
pub use handles::{Handle, OpenFile, Opened, Traits};
pub use id_map::{IdMap, IdMapError, IdRange};
pub use options::{ShareError, ShareOptions};
pub use pieces::{Passed, Piece};
pub use rustix::io::Errno;
pub use share::Share;
pub use share::directories::{DirEntry, OpenDirectory};
pub use share::locks::{LockKind, RangeLock};
pub use share::restore::{Glimpse, Restored};
pub use share::xattrs::Xattr;
pub use state::{IDENTITY_BYTES, Intent, Phase, Slot, State, StateError};
pub use table::NodeId;
pub use xattr_map::{XattrMap, XattrMapError};
