//! Disks that come to and leave a running program: the control socket's
//! `add-device` and `remove-device`.
//!
//! The program is confined and can open nothing any more. Whoever adds a disk
//! opens it and binds its socket with his own rights, and sends three
//! descriptors with the line: the disk, the listening socket, and the socket's
//! file (O_PATH), which tells a successor that takes over which socket it is.
//! All are checked before anything changes. [`Hotplug`] is the running program's
//! side, on a thread of its own for each line; [`added`] and [`removed`] make
//! the lines that a client sends.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::{Arc, Mutex, PoisonError};

use log::{info, warn};
use pericarp_control::{Arguments, Operations, Outcome, Refused, only};
use pericarp_vhost::program::named;
use pericarp_vhost::{Endpoint, Fleet, FleetError, Giver, Oversight};
use serde_json::{Map, Value, json};

use crate::device::BlockDevice;
use crate::disk::{Abilities, Disk};
use crate::handover::device_identity;
use crate::options::{DeviceOptions, SocketOption};
use crate::sockets::Sockets;

/// What can be changed in a running program, and what else knows its devices.
#[derive(Debug, Clone)]
pub struct Hotplug {
    /// Its devices.
    pub fleet: Fleet<BlockDevice>,
    /// Who passes them on.
    pub giver: Giver,
    /// Their sockets' files.
    pub sockets: Arc<Mutex<Sockets>>,
    /// Its rings can discard on block devices.
    pub commands: bool,
    /// It keeps requests in flight in a file, which is laid out for the devices
    /// that it was made for.
    pub records: bool,
}

impl Hotplug {
    /// Adds `add-device` and `remove-device`.
    #[must_use]
    pub fn with_operations(self, operations: Operations) -> Operations {
        let other = self.clone();
        operations
            .with_errand("add-device", move |arguments, descriptors| {
                self.add(arguments, descriptors)
            })
            .with_errand("remove-device", move |arguments, descriptors| {
                if descriptors.is_empty() {
                    return other.remove(arguments);
                }
                Err(mistake(
                    "descriptors came with it, and this line takes none",
                ))
            })
    }

    fn add(&self, arguments: &Arguments, descriptors: Vec<OwnedFd>) -> Outcome {
        let count = descriptors.len();
        let Ok([disk, socket, file]) = <[OwnedFd; 3]>::try_from(descriptors) else {
            return Err(mistake(format!(
                "{count} descriptors came with it: send three, \
                 the open disk, the listening socket, and its file (O_PATH)"
            )));
        };
        let (members, mut abilities) = split(arguments)?;
        if !self.commands {
            // The rings were made without; the guest is not offered it.
            abilities.discard_granularity = 0;
        }
        let options = DeviceOptions::from_members(&members).map_err(|e| mistake(e.to_string()))?;
        let id = options.id.as_str();
        self.may_change("give it to another process")?;
        let endpoint = Endpoint::from_descriptor(socket)
            .map_err(|e| mistake(format!("descriptor of the socket: {e}")))?;
        if !matches!(endpoint, Endpoint::Listening(_)) {
            let rule = "it does not listen: send a listening one, for one front end after another";
            return Err(mistake(format!("descriptor of the socket: {rule}")));
        }
        let socket = File::from(file).metadata().map_err(failed)?;
        if !socket.file_type().is_socket() {
            let rule =
                "it is not a socket: open the path that the socket was bound to, with O_PATH";
            return Err(mistake(format!("descriptor of the socket's file: {rule}")));
        }
        let disk = Disk::given(disk, &options.disk, abilities).map_err(|rule| {
            let file = options.disk.file.display();
            mistake(format!("file {file}: {rule}"))
        })?;
        let size = disk.size();
        if disk.needs_threads() {
            info!("device {id:?}: its file system knows no I/O without waiting");
        }
        let (queues, queue_size) = (options.queues, options.queue_size);
        let device = Arc::new(BlockDevice::new(disk, &options.serial, queues, queue_size));
        let identity = device_identity(&options, &device, named(&socket)).map_err(failed)?;
        let listener = endpoint.descriptor().map_err(failed)?;
        let oversight = Arc::new(Oversight::new(&options.limits).counting(&*device));
        // What may wait for a file system has been done: others may change now.
        let change = self.fleet.change().map_err(|e| refused(id, &e))?;
        if self.giver.listens_on(&identity.socket) {
            return Err(mistake("socket: another device listens there"));
        }
        change
            .add(id, endpoint, device, Some(oversight))
            .map_err(|e| refused(id, &e))?;
        self.giver.add(identity, listener);
        if let SocketOption::Path(path) = &options.socket
            && let Some(name) = path.file_name()
        {
            let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            if !sockets.push_beside(id, name, (socket.dev(), socket.ino())) {
                warn!("device {id:?}: its socket's directory is out of reach: it stays at the end");
            }
        }
        info!("device {id:?}: added, {}", options.disk.file.display());
        Ok(answer(id, [("size", json!(size))]))
    }

    fn remove(&self, arguments: &Arguments) -> Outcome {
        only(arguments, &["device", "force"])?;
        let id = match arguments.get("device") {
            Some(Value::String(id)) => id.as_str(),
            Some(other) => return Err(mistake(format!("device {other}: not a string"))),
            None => return Err(mistake("device: missing: give the id of one")),
        };
        let force = match arguments.get("force") {
            None => false,
            Some(Value::Bool(force)) => *force,
            Some(other) => return Err(mistake(format!("force {other}: say true or false"))),
        };
        self.may_change("end the process")?;
        let change = self.fleet.change().map_err(|e| refused(id, &e))?;
        change.remove(id, force).map_err(|e| refused(id, &e))?;
        self.giver.remove(id);
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = sockets.remove_of(id).unwrap_or_else(|e| {
            warn!("device {id:?}: cannot remove its socket: {e}");
            false
        });
        info!("device {id:?}: removed");
        let left = if gone { "removed" } else { "left" };
        Ok(answer(id, [("socket", json!(left))]))
    }

    fn may_change(&self, cure: &str) -> Result<(), Refused> {
        if self.records {
            let rule = "this process keeps requests in flight in a file (--inflight-file), \
                        which has places for the devices it started with only";
            return Err(mistake(format!("{rule}: {cure}")));
        }
        Ok(())
    }
}

/// What a confined program cannot measure of a disk, and all else.
fn split(arguments: &Arguments) -> Result<(Arguments, Abilities), Refused> {
    let mut members = arguments.clone();
    let granularity = match members.remove("discard-granularity") {
        None => 0,
        Some(value) => value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| n.is_multiple_of(512))
            .ok_or_else(|| {
                let rule = "not a multiple of 512 below 4 GiB: use 0 for none";
                mistake(format!("discard-granularity {value}: {rule}"))
            })?,
    };
    let unmap = match members.remove("unmap-zeroes") {
        None => false,
        Some(Value::Bool(unmap)) => unmap,
        Some(value) => return Err(mistake(format!("unmap-zeroes {value}: say true or false"))),
    };
    let abilities = Abilities {
        discard_granularity: granularity,
        unmap_zeroes: unmap,
    };
    Ok((members, abilities))
}

/// The line that adds this device, whose disk was opened here.
pub fn added(device: &DeviceOptions, disk: &Disk) -> Value {
    let mut members = device.to_members();
    let abilities = disk.abilities();
    members.insert("op".to_owned(), json!("add-device"));
    let granularity = json!(abilities.discard_granularity);
    members.insert("discard-granularity".to_owned(), granularity);
    members.insert("unmap-zeroes".to_owned(), json!(abilities.unmap_zeroes));
    Value::Object(members)
}

/// The line that removes the device with this id.
pub fn removed(id: &str, force: bool) -> Value {
    json!({"op": "remove-device", "device": id, "force": force})
}

fn answer<const N: usize>(id: &str, members: [(&str, Value); N]) -> Map<String, Value> {
    let members = members.into_iter().map(|(k, v)| (k.to_owned(), v));
    members.chain([("device".to_owned(), json!(id))]).collect()
}

fn refused(id: &str, error: &FleetError) -> Refused {
    Refused {
        error: format!("device {id:?}: {error}"),
        mistake: error.is_mistake(),
    }
}

fn mistake(error: impl Into<String>) -> Refused {
    Refused::from(error.into())
}

fn failed(error: std::io::Error) -> Refused {
    Refused {
        error: format!("the system refused it: {error}"),
        mistake: false,
    }
}
