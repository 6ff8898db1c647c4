//! What an operator configures of pods, and what a pod may ask for.
//!
//! For the shim, which makes a pod's machine, and for the commands that check a node, explain its
//! configuration or change it. In the order in which a shim asks:
//!
//! 1. [`ConfigPath`] is what containerd passes of a handler: a file, and which profile of it;
//! 2. [`Config::load`] reads the file and those that add to it, and reports everything that is wrong
//!    in one go, each with its line;
//! 3. [`Config::pod`] adds what the pod says by [`annotation`]s, as far as its profile allows;
//! 4. [`feature::FeatureFile::require`] refuses what this node is not prepared for;
//! 5. [`sizing`] says how large the machine is, from the pod's limits.
//!
//! [`Config::explain`] says what a key means and where its value comes from. Each key is described
//! once, in `keys.rs`, and everything else asks there.
//!
//! This crate reads files and, of features, writes one. It starts no process, opens no socket and does
//! not look at the host: what that has is passed in.

pub mod annotation;
mod config;
mod explain;
pub mod feature;
mod key;
mod keys;
mod problem;
mod settings;
pub mod sizing;
#[cfg(test)]
mod testing;
mod value;

pub use annotation::{Pod, VolumeLimits};
pub use config::{Config, ConfigPath, DEFAULT_PATH, DEFAULT_PROFILE, Profile};
pub use explain::{Explanation, Value};
pub use key::{Key, Maturity};
pub use problem::{Place, Violation, Violations, nearest};
pub use settings::{Rootfs, Settings, ShareCache};
pub use value::CpuSet;
