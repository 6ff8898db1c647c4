//! How large a pod's machine is: the policy of the AKS preview, which is one CPU and 2 GiB more than
//! the containers' limits together. Requests do not count.
//!
//! containerd gives those sums as annotations of the pod, and a container without a pod has its own.

use serde_json::Value;

use crate::{
    bundle::{Bundle, Kind},
    error::ShimError,
};

const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Megabytes in place of the policy's 2048, for machines that hold many pods in tests.
const MEMORY_VARIABLE: &str = "PERICARP_SHIM_MEMORY";
const BASE: u64 = 2048;
const MIB: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: u32,
    /// Bytes.
    pub(crate) memory: u64,
}

/// The size of the machine for this pod.
pub(crate) fn of(bundle: &Bundle) -> Result<Size, ShimError> {
    let base = match std::env::var(MEMORY_VARIABLE) {
        Err(_) => BASE,
        Ok(text) => text.parse().ok().filter(|mib| *mib > 0).ok_or_else(|| {
            ShimError::Invalid(format!(
                "{MEMORY_VARIABLE} '{text}': is no number of megabytes"
            ))
        })?,
    };
    let (quota, period, memory) = match bundle.kind() {
        Kind::Sandbox | Kind::Member => {
            let number = |key| bundle.annotation(key).and_then(|text| text.parse().ok());
            (number(QUOTA), number(PERIOD), number(MEMORY))
        }
        Kind::Single => {
            let resources = &bundle.spec["linux"]["resources"];
            let number = |value: &Value| value.as_i64();
            (
                number(&resources["cpu"]["quota"]),
                number(&resources["cpu"]["period"]),
                number(&resources["memory"]["limit"]),
            )
        }
    };
    Ok(size(base, quota, period, memory))
}

/// A limit that is not positive is none.
fn size(base: u64, quota: Option<i64>, period: Option<i64>, memory: Option<i64>) -> Size {
    let positive = |number: Option<i64>| {
        number
            .and_then(|number| u64::try_from(number).ok())
            .filter(|number| *number > 0)
    };
    let limit = match (positive(quota), positive(period)) {
        (Some(quota), Some(period)) => quota.div_ceil(period),
        _ => 0,
    };
    let memory = positive(memory).unwrap_or(0).div_ceil(MIB);
    let most = u64::from(pericarp_hypervisor::spec::MAX_CPUS);
    Size {
        cpus: u32::try_from(limit.saturating_add(1).min(most)).unwrap_or(1),
        memory: base.saturating_add(memory).saturating_mul(MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_come_on_top() {
        let gib = 1 << 30;
        for (quota, period, memory, cpus, bytes) in [
            (None, None, None, 1, 2 * gib),
            (Some(50_000), Some(100_000), None, 2, 2 * gib),
            (Some(150_000), Some(100_000), Some(1 << 30), 3, 3 * gib),
            (Some(200_000), Some(100_000), Some(1), 3, 2 * gib + MIB),
            (Some(-1), Some(100_000), Some(0), 1, 2 * gib),
            (Some(i64::MAX), Some(1), None, 255, 2 * gib),
        ] {
            let size = size(BASE, quota, period, memory);
            assert_eq!(
                (size.cpus, size.memory),
                (cpus, bytes),
                "{quota:?} {memory:?}"
            );
        }
    }
}
