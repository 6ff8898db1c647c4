//! What every device is told on a command line, while it is still being read:
//! its name, its socket, its queues and its limits. Each program's own draft has
//! one of these inside.

use std::collections::HashSet;

use pericarp_control::command_line::{
    BadOption, SocketOption, amount, bad, descriptor, number, socket_path,
};

use crate::limiter::{LIMIT_NAMES, LimitNames, Limits, MAX_LANES};

/// The most queues one device may have.
pub const MAX_QUEUES: u16 = 64;
/// The range of queue sizes.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 16..=pericarp_ring::MAX_QUEUE_SIZE;

/// Where the keys of a device stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keys {
    /// They are options of their own, for the only device.
    #[default]
    Options,
    /// In the value of this option.
    Of(&'static str),
    /// In a line on the control socket.
    Members,
}

impl Keys {
    /// What stands before the name of a key in messages.
    pub fn prefix(self) -> String {
        match self {
            Self::Options => "--".to_owned(),
            Self::Of(option) => format!("{option} "),
            Self::Members => String::new(),
        }
    }

    /// Nobody knows this key; `known` are those there are.
    pub fn unknown(self, key: &str, known: &str) -> BadOption {
        let option = match self {
            Self::Of(option) => option,
            _ => "key",
        };
        let rule = format!("unknown key: use {known}");
        bad(option, format!("{key:?}"), rule)
    }

    /// A value that has to be given; `what` says what it is.
    pub fn missing(self, key: &str, what: &str) -> BadOption {
        let name = format!("{}{key}", self.prefix());
        bad(&name, "", format!("missing: say {what}"))
    }
}

/// A device under construction.
#[derive(Debug)]
pub struct DeviceDraft {
    /// What its options are spelled with.
    pub keys: Keys,
    id: Option<String>,
    socket: Option<SocketOption>,
    queues: Option<u16>,
    queue_size: Option<u16>,
    /// What its limits are called, for each direction.
    names: &'static [LimitNames],
    limits: [[Option<u64>; 4]; MAX_LANES],
}

impl Default for DeviceDraft {
    fn default() -> Self {
        Self {
            keys: Keys::default(),
            id: None,
            socket: None,
            queues: None,
            queue_size: None,
            names: &[LIMIT_NAMES],
            limits: Default::default(),
        }
    }
}

/// What every device has.
#[derive(Debug)]
pub struct Served {
    /// Its name; none for an only device.
    pub id: Option<String>,
    /// Its socket.
    pub socket: SocketOption,
    /// Number of virtqueues, as asked for.
    pub queues: u16,
    /// Largest virtqueue.
    pub queue_size: u16,
    /// Limits to begin with, of each direction.
    pub limits: [Limits; MAX_LANES],
}

impl DeviceDraft {
    /// One whose keys stand there.
    pub fn new(keys: Keys) -> Self {
        Self {
            keys,
            ..Self::default()
        }
    }

    /// With these limits in place of the usual ones.
    #[must_use]
    pub fn limited_by(mut self, names: &'static [LimitNames]) -> Self {
        self.names = &names[..names.len().min(MAX_LANES)];
        self
    }

    /// Something was said of it.
    pub fn touched(&self) -> bool {
        self.id.is_some()
            || self.socket.is_some()
            || self.queues.is_some()
            || self.queue_size.is_some()
            || self.limits.iter().flatten().any(Option::is_some)
    }

    /// Sets what `key` names, if it is one of these: an option without its
    /// dashes, or a key. `name` is how the operator spelled it. False if it is
    /// another.
    ///
    /// # Errors
    /// A value that is none.
    pub fn set(&mut self, name: &str, key: &str, value: &str) -> Result<bool, BadOption> {
        match (key, self.keys) {
            ("socket-path" | "fd", Keys::Options) if self.socket.is_some() => {
                let rule = "give either --socket-path or --fd, not both";
                return Err(bad(name, value, rule));
            }
            ("fd", Keys::Options) => self.socket = Some(descriptor(name, value)?),
            ("socket-path", Keys::Options) => self.socket = Some(socket_path(name, value)?),
            ("socket", Keys::Of(_) | Keys::Members) => {
                self.socket = Some(socket_path(name, value)?);
            }
            ("id", Keys::Of(_) | Keys::Members) => {
                if value.is_empty() || value.len() > 64 {
                    let rule = "an id has 1 to 64 characters";
                    return Err(bad(name, format!("{value:?}"), rule));
                }
                self.id = Some(value.to_owned());
            }
            ("num-queues", _) => self.queues = Some(number(name, value, 1, MAX_QUEUES)?),
            ("queue-size", _) => self.queue_size = Some(queue_size(name, value)?),
            _ => {
                let limits = self.names.iter().zip(&mut self.limits);
                let mut limits = limits.flat_map(|(names, limits)| names.iter().zip(limits));
                match limits.find(|(known, _)| **known == key) {
                    Some((_, limit)) => *limit = Some(amount(name, value)?),
                    None => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    /// All of it.
    ///
    /// # Errors
    /// What is missing, or does not go together.
    pub fn finish(self) -> Result<Served, BadOption> {
        let prefix = self.keys.prefix();
        if self.keys != Keys::Options && self.id.is_none() {
            let name = format!("{prefix}id");
            return Err(bad(&name, "", "missing: give the device a name"));
        }
        let numbers = self.limits.map(|lane| lane.map(Option::unwrap_or_default));
        let limits = numbers.map(Limits::of);
        for (names, limits) in self.names.iter().zip(&limits) {
            limits.check(names).map_err(|(burst, rule)| {
                let name = format!("{prefix}{}", names[burst]);
                bad(&name, limits.numbers()[burst], rule)
            })?;
        }
        let socket = match self.keys {
            Keys::Options => "socket-path",
            _ => "socket",
        };
        let missing = || self.keys.missing(socket, "where to listen");
        Ok(Served {
            id: self.id,
            socket: self.socket.ok_or_else(missing)?,
            queues: self.queues.unwrap_or(1),
            queue_size: self.queue_size.unwrap_or(*QUEUE_SIZES.end()),
            limits,
        })
    }
}

fn queue_size(name: &str, value: &str) -> Result<u16, BadOption> {
    let size: u16 = number(name, value, *QUEUE_SIZES.start(), *QUEUE_SIZES.end())?;
    if !size.is_power_of_two() {
        let next = size.next_power_of_two();
        let rule = format!("a queue size is a power of two: use {next}");
        return Err(bad(name, value, rule));
    }
    Ok(size)
}

/// The devices of a process have names and sockets of their own, and are at most
/// so many.
///
/// # Errors
/// The first that is not so.
pub fn check_apart<'a>(
    devices: impl ExactSizeIterator<Item = (&'a str, &'a SocketOption)>,
    most: usize,
) -> Result<(), BadOption> {
    if devices.len() > most {
        let rule = format!("at most {most} devices fit one process: start another");
        return Err(bad("--device", devices.len(), rule));
    }
    let (mut ids, mut sockets) = (HashSet::new(), HashSet::new());
    let rule = "used twice: give each device its own";
    for (id, socket) in devices {
        if !ids.insert(id) {
            return Err(bad("--device id", id, rule));
        }
        if let SocketOption::Path(path) = socket
            && !sockets.insert(path)
        {
            return Err(bad("--device socket", path.display(), rule));
        }
    }
    Ok(())
}
