//! A node: whether it has what pods need, and how containerd and Kubernetes are told that it can
//! run them.
//!
//! For the commands of `pericarp` that look at a node and change it. [`check`] looks and changes
//! nothing; [`containerd`] adds handlers to the configuration of containerd and takes them out again;
//! [`manifest`] writes what Kubernetes is to be told; [`assets`] keeps versions of the guest's files;
//! [`install`] and [`daemon_set`] have nodes of a cluster prepare themselves.

pub mod assets;
pub mod check;
pub mod containerd;
pub mod daemon_set;
mod host;
pub mod install;
pub mod manifest;
