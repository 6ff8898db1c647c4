//! What is measured, and against whom.

use pericarp_tests::peer::{Cache, Kind};

/// Who does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// `fio` on the host, on the file itself.
    HostFio,
    /// A vhost-user backend behind the `virtio-driver` crate.
    Backend(Kind),
    /// `qemu-storage-daemon` with io_uring where threads are its default.
    QemuUring,
    /// `pericarp-block` with one worker and so many disks, which share the
    /// depth of the case.
    Disks(usize),
    /// The same with so many workers, and the disks of the case.
    Workers(usize),
    /// No disk: two threads that wake each other by eventfds in turn.
    RoundTrip,
}

impl Target {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HostFio => "host fio",
            Self::Backend(Kind::Pericarp) => "pericarp-block",
            Self::Backend(Kind::QemuStorageDaemon) => "qemu-storage-daemon",
            Self::Backend(Kind::Reference) => "reference backend",
            Self::QemuUring => "qemu-sd io_uring",
            Self::Disks(1) => "one disk",
            Self::Disks(_) => "eight disks",
            Self::Workers(1) => "one worker",
            Self::Workers(_) => "two workers",
            Self::RoundTrip => "eventfd round trip",
        }
    }
}

/// One kind of load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) write: bool,
    pub(crate) sequential: bool,
    pub(crate) cache: Cache,
    /// Requests in flight, over all queues.
    pub(crate) depth: usize,
    /// Bytes of every request.
    pub(crate) block: usize,
    pub(crate) queues: usize,
    /// Where that is not up to the target.
    pub(crate) disks: usize,
    pub(crate) targets: &'static [Target],
}

const DIRECT: &[Target] = &[
    Target::HostFio,
    Target::Backend(Kind::Pericarp),
    Target::Backend(Kind::QemuStorageDaemon),
];
const ALONE: &[Target] = &[
    Target::HostFio,
    Target::Backend(Kind::Pericarp),
    Target::Backend(Kind::QemuStorageDaemon),
    Target::RoundTrip,
];
/// The reference backend knows the page cache only.
const CACHED: &[Target] = &[
    Target::HostFio,
    Target::Backend(Kind::Pericarp),
    Target::Backend(Kind::QemuStorageDaemon),
    Target::QemuUring,
    Target::Backend(Kind::Reference),
];
const DISKS: &[Target] = &[Target::Disks(1), Target::Disks(8)];

/// So many disks, of depth 8 each.
const fn scaled(name: &'static str, disks: usize) -> Case {
    Case {
        name,
        depth: 8 * disks,
        disks,
        targets: &[Target::Workers(1), Target::Workers(2)],
        ..BASE
    }
}

/// 4 KiB random reads, direct, one queue, depth 32; the cases differ from it.
const BASE: Case = Case {
    name: "direct-read-32",
    write: false,
    sequential: false,
    cache: Cache::Direct,
    depth: 32,
    block: 4096,
    queues: 1,
    disks: 1,
    targets: DIRECT,
};

const fn direct(name: &'static str, write: bool, depth: usize) -> Case {
    Case {
        name,
        write,
        depth,
        ..BASE
    }
}

const fn cached(name: &'static str, write: bool, depth: usize) -> Case {
    Case {
        name,
        write,
        cache: Cache::Buffered,
        depth,
        targets: CACHED,
        ..BASE
    }
}

const fn sequential(name: &'static str, write: bool) -> Case {
    Case {
        name,
        write,
        sequential: true,
        depth: 8,
        block: 128 * 1024,
        ..BASE
    }
}

/// Random reads of so many bytes, 8 of them in flight.
const fn sized(name: &'static str, block: usize) -> Case {
    Case {
        name,
        depth: 8,
        block,
        ..BASE
    }
}

/// Depth 32 over so many queues.
const fn spread(name: &'static str, queues: usize) -> Case {
    Case {
        name,
        queues,
        ..BASE
    }
}

/// Everything that can be measured.
pub(crate) const CASES: &[Case] = &[
    Case {
        targets: ALONE,
        ..direct("direct-read-1", false, 1)
    },
    direct("direct-read-2", false, 2),
    direct("direct-read-4", false, 4),
    direct("direct-read-8", false, 8),
    direct("direct-read-16", false, 16),
    BASE,
    direct("direct-read-64", false, 64),
    direct("direct-read-128", false, 128),
    sized("direct-read-16k", 16 * 1024),
    sized("direct-read-64k", 64 * 1024),
    sized("direct-read-256k", 256 * 1024),
    sized("direct-read-1m", 1024 * 1024),
    direct("direct-write-1", true, 1),
    direct("direct-write-32", true, 32),
    direct("direct-write-64", true, 64),
    sequential("direct-seqread-128k", false),
    sequential("direct-seqwrite-128k", true),
    cached("cached-read-1", false, 1),
    cached("cached-read-32", false, 32),
    cached("cached-read-64", false, 64),
    cached("cached-write-64", true, 64),
    spread("direct-read-2x16", 2),
    spread("direct-read-4x8", 4),
    spread("direct-read-8x4", 8),
    Case {
        name: "disks",
        targets: DISKS,
        ..BASE
    },
    scaled("scale-1", 1),
    scaled("scale-2", 2),
    scaled("scale-4", 4),
    scaled("scale-8", 8),
    scaled("scale-16", 16),
    scaled("scale-32", 32),
];
