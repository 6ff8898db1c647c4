//! What is measured, and where.

use pericarp_tests::parts::Part;
use pericarp_tests::peer::Kind;

/// Where the job runs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// On the host, on the file itself.
    Host,
    /// In a guest, on a disk that is served by this backend.
    Guest(Kind),
}

/// All of them, in their order.
pub(crate) const TARGETS: &[Target] = &[
    Target::Host,
    Target::Guest(Kind::Pericarp),
    Target::Guest(Kind::QemuStorageDaemon),
];

impl Target {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host fio",
            Self::Guest(kind) => kind.part().program(),
        }
    }

    /// What it needs of this machine.
    pub(crate) fn parts(self) -> &'static [Part] {
        match self {
            Self::Host => &[Part::Fio],
            Self::Guest(Kind::QemuStorageDaemon) => {
                &[Part::Fio, Part::UserModeLinux, Part::QemuStorageDaemon]
            }
            Self::Guest(_) => &[Part::Fio, Part::UserModeLinux, Part::PERICARP_BLOCK],
        }
    }
}

/// One job, the same everywhere.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The job file itself: a guest does not see every directory of its host.
    pub(crate) job: &'static str,
}

macro_rules! job {
    ($file:literal) => {
        include_str!(concat!("../../../../fio-profiles/", $file, ".fio"))
    };
}

/// Everything that can be measured.
pub(crate) const CASES: &[Case] = &[
    Case {
        name: "direct-read-1",
        job: job!("randread-4k-qd1-psync"),
    },
    Case {
        name: "direct-read-32",
        job: job!("randread-4k-qd32-uring"),
    },
    Case {
        name: "direct-write-32",
        job: job!("randwrite-4k-qd32-uring"),
    },
    Case {
        name: "direct-seqread-128k",
        job: job!("seqread-128k-qd8-uring"),
    },
];
