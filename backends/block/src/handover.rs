//! What `pericarp-block` is to a process that takes over from it: its disks and
//! sockets, named by what the kernel names them by.
//!
//! `main` makes it before the program confines itself, in the old process and in
//! the new one; the two are compared.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pericarp_vhost::{Device, DeviceIdentity, Identity};

use crate::device::BlockDevice;
use crate::options::{DeviceOptions, Options, SocketOption};

pub(crate) fn named(found: &Metadata) -> String {
    format!("{:x}:{:x}:{:x}", found.dev(), found.ino(), found.rdev())
}

/// True when both paths name one file.
///
/// # Errors
/// The kernel's answer where one of them is not there.
pub fn same_file(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(named(&std::fs::metadata(one)?) == named(&std::fs::metadata(other)?))
}

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
    let of = |path: &Path| {
        let found = std::fs::metadata(path);
        found
            .map(|found| named(&found))
            .map_err(|e| (path.display().to_string(), e))
    };
    let device = |(option, device): (&DeviceOptions, &BlockDevice)| {
        let socket = match &option.socket {
            SocketOption::Path(path) => of(path)?,
            SocketOption::Descriptor(_) => "passed".to_owned(),
        };
        device_identity(option, device, socket).map_err(|e| (option.id.clone(), e))
    };
    let records = options.inflight_file.as_deref().map(of);
    let devices = options.devices.iter().zip(devices).map(device);
    Ok(Identity {
        devices: devices.collect::<Result<_, _>>()?,
        records: records.transpose()?,
    })
}
