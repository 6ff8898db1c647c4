//! `pericarp-vmm`, the monitor of one virtual machine: it starts an unmodified
//! kernel, and knows one kind of device, a vhost-user backend behind virtio-pci.
//!
//! ```text
//!            KVM ── irqfd, ioeventfd ──┐
//!             │                        │  (no thread of ours between them)
//!   cpu::thread ── pci::bus ── virtio::function ── backend::actor ── a backend
//!             └─── ports                           (one thread for each device)
//! ```
//!
//! The guest is hostile: every register it writes is checked where it is read, and
//! what it does wrong is counted and costs nobody but itself. Rings are never looked
//! into; the addresses of a ring are checked to be guest memory before a
//! backend is told of them. Everything but [`kvm`] and [`cpu`] is tested without
//! a hypervisor, by [`wiring::Wiring`] and [`virtio::Back`].
//!
//! Used by the program `pericarp-vmm`, which `pericarp-hypervisor` starts.

pub mod acpi;
pub mod backend;
pub mod confinement;
pub mod control;
pub mod cpu;
pub mod devices;
mod event;
pub mod kvm;
pub mod layout;
pub mod load;
pub mod machine;
pub mod memory;
pub mod options;
pub mod pci;
pub mod ports;
pub mod terminal;
pub mod virtio;
pub mod wiring;
