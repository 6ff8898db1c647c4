//! Makes a tap in the namespace of the calling thread. `attach` does so for each interface;
//! who gets the queues needs neither the namespace nor a right afterwards.
#![expect(unsafe_code)]
// UNSAFETY: an ioctl with a pointer to a value of ours.

use std::{
    ffi::c_short,
    fs::{self, File},
    io,
    mem::zeroed,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    thread::sleep,
    time::{Duration, Instant},
};

use netlink_packet_route::link::LinkAttribute;

use crate::{
    attach::AttachError,
    link::{Link, links},
    netlink::Netlink,
};

/// What the names of our taps begin with; a number follows.
const NAME: &str = "pericarp";
/// Packets that wait for the guest. The usual 1000 are two bursts of a fast sender, and what
/// does not fit is lost.
const QUEUE: u32 = 10_000;
/// A process that was killed has its tap until the kernel has taken its rings apart.
pub(crate) const LETTING_GO: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// The tap beside the interface with this place in the list.
pub(crate) fn name(place: usize) -> String {
    format!("{NAME}{place}")
}

/// Whether this crate has made it.
pub(crate) fn is_ours(link: &Link) -> bool {
    let number = link.name.strip_prefix(NAME).unwrap_or_default();
    link.kind == "tun" && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Waits for the taps of a process that has just ended. Taps are there for as long as
/// somebody has a queue, so one that stays is in use.
pub(crate) fn none_left(netlink: &mut Netlink) -> Result<(), AttachError> {
    let begin = Instant::now();
    loop {
        let all = links(netlink)?;
        let Some(tap) = all.iter().find(|link| is_ours(link)) else {
            return Ok(());
        };
        if begin.elapsed() > LETTING_GO {
            return Err(AttachError::InUse {
                tap: tap.name.clone(),
            });
        }
        sleep(PAUSE);
    }
}

/// Makes the tap, with so many queues and the interface's MTU, and brings it up. It goes with
/// the last of its queues.
pub(crate) fn make(
    netlink: &mut Netlink,
    name: &str,
    mtu: u32,
    pairs: u16,
) -> Result<(Link, Vec<OwnedFd>), AttachError> {
    let queues = (0..pairs).map(|index| queue(name, pairs > 1, index == 0));
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    let made = links(netlink)?.into_iter().find(|link| link.name == name);
    let Some(tap) = made else {
        return Err(AttachError::Tap {
            name: name.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        });
    };
    let attributes = vec![LinkAttribute::Mtu(mtu), LinkAttribute::TxQueueLen(QUEUE)];
    let tried = format!("an MTU of {mtu} and {QUEUE} packets in its queue");
    tap.set(netlink, attributes, &tried)?;
    silence(name)?;
    tap.bring(netlink, true)?;
    Ok((tap, queues))
}

/// The first one makes the tap, and none other has its name.
fn queue(name: &str, several: bool, first: bool) -> Result<OwnedFd, AttachError> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK);
    // In which namespace the tap will be is decided here.
    let tun = OwnedFd::from(options.open("/dev/net/tun").map_err(AttachError::NoTun)?);
    // SAFETY: a structure of numbers, of which none must not be zero.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // One byte less than there are, for the zero at the end.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if first {
        flags |= libc::IFF_TUN_EXCL;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: TUNSETIFF takes a pointer to such a structure, and keeps none.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    match result {
        0.. => Ok(tun),
        _ => Err(AttachError::Tap {
            name: name.to_owned(),
            source: io::Error::last_os_error(),
        }),
    }
}

/// Keeps the host's IPv6 from speaking on the tap, which is the guest's wire. The directory
/// shows the namespace of the thread that opens the file.
fn silence(name: &str) -> Result<(), AttachError> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match fs::write(&path, "1") {
        // A kernel without IPv6 has nothing to say.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| AttachError::Ipv6 { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_taps_are_known_by_kind_and_name() {
        let mut link = Link {
            index: 1,
            name: name(3),
            up: true,
            loopback: false,
            mac: None,
            mtu: 0,
            kind: "tun".into(),
            master: None,
            lower: None,
        };
        assert!(is_ours(&link));
        for other in ["pericarp", "pericarp0a", "eth0", "pericarp-0"] {
            link.name = other.into();
            assert!(!is_ours(&link), "{other}");
        }
        link.name = name(0);
        link.kind = "veth".into();
        assert!(!is_ours(&link));
    }
}
