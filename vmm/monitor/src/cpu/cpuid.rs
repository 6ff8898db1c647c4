//! What `CPUID` says in the guest: what KVM can give of the host's CPU, with the
//! topology of this machine, and without what a pod has no use for. Called by
//! [`crate::machine`] for each CPU.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const MULTITHREADING: u32 = 1 << 28;
/// Kinds of levels in leaf 0xb.
const THREADS: u32 = 1;
const CORES: u32 = 2;

/// Address bits that the window of 64-bit device memory needs.
const ADDRESS_BITS: u32 = 39;

/// The entries for CPU `index` of `count`. CPUs are cores of one package, with
/// their index as APIC id.
pub fn entries(supported: &[kvm_cpuid_entry2], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let (id, cpus) = (u32::from(index), u32::from(count));
    let bits = bits_for(count);
    let mut entries = Vec::with_capacity(supported.len());
    for entry in supported {
        let mut entry = *entry;
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | (cpus << 16) | (id << 24);
                // The guest's kernel looks for no other timer with these two.
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                // No virtual machines in virtual machines.
                entry.ecx &= !VMX;
                if count > 1 {
                    entry.edx |= MULTITHREADING;
                }
            }
            // Caches: cores in the package.
            0x4 if entry.eax & 0x1f != 0 => {
                let cores = (1 << bits) - 1;
                entry.eax = (entry.eax & !(0x3f << 26)) | ((cores & 0x3f) << 26);
            }
            // The levels are made below. No counters: they are a way to watch the neighbours.
            0xb | 0x1f => continue,
            0xa | 0x8000_0022 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            0x8000_0001 => entry.ecx &= !SVM,
            // AMD: cores less one, and the bits of the id that number them.
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | (bits << 12);
            }
            // SVM's own.
            0x8000_000a => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
            }
            _ => {}
        }
        entries.push(entry);
    }
    let highest = supported.iter().find(|entry| entry.function == 0);
    if highest.is_some_and(|entry| entry.eax >= 0xb) {
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | (kind << 8),
            edx: id,
            ..kvm_cpuid_entry2::default()
        };
        entries.push(level(0, 0, 1, THREADS));
        entries.push(level(1, bits, cpus, CORES));
        entries.push(level(2, 0, 0, 0));
    }
    entries
}

/// True where device memory is within the CPU's reach.
pub fn reaches_devices(supported: &[kvm_cpuid_entry2]) -> bool {
    let sizes = supported.iter().find(|entry| entry.function == 0x8000_0008);
    sizes.is_some_and(|entry| entry.eax & 0xff >= ADDRESS_BITS)
}

/// Bits that number so many CPUs.
fn bits_for(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: 0xffff_ffff,
            edx: 0xffff_ffff,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn of(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|entry| entry.function == function && entry.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} twice");
        entry
    }

    #[test]
    fn all_leaves_agree_on_who_a_cpu_is() {
        let supported: Vec<_> = [
            0,
            1,
            4,
            0xa,
            0xb,
            0x1f,
            0x8000_0001,
            0x8000_0008,
            0x8000_001e,
        ]
        .map(leaf)
        .into();
        let entries = entries(&supported, 3, 6);
        assert_eq!(of(&entries, 1, 0).ebx >> 16, 0x0306);
        assert_eq!(of(&entries, 0xb, 0).edx, 3);
        let cores = of(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!(of(&entries, 0xb, 2).ecx, 2);
        assert_eq!(of(&entries, 0x8000_001e, 0).eax, 3);
        assert_eq!(of(&entries, 0x8000_0008, 0).ecx & 0xf0ff, 0x3005);
        assert_eq!(of(&entries, 4, 0).eax >> 26, 7);
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
    }

    #[test]
    fn guests_have_no_guests_and_no_counters() {
        let supported: Vec<_> = [1, 0xa, 0x8000_0001, 0x8000_000a].map(leaf).into();
        let entries = entries(&supported, 0, 1);
        let first = of(&entries, 1, 0);
        assert_eq!(first.ecx & VMX, 0);
        assert_eq!(first.ecx & HYPERVISOR, HYPERVISOR);
        assert_eq!(of(&entries, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(of(&entries, 0xa, 0).eax, 0);
        assert_eq!(of(&entries, 0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn device_memory_must_be_within_reach() {
        let end = layout::WINDOW64 + layout::WINDOW64_SIZE;
        assert!(end <= 1 << ADDRESS_BITS);
        let mut sizes = leaf(0x8000_0008);
        sizes.eax = 39;
        assert!(reaches_devices(&[sizes]));
        sizes.eax = 36;
        assert!(!reaches_devices(&[sizes]) && !reaches_devices(&[]));
    }
}
