//! What the control socket of `pericarp-block` offers, over that of every
//! device: `resize`. Devices that come and go are in `hotplug`.
//!
//! `main` makes the table before the program confines itself.

use std::sync::Arc;

use pericarp_control::{Answer, Arguments, Operations, only};
use pericarp_vhost::{Fleet, Overseen, Told, device_named, program};
use serde_json::{Map, json};

use crate::device::BlockDevice;

/// The operations of a program that serves these disks. `wake` makes the
/// workers look at changed limits.
pub fn operations(
    name: &str,
    disks: &Fleet<BlockDevice>,
    wake: impl Fn() + Send + 'static,
) -> Operations {
    let operations = program::operations(name, env!("CARGO_PKG_VERSION"), disks, wake);
    let disks = disks.clone();
    operations.with("resize", move |arguments| {
        resize(&disks.devices(), arguments)
    })
}

/// Reads the size of a disk's file again and tells the front end.
fn resize(disks: &[(Overseen, Arc<BlockDevice>)], arguments: &Arguments) -> Answer {
    only(arguments, &["device"])?;
    let index = device_named(disks.iter().map(|(o, _)| o.id.as_str()), arguments)?;
    let (overseen, disk) = &disks[index];
    let size = disk
        .resize()
        .map_err(|e| format!("device {:?}: {e}", overseen.id))?;
    let told = match overseen.oversight.config_changed() {
        Told::FrontEnd => "front-end",
        Told::Nobody => "nobody",
        Told::Full => "full",
    };
    Ok(Map::from_iter([
        ("device".to_owned(), json!(overseen.id)),
        ("size".to_owned(), json!(size)),
        ("told".to_owned(), json!(told)),
    ]))
}
