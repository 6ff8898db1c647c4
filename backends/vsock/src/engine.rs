//! All connections of one device: finds them by port, opens and ends them,
//! hears of their sockets through an epoll instance of its own, and says what
//! the guest is to be sent next. It knows no virtqueue; `Vsock`
//! feeds it packets and takes packets from it. It must never wait.

mod host;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use log::debug;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use crate::connection::{Connection, Ports, State, Verdict};
use crate::credit::{BUF_ALLOC, LITTLE, MANY};
use crate::packet::{HOST_CID, Header, STREAM, op, shutdown};

/// Connections of one device, where the limit of descriptors allows as many.
pub const MAX_CONNECTIONS: usize = 4096;
/// Resets that wait for a receive buffer, beyond which the guest is not heard.
const MAX_RESETS: usize = 256;
/// Ports that stand for host programs. Linux guests give out theirs from 1024
/// upwards, so that these are easy to tell apart in a trace.
const FIRST_PORT: u32 = 1 << 30;

/// How long the guest may take to confirm the end.
const CLOSING: Duration = Duration::from_secs(10);
/// How long a host program may take to read what a closed connection left.
const DRAINING: Duration = Duration::from_secs(30);

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_TOKEN: u64 = 2;

/// All connections of one device.
#[derive(Debug)]
pub struct Engine {
    guest_cid: u64,
    listener: UnixListener,
    /// What a port number is appended to, in the working directory.
    prefix: String,
    limit: usize,
    epoll: OwnedFd,
    timer: OwnedFd,
    ticking: bool,
    /// The listener was left alone because no place was free.
    listener_waits: bool,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    from_guest: usize,
    next_token: u64,
    next_port: u32,
    /// Connections that may have a packet, first come first served.
    line: VecDeque<u64>,
    resets: VecDeque<Header>,
}

impl Engine {
    /// Serves `listener`. Guests dial ports as sockets `prefix` + port in the
    /// directory that is the working directory by then.
    ///
    /// # Errors
    /// The kernel's refusal of an epoll instance or timer.
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        prefix: String,
        limit: usize,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let once = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), once)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        Ok(Self {
            guest_cid,
            listener,
            prefix,
            limit: limit.clamp(1, MAX_CONNECTIONS),
            epoll,
            timer,
            ticking: false,
            listener_waits: false,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            from_guest: 0,
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            line: VecDeque::new(),
            resets: VecDeque::new(),
        })
    }

    /// The guest's context id.
    pub(crate) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Closes everything: the guest is another one now, or none.
    pub(crate) fn reset(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.from_guest = 0;
        self.line.clear();
        self.resets.clear();
        self.take_waiting();
    }

    /// True when the guest must take packets before it is heard again.
    pub(crate) fn congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// True when [`next_packet`](Self::next_packet) may have one.
    pub(crate) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// Handles one packet of the guest.
    pub(crate) fn receive(&mut self, header: &Header, payload: &[u8]) {
        if header.src_cid != self.guest_cid {
            // Not its address: an answer would not be for it either.
            debug!("packet from context {} dropped", header.src_cid);
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.refuse(header);
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(token) = self.by_ports.get(&ports).copied() else {
            return match header.op {
                op::REQUEST => self.dial(ports, header),
                _ => self.refuse(header),
            };
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return self.refuse(header);
        };
        match connection.receive(header, payload) {
            Verdict::Keep => self.queue(token),
            Verdict::Gone => self.let_go(token),
            Verdict::Finished => {
                self.refuse(header);
                self.let_go(token);
            }
            Verdict::Broken => {
                debug!("connection {ports:?} broken by operation {}", header.op);
                self.refuse(header);
                self.remove(token);
            }
        }
    }

    /// Handles a packet whose length is a lie: its connection ends.
    pub(crate) fn receive_malformed(&mut self, header: &Header) {
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.src_cid == self.guest_cid {
            self.refuse(header);
            if header.dst_cid == HOST_CID
                && header.kind == STREAM
                && let Some(token) = self.by_ports.get(&ports).copied()
            {
                self.remove(token);
            }
        }
    }

    /// Answers with a reset; never to a reset.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// The guest wants to talk to the host program behind `ports.host`.
    fn dial(&mut self, ports: Ports, request: &Header) {
        // A part of the places stays for those who want to reach the guest.
        let full =
            self.connections.len() >= self.limit || self.from_guest >= self.limit - self.limit / 4;
        let connected = if full {
            Err(Errno::NFILE)
        } else {
            self.connect(ports.host)
        };
        let added = connected.and_then(|socket| {
            let connection = Connection::dialled(socket, ports, request, self.room());
            self.add(connection)
        });
        match added {
            Ok(token) => {
                self.from_guest += 1;
                self.by_ports.insert(ports, token);
                self.queue(token);
            }
            Err(errno) => {
                debug!("port {} cannot be dialled: {errno}", ports.host);
                self.refuse(request);
            }
        }
    }

    /// Does not wait: where a host program's backlog is full, this is an error.
    fn connect(&self, port: u32) -> Result<OwnedFd, Errno> {
        let address = SocketAddrUnix::new(format!("{}{port}", self.prefix))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(socket)
    }

    /// Bytes to hold for the next connection's host program.
    fn room(&self) -> u32 {
        match self.connections.len() {
            ..MANY => BUF_ALLOC,
            _ => LITTLE,
        }
    }

    fn add(&mut self, connection: Connection) -> Result<u64, Errno> {
        let token = self.next_token;
        self.next_token += 1;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = EventData::new_u64(token);
        epoll::add(&self.epoll, connection.socket(), data, flags)?;
        self.connections.insert(token, connection);
        Ok(token)
    }

    /// Ends a connection; what waits for the host program is lost.
    fn remove(&mut self, token: u64) {
        // Closing the socket takes it off the epoll instance, too.
        if let Some(connection) = self.connections.remove(&token) {
            self.forget(token, &connection);
            self.take_waiting();
        }
    }

    /// Takes a connection out of the tables.
    fn forget(&mut self, token: u64, connection: &Connection) {
        if self.by_ports.get(&connection.ports) == Some(&token) {
            self.by_ports.remove(&connection.ports);
            self.from_guest -= usize::from(connection.from_guest);
        }
        // A guest that takes no packets must not fill the line with the dead.
        if connection.in_line {
            self.line.retain(|waiting| *waiting != token);
        }
    }

    /// The guest is done with a connection: the host program still gets what
    /// was sent to it, if the guest ended it in order.
    fn let_go(&mut self, token: u64) {
        let Some(mut connection) = self.connections.remove(&token) else {
            return;
        };
        self.forget(token, &connection);
        if connection.holds_data() && connection.guest_finished() {
            connection.state = State::Draining;
            connection.in_line = false;
            self.connections.insert(token, connection);
            self.set_deadline(token, DRAINING);
        } else {
            drop(connection);
            self.take_waiting();
        }
    }

    fn queue(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.in_line
            && connection.has_packet()
        {
            connection.in_line = true;
            self.line.push_back(token);
        }
    }

    /// The next packet for the guest, with its payload in `data`, which must
    /// have room for a byte at least.
    pub(crate) fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.in_line = false;
            let packet = connection.produce(self.guest_cid, data);
            let over = connection.over();
            self.queue(token);
            if let Some(packet) = packet {
                if over && packet.op == op::SHUTDOWN && packet.flags == shutdown::BOTH {
                    self.set_deadline(token, CLOSING);
                }
                return Some(packet);
            }
        }
        None
    }
}

impl AsFd for Engine {
    /// Readable when there is news from the host's sockets.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
