//! What a pod's processes may take of their host beside the guest's memory: their part of a
//! RuntimeClass's `overhead.podFixed`.
//!
//! Asked by whoever writes RuntimeClasses, and by whoever starts a pod's machine, which writes it
//! down (`record`) for those that compare it with what the processes take.

use pericarp_hypervisor::Driver;

/// Bytes of a mebibyte, in which overheads are written.
pub const MIB: u64 = 1 << 20;
/// The shim and the sidecars, MiB: three times what they take of an idle pod's host, since under load
/// they hold requests. PERF.md, "What does a pod take of its host?".
const SIDECARS: u64 = 32;
/// The monitor, beside the guest's memory, MiB: twice and more.
const MONITOR: u64 = 8;
/// QEMU, likewise: with an emulated CPU it keeps what it has translated.
const QEMU: u64 = 256;

/// Bytes that all processes of a pod may take, where nobody has measured.
#[must_use]
pub fn usual(driver: Driver) -> u64 {
    let machine = match driver {
        Driver::Pericarp => MONITOR,
        Driver::Qemu(_) => QEMU,
    };
    (SIDECARS + machine) * MIB
}

/// The same from what an idle pod's were measured to take: shim and sidecars, and the machine's
/// process. There is as much room for load as in [`usual`]; whole MiB.
#[must_use]
pub fn with_room(sidecars: u64, machine: u64) -> u64 {
    let room = sidecars.saturating_mul(3) + machine.saturating_mul(2);
    room.div_ceil(MIB) * MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_makes_about_what_is_usual() {
        // PERF.md's pod.
        let measured = with_room(10_304 << 10, 3_080 << 10);
        let usual = usual(Driver::Pericarp);
        assert!(measured <= usual && measured > usual / 2, "{measured}");
        assert_eq!(with_room(0, 1), MIB);
        assert_eq!(with_room(MIB, MIB), 5 * MIB);
    }
}
