//! How large a virtual machine is for a command with given limits.
//!
//! The rule: without limits, 1 CPU and 2 GiB. With limits of x CPUs and y bytes, `ceil(1 + x)` CPUs
//! and 2 GiB + y, so that the guest's kernel has room of its own while the command is held to x
//! and y inside. Arithmetic only.

/// CPUs of a machine without limits, and of the guest's own share in one with limits.
const BASE_CPUS: u32 = 1;
/// The same for memory.
pub(crate) const BASE_MEMORY: u64 = 2 << 30;
/// Memory comes in whole units of this.
const UNIT: u64 = pericarp_hypervisor::spec::MEMORY_UNIT;

/// The command's own limits, held inside the guest; the machine is larger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Thousandths of a CPU.
    pub(crate) milli_cpus: Option<u32>,
    /// Bytes.
    pub(crate) memory: Option<u64>,
}

/// Size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: u32,
    pub(crate) memory: u64,
}

/// The machine for a command with these limits.
pub(crate) fn machine(limits: Limits) -> Size {
    let cpus = limits.milli_cpus.map_or(0, |milli| milli.div_ceil(1000));
    let memory = BASE_MEMORY.saturating_add(limits.memory.unwrap_or(0));
    Size {
        cpus: BASE_CPUS.saturating_add(cpus),
        memory: memory.div_ceil(UNIT).saturating_mul(UNIT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_holds_for_every_combination() {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        // (limit in CPUs, limit in bytes) -> (CPUs, bytes)
        let cases: [(Option<f64>, Option<u64>, u32, u64); 12] = [
            (None, None, 1, 2 * GIB),
            (Some(1.0), None, 2, 2 * GIB),
            (Some(0.5), None, 2, 2 * GIB),
            (Some(0.001), None, 2, 2 * GIB),
            (Some(1.001), None, 3, 2 * GIB),
            (Some(2.0), None, 3, 2 * GIB),
            (Some(2.5), None, 4, 2 * GIB),
            (None, Some(512 * MIB), 1, 2 * GIB + 512 * MIB),
            (None, Some(GIB), 1, 3 * GIB),
            (None, Some(16 * MIB + 1), 1, 2 * GIB + 17 * MIB),
            (Some(1.0), Some(2 * GIB), 2, 4 * GIB),
            (Some(3.25), Some(6 * GIB), 5, 8 * GIB),
        ];
        for (cpus, memory, want_cpus, want_memory) in cases {
            let milli_cpus = cpus.map(|cpus| (cpus * 1000.0).round() as u32);
            assert_eq!(
                machine(Limits { milli_cpus, memory }),
                Size {
                    cpus: want_cpus,
                    memory: want_memory
                },
                "limits {cpus:?} CPUs, {memory:?} bytes"
            );
        }
    }

    #[test]
    fn absurd_limits_do_not_overflow() {
        let limits = Limits {
            milli_cpus: Some(u32::MAX),
            memory: Some(u64::MAX),
        };
        assert!(machine(limits).cpus > 4_000_000);
    }
}
