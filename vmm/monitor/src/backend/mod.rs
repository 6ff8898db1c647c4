//! The other half of every device: a vhost-user backend in a process of its own,
//! whatever it serves. A thread for each device talks to it ([`actor`]) by the
//! protocol's messages ([`session`]); the guest's accesses only leave word there
//! ([`Handle`]). What differs between kinds of devices is in [`kind`].
//!
//! A backend may vanish at any time and come back: the thread dials until it
//! does, and no virtual CPU waits for it.

pub mod actor;
pub mod kind;
pub mod session;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use pericarp_confine::SocketFile;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::{Activation, Back};

/// Reaches a backend again after it has gone.
pub trait Dial: Send {
    /// A new connection.
    ///
    /// # Errors
    /// Nobody listens, or not yet.
    fn dial(&self) -> io::Result<UnixStream>;
}

impl Dial for SocketFile {
    fn dial(&self) -> io::Result<UnixStream> {
        self.connect()
    }
}

impl Dial for PathBuf {
    fn dial(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self)
    }
}

/// Words of a guest's making that may wait for the thread of a device.
const WAITING_MAX: usize = 1024;

/// What the thread of a device is told.
#[derive(Debug)]
pub(crate) enum Word {
    Activate(Activation),
    Reset,
    Call(u16, Arc<EventFd>),
    WriteConfig(u32, Vec<u8>),
    Remove,
}

/// Leaves word for the thread of a device. The [`Back`] of its function.
#[derive(Debug)]
pub struct Handle {
    pub(crate) words: Sender<Word>,
    /// Words that nobody has heard yet.
    pub(crate) waiting: Arc<AtomicUsize>,
    pub(crate) bell: Arc<EventFd>,
    pub(crate) lifeline: Arc<Lifeline>,
}

impl Handle {
    fn say(&self, word: Word) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Without a reader the thread has ended, and so has the device.
        if self.words.send(word).is_ok() {
            let _ = self.bell.write(1);
        }
    }

    /// What a guest can say as often as it likes, which costs memory until it is heard.
    fn say_if_room(&self, word: Word) -> bool {
        let room = self.waiting.load(Ordering::Relaxed) < WAITING_MAX;
        if room {
            self.say(word);
        }
        room
    }
}

impl Back for Handle {
    fn activate(&mut self, activation: Activation) {
        self.say(Word::Activate(activation));
    }

    fn reset(&mut self) {
        // In this order: once it has been told, the device's thread may have taken the rings
        // back before we look, and a connection in the best of health would be cut.
        self.lifeline.cut_if_idle();
        self.say(Word::Reset);
    }

    fn set_call(&mut self, ring: u16, call: Arc<EventFd>) -> bool {
        self.say_if_room(Word::Call(ring, call))
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> bool {
        self.say_if_room(Word::WriteConfig(offset, data.to_vec()))
    }

    fn remove(&mut self) {
        self.say(Word::Remove);
        self.lifeline.cut_if_idle();
    }
}

/// The connection, to end a wait for a backend that does not answer. Cut while
/// the backend has no rings alone: with rings, it may still write to the guest's
/// memory afterwards.
#[derive(Debug, Default)]
pub struct Lifeline(Mutex<(Option<UnixStream>, bool)>);

impl Lifeline {
    fn with<T>(&self, act: impl FnOnce(&mut (Option<UnixStream>, bool)) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// This is the connection now, on which no ring was started.
    pub(crate) fn hold(&self, stream: Option<UnixStream>) {
        self.with(|line| *line = (stream, false));
    }

    /// The backend has rings from here on, or has none.
    pub(crate) fn set_rings(&self, rings: bool) {
        self.with(|line| line.1 = rings);
    }

    fn cut_if_idle(&self) {
        self.with(|(stream, rings)| {
            if let Some(stream) = stream.as_ref().filter(|_| !*rings) {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
    }

    /// Ends the connection whatever the backend does.
    pub(crate) fn cut(&self) {
        self.with(|(stream, _)| {
            if let Some(stream) = stream {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_outruns_its_backend_costs_no_memory() {
        let (words, inbox) = std::sync::mpsc::channel();
        let mut handle = Handle {
            words,
            waiting: Arc::default(),
            bell: Arc::new(crate::event::new().unwrap()),
            lifeline: Arc::default(),
        };
        let taken = (0..3000)
            .filter(|at| handle.write_config(*at, &[1]))
            .count();
        assert_eq!(taken, WAITING_MAX);
        let call = Arc::clone(&handle.bell);
        assert!(!handle.set_call(0, call));
        // A reset is heard all the same.
        handle.reset();
        assert_eq!(inbox.try_iter().count(), WAITING_MAX + 1);
    }
}
