//! What `pericarp-fs` is to a process that takes over from it: its directories
//! and sockets, named by what the kernel names them by.

use std::fmt::Write;
use std::io;

use pericarp_vhost::program::{named_at, named_socket};
use pericarp_vhost::{DeviceIdentity, Identity};

use crate::options::{DeviceOptions, Options};

/// What this process serves. Directories, and sockets with a path, must be there.
///
/// # Errors
/// The kernel's answer where one is not, and the path.
pub fn identity(options: &Options) -> Result<Identity, (String, io::Error)> {
    let device = |device: &DeviceOptions| {
        Ok(DeviceIdentity {
            id: device.id.clone(),
            store: named_at(&device.dir)?,
            socket: named_socket(&device.socket)?,
            // The high priority queue counts, too.
            queues: device.queues + 1,
            queue_size: device.queue_size,
            read_only: device.read_only,
            geometry: promises(device),
        })
    };
    let devices = options.devices.iter().map(device);
    let records = options.process.inflight_file.as_deref().map(named_at);
    let state = options.state_file.as_deref().map(named_at);
    Ok(Identity {
        devices: devices.collect::<Result<_, _>>()?,
        records: records.transpose()?,
        state: state.transpose()?,
    })
}

/// What guests were told when they mounted and go on believing, and how they are
/// known.
fn promises(device: &DeviceOptions) -> String {
    let mut text = format!("{} {:?}", device.tag, device.settings);
    let flags = [
        device.direct_io,
        device.xattr,
        device.posix_acl,
        device.locks,
        // What a node goes by.
        device.file_handles,
    ];
    // A String takes all that is written.
    let _ = write!(
        text,
        " {flags:?} {:?} {:?} {:?}",
        device.xattr_map, device.uid_map, device.gid_map
    );
    text
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::options::{Command, parse};

    #[test]
    fn both_sides_follow_later_mounts_or_neither() {
        let promised = |more: &[&str]| {
            let one = ["--socket-path", "/s", "--shared-dir", "/d", "--tag", "t"];
            let line = one.iter().chain(more).map(OsString::from);
            match parse(line).unwrap() {
                Command::Serve(options) => promises(&options.devices[0]),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(promised(&[]), promised(&["--workers", "2"]));
        assert_ne!(promised(&[]), promised(&["--later-mounts"]));
    }
}
