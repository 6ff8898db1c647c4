//! Why the store does not do what it is asked.

use thiserror::Error;

use super::Kind;

/// Why not.
#[derive(Debug, Error)]
pub enum StoreError {
    /// There is one of that name.
    #[error("{} \"{name}\" already exists", .kind.plural())]
    AlreadyExists {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// There is none of that name.
    #[error("{} \"{name}\" not found", .kind.plural())]
    NotFound {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// It is not what the caller believes it is any more.
    #[error(
        "{} \"{name}\" was changed by somebody else meanwhile; get it anew and try again",
        .kind.plural()
    )]
    Conflict {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// Changes since that version are not remembered.
    #[error("too old resource version: {version}")]
    Gone {
        /// The version.
        version: u64,
    },
    /// It would not be what such an object has to be.
    #[error("{0}")]
    Invalid(String),
    /// It is well formed, and not wanted.
    #[error("{0}")]
    Forbidden(String),
    /// The file cannot be read or written.
    #[error("the store cannot be used")]
    Disk(#[source] Box<redb::Error>),
    /// What is in the file was not written by us.
    #[error("the store holds {what}")]
    Garbled {
        /// What there is.
        what: String,
    },
}
