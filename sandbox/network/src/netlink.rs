//! A netlink socket of the routing family: requests and dumps, one at a time. All of this
//! crate that speaks with the kernel about interfaces does so through here.
//!
//! Messages are built with `netlink-packet-route`. What comes back is read one attribute at
//! a time: an attribute that a newer kernel fills differently must not cost us the message.
#![expect(unsafe_code)]
// UNSAFETY: setsockopt with a number, for options that rustix does not know.

use std::{ffi::c_int, io, mem::size_of, os::fd::AsRawFd, os::fd::OwnedFd};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkMessage, NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use thiserror::Error;

/// Larger than any message that the kernel sends us: dumps come in pieces of 32 KiB.
const BUFFER: usize = 128 << 10;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// The kernel's sentence in an answer (linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;
/// How often a dump is begun again because something changed meanwhile.
const DUMPS: usize = 10;

/// The kernel has refused something.
#[derive(Debug, Error)]
#[error("{tried}: {}{answer}", sentence(.said))]
pub struct NetlinkError {
    /// What was tried, and with which interface.
    tried: String,
    /// The kernel's own words, where it has some.
    said: String,
    /// The error number.
    answer: io::Error,
}

impl NetlinkError {
    /// The kernel's error number.
    #[must_use]
    pub fn number(&self) -> Option<i32> {
        self.answer.raw_os_error()
    }

    /// As the others, for what was tried without netlink.
    pub(crate) fn other(tried: impl Into<String>, answer: io::Error) -> Self {
        Self {
            tried: tried.into(),
            said: String::new(),
            answer,
        }
    }
}

fn sentence(said: &str) -> String {
    match said {
        "" => String::new(),
        _ => format!("{said}: "),
    }
}

/// The body of a message, without the header all messages have.
pub(crate) type Body = Vec<u8>;

/// A socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let failed = |error| NetlinkError::other("a netlink socket", error);
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 of netlink is the routing family.
            None,
        )
        .map_err(|error| failed(error.into()))?;
        // The kernel's words beside its numbers, and no copies of what we said.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: c_int = 1;
            // SAFETY: the option is a number, which `on` is for the length of the call.
            unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of::<c_int>() as libc::socklen_t,
                );
            }
            // Kernels before 4.12 know neither, which costs the words only.
        }
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Has the kernel do something. `tried` says what, for the error.
    pub(crate) fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        tried: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        let (said, answer) = match self.exchange(message, flags | NLM_F_ACK) {
            Ok(_) => return Ok(()),
            Err(Failure::Kernel(said, number)) => (said, io::Error::from_raw_os_error(number)),
            Err(Failure::Changed) => (String::new(), io::ErrorKind::Interrupted.into()),
            Err(Failure::Socket(error)) => (String::new(), error),
        };
        Err(NetlinkError {
            tried: tried(),
            said,
            answer,
        })
    }

    /// All that the kernel has of a kind. `what` says which, for the error.
    pub(crate) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
        what: &str,
    ) -> Result<Vec<Body>, NetlinkError> {
        let mut answer = io::Error::from(io::ErrorKind::Interrupted);
        for _ in 0..DUMPS {
            answer = match self.exchange(message.clone(), NLM_F_DUMP) {
                Ok(bodies) => return Ok(bodies),
                Err(Failure::Changed) => continue,
                Err(Failure::Kernel(_, number)) => io::Error::from_raw_os_error(number),
                Err(Failure::Socket(error)) => error,
            };
            break;
        }
        Err(NetlinkError::other(format!("reading the {what}"), answer))
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<Body>, Failure> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags | NLM_F_REQUEST;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut request = vec![0; message.buffer_len()];
        message.emit(&mut request);
        send(&self.socket, &request, SendFlags::empty()).map_err(io::Error::from)?;
        let mut bodies = Vec::new();
        let mut changed = false;
        loop {
            let received = recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC);
            let (_, length) = received.map_err(io::Error::from)?;
            let Some(datagram) = self.buffer.get(..length) else {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge).into());
            };
            for piece in Pieces(datagram) {
                // What is left of an exchange that was given up.
                if piece.sequence != self.sequence {
                    continue;
                }
                changed |= piece.flags & NLM_F_DUMP_INTR != 0;
                match piece.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match (verdict(&piece), changed) {
                            ((_, 0), false) => Ok(bodies),
                            ((_, 0), true) => Err(Failure::Changed),
                            ((said, number), _) => Err(Failure::Kernel(said, number)),
                        };
                    }
                    _ => bodies.push(piece.body.to_vec()),
                }
            }
        }
    }
}

enum Failure {
    /// Words and a number.
    Kernel(String, i32),
    /// The dump is of two moments.
    Changed,
    Socket(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// One message of a datagram.
struct Piece<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// The messages of a datagram. Ends at the first that makes no sense.
struct Pieces<'a>(&'a [u8]);

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let header = self.0.get(..HEADER)?;
        let length = number(header, 0)? as usize;
        let body = self.0.get(HEADER..length)?;
        let rest = length.checked_next_multiple_of(4)?;
        self.0 = self.0.get(rest..).unwrap_or_default();
        let half = |at: usize| Some(u16::from_ne_bytes(header.get(at..at + 2)?.try_into().ok()?));
        Some(Piece {
            kind: half(4)?,
            flags: half(6)?,
            sequence: number(header, 8)?,
            body,
        })
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The end of an exchange: the kernel's sentence, and the error number, 0 for none.
fn verdict(piece: &Piece<'_>) -> (String, i32) {
    let code = number(piece.body, 0).unwrap_or_default() as i32;
    let mut said = String::new();
    if piece.flags & NLM_F_ACK_TLVS != 0 {
        // The header of our request, all of it unless the kernel capped it; for the end of a
        // dump there is none.
        let request = number(piece.body, 4).unwrap_or_default() as usize;
        let skip = match piece.kind {
            NLMSG_DONE => 4,
            _ if piece.flags & NLM_F_CAPPED != 0 => 4 + HEADER,
            _ => 4 + request.next_multiple_of(4),
        };
        let words = attributes(piece.body.get(skip..).unwrap_or_default())
            .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG);
        if let Some(words) = words {
            let words = String::from_utf8_lossy(words.value());
            said = words.trim_end_matches(['\0', '\n', '.']).to_owned();
        }
    }
    (said, code.saturating_neg().max(0))
}

/// The attributes of a message, without those that its length cuts off.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// What of a body comes after this header.
pub(crate) fn after<'a>(header: &impl Emitable, body: &'a [u8]) -> &'a [u8] {
    body.get(header.buffer_len()..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::LinkMessage;
    use proptest::prelude::*;

    #[test]
    fn loopback_is_everywhere() {
        let mut netlink = Netlink::open().unwrap();
        let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
        assert!(!netlink.dump(links, "interfaces").unwrap().is_empty());
    }

    #[test]
    fn a_refusal_names_what_was_tried() {
        let mut netlink = Netlink::open().unwrap();
        let mut link = LinkMessage::default();
        link.header.index = 0x7fff_fff0;
        let message = RouteNetlinkMessage::DelLink(link);
        let refused = netlink.ask(message, 0, || "removing nothing".into());
        let refused = refused.unwrap_err();
        assert!(refused.to_string().starts_with("removing nothing: "));
        assert!(matches!(refused.number(), Some(libc::ENODEV | libc::EPERM)));
    }

    proptest! {
        #[test]
        fn odd_datagrams_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for piece in Pieces(&bytes) {
                let _ = verdict(&piece);
            }
        }

        #[test]
        fn odd_answers_end(flags in any::<u16>(), done in any::<bool>(),
                body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let kind = if done { NLMSG_DONE } else { NLMSG_ERROR };
            let (_, number) = verdict(&Piece { kind, flags, sequence: 0, body: &body });
            prop_assert!(number >= 0);
        }
    }
}
