//! Where everything lies in the guest's physical address space and which ports
//! it has. Used by all parts that tell the guest or answer it; ARCHITECTURE.md
//! draws the same map.

/// The global descriptor table of the first CPU.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const START_INFO: u64 = 0x6000;
/// The one module entry of it, the initramfs.
pub const MODULES: u64 = 0x6040;
/// Its memory map, or the zero page of the Linux boot protocol.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line of a kernel of protocol 2.06 and later, without its end.
pub const COMMAND_LINE_MAX: usize = 2047;
/// End of the memory below the tables.
pub const LOW_END: u64 = 0x9_fc00;
/// The ACPI tables.
pub const ACPI: u64 = 0xa_0000;
/// The root pointer, in the area that is searched for it.
pub const RSDP: u64 = 0xe_0000;
/// Where a CPU begins in real mode, F000:FFF0, and a kernel jumps to that knows no other
/// way to reset.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Memory that the kernel may use as it likes.
pub const HIGH: u64 = 0x10_0000;

/// End of the memory below the hole for devices.
pub const HOLE: u64 = 0xc000_0000;
/// The memory that has no place below it goes on here.
pub const ABOVE: u64 = 0x1_0000_0000;

/// PCI configuration space, bus 0 alone.
pub const ECAM: u64 = 0xe000_0000;
/// 32 devices of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// A window for 32-bit memory of PCI devices; ours have none.
pub const WINDOW32: u64 = 0xd000_0000;
/// Its size.
pub const WINDOW32_SIZE: u64 = 0x1000_0000;
/// The IOAPIC that KVM emulates.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs that KVM emulates.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel CPUs keeps a task state in.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that it keeps an identity map in.
pub const KVM_IDENTITY: u64 = 0xfffb_c000;

/// Where 64-bit memory of PCI devices begins. The CPU must have 40 address bits.
pub const WINDOW64: u64 = 0x40_0000_0000;
/// Its size: a slot for each of the 32 devices of the bus.
pub const WINDOW64_SIZE: u64 = 32 * BAR_SLOT;
/// What one device has of it.
pub const BAR_SLOT: u64 = 0x10_0000;

/// First port of the 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its ports.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// Sleep control, sleep status and reset, a byte.
pub const SLEEP_PORT: u16 = 0x600;
/// What is written there to power off: sleep type 5 and the enable bit.
pub const SLEEP_S5: u8 = (5 << 2) | 0x20;
/// What is written there to reset.
pub const SLEEP_RESET: u8 = 1;
/// Marks of the boot's progress, a byte.
pub const MARK_PORT: u16 = 0x80;

/// First interrupt number beyond the IOAPIC's pins, for message interrupts.
pub const FIRST_MESSAGE: u32 = 24;

/// Most memory a guest may have: all of it lies below the 64-bit window.
pub const MEMORY_MAX: u64 = WINDOW64 - ABOVE;
/// Most virtual CPUs: their APIC ids fit 8 bits, and 255 is for all.
pub const CPUS_MAX: u8 = 254;
