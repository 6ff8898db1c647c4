//! Where a job runs, and what that needs of this machine.

use std::path::Path;

use pericarp_benches::served::Server;
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
    /// In a guest that this server shows a directory.
    Shared(Server),
}

/// All of them, in their order.
pub(crate) const TARGETS: &[Target] = &[
    Target::Host,
    Target::Container,
    Target::Guest(Kind::Pericarp),
    Target::Guest(Kind::QemuStorageDaemon),
    Target::Shared(Server::Pericarp),
    Target::Shared(Server::Virtiofsd(0)),
    Target::Shared(Server::Virtiofsd(1)),
    Target::Shared(Server::Virtiofsd(8)),
    Target::Shared(Server::Virtiofsd(64)),
    Target::Shared(Server::Null),
];

/// What all others are compared with.
pub(crate) const BASE: &str = Target::Container.name();
/// The other backend.
pub(crate) const PEER: &str = Target::Guest(Kind::QemuStorageDaemon).name();
/// The other file server.
pub(crate) const FILE_PEER: &str = Target::Shared(Server::Virtiofsd(0)).name();

impl Target {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Container => "runc",
            Self::Guest(Kind::Pericarp) => "pericarp",
            Self::Guest(Kind::QemuStorageDaemon) => "qsd",
            Self::Guest(Kind::Reference) => "reference",
            Self::Shared(Server::Pericarp) => "pericarp-fs",
            Self::Shared(Server::Virtiofsd(0)) => "virtiofsd",
            Self::Shared(Server::Virtiofsd(1)) => "virtiofsd-1",
            Self::Shared(Server::Virtiofsd(8)) => "virtiofsd-8",
            Self::Shared(Server::Virtiofsd(_)) => "virtiofsd-64",
            Self::Shared(Server::Null) => "null-fs",
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
            (Self::Shared(_), _) => "UML, 1 CPU, virtiofs",
        }
    }

    /// True for what only runs when it is named: the rows of directories, whose
    /// peer no package brings.
    pub(crate) const fn is_by_name_only(self) -> bool {
        matches!(self, Self::Shared(_))
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
            Self::Shared(_) => parts.push(Part::UserModeLinux),
        }
        if guest && tree {
            parts.push(Part::MkfsExt4);
        }
        let root = rustix::process::geteuid().is_root();
        let server = match self {
            Self::Shared(server) => server.lacks(),
            _ => None,
        };
        missing(&parts)
            .or(server)
            .or_else(|| {
                (matches!(self, Self::Shared(_)) && !root)
                    .then(|| "file servers are compared as root; run this as root".to_owned())
            })
            .or_else(|| {
                (self == Self::Container && !root)
                    .then(|| "containers need root; run this as root, or leave it out".to_owned())
            })
            .or_else(|| {
                let cannot = !root || !Path::new("/dev/fuse").exists();
                (matches!(profile.ground, Ground::Store(..)) && cannot).then(|| {
                    "a store with injected latency needs root and /dev/fuse; leave the profile out"
                        .to_owned()
                })
            })
    }
}
