//! What is measured, and against whom.

use pericarp_tests::peer::{Cache, Kind};

/// Who does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// `fio` on the host, on the file itself.
    HostFio,
    /// A vhost-user backend behind the `virtio-driver` crate.
    Backend(Kind),
}

impl Target {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HostFio => "host fio",
            Self::Backend(Kind::Pericarp) => "pericarp-block",
            Self::Backend(Kind::QemuStorageDaemon) => "qemu-storage-daemon",
            Self::Backend(Kind::Reference) => "reference backend",
        }
    }
}

/// One kind of load.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) write: bool,
    pub(crate) cache: Cache,
    pub(crate) depth: usize,
    pub(crate) targets: &'static [Target],
}

/// What one turn gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Operations per second.
    pub(crate) iops: f64,
    /// Latency seen by the generator, microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU time of the backend process per operation, microseconds. For host
    /// fio, all of fio.
    pub(crate) cpu_us: f64,
}

/// Bytes of every operation.
pub(crate) const BLOCK: usize = 4096;

const DIRECT: &[Target] = &[
    Target::HostFio,
    Target::Backend(Kind::Pericarp),
    Target::Backend(Kind::QemuStorageDaemon),
];
/// The reference backend knows the page cache only.
const CACHED: &[Target] = &[
    Target::HostFio,
    Target::Backend(Kind::Pericarp),
    Target::Backend(Kind::QemuStorageDaemon),
    Target::Backend(Kind::Reference),
];

/// 4 KiB random I/O, one queue.
pub(crate) const CASES: &[Case] = &[
    Case {
        name: "direct-read-32",
        write: false,
        cache: Cache::Direct,
        depth: 32,
        targets: DIRECT,
    },
    Case {
        name: "direct-read-1",
        write: false,
        cache: Cache::Direct,
        depth: 1,
        targets: DIRECT,
    },
    Case {
        name: "direct-write-32",
        write: true,
        cache: Cache::Direct,
        depth: 32,
        targets: DIRECT,
    },
    Case {
        name: "cached-read-32",
        write: false,
        cache: Cache::Buffered,
        depth: 32,
        targets: CACHED,
    },
];
