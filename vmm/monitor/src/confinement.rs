//! What this program keeps when it gives up the rest: KVM's commands for a machine
//! it has begun, and the sockets of its backends. Used by `main`, before the guest
//! runs and before a backend is listened to.

use pericarp_confine::{Namespaces, Profile};

/// KVM's commands, as `ioctl` numbers (linux/kvm.h). Not among them: anything of
/// devices, nested state, encryption or migration.
#[rustfmt::skip] // in groups
const KVM: &[u32] = &[
    // The system's: CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID.
    0xae01, 0xae03, 0xae04, 0xc008_ae05,
    // A machine's: CREATE_VCPU, SET_USER_MEMORY_REGION, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR,
    // CREATE_IRQCHIP, SET_GSI_ROUTING, IRQFD, IOEVENTFD.
    0xae41, 0x4020_ae46, 0xae47, 0x4008_ae48, 0xae60, 0x4008_ae6a, 0x4020_ae76, 0x4040_ae79,
    // A CPU's: RUN, SET_REGS, GET_SREGS, SET_SREGS, SET_MSRS, SET_CPUID2.
    0xae80, 0x4090_ae82, 0x8138_ae83, 0x4138_ae84, 0x4008_ae89, 0x4008_ae90,
];

/// To reach a backend again, and for the channel it speaks back on.
const CALLS: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_fchdir,
    libc::SYS_socketpair,
];

/// The profile.
pub const PROFILE: Profile<'static> = Profile {
    syscalls: CALLS,
    ioctls: KVM,
    registrations: &[],
    namespaces: Namespaces::ALL,
};
