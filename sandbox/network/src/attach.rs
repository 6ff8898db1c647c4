//! Joins a guest's cards to the interfaces of a pod: a tap beside each, and filters that pass
//! every frame from one to the other. The command line and the shim call this before they
//! start `pericarp-net`, which gets the taps' queues.
//!
//! The interfaces keep their addresses, but the host sees nothing of what arrives for them.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::{
    link::{Link, links},
    namespace::{Namespace, NamespaceError},
    netlink::{Netlink, NetlinkError},
    network::Network,
    survey::{Answers, SurveyError},
    tap, traffic,
};

/// As many cards as a guest may have.
pub const MAX_CARDS: usize = 8;
/// How long a qdisc may be busy, as it is while the one before it is taken apart.
const BUSY: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// Why a guest cannot be joined to a namespace. Nothing is changed then.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// It has something that a guest cannot have.
    #[error(transparent)]
    Survey(#[from] SurveyError),
    /// The kernel has refused a step.
    #[error(transparent)]
    Kernel(#[from] NetlinkError),
    /// More interfaces than a guest can have.
    #[error("the namespace has {count} interfaces, and a guest has at most {MAX_CARDS} cards")]
    TooMany {
        /// Interfaces that are there.
        count: usize,
    },
    /// Somebody has the queues of a tap of ours.
    #[error("{tap}: another guest has this namespace: end it first")]
    InUse {
        /// Its tap.
        tap: String,
    },
    /// Somebody else is joining a guest to it, or has.
    #[error("{}: another guest has this namespace: end it first", .path.display())]
    Claimed {
        /// The namespace.
        path: PathBuf,
    },
    /// Somebody has filters where ours belong.
    #[error(
        "{name}: has filters of somebody else at priority {priority}, which is ours: move them"
    )]
    Priority {
        /// The interface.
        name: String,
        /// The priority.
        priority: u16,
    },
    /// There are no taps here.
    #[error(
        "/dev/net/tun cannot be opened: load the module tun, or give the right to open it: {0}"
    )]
    NoTun(io::Error),
    /// A tap cannot be made.
    #[error("{name}: a tap with this name cannot be made: {source}")]
    Tap {
        /// The tap.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The host would speak on the guest's wire.
    #[error("{path}: cannot be set, so that the host is silent there: {source}")]
    Ipv6 {
        /// The setting.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A card for the guest.
#[derive(Debug)]
pub struct Card {
    /// The name of the interface whose place it takes.
    pub interface: String,
    /// Its Ethernet address, which the guest's card must have.
    pub mac: [u8; 6],
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// One for each pair of queues. They do not block, and have headers of 10 bytes until
    /// somebody says otherwise.
    pub queues: Vec<OwnedFd>,
}

/// What is undone by [`Attached::detach`], or when it is dropped.
#[derive(Debug)]
pub struct Attached {
    /// What the guest has to be told.
    pub network: Network,
    /// One for each of the network's interfaces, in the same order. May be taken out: the
    /// queues are of use to others, and `detach` does not need them.
    pub cards: Vec<Card>,
    namespace: Namespace,
    undone: bool,
    /// Until all is undone.
    _claim: OwnedFd,
}

/// Makes a card, with so many pairs of queues, for each interface of the namespace. One guest
/// at a time can have a namespace. What a process that was killed has left there is replaced.
///
/// # Errors
/// [`AttachError`].
pub fn attach(namespace: &Namespace, pairs: u16) -> Result<Attached, AttachError> {
    let namespace = namespace.try_clone()?;
    let claim = claim(&namespace)?;
    let (network, cards) = namespace.run(|| {
        let mut netlink = Netlink::open()?;
        tap::none_left(&mut netlink)?;
        // Before the survey: nobody undoes it if that fails.
        sweep_here(&mut netlink)?;
        let (network, indexes) = Answers::ask(&mut netlink)?.network()?;
        let joined = join(&mut netlink, &network, &indexes, pairs.max(1));
        if joined.is_err()
            && let Err(error) = sweep_here(&mut netlink)
        {
            log::warn!("{}: {error}", namespace.path().display());
        }
        Ok::<_, AttachError>((network, joined?))
    })??;
    Ok(Attached {
        network,
        cards,
        namespace,
        undone: false,
        _claim: claim,
    })
}

/// Has the namespace for one guest. A process that is dying may still have it.
fn claim(namespace: &Namespace) -> Result<OwnedFd, AttachError> {
    let begin = Instant::now();
    loop {
        if let Some(claim) = namespace.claim()? {
            return Ok(claim);
        }
        if begin.elapsed() > tap::LETTING_GO {
            return Err(AttachError::Claimed {
                path: namespace.path().to_owned(),
            });
        }
        sleep(PAUSE);
    }
}

/// Undoes what `attach` has done in this namespace, whoever called it. For those who come after a
/// process that has ended.
///
/// # Errors
/// [`AttachError::Claimed`] where it lives, or another guest has the namespace by now. Else the
/// first of [`AttachError::Namespace`] and [`AttachError::Kernel`]; everything else is undone
/// nevertheless.
pub fn sweep(namespace: &Namespace) -> Result<(), AttachError> {
    let _claim = claim(namespace)?;
    undo(namespace)
}

fn undo(namespace: &Namespace) -> Result<(), AttachError> {
    namespace.run(|| {
        let mut netlink = Netlink::open()?;
        sweep_here(&mut netlink)
    })??;
    Ok(())
}

impl Attached {
    /// Leaves all of it as it is, for [`sweep`] or the next [`attach`].
    pub fn leave(mut self) {
        self.undone = true;
    }

    /// Undoes it: our filters, our qdiscs and the taps are gone, whoever has their queues.
    ///
    /// # Errors
    /// As [`sweep`].
    pub fn detach(mut self) -> Result<(), AttachError> {
        self.undone = true;
        undo(&self.namespace)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if !self.undone
            && let Err(error) = undo(&self.namespace)
        {
            log::warn!("{}: {error}", self.namespace.path().display());
        }
    }
}

fn join(
    netlink: &mut Netlink,
    network: &Network,
    indexes: &[u32],
    pairs: u16,
) -> Result<Vec<Card>, AttachError> {
    let count = network.interfaces.len();
    if count > MAX_CARDS {
        return Err(AttachError::TooMany { count });
    }
    let all = links(netlink)?;
    let mut cards = Vec::new();
    for (place, (interface, index)) in network.interfaces.iter().zip(indexes).enumerate() {
        let Some(link) = all.iter().find(|link| link.index == *index) else {
            let gone = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(NetlinkError::other(format!("{}: a tap", interface.name), gone).into());
        };
        let name = tap::name(place);
        let (tap, queues) = tap::make(netlink, &name, interface.mtu, pairs)?;
        patiently(netlink, &tap, link)?;
        patiently(netlink, link, &tap)?;
        cards.push(Card {
            interface: interface.name.clone(),
            mac: interface.mac,
            mtu: interface.mtu,
            queues,
        });
    }
    Ok(cards)
}

fn patiently(netlink: &mut Netlink, from: &Link, to: &Link) -> Result<(), AttachError> {
    let begin = Instant::now();
    loop {
        match traffic::redirect(netlink, from, to) {
            Err(AttachError::Kernel(error))
                if error.number() == Some(libc::EBUSY) && begin.elapsed() < BUSY =>
            {
                sleep(PAUSE);
            }
            other => return other,
        }
    }
}

/// All of it, in the namespace of this thread. The filters first, so that nothing is passed
/// to a tap that is going.
fn sweep_here(netlink: &mut Netlink) -> Result<(), NetlinkError> {
    let all = links(netlink)?;
    let (taps, others): (Vec<_>, Vec<_>) = all.iter().partition(|link| tap::is_ours(link));
    let mut result = Ok(());
    for link in others {
        result = result.and(traffic::clear(netlink, link));
    }
    for tap in taps {
        result = result.and(traffic::gone(tap.remove(netlink)));
    }
    result
}
