//! The kernel's hypervisor: a virtual machine with memory and interrupts, and
//! its virtual CPUs. Made by [`crate::machine`]; a guest that resets itself gets a new
//! one, which has no state of the old.

// UNSAFETY: KVM is given addresses of guest memory.
#![expect(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kvm_bindings::{
    KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_cpuid_entry2, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::Ram;
use crate::wiring::{Message, Wiring};

/// Pins of the IOAPIC.
const PINS: u32 = 24;

/// The device of the hypervisor.
pub const DEVICE: &str = "/dev/kvm";

/// Why there is no virtual machine.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    /// It is another interface.
    #[error("{DEVICE} has version {0} of the interface, 12 is wanted")]
    Version(i32),
    /// A part is missing.
    #[error("this kernel's KVM has no {0}")]
    Lacks(&'static str),
    /// A step failed.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn step<T>(
    step: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, KvmError> {
    result.map_err(|e| KvmError::Step {
        step,
        source: io::Error::from_raw_os_error(e.errno()),
    })
}

/// The hypervisor, and the one virtual machine of this process.
#[derive(Debug)]
pub struct Kvm {
    system: kvm_ioctls::Kvm,
    current: RwLock<Option<Arc<VmFd>>>,
    routes: Mutex<BTreeMap<u32, Message>>,
}

impl Kvm {
    /// Opens the hypervisor and sees whether it has what is needed.
    ///
    /// # Errors
    /// It does not.
    pub fn open() -> Result<Arc<Self>, KvmError> {
        let device = std::fs::File::options()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(KvmError::Open)?;
        let system = from_device(device.into());
        if system.get_api_version() != 12 {
            return Err(KvmError::Version(system.get_api_version()));
        }
        for (capability, what) in [
            (Cap::Irqchip, "interrupt controllers"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::UserMemory, "user memory"),
            (Cap::TscDeadlineTimer, "TSC deadline timer"),
        ] {
            if !system.check_extension(capability) {
                return Err(KvmError::Lacks(what));
            }
        }
        if system.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) == 0 {
            return Err(KvmError::Lacks("ioeventfd of any length"));
        }
        Ok(Arc::new(Self {
            system,
            current: RwLock::new(None),
            routes: Mutex::default(),
        }))
    }

    /// What CPUs may be told of this host's.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let supported = self.system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        Ok(step("read the CPU's features", supported)?
            .as_slice()
            .to_vec())
    }

    /// Makes a new virtual machine with this memory; the one before goes when its
    /// CPUs are gone. Everything that was wired is no longer.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn renew(&self, ram: &Ram) -> Result<(), KvmError> {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = None;
        let vm = step("create a virtual machine", self.system.create_vm())?;
        // Without these Intel's CPUs cannot run what has no paging yet.
        step(
            "place the task state",
            vm.set_tss_address(layout::KVM_TSS as usize),
        )?;
        step(
            "place the identity map",
            vm.set_identity_map_address(layout::KVM_IDENTITY),
        )?;
        step("create the interrupt controllers", vm.create_irq_chip())?;
        for (slot, (start, size, address)) in (0..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: size,
                userspace_addr: address,
            };
            // SAFETY: the address is that of a mapping of this size, which `ram` keeps as long as
            // the process runs the machine: the machine owns both and drops this first. What the
            // guest does to it is what shared memory is for.
            step("give the guest its memory", unsafe {
                vm.set_user_memory_region(region)
            })?;
        }
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.clear();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(vm));
        Ok(())
    }

    /// A virtual CPU of the machine.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn create_cpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        let vm = self.vm().map_err(|source| KvmError::Step {
            step: "create a virtual CPU",
            source,
        })?;
        step("create a virtual CPU", vm.create_vcpu(index.into()))
    }

    fn vm(&self) -> io::Result<Arc<VmFd>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let none = || io::Error::other("there is no virtual machine");
        current.clone().ok_or_else(none)
    }
}

fn from_device(device: OwnedFd) -> kvm_ioctls::Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is /dev/kvm's, opened by the only caller, and owned by nobody else
    // from here on.
    unsafe { kvm_ioctls::Kvm::from_raw_fd(device.into_raw_fd()) }
}

fn refused(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Wiring for Kvm {
    fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        // The table is set as a whole.
        let table: Vec<_> = pins().chain(routes.iter().map(message_entry)).collect();
        let table = KvmIrqRouting::from_entries(&table)
            .map_err(|_| io::Error::other("too many interrupts"))?;
        self.vm()?.set_gsi_routing(&table).map_err(refused)
    }

    fn connect(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        self.vm()?.register_irqfd(event, gsi).map_err(refused)
    }

    fn disconnect(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        self.vm()?.unregister_irqfd(event, gsi).map_err(refused)
    }

    fn add_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let vm = self.vm()?;
        vm.register_ioevent(event, &address, NoDatamatch)
            .map_err(refused)
    }

    fn remove_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let vm = self.vm()?;
        vm.unregister_ioevent(event, &address, NoDatamatch)
            .map_err(refused)
    }
}

/// The IOAPIC's pins, each its own interrupt.
fn pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    (0..PINS).map(|pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = pin;
        entry
    })
}

fn message_entry((gsi, message): (&u32, &Message)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: *gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
