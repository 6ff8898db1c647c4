//! The host's side of the [`Engine`]: programs that come and go
//! on its sockets, and those that take too long. Nothing here knows packets
//! except the reset that ends what the guest was promised.

use std::time::{Duration, Instant};

use log::debug;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

use super::{Engine, FIRST_PORT, LISTENER, TIMER};
use crate::connection::{Connection, Ports, State};

/// How long a host program may take for its line.
const GREETING: Duration = Duration::from_secs(5);
/// How long the guest may take to answer a request.
const ANSWER: Duration = Duration::from_secs(10);
/// Events of host sockets looked at in one go.
const EVENTS: usize = 128;

impl Engine {
    /// Looks after the host's sockets.
    pub(crate) fn host_events(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        let now = Timespec::default();
        if let Err(errno) = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now)) {
            debug!("epoll: {errno}");
            return;
        }
        for event in events {
            let (flags, token) = (event.flags, event.data.u64());
            match token {
                LISTENER => self.accept(),
                TIMER => self.tick(),
                _ => self.socket_event(token, flags),
            }
        }
    }

    fn accept(&mut self) {
        self.listener_waits = false;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            if self.connections.len() >= self.limit {
                self.listener_waits = true;
                return;
            }
            match accept_with(&self.listener, flags) {
                Ok(socket) => match self.add(Connection::greeting(socket, self.room())) {
                    Ok(token) => self.set_deadline(token, GREETING),
                    Err(errno) => debug!("a host program is turned away: {errno}"),
                },
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    debug!("accept: {errno}");
                    self.listener_waits = true;
                    self.start_ticking();
                    return;
                }
            }
        }
    }

    /// Accepts those who came while no place was free.
    pub(super) fn take_waiting(&mut self) {
        if self.listener_waits {
            self.accept();
        }
    }

    fn socket_event(&mut self, token: u64, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let closed = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let ended = closed || flags.contains(EventFlags::RDHUP);
        connection.socket_event(
            flags.contains(EventFlags::IN) || ended,
            flags.contains(EventFlags::OUT),
            closed,
        );
        match connection.state {
            State::Greeting => match connection.greeting_line() {
                Ok(Some(port)) => self.ask(token, port),
                Ok(None) => {}
                Err(()) => self.remove(token),
            },
            State::Asked if closed => {
                let reset = connection.farewell(self.guest_cid);
                self.resets.push_back(reset);
                self.remove(token);
            }
            State::Draining if !connection.holds_data() => self.remove(token),
            State::Asked | State::Draining => {}
            State::Open => self.queue(token),
        }
    }

    /// A host program wants the guest's `port`.
    fn ask(&mut self, token: u64, port: u32) {
        // There are far fewer connections than ports, so one is free.
        let ports = loop {
            let ports = Ports {
                host: self.next_port,
                guest: port,
            };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.ask(ports);
            self.by_ports.insert(ports, token);
            self.set_deadline(token, ANSWER);
            self.queue(token);
        }
    }

    pub(super) fn set_deadline(&mut self, token: u64, patience: Duration) {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.deadline = Some(Instant::now() + patience);
            self.start_ticking();
        }
    }

    /// Runs the timer once a second while anybody has a deadline.
    fn start_ticking(&mut self) {
        if !self.ticking {
            self.ticking = self.set_timer(1);
        }
    }

    fn set_timer(&self, seconds: i64) -> bool {
        let interval = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let time = Itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time).is_ok()
    }

    fn tick(&mut self) {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.expire(Instant::now());
        self.take_waiting();
        let waiting =
            self.listener_waits || self.connections.values().any(|c| c.deadline.is_some());
        if !waiting && self.set_timer(0) {
            self.ticking = false;
        }
    }

    /// Ends what has taken too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |connection: &Connection| connection.deadline.is_some_and(|end| end <= now);
        let tokens: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| late(connection))
            .map(|(token, _)| *token)
            .collect();
        for token in tokens {
            if let Some(connection) = self.connections.get(&token) {
                if matches!(connection.state, State::Asked | State::Open) {
                    self.resets.push_back(connection.farewell(self.guest_cid));
                }
                self.remove(token);
            }
        }
    }
}
