//! What `pericarp-block` is to a process that takes over from it: its disks and
//! sockets, named by what the kernel names them by.

use std::io;

use pericarp_vhost::program::{named, named_at, named_socket};
use pericarp_vhost::{Device, DeviceIdentity, Identity};

use crate::device::BlockDevice;
use crate::options::{DeviceOptions, Options};

/// What tells one device; `socket` is the name of its socket's file.
pub(crate) fn device_identity(
    option: &DeviceOptions,
    device: &BlockDevice,
    socket: String,
) -> io::Result<DeviceIdentity> {
    let file = device.files().first().ok_or(io::ErrorKind::NotFound)?;
    let store = std::fs::File::from(file.try_clone()?).metadata()?;
    Ok(DeviceIdentity {
        id: option.id.clone(),
        store: named(&store),
        socket,
        queues: option.queues,
        queue_size: option.queue_size,
        read_only: option.disk.read_only,
        geometry: device.promises(),
    })
}

/// What this process serves. Sockets with a path and the file for requests in
/// flight must be there.
///
/// # Errors
/// The kernel's answer where one is not, and the path or the device.
pub fn identity<'a>(
    options: &Options,
    devices: impl Iterator<Item = &'a BlockDevice>,
) -> Result<Identity, (String, io::Error)> {
    let device = |(option, device): (&DeviceOptions, &BlockDevice)| {
        let socket = named_socket(&option.socket)?;
        device_identity(option, device, socket).map_err(|e| (option.id.clone(), e))
    };
    let records = options.inflight_file.as_deref().map(named_at);
    let devices = options.devices.iter().zip(devices).map(device);
    Ok(Identity {
        devices: devices.collect::<Result<_, _>>()?,
        records: records.transpose()?,
        state: None,
    })
}
