//! What `main` makes of the options before anything changes: the disks, the
//! devices, the records of requests in flight. Each mistake of the operator's is
//! one line.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::info;
use pericarp_block::{BlockDevice, DeviceOptions, Disk, Options};
use pericarp_control::Failure;
use pericarp_vhost::{InflightFile, RecordOf, program};

use crate::MAX_THREADS;

pub(crate) fn open_disks(options: &Options) -> Result<Vec<Disk>, Failure> {
    let open = |device: &DeviceOptions| {
        let disk = Disk::open(&device.disk).map_err(|rule| {
            let option = spelled(options, "--blk-file", "--device file");
            Failure::mistake(option, device.disk.file.display(), rule)
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
    opened
        .map(Some)
        .map_err(|rule| Failure::mistake("--inflight-file", path.display(), rule))
}

/// The name of an option as this command line has it.
fn spelled<'a>(options: &Options, single: &'a str, key: &'a str) -> &'a str {
    let only = options.devices.len() == 1 && options.devices[0].id == "disk";
    if only { single } else { key }
}

/// Room in the workers' tables for disks that are added: 255 of one queue.
const MORE_DISKS: u32 = 255 * 5;

/// Descriptors that a worker registers. Where disks may be added there is room
/// for some.
pub(crate) fn table_size(options: &Options) -> u32 {
    let queues = options.devices.iter().map(|d| u32::from(d.queues)).sum();
    let more = options.control.as_ref().map_or(0, |_| MORE_DISKS);
    program::table_size(queues, options.devices.len() as u32, more)
}
