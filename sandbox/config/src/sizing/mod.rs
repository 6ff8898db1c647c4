//! How large a pod's machine is, from the limits of its containers.
//!
//! Asked by the shim once for each pod, before its machine is made. Integer arithmetic only: the
//! same pod has the same machine everywhere. [`Resources`] is what containerd says of the pod; what
//! it cannot say (memory requests, the pod's overhead) is no part of any policy.
//!
//! With x for the sum of the CPU limits and y for that of the memory limits:
//!
//! | policy | virtual CPUs | memory | nothing limited |
//! |---|---|---|---|
//! | `aks-preview` | `ceil(1 + x)` | 2 GiB + y | 1, 2 GiB |
//! | `aks-ga` | `ceil(x)` | y, at least 128 MiB | 1, 512 MiB |
//! | `kata` | `ceil(x + 0.2)` | y + 32 MiB | 1, 2 GiB |
//!
//! A limit that is missing alone counts as 0 under `aks-preview`, and has the default of the last
//! column under `aks-ga`. Under `kata` x is 0 then, which makes one CPU, and memory the default: Kata
//! itself gives 32 MiB, in which nothing boots. Memory is rounded up to a whole MiB. A machine needs
//! 128 MiB to boot: a smaller one is refused under `aks-ga`, where the limit is the machine's size,
//! and raised under `kata`, where the container is held to its limit inside.

mod resources;

use pericarp_hypervisor::spec::{MAX_CPUS, MEMORY_UNIT, MIN_MEMORY};
use thiserror::Error;

pub use resources::{CPU_PERIOD, CPU_QUOTA, CPU_SHARES, MEMORY, Resources};

use crate::value::size;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// What AKS's preview adds to limits, and all that a pod without limits has.
const PREVIEW_MEMORY: u64 = 2 * GIB;
/// What AKS gives a pod without a memory limit.
const GA_MEMORY: u64 = 512 * MIB;
/// What Kata's profiles of 4.1 add to limits, and what they give a pod without any.
const KATA_MILLI_CPUS: u64 = 200;
const KATA_OVERHEAD: u64 = 32 * MIB;
const KATA_MEMORY: u64 = 2 * GIB;

/// How limits become a machine's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// As the preview of AKS Pod Sandboxing has it: the machine has room beside the limits.
    #[default]
    AksPreview,
    /// As AKS Pod Sandboxing has it now: the machine is as large as the limits.
    AksGa,
    /// As Kata Containers has it: the limits and a fixed overhead.
    Kata,
}

impl Policy {
    /// Every policy's name.
    pub const NAMES: [&str; 3] = ["aks-preview", "aks-ga", "kata"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "aks-preview" => Some(Self::AksPreview),
            "aks-ga" => Some(Self::AksGa),
            "kata" => Some(Self::Kata),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AksPreview => "aks-preview",
            Self::AksGa => "aks-ga",
            Self::Kata => "kata",
        }
    }

    /// Bytes of the smallest machine this makes.
    #[must_use]
    pub fn least_memory(self) -> u64 {
        match self {
            Self::AksPreview => PREVIEW_MEMORY,
            Self::AksGa | Self::Kata => MIN_MEMORY,
        }
    }

    /// Bytes that a machine may have beside the limits of its containers.
    #[must_use]
    pub fn beside_limits(self) -> u64 {
        match self {
            Self::AksPreview => PREVIEW_MEMORY,
            Self::AksGa => 0,
            Self::Kata => KATA_OVERHEAD,
        }
    }

    /// Whether CPU requests may count: the two of AKS ignore them by definition.
    #[must_use]
    pub fn may_count_requests(self) -> bool {
        self == Self::Kata
    }

    /// CPUs of the machine for x in thousandths.
    fn cpus(self, milli: Option<u64>) -> u64 {
        let whole = |milli: u64| milli.div_ceil(1000).max(1);
        match self {
            Self::AksPreview => whole(milli.unwrap_or(0).saturating_add(1000)),
            Self::AksGa => whole(milli.unwrap_or(0)),
            Self::Kata => whole(milli.unwrap_or(0).saturating_add(KATA_MILLI_CPUS)),
        }
    }

    /// Bytes of the machine for y; not yet rounded.
    fn memory(self, limit: Option<u64>) -> u64 {
        match (self, limit) {
            (Self::AksPreview, limit) => PREVIEW_MEMORY.saturating_add(limit.unwrap_or(0)),
            (Self::AksGa, limit) => limit.unwrap_or(GA_MEMORY),
            (Self::Kata, Some(limit)) => limit.saturating_add(KATA_OVERHEAD).max(MIN_MEMORY),
            (Self::Kata, None) => KATA_MEMORY,
        }
    }
}

/// Whether what containers request of the CPU counts as if it were their limit, where that is more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CpuRequests {
    /// Only limits count.
    #[default]
    Ignored,
    /// The larger of limit and request counts, if the policy allows it.
    Counted,
}

impl CpuRequests {
    /// The names that [`CpuRequests::parse`] knows.
    pub const NAMES: [&str; 2] = ["ignored", "counted"];

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "ignored" => Some(Self::Ignored),
            "counted" => Some(Self::Counted),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignored => "ignored",
            Self::Counted => "counted",
        }
    }
}

/// What this host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that are online.
    pub cpus: u32,
    /// Bytes of memory in all.
    pub memory: u64,
}

/// What decides a machine's size beside the pod's limits: the configuration, and what the pod asks
/// for in words of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizing {
    /// How limits become a size.
    pub policy: Policy,
    /// Whether requests count.
    pub requests: CpuRequests,
    /// Most virtual CPUs of a machine; without it only the host limits them.
    pub max_vcpus: Option<u32>,
    /// Most bytes of a machine; without it only the host limits them.
    pub max_memory: Option<u64>,
    /// Virtual CPUs in place of the policy's.
    pub vcpus: Option<u32>,
    /// Bytes in place of the policy's.
    pub memory: Option<u64>,
}

/// Size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSize {
    /// Virtual CPUs, 1 to 255.
    pub vcpus: u32,
    /// Bytes, a whole number of MiB, at least 128 of them.
    pub memory: u64,
}

/// A machine that this host cannot have, or must not.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SizeError {
    /// What the containers may use is more than there is.
    #[error(
        "the pod's {what} is {}, and this host has {host} CPUs; lower {field}", cpus(*.milli)
    )]
    Cpus {
        /// Limit or request.
        what: &'static str,
        /// Thousandths of a CPU.
        milli: u64,
        /// CPUs of the host.
        host: u32,
        /// The field of the pod.
        field: &'static str,
    },
    /// More virtual CPUs than allowed.
    #[error("the machine would have {vcpus} virtual CPUs, and {most} are allowed ({by}); {cure}")]
    Vcpus {
        /// Virtual CPUs it would have.
        vcpus: u64,
        /// The most allowed.
        most: u32,
        /// By what.
        by: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// More memory than there is or is allowed.
    #[error("the machine would have {}, and {} are allowed ({by}); {cure}", size(*.memory), size(*.most))]
    Memory {
        /// Bytes it would have.
        memory: u64,
        /// The most allowed, bytes.
        most: u64,
        /// By what.
        by: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// Less memory than a kernel boots with.
    #[error(
        "the pod's memory limit is {}, and under '{}' the machine has no more than that, with its \
         kernel in it; set resources.limits.memory to at least {}",
        size(*.memory), .policy.name(), size(MIN_MEMORY)
    )]
    Small {
        /// Bytes it would have.
        memory: u64,
        /// The policy that says so.
        policy: Policy,
    },
}

fn cpus(milli: u64) -> String {
    match milli % 1000 {
        0 => format!("{} CPUs", milli / 1000),
        _ => format!("{milli}m CPUs"),
    }
}

/// Virtual CPUs and memory that an annotation names, and where.
const NAMED_VCPUS: &str = "lower the annotation for vcpus";
const NAMED_MEMORY: &str = "lower the annotation for memory";
const LOWER_VCPUS: &str = "lower resources.limits.cpu";
const LOWER_MEMORY: &str = "lower resources.limits.memory";
const BY_HOST: &str = "what this host has";

impl Sizing {
    /// The machine for a pod with these resources on this host.
    ///
    /// A limit above what the host has is refused. Under `aks-preview` and `kata` a machine may have
    /// one virtual CPU more than the host has, which is the guest's own share.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it.
    pub fn machine(
        &self,
        resources: &Resources,
        host: Host,
    ) -> Result<MachineSize, Vec<SizeError>> {
        let mut errors = Vec::new();
        let vcpus = self.vcpus(resources, host, &mut errors);
        let memory = self.memory(resources, host, &mut errors);
        if errors.is_empty() {
            Ok(MachineSize { vcpus, memory })
        } else {
            Err(errors)
        }
    }

    fn vcpus(&self, resources: &Resources, host: Host, errors: &mut Vec<SizeError>) -> u32 {
        let request = (self.requests == CpuRequests::Counted && self.policy.may_count_requests())
            .then_some(resources.milli_cpus_requested)
            .flatten();
        for (what, milli, field) in [
            ("CPU limit", resources.milli_cpus, "resources.limits.cpu"),
            ("CPU request", request, "resources.requests.cpu"),
        ] {
            let most = u64::from(host.cpus).saturating_mul(1000);
            if let Some(milli) = milli.filter(|milli| *milli > most) {
                errors.push(SizeError::Cpus {
                    what,
                    milli,
                    host: host.cpus,
                    field,
                });
                return 0;
            }
        }
        let derived = self.policy.cpus(resources.milli_cpus.max(request));
        let (vcpus, cure) = match self.vcpus {
            Some(named) => (u64::from(named), NAMED_VCPUS),
            None => (derived, LOWER_VCPUS),
        };
        let named_most = self.vcpus.map(|_| (host.cpus, BY_HOST));
        let configured = self.max_vcpus.map(|most| (most, "max-vcpus"));
        let possible = Some((MAX_CPUS, "what a machine can have"));
        let broken = [named_most, configured, possible]
            .into_iter()
            .flatten()
            .filter(|(most, _)| vcpus > u64::from(*most))
            .min_by_key(|(most, _)| *most);
        if let Some((most, by)) = broken {
            errors.push(SizeError::Vcpus {
                vcpus,
                most,
                by,
                cure,
            });
        }
        // Exact unless refused.
        u32::try_from(vcpus).unwrap_or(u32::MAX)
    }

    fn memory(&self, resources: &Resources, host: Host, errors: &mut Vec<SizeError>) -> u64 {
        let (memory, cure) = match self.memory {
            Some(named) => (named, NAMED_MEMORY),
            None => (self.policy.memory(resources.memory), LOWER_MEMORY),
        };
        // A machine without a memory limit is no smaller for a lower one.
        let cure = match (self.memory, resources.memory) {
            (None, None) => "use a policy with smaller machines, or a larger host",
            _ => cure,
        };
        if memory < MIN_MEMORY {
            errors.push(SizeError::Small {
                memory,
                policy: self.policy,
            });
            return 0;
        }
        let memory = memory.div_ceil(MEMORY_UNIT).saturating_mul(MEMORY_UNIT);
        let configured = self.max_memory.map(|most| (most, "max-memory"));
        let broken = [Some((host.memory, BY_HOST)), configured]
            .into_iter()
            .flatten()
            .filter(|(most, _)| memory > *most)
            .min_by_key(|(most, _)| *most);
        if let Some((most, by)) = broken {
            errors.push(SizeError::Memory {
                memory,
                most,
                by,
                cure,
            });
        }
        memory
    }
}

#[cfg(test)]
mod tests;
