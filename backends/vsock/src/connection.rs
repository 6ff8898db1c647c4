//! One connection: a unix socket on the host's side, a pair of ports on the
//! guest's. It moves bytes between the socket and packets and knows what is to
//! be said next; [`Engine`](crate::Engine) finds it by its ports, asks it for
//! packets and ends it. It must never wait: the socket is non-blocking.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::credit::{Inbound, Outbound};
use crate::packet::{HOST_CID, Header, MAX_PAYLOAD, STREAM, op, shutdown};

/// The two ports of a connection; the context ids are always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Ports {
    /// On the host.
    pub(crate) host: u32,
    /// In the guest.
    pub(crate) guest: u32,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// A host program that has not yet said which port it wants.
    Greeting,
    /// The guest has been asked.
    Asked,
    /// Data flows.
    Open,
    /// The guest is done with it; its last bytes wait for the host program.
    Draining,
}

/// What the guest's packet made of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Keep,
    /// The guest closed it, nothing must be answered.
    Gone,
    /// Both directions are shut: answer with a reset.
    Finished,
    /// The guest broke a rule: answer with a reset.
    Broken,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    /// Its ports, once it has them.
    pub(crate) ports: Ports,
    /// Where it stands.
    pub(crate) state: State,
    /// When patience with one of the sides ends.
    pub(crate) deadline: Option<Instant>,
    /// True while it stands in the line of those with something to send.
    pub(crate) in_line: bool,
    /// True if the guest opened it.
    pub(crate) from_guest: bool,
    inbound: Inbound,
    outbound: Outbound,
    to_host: VecDeque<u8>,
    readable: bool,
    writable: bool,
    /// What the guest has shut down.
    guest_shut: u32,
    /// What the host program has shut down, and what the guest was told of it.
    host_shut: u32,
    told: u32,
    /// REQUEST or RESPONSE, until it is sent.
    opening: Option<u16>,
    update_due: bool,
    asked_for_credit: bool,
    credit_request_due: bool,
}

impl Connection {
    fn new(socket: OwnedFd, state: State, from_guest: bool, room: u32) -> Self {
        Self {
            socket,
            ports: Ports::default(),
            state,
            deadline: None,
            in_line: false,
            from_guest,
            inbound: Inbound::new(room),
            outbound: Outbound::default(),
            to_host: VecDeque::new(),
            readable: false,
            writable: false,
            guest_shut: 0,
            host_shut: 0,
            told: 0,
            opening: None,
            update_due: false,
            asked_for_credit: false,
            credit_request_due: false,
        }
    }

    /// A host program that has just connected, for which so many bytes are held.
    pub(crate) fn greeting(socket: OwnedFd, room: u32) -> Self {
        Self::new(socket, State::Greeting, false, room)
    }

    /// A connection which the guest asked for with `request`; so many bytes are held
    /// for the host program.
    pub(crate) fn dialled(socket: OwnedFd, ports: Ports, request: &Header, room: u32) -> Self {
        let mut connection = Self::new(socket, State::Open, true, room);
        connection.ports = ports;
        connection.opening = Some(op::RESPONSE);
        connection
            .outbound
            .update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Asks the guest for `ports`.
    pub(crate) fn ask(&mut self, ports: Ports) {
        self.ports = ports;
        self.state = State::Asked;
        self.opening = Some(op::REQUEST);
    }

    /// The host program's socket has news.
    pub(crate) fn socket_event(&mut self, readable: bool, writable: bool, closed: bool) {
        self.readable |= readable;
        self.writable |= writable;
        if closed {
            self.host_deaf();
        }
        if self.writable {
            self.flush();
        }
    }

    /// Reads the line of a host program: the port it wants, `None` while the
    /// line is incomplete.
    ///
    /// # Errors
    /// It hung up, or the line is none that we know.
    pub(crate) fn greeting_line(&mut self) -> Result<Option<u32>, ()> {
        const LONGEST: usize = "CONNECT 4294967295\n".len();
        let mut line = [0; LONGEST];
        // Looked at only, so that not a byte behind the line is taken.
        let look = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let len = match rustix::net::recv(&self.socket, &mut line, look) {
            Ok((0, _)) => return Err(()),
            Ok((len, _)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(_) => return Err(()),
        };
        let Some(end) = line[..len].iter().position(|byte| *byte == b'\n') else {
            return if len < LONGEST { Ok(None) } else { Err(()) };
        };
        let port = std::str::from_utf8(&line[..end])
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|port| port.parse().ok())
            .ok_or(())?;
        let taken = rustix::net::recv(&self.socket, &mut line[..=end], RecvFlags::DONTWAIT);
        match taken {
            Ok((len, _)) if len == end + 1 => Ok(Some(port)),
            _ => Err(()),
        }
    }

    /// Handles a packet for this connection.
    pub(crate) fn receive(&mut self, header: &Header, payload: &[u8]) -> Verdict {
        self.outbound.update(header.buf_alloc, header.fwd_cnt);
        if self.outbound.available() > 0 {
            self.asked_for_credit = false;
            self.credit_request_due = false;
        }
        match (self.state, header.op) {
            (_, op::RST) => Verdict::Gone,
            (State::Asked, op::RESPONSE) => self.answered(),
            (State::Open, op::SHUTDOWN) => self.guest_shuts(header.flags & shutdown::BOTH),
            (State::Open, op::RW) => self.deliver(payload),
            (State::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            (State::Open, op::CREDIT_REQUEST) => {
                self.update_due = true;
                Verdict::Keep
            }
            _ => Verdict::Broken,
        }
    }

    fn answered(&mut self) -> Verdict {
        let line = format!("OK {}\n", self.ports.host);
        match rustix::net::send(&self.socket, line.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(len) if len == line.len() => {
                self.state = State::Open;
                self.deadline = None;
                Verdict::Keep
            }
            // It is gone: nothing was ever written to this socket before.
            _ => Verdict::Broken,
        }
    }

    fn guest_shuts(&mut self, flags: u32) -> Verdict {
        self.guest_shut |= flags;
        if self.guest_shut == shutdown::BOTH {
            return Verdict::Finished;
        }
        // Errors mean that the host program is gone, which `socket_event` hears.
        if flags & shutdown::RECEIVE != 0 {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
        if flags & shutdown::SEND != 0 && self.to_host.is_empty() {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
        Verdict::Keep
    }

    fn deliver(&mut self, payload: &[u8]) -> Verdict {
        let shut = self.guest_shut & shutdown::SEND != 0;
        if shut || !self.inbound.accept(payload.len() as u32) {
            return Verdict::Broken;
        }
        let mut rest = payload;
        if self.to_host.is_empty() {
            let sent = self.write(rest);
            rest = &rest[sent..];
        }
        if self.host_shut & shutdown::RECEIVE != 0 {
            self.inbound.forward(rest.len() as u32);
        } else {
            self.to_host.extend(rest);
        }
        Verdict::Keep
    }

    /// Writes what the socket takes and counts it.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while self.writable && done < bytes.len() {
            match rustix::net::send(&self.socket, &bytes[done..], SendFlags::NOSIGNAL) {
                Ok(len) => done += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(_) => self.host_deaf(),
            }
        }
        self.inbound.forward(done as u32);
        done
    }

    fn flush(&mut self) {
        while !self.to_host.is_empty() && self.writable {
            let mut waiting = std::mem::take(&mut self.to_host);
            let sent = self.write(waiting.as_slices().0);
            if self.host_shut & shutdown::RECEIVE != 0 {
                self.inbound.forward((waiting.len() - sent) as u32);
                return;
            }
            waiting.drain(..sent);
            if !waiting.is_empty() {
                self.to_host = waiting;
            }
        }
        if self.to_host.is_empty() && self.guest_shut & shutdown::SEND != 0 {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The host program takes no more: what the guest sends is dropped.
    fn host_deaf(&mut self) {
        self.host_shut |= shutdown::RECEIVE;
        self.writable = false;
        self.inbound.forward(self.to_host.len() as u32);
        self.to_host = VecDeque::new();
    }

    /// True while bytes wait for the host program.
    pub(crate) fn holds_data(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// True when neither side has anything to say any more, the guest knows,
    /// and only its reset is missing.
    pub(crate) fn over(&self) -> bool {
        self.told == shutdown::BOTH
    }

    /// True when the guest has said that it sends no more.
    pub(crate) fn guest_finished(&self) -> bool {
        self.guest_shut & shutdown::SEND != 0
    }

    /// The reset that ends this connection.
    pub(crate) fn farewell(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: STREAM,
            op: op::RST,
            ..Header::default()
        }
    }

    fn may_read(&self) -> bool {
        self.state == State::Open
            && self.readable
            && self.opening.is_none()
            && self.host_shut & shutdown::SEND == 0
            && self.guest_shut & shutdown::RECEIVE == 0
    }

    /// True when [`produce`](Self::produce) may have a packet.
    pub(crate) fn has_packet(&self) -> bool {
        if !matches!(self.state, State::Asked | State::Open) {
            return false;
        }
        self.opening.is_some()
            || (self.may_read() && (self.outbound.available() > 0 || !self.asked_for_credit))
            || (self.state == State::Open
                && (self.told != self.host_shut
                    || self.update_due
                    || self.inbound.due()
                    || self.credit_request_due))
    }

    /// The next packet for the guest: at most `data.len()` bytes of payload,
    /// which are put there.
    pub(crate) fn produce(&mut self, guest_cid: u64, data: &mut [u8]) -> Option<Header> {
        if !self.has_packet() {
            return None;
        }
        if let Some(operation) = self.opening.take() {
            return Some(self.packet(guest_cid, operation, 0, 0));
        }
        if self.may_read() {
            let credit = self.outbound.available() as usize;
            let want = data.len().min(credit).min(MAX_PAYLOAD);
            if credit == 0 && !self.asked_for_credit {
                self.asked_for_credit = true;
                self.credit_request_due = true;
            }
            if want > 0 {
                let len = self.read(&mut data[..want]);
                if len > 0 {
                    self.outbound.send(len);
                    return Some(self.packet(guest_cid, op::RW, 0, len));
                }
            }
        }
        if self.told != self.host_shut {
            self.told = self.host_shut;
            return Some(self.packet(guest_cid, op::SHUTDOWN, self.told, 0));
        }
        if self.update_due || self.inbound.due() {
            self.update_due = false;
            return Some(self.packet(guest_cid, op::CREDIT_UPDATE, 0, 0));
        }
        if self.credit_request_due {
            self.credit_request_due = false;
            return Some(self.packet(guest_cid, op::CREDIT_REQUEST, 0, 0));
        }
        None
    }

    /// Reads from the host program; 0 when there is nothing now or ever.
    fn read(&mut self, data: &mut [u8]) -> u32 {
        loop {
            match rustix::net::recv(&self.socket, &mut *data, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.host_shut |= shutdown::SEND,
                Ok((len, _)) => return len as u32,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => self.readable = false,
                // Reset by the peer: what it sent before was read before.
                Err(_) => self.host_shut |= shutdown::SEND,
            }
            return 0;
        }
    }

    fn packet(&mut self, guest_cid: u64, operation: u16, flags: u32, len: u32) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op: operation,
            flags,
            buf_alloc: self.inbound.room(),
            fwd_cnt: self.inbound.announce(),
        }
    }
}
