//! The state in which the first CPU enters the kernel: 32-bit protected mode,
//! flat segments, no paging, as both boot protocols want it (PVH: Xen's
//! docs/misc/pvh.pandoc; Linux: Documentation/arch/x86/boot.rst, "32-bit boot
//! protocol"). The other CPUs wait in KVM's local APICs until the kernel starts
//! them. Called by [`crate::machine`].

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{KvmError, step};
use crate::layout;
use crate::load::Entry;
use crate::memory::Ram;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Enabled, and memory is write-back where nothing else is said.
const MTRR_WRITE_BACK: u64 = 0x806;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
/// Always one.
const FLAGS: u64 = 2;

/// Code that may be read, and was.
const CODE: u8 = 0xb;
/// Data that may be written, and was.
const DATA: u8 = 0x3;
/// A 32-bit task that runs.
const TASK: u8 = 0xb;

/// Tells a CPU what it is. Before anything else: some registers exist only then.
///
/// # Errors
/// The kernel's refusal.
pub fn identify(cpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let entries = CpuId::from_entries(entries).map_err(|_| KvmError::Lacks("room for CPUID"))?;
    step("set the CPU's features", cpu.set_cpuid2(&entries))?;
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    for (index, data) in [
        (MSR_MISC_ENABLE, FAST_STRINGS),
        (MSR_MTRR_DEFAULT, MTRR_WRITE_BACK),
    ] {
        // One at a time: what a CPU does not have is passed over.
        let list = Msrs::from_entries(&[msr(index, data)])
            .map_err(|_| KvmError::Lacks("room for registers"))?;
        step("set the CPU's registers", cpu.set_msrs(&list))?;
    }
    Ok(())
}

/// Sets the first CPU before the kernel.
///
/// # Errors
/// The kernel's refusal.
pub fn enter(cpu: &VcpuFd, ram: &Ram, entry: Entry) -> Result<(), KvmError> {
    let mut special = step("read the CPU's registers", cpu.get_sregs())?;
    let (code, data, task) = (segment(1, CODE, 1), segment(2, DATA, 1), task());
    let table = [0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (index, entry) in (0..).zip(table) {
        let at = GuestAddress(layout::GDT + 8 * index);
        ram.mmap()
            .write_obj(entry, at)
            .map_err(|e| KvmError::Step {
                step: "write the CPU's tables",
                source: std::io::Error::other(e),
            })?;
    }
    special.cs = code;
    (special.ds, special.es, special.fs) = (data, data, data);
    (special.gs, special.ss) = (data, data);
    special.tr = task;
    special.gdt.base = layout::GDT;
    special.gdt.limit = (8 * table.len() - 1) as u16;
    (special.idt.base, special.idt.limit) = (0, 0);
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION;
    (special.cr3, special.cr4, special.efer) = (0, 0, 0);
    step("set the CPU's registers", cpu.set_sregs(&special))?;
    let regs = kvm_regs {
        rip: entry.rip,
        rbx: entry.rbx,
        rsi: entry.rsi,
        rflags: FLAGS,
        ..kvm_regs::default()
    };
    step("set the CPU's registers", cpu.set_regs(&regs))
}

/// All 4 GiB.
fn segment(index: u16, kind: u8, code_or_data: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: code_or_data,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        db: 0,
        g: 0,
        ..segment(3, TASK, 0)
    }
}

/// As it stands in the table (Intel SDM 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = match segment.g {
        0 => segment.limit,
        _ => segment.limit >> 12,
    };
    let access = u64::from(segment.type_)
        | (u64::from(segment.s) << 4)
        | (u64::from(segment.dpl) << 5)
        | (u64::from(segment.present) << 7)
        | (u64::from(segment.l) << 13)
        | (u64::from(segment.db) << 14)
        | (u64::from(segment.g) << 15);
    let (base, limit) = (segment.base, u64::from(limit));
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | (access << 40)
        | ((limit & 0xf_0000) << 32)
        | ((base & 0xff00_0000) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_as_the_cpu_reads_them() {
        assert_eq!(descriptor(&segment(1, CODE, 1)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(2, DATA, 1)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
