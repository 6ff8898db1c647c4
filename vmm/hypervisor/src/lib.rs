//! Virtual machines described once, run by the driver this host can use.
//!
//! A caller fills in a [`MachineSpec`], asks [`select()`] which driver serves this host, and starts
//! the machine through the [`Hypervisor`] trait. What comes back is a [`Machine`]: a child process
//! with a console of bounded size, which can be paused and killed. Called by `pericarp run` and by
//! the test rigs. This crate knows nothing about what runs in the guest or how one talks to it,
//! about disk images or about the vhost-user backends beyond their socket paths.
//!
//! Whatever happens, a machine has one end: it powered off, or one [`MachineError`] says what went
//! wrong, and [`Machine::console_lines`] has the last lines of the guest's console. Dropping a
//! [`Machine`] kills and reaps its process; when the caller itself is killed, the kernel kills the
//! process (see [`process`]).

pub mod console;
pub mod machine;
mod monitor;
pub mod pericarp;
pub mod process;
pub mod qemu;
mod remote;
pub mod ring;
pub mod select;
pub mod spec;
mod walls;

pub use console::ConsoleSpec;
pub use machine::{Hypervisor, Machine, MachineError};
pub use process::{Confinement, Process};
pub use select::{Choice, Driver, HostFacts, Wanted, select};
pub use spec::{CardSpec, DiskSpec, MAX_CARDS, MachineSpec, ShareSpec, SpecError, VsockSpec};
