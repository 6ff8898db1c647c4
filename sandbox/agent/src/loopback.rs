//! Brings the loopback interface up, with one netlink message.
//!
//! The kernel adds 127.0.0.1 and ::1 by itself when `lo` comes up. Called once; the guest has no
//! other network.

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::error::{AgentError, during};

/// The groups that may send echo requests.
const PING_GROUPS: &str = "/proc/sys/net/ipv4/ping_group_range";
const RTM_NEWLINK: u16 = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;
/// The first interface of every network namespace.
const LOOPBACK_INDEX: i32 = 1;

pub(crate) fn bring_up() -> Result<(), AgentError> {
    let attempt = || -> rustix::io::Result<()> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 of netlink is the routing family.
            None,
        )?;
        send(&socket, &request(), SendFlags::empty())?;
        let mut answer = [0; 256];
        let (count, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
        match status(&answer[..count.min(answer.len())]) {
            Some(0) => Ok(()),
            Some(code) => Err(rustix::io::Errno::from_raw_os_error(-code)),
            None => Err(rustix::io::Errno::PROTO),
        }
    };
    attempt().map_err(during("the loopback interface"))?;
    // Without it ping needs a capability that containers do not get.
    std::fs::write(PING_GROUPS, "0 2147483647").map_err(during(PING_GROUPS))
}

/// `struct nlmsghdr` and `struct ifinfomsg`, see rtnetlink(7).
fn request() -> Vec<u8> {
    let mut body = vec![0; 4]; // family, padding, device type
    body.extend_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    body.extend_from_slice(&IFF_UP.to_ne_bytes()); // flags
    body.extend_from_slice(&IFF_UP.to_ne_bytes()); // which flags change
    let mut message = Vec::new();
    message.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend_from_slice(&1u32.to_ne_bytes()); // sequence
    message.extend_from_slice(&0u32.to_ne_bytes()); // to the kernel
    message.extend_from_slice(&body);
    message
}

/// The error number in an acknowledgement, 0 for success.
fn status(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(answer.get(16..20)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_the_shape_rtnetlink_wants() {
        let message = request();
        assert_eq!(message.len(), 32);
        assert_eq!(message[..6], [32, 0, 0, 0, 16, 0]);
        assert_eq!(message[20..32], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn only_an_acknowledgement_is_success() {
        let mut answer = [0; 36];
        assert_eq!(status(&answer), None);
        answer[4] = 2;
        assert_eq!(status(&answer), Some(0));
        answer[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(status(&answer), Some(-1));
        assert_eq!(status(&answer[..10]), None);
    }
}
