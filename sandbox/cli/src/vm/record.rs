//! What there is to know of a run's machine, in the form that pods have (`pericarp_pod::record`):
//! its processes, and who counts what is done with its devices. For `pericarp metrics` and `top`.
//!
//! Kept by `pod`, which writes it again when a sidecar was replaced.

use std::path::PathBuf;

use pericarp_pod::{
    Lasting, Sidecar, overhead,
    record::{DeviceKind, DeviceRecord, MACHINE, PodRecord, ProcessRecord},
};

use crate::{input::check::VmPlan, registry::Record, report, rundir::RunDir};

/// The namespace of machines that no containerd has.
pub(crate) const NAMESPACE: &str = "";

/// The record and where it is.
#[derive(Debug)]
pub(crate) struct Told {
    directory: PathBuf,
    record: PodRecord,
}

impl Told {
    /// Of a machine that is about to be made, with these devices.
    pub(super) fn new(run_dir: &RunDir, plan: &VmPlan, devices: Vec<DeviceRecord>) -> Self {
        let directory = run_dir.path().to_owned();
        let run = Record::read(&directory).unwrap_or_default();
        let record = PodRecord {
            namespace: NAMESPACE.into(),
            id: run.id,
            name: run.name,
            created: run.created,
            shim: std::process::id(),
            hypervisor: plan.choice.to_string(),
            vcpus: plan.size.cpus,
            memory: plan.size.memory,
            assets: plan.assets.directory.clone(),
            assets_version: plan.assets.version().map(str::to_owned),
            kernel: plan.assets.release(),
            overhead: overhead::usual(plan.choice.driver),
            devices,
            ..PodRecord::default()
        };
        Self { directory, record }
    }

    /// Writes it with the processes that there are now. A run goes on without.
    pub(super) fn tell(&mut self, machine: u32, sidecars: &[Sidecar], lasting: &[Lasting]) {
        let process = |role: &str, pid| ProcessRecord {
            role: role.to_owned(),
            pid,
            device: String::new(),
        };
        let all = [process(MACHINE, machine)]
            .into_iter()
            .chain(sidecars.iter().map(|one| process(one.name(), one.pid())))
            .chain(lasting.iter().map(|one| process(one.name(), one.pid())));
        self.record.processes = all.collect();
        if let Err(error) = self.record.write(&self.directory) {
            report::warn(&format!(
                "`pericarp top` does not see this machine as it is: {error}"
            ));
        }
    }
}

/// A device whose sidecar answers at a socket of its program's name in the run's directory.
pub(super) fn device(id: &str, kind: DeviceKind, volume: &str) -> DeviceRecord {
    DeviceRecord {
        id: id.to_owned(),
        kind,
        volume: volume.to_owned(),
        control: control(kind).to_owned(),
    }
}

/// The control socket of the sidecar that serves all such devices, in the run's directory.
pub(super) fn control(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Disk => "block.control",
        DeviceKind::Share => "fs.control",
        DeviceKind::Card => "net.control",
    }
}
