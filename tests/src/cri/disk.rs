//! A block device of the node's: a loop device on an image in the test's directory. Called by cases
//! with block volumes and by `endure`.

use std::path::PathBuf;
use std::process::Command;

use super::proto::Device;
use crate::parts::absent;
use crate::scratch::Scratch;

/// The device. It is taken away when this is dropped.
#[derive(Debug)]
pub struct Disk {
    /// Its node below `/dev`.
    pub node: String,
    /// What it is on.
    pub image: PathBuf,
}

impl Disk {
    /// One of this many bytes, with this name in the directory. `None` where the kernel has no loop
    /// devices, which is said.
    pub fn new(scratch: &Scratch, name: &str, bytes: u64) -> Option<Self> {
        let image = scratch.sparse(name, bytes);
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image)
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self {
                node: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
                image,
            }),
            _ => {
                absent(name, "no loop device can be had (losetup, as root)");
                None
            }
        }
    }

    /// Takes it away. Whether nobody had it open: else that happens with its last user.
    pub fn is_free(&self) -> bool {
        let done = losetup(&["--detach", &self.node]);
        let mut list = Command::new("losetup");
        let list = list.arg("--associated").arg(&self.image).output();
        done && list.is_ok_and(|list| list.stdout.is_empty())
    }

    /// As a container has it, at this path and with these permissions (`r`, `mrw`).
    pub fn device(&self, path: &str, permissions: &str) -> Device {
        let mut device = Device::new();
        device.host_path = self.node.clone();
        device.container_path = path.into();
        device.permissions = permissions.into();
        device
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        losetup(&["--detach", &self.node]);
    }
}

fn losetup(words: &[&str]) -> bool {
    let done = Command::new("losetup").args(words).output();
    done.is_ok_and(|output| output.status.success())
}
