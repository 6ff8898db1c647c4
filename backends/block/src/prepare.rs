//! What `main` makes of the options before anything changes: whether sockets
//! can be bound and CPUs used, the disks, the devices, the records of requests
//! in flight. Each mistake of the operator's is one line.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use log::{info, warn};
use pericarp_block::{BadOption, BlockDevice, DeviceOptions, Disk, Options, SocketOption};
use pericarp_vhost::{Endpoint, InflightFile, Limits, Oversight, RecordOf};

use crate::{Failure, MAX_THREADS};

pub(crate) fn check_sockets(options: &Options) -> Result<(), Failure> {
    for device in &options.devices {
        if let SocketOption::Path(path) = &device.socket {
            Endpoint::check(path).map_err(|e| Failure::input(socket_mistake(device, &e)))?;
        }
    }
    if let Some(path) = &options.control {
        Endpoint::check(path).map_err(|e| Failure::input(control_mistake(path, &e)))?;
    }
    Ok(())
}

/// A queue takes four descriptors, and the default limit is 1024.
pub(crate) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        warn!("the limit of open descriptors stays as it is: {errno}");
    }
}

/// Every CPU a worker is to be pinned to must be one this process may use.
pub(crate) fn check_cpus(cpus: &[usize]) -> Result<(), Failure> {
    let mine = rustix::thread::sched_getaffinity(None)
        .map_err(|e| Failure::run_time(format_args!("CPU affinity: {e}")))?;
    match cpus.iter().find(|&&cpu| !mine.is_set(cpu)) {
        None => Ok(()),
        Some(cpu) => Err(Failure::input(BadOption {
            option: "--cpus".to_owned(),
            value: cpu.to_string(),
            rule: "not a CPU this process may use: leave it out".to_owned(),
        })),
    }
}

pub(crate) fn open_disks(options: &Options) -> Result<Vec<Disk>, Failure> {
    let open = |device: &DeviceOptions| {
        let disk = Disk::open(&device.disk).map_err(|rule| {
            Failure::input(BadOption {
                option: spelled(options, "--blk-file", "--device file").to_owned(),
                value: device.disk.file.display().to_string(),
                rule: rule.to_string(),
            })
        })?;
        if disk.needs_threads() {
            info!(
                "{}: its file system knows no I/O without waiting; \
                 the kernel may use {MAX_THREADS} threads for each worker",
                device.disk.file.display()
            );
        }
        Ok(disk)
    };
    options.devices.iter().map(open).collect()
}

pub(crate) fn make_devices(options: &Options, disks: Vec<Disk>) -> Vec<Arc<BlockDevice>> {
    let make = |(device, disk): (&DeviceOptions, Disk)| {
        let (queues, size) = (device.queues, device.queue_size);
        Arc::new(BlockDevice::new(disk, &device.serial, queues, size))
    };
    options.devices.iter().zip(disks).map(make).collect()
}

/// The file for requests in flight, if one was asked for.
pub(crate) fn open_records(
    options: &Options,
    inherited: Option<(OwnedFd, OwnedFd)>,
) -> Result<Option<InflightFile>, Failure> {
    let Some(path) = &options.inflight_file else {
        return Ok(None);
    };
    let devices: Vec<RecordOf<'_>> = options
        .devices
        .iter()
        .map(|device| RecordOf {
            id: &device.id,
            store: &device.disk.file,
            queues: device.queues,
            queue_size: device.queue_size,
        })
        .collect();
    let opened = match inherited {
        None => InflightFile::open(path, &devices),
        Some(descriptors) => InflightFile::inherit(path, descriptors, &devices),
    };
    opened.map(Some).map_err(|rule| {
        Failure::input(BadOption {
            option: "--inflight-file".to_owned(),
            value: path.display().to_string(),
            rule: rule.to_string(),
        })
    })
}

/// The name of an option as this command line has it.
fn spelled<'a>(options: &Options, single: &'a str, key: &'a str) -> &'a str {
    let only = options.devices.len() == 1 && options.devices[0].id == "disk";
    if only { single } else { key }
}

pub(crate) fn socket_mistake(device: &DeviceOptions, rule: &dyn Display) -> BadOption {
    let (option, value) = match &device.socket {
        SocketOption::Path(path) => ("--socket-path", path.display().to_string()),
        SocketOption::Descriptor(n) => ("--fd", n.to_string()),
    };
    BadOption {
        option: option.to_owned(),
        value,
        rule: rule.to_string(),
    }
}

pub(crate) fn control_mistake(path: &Path, rule: &dyn Display) -> BadOption {
    BadOption {
        option: "--control-path".to_owned(),
        value: path.display().to_string(),
        rule: rule.to_string(),
    }
}

/// What is counted and limited; `None` where nobody asks for either.
pub(crate) fn oversee(
    options: &Options,
    devices: &[Arc<BlockDevice>],
) -> Vec<Option<Arc<Oversight>>> {
    let both = options.devices.iter().zip(devices);
    both.map(|(device, block)| {
        let oversight = Oversight::new(&device.limits);
        if options.control.is_some() {
            Some(Arc::new(oversight.counting(&**block)))
        } else {
            (device.limits != Limits::default()).then(|| Arc::new(oversight))
        }
    })
    .collect()
}

/// Room in the workers' tables for disks that are added: 255 of one queue.
const MORE_DISKS: u32 = 255 * 5;

/// Descriptors that a worker registers: four for each queue and one for each
/// disk. Where disks may be added there is room for some, as far as the limit
/// of open files goes, which is that of the table, too.
pub(crate) fn table_size(options: &Options) -> u32 {
    let queues: u32 = options.devices.iter().map(|d| u32::from(d.queues)).sum();
    let needed = 4 * queues + options.devices.len() as u32;
    if options.control.is_none() {
        return needed;
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = u32::try_from(limit.unwrap_or(u64::MAX)).unwrap_or(u32::MAX);
    needed + MORE_DISKS.min(limit.saturating_sub(needed) / 2)
}
