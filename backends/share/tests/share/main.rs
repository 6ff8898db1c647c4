//! The share on scratch directories: what each operation does, and what no
//! guest may bring it to. Tests that need root say so where they are skipped.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod descriptors;
mod directories;
mod files;
mod hostile;
mod lookup;
mod mounts;
mod ownership;
mod places;
mod property;
mod restart;
mod scratch;
mod xattrs;
