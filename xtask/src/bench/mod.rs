//! `cargo xtask bench`: what is measured, each by a command of its own.

pub(crate) mod compare;
pub(crate) mod regress;
