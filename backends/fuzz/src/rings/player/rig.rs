//! What is kept from script to script: mappings, devices, a disk.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use pericarp_block::{BlockDevice, CacheMode, Disk, DiskOptions};
use pericarp_vhost::Device;

use crate::memory::{Memory, memfd};
use crate::rings::judge::Rules;
use crate::rings::store::{self, DISK};

/// What is kept from script to script: mappings, devices, a disk.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(super) memory: Memory,
    pub(super) devices: Vec<(Arc<BlockDevice>, Rules)>,
    pub(super) disk: Vec<u8>,
    pub(super) dirty: bool,
    /// A device learnt that its disk lacks something, which it never forgets.
    pub(super) taught: bool,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self {
            memory: Memory::new(),
            devices: Self::devices(),
            disk: store::content(),
            dirty: false,
            taught: false,
        }
    }

    fn devices() -> Vec<(Arc<BlockDevice>, Rules)> {
        let mut devices = Vec::new();
        for (cache, read_only) in [
            (CacheMode::Buffered, false),
            (CacheMode::Buffered, true),
            (CacheMode::Direct, false),
        ] {
            let file = memfd(DISK as u64);
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let options = DiskOptions {
                file: path,
                read_only,
                cache,
                iopoll: false,
            };
            // Old kernels have no direct I/O on memory files.
            let Ok(disk) = Disk::open(&options) else {
                devices.push(devices.first().cloned().expect("a buffered disk"));
                continue;
            };
            let device = BlockDevice::new(disk, "a serial of the fuzzer", 1, 64);
            let rules = Rules::told(&device.config(), read_only);
            assert_eq!(rules.size, DISK as u64, "the capacity");
            devices.push((Arc::new(device), rules));
        }
        devices
    }

    pub(crate) fn clear(&mut self) {
        self.memory.clear();
        if std::mem::take(&mut self.dirty) {
            self.disk = store::content();
        }
        if std::mem::take(&mut self.taught) {
            self.devices = Self::devices();
        }
    }
}
