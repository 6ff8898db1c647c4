//! What a PCI device needs of the hypervisor: interrupts that an eventfd
//! triggers, and eventfds that a write of the guest triggers. Neither wakes a
//! thread of the monitor. [`crate::kvm`] does it; tests have a recorder.

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt, as the guest wrote it (PCI 3.0, 6.8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message {
    /// Where it is written to: the local APIC it is for.
    pub address: u64,
    /// What is written: the vector and how it is delivered.
    pub data: u32,
}

/// Connects devices with the guest's interrupts and writes.
pub trait Wiring: Send + Sync + Debug {
    /// Says what interrupt `gsi` is from now on.
    ///
    /// # Errors
    /// The hypervisor's refusal.
    fn route(&self, gsi: u32, message: Message) -> io::Result<()>;

    /// Has `event` trigger interrupt `gsi`, at once if it has been written to.
    ///
    /// # Errors
    /// The hypervisor's refusal.
    fn connect(&self, gsi: u32, event: &EventFd) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// The hypervisor's refusal.
    fn disconnect(&self, gsi: u32, event: &EventFd) -> io::Result<()>;

    /// Has a write of any length to the guest's `address` write to `event`.
    ///
    /// # Errors
    /// The hypervisor's refusal.
    fn add_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// The hypervisor's refusal.
    fn remove_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Remembers what is wired.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        pub(crate) routes: Mutex<BTreeMap<u32, Message>>,
        pub(crate) connected: Mutex<BTreeSet<u32>>,
        pub(crate) doorbells: Mutex<BTreeSet<u64>>,
    }

    impl Recorder {
        pub(crate) fn new() -> Arc<Self> {
            Arc::default()
        }
    }

    impl Wiring for Recorder {
        fn route(&self, gsi: u32, message: Message) -> io::Result<()> {
            self.routes.lock().unwrap().insert(gsi, message);
            Ok(())
        }

        fn connect(&self, gsi: u32, _: &EventFd) -> io::Result<()> {
            assert!(self.connected.lock().unwrap().insert(gsi), "{gsi} twice");
            Ok(())
        }

        fn disconnect(&self, gsi: u32, _: &EventFd) -> io::Result<()> {
            assert!(self.connected.lock().unwrap().remove(&gsi), "{gsi} is not");
            Ok(())
        }

        fn add_doorbell(&self, address: u64, _: &EventFd) -> io::Result<()> {
            assert!(self.doorbells.lock().unwrap().insert(address));
            Ok(())
        }

        fn remove_doorbell(&self, address: u64, _: &EventFd) -> io::Result<()> {
            assert!(self.doorbells.lock().unwrap().remove(&address));
            Ok(())
        }
    }
}
