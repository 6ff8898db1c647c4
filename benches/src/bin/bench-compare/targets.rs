//! Where a job runs, and what that needs of this machine.

use std::path::Path;

use pericarp_tests::parts::{Part, missing};
use pericarp_tests::peer::Kind;

use crate::profiles::{Ground, Profile};

/// Where the job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// On the host itself.
    Host,
    /// In a container of runc.
    Container,
    /// In a guest whose disk this backend serves.
    Guest(Kind),
}

/// All of them, in their order.
pub(crate) const TARGETS: &[Target] = &[
    Target::Host,
    Target::Container,
    Target::Guest(Kind::Pericarp),
    Target::Guest(Kind::QemuStorageDaemon),
];

/// What all others are compared with.
pub(crate) const BASE: &str = Target::Container.name();
/// The other backend.
pub(crate) const PEER: &str = Target::Guest(Kind::QemuStorageDaemon).name();

impl Target {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Container => "runc",
            Self::Guest(Kind::Pericarp) => "pericarp",
            Self::Guest(Kind::QemuStorageDaemon) => "qsd",
            Self::Guest(Kind::Reference) => "reference",
        }
    }

    /// What the row is labelled with. Guests are User-mode Linux: the only rig
    /// with Linux's own drivers and an unemulated CPU on every machine.
    pub(crate) const fn rig(self, ground: Ground) -> &'static str {
        match (self, ground) {
            (Self::Host, Ground::Tree) => "native, directory",
            (Self::Host, _) => "native",
            (Self::Container, Ground::Tree) => "container, directory",
            (Self::Container, _) => "native, container",
            (Self::Guest(_), Ground::Tree) => "UML, 1 CPU, ext4",
            (Self::Guest(_), _) => "UML, 1 CPU",
        }
    }

    /// What is missing on this machine, and how to get it.
    pub(crate) fn lacks(self, profile: &Profile) -> Option<String> {
        let (guest, tree) = (
            matches!(self, Self::Guest(_)),
            profile.ground == Ground::Tree,
        );
        let mut parts = vec![Part::Fio];
        match self {
            Self::Host => {}
            Self::Container => parts.push(Part::Runc),
            Self::Guest(kind) => parts.extend([Part::UserModeLinux, kind.part()]),
        }
        if guest && tree {
            parts.push(Part::MkfsExt4);
        }
        let root = rustix::process::geteuid().is_root();
        missing(&parts)
            .or_else(|| {
                (self == Self::Container && !root)
                    .then(|| "containers need root; run this as root, or leave it out".to_owned())
            })
            .or_else(|| {
                let cannot = !root || !Path::new("/dev/fuse").exists();
                (profile.ground == Ground::Share && cannot).then(|| {
                    "a store with injected latency needs root and /dev/fuse; leave the profile out"
                        .to_owned()
                })
            })
    }
}
