//! `pericarp-vmm` where KVM is backed by hardware: stock kernels, devices with
//! ours and foreign backends, the control socket, and guests and backends that
//! misbehave.
//!
//! Where this machine is no such place, two tests boot a laboratory each and run
//! the others there, half of them in either (`laboratory`): a laboratory has one CPU, and few
//! machines have only one. Here the others pass by themselves; there they count.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod boot;
mod devices;
mod disks;
mod hostile;
mod laboratory;
mod pod;
mod rig;
mod run;

/// What the tests of either half begin with.
const MACHINE: &[&str] = &["boot::"];
const DEVICES: &[&str] = &["devices::", "disks::", "hostile::", "pod::", "run::"];

#[test]
fn all_of_the_machine_passes_in_the_laboratory() {
    laboratory::passes("all_of_the_machine_passes_in_the_laboratory", MACHINE);
}

#[test]
fn all_of_the_devices_passes_in_the_laboratory() {
    laboratory::passes("all_of_the_devices_passes_in_the_laboratory", DEVICES);
}
