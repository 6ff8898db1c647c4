//! What is configured of a profile's pods, with the defaults.
//!
//! Filled in by `key::Kind::store` alone, which has checked each value; read by the shim.

use std::{path::PathBuf, time::Duration};

use pericarp_hypervisor::Wanted;

use crate::{
    feature::Feature,
    key::Key,
    sizing::{CpuRequests, Policy},
    value::CpuSet,
};

/// What a guest may keep of the files of a share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ShareCache {
    /// Nothing: every access asks the host.
    Never,
    /// For a second, as long as nothing is seen to have changed.
    #[default]
    Auto,
    /// For good: nobody else may change the files.
    Always,
}

impl ShareCache {
    /// The names that [`ShareCache::parse`] knows, which `pericarp-fs --cache` takes, too.
    pub const NAMES: [&str; 3] = ["never", "auto", "always"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "never" => Some(Self::Never),
            "auto" => Some(Self::Auto),
            "always" => Some(Self::Always),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Auto => "auto",
            Self::Always => "always",
        }
    }
}

/// How a container's root reaches the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rootfs {
    /// As files: mounted on the host, passed on by `pericarp-fs`.
    #[default]
    Fs,
    /// As a disk: the guest mounts what the snapshotter made, which is a file system on a device
    /// or in a file.
    Block,
}

impl Rootfs {
    /// The names that [`Rootfs::parse`] knows.
    pub const NAMES: [&str; 2] = ["fs", "block"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "fs" => Some(Self::Fs),
            "block" => Some(Self::Block),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fs => "fs",
            Self::Block => "block",
        }
    }
}

/// How a profile's pods run, where a pod says nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// What runs the machine.
    pub hypervisor: Wanted,
    /// Directory of the guest's kernel and agent, or of versions of them; without it, the node's.
    pub assets: Option<PathBuf>,
    /// Directory of the audit stream; none is none.
    pub audit: Option<PathBuf>,
    /// How long a machine may take until its agent answers; without it, as the hypervisor's driver
    /// says.
    pub boot_timeout: Option<Duration>,
    /// How limits become the machine's size.
    pub sizing: Policy,
    /// Whether CPU requests count.
    pub cpu_requests: CpuRequests,
    /// Most virtual CPUs of a machine; without it only the host limits them.
    pub max_vcpus: Option<u32>,
    /// Most bytes of a machine; without it only the host limits them.
    pub max_memory: Option<u64>,
    /// Bytes that a pod's processes may take of the host beside the machine's; none is as usual.
    pub overhead: Option<u64>,
    /// What guests keep of the files of their volumes.
    pub share_cache: ShareCache,
    /// How containers' roots reach the guest.
    pub rootfs: Rootfs,
    /// Requests per second of each volume; none is no limit.
    pub volume_iops: Option<u64>,
    /// Bytes per second of each volume; none is no limit.
    pub volume_bandwidth: Option<u64>,
    /// CPUs of the host that the machine and its sidecars run on; none is all.
    pub cpus: Option<CpuSet>,
    /// Kernel parameters beside the machine's own, words with spaces between them.
    pub kernel_parameters: String,
}

/// Everything that any key can say: of the node, of a profile, or of a pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct Draft {
    pub(crate) settings: Settings,
    /// Of the node.
    pub(crate) features: Vec<Feature>,
    pub(crate) state_directory: Option<PathBuf>,
    /// Of a profile.
    pub(crate) aliases: Option<Vec<String>>,
    pub(crate) annotations: Vec<&'static Key>,
    /// Of a pod.
    pub(crate) vcpus: Option<u32>,
    pub(crate) memory: Option<u64>,
    /// Of one volume of a pod.
    pub(crate) volume_size_limit: Option<u64>,
}
