//! vhost-user messages as bytes, for what `vhost::Frontend` refuses to send:
//! wrong sizes, unknown requests, missing and surplus file descriptors, pipes
//! where an eventfd belongs. Used by `tests/hostile.rs`.

use std::io::{IoSlice, Read, Result};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Request numbers of the specification, as far as tests send them raw.
pub mod request {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const ADD_MEM_REG: u32 = 37;
}

/// Version 1, the only one there is.
pub const VERSION: u32 = 1;
/// The receiver must answer, where REPLY_ACK was negotiated.
pub const NEED_REPLY: u32 = 1 << 3;
/// In the payload of SET_VRING_KICK and SET_VRING_CALL: no file descriptor comes along.
pub const NO_FD: u64 = 1 << 8;

/// One message: header and payload.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    sized(request, flags, payload.len() as u32, payload)
}

/// One message that claims `size` bytes of payload, whatever follows.
pub fn sized(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12 + payload.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Numbers as a payload.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A vring state payload: index and number.
pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// Sends `bytes` with `fds` attached to their first byte.
///
/// # Errors
/// When the other side has closed, or does not read.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); 512];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    // A backend that hung up must be an error here, not a signal.
    sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Reads one reply: (request, payload).
///
/// # Errors
/// When the other side has closed or stays silent past the socket's time-out.
pub fn receive(mut stream: &UnixStream) -> Result<(u32, Vec<u8>)> {
    let mut header = [0; 12];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let mut payload = vec![0; word(8).min(4096) as usize];
    stream.read_exact(&mut payload)?;
    Ok((word(0), payload))
}
