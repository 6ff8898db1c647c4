//! A tap: the queue of packets between us and the host's network stack.
//!
//! Opened or taken over before the process is confined; afterwards three ioctls on
//! the open descriptors are all that is done with it beside reads and writes, and
//! they need no privilege.
#![expect(unsafe_code)]
// UNSAFETY: ioctls with pointers to values of ours, and descriptors by number.

use std::ffi::{CString, c_int, c_short, c_uint};
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use libc::ifreq;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use thiserror::Error;

use crate::device::Host;

/// The ioctls that a confined process needs for a tap.
pub const IOCTLS: [u32; 3] = [
    libc::TUNSETOFFLOAD as u32,
    libc::TUNSETVNETHDRSZ as u32,
    libc::TUNSETQUEUE as u32,
];

/// What a tap of ours is: frames, with a virtio header, and nothing else before them.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A process that was killed has its tap until the kernel has taken its rings apart,
/// which its successor waits for.
const LETTING_GO: Duration = Duration::from_secs(2);

/// Why a tap cannot be used. The message says what to do about it.
#[derive(Debug, Error)]
pub enum TapError {
    /// There are no taps here.
    #[error("/dev/net/tun cannot be opened: load the module tun, or give the right to open it")]
    NoTun(#[source] io::Error),
    /// No interface has this name.
    #[error("no interface has this name: make it (ip tuntap add NAME mode tap vnet_hdr{})", multi(*.pairs))]
    Missing {
        /// Queue pairs that were wanted.
        pairs: u16,
    },
    /// The interface is of another kind.
    #[error(
        "it is no tap, or one made with other flags: make it anew \
         (ip tuntap add NAME mode tap vnet_hdr{})", multi(*.pairs)
    )]
    Kind {
        /// Queue pairs that were wanted.
        pairs: u16,
    },
    /// Somebody has its queues.
    #[error("another program has it open: end that, or use another tap")]
    Busy,
    /// Not ours to open.
    #[error(
        "this user may not open it: run as root, or give it to the user (ip tuntap add ... user NAME)"
    )]
    Forbidden,
    /// A descriptor that was passed is none, or comes twice.
    #[error("not an open descriptor of a tap, or given twice: pass each queue of one tap once")]
    Descriptor,
    /// A descriptor that was passed is of a tap with other flags.
    #[error("this tap was opened with other flags: use IFF_TAP, IFF_NO_PI and IFF_VNET_HDR{}",
        if *.several { ", and IFF_MULTI_QUEUE for several" } else { "" })]
    Flags {
        /// Several were passed.
        several: bool,
    },
    /// All descriptors have to be of one tap.
    #[error("of another tap than the first: pass the queues of one tap")]
    Another,
    /// The kernel's own words.
    #[error("the kernel refuses it")]
    System(#[from] io::Error),
}

fn multi(pairs: u16) -> &'static str {
    if pairs > 1 { " multi_queue" } else { "" }
}

/// A tap that is open, one descriptor for each pair of queues.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<OwnedFd>,
    uso: bool,
}

impl Tap {
    /// Opens so many queues of the interface, which is there already.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str, pairs: u16) -> Result<Self, TapError> {
        Self::find(name, pairs)?;
        let flags = if pairs > 1 {
            FLAGS | libc::IFF_MULTI_QUEUE
        } else {
            FLAGS
        };
        let mut queues = Vec::new();
        for _ in 0..pairs {
            let mut options = File::options();
            options
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK);
            let tun = options.open("/dev/net/tun");
            let tun = OwnedFd::from(tun.map_err(TapError::NoTun)?);
            let mut request = named(name);
            request.ifr_ifru.ifru_flags = flags as c_short;
            let begin = Instant::now();
            while let Err(error) = ioctl(&tun, libc::TUNSETIFF, &mut request) {
                match error.raw_os_error() {
                    Some(libc::EBUSY | libc::E2BIG) if begin.elapsed() < LETTING_GO => {
                        std::thread::sleep(LETTING_GO / 100);
                    }
                    Some(libc::EBUSY | libc::E2BIG) => return Err(TapError::Busy),
                    Some(libc::EPERM | libc::EACCES) => return Err(TapError::Forbidden),
                    Some(libc::EINVAL) => return Err(TapError::Kind { pairs }),
                    _ => return Err(TapError::System(error)),
                }
            }
            queues.push(tun);
        }
        Ok(Self::of(queues))
    }

    /// The number of the interface with this name, whatever it is.
    ///
    /// # Errors
    /// [`TapError::Missing`].
    pub fn find(name: &str, pairs: u16) -> Result<u32, TapError> {
        let plain = CString::new(name)
            .ok()
            .filter(|_| name.len() < libc::IFNAMSIZ);
        // SAFETY: a string that ends with a zero.
        let index = plain.map_or(0, |plain| unsafe { libc::if_nametoindex(plain.as_ptr()) });
        match index {
            0 => Err(TapError::Missing { pairs }),
            index => Ok(index),
        }
    }

    /// Takes queues that were opened by whoever started us.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn adopt(numbers: &[RawFd]) -> Result<Self, TapError> {
        let mut name = None;
        let several = numbers.len() > 1;
        for (index, &number) in numbers.iter().enumerate() {
            let mut request = named("");
            // SAFETY: whatever the number is, the kernel says so.
            let is_tap = unsafe { libc::ioctl(number, libc::TUNGETIFF, &raw mut request) } == 0;
            if !is_tap || numbers[..index].contains(&number) {
                return Err(TapError::Descriptor);
            }
            // SAFETY: the flags are what TUNGETIFF filled in, besides the name.
            let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff;
            let wanted = match several {
                true => FLAGS | libc::IFF_MULTI_QUEUE,
                false => FLAGS,
            };
            if flags & wanted != wanted || flags & libc::IFF_TUN != 0 {
                return Err(TapError::Flags { several });
            }
            if *name.get_or_insert(request.ifr_name) != request.ifr_name {
                return Err(TapError::Another);
            }
        }
        let queues = numbers.iter().map(|&number| {
            // SAFETY: open, and passed to us to have: no option names it twice.
            unsafe { OwnedFd::from_raw_fd(number) }
        });
        let tap = Self::of(queues.collect());
        for (index, queue) in tap.queues.iter().enumerate() {
            let flags = fcntl_getfl(queue).map_err(io::Error::from)?;
            fcntl_setfl(queue, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
            // Whoever had it before may have left it detached.
            tap.attach(index, true)?;
        }
        Ok(tap)
    }

    fn of(queues: Vec<OwnedFd>) -> Self {
        let mut tap = Self { queues, uso: true };
        // Since Linux 6.2: asked by trying.
        let all = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        tap.uso = tap.set_offloads(all).is_ok();
        let _ = tap.set_offloads(0);
        tap
    }
}

impl Host for Tap {
    fn inherited(queues: Vec<OwnedFd>, uso: bool) -> Self {
        Self { queues, uso }
    }

    fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn takes_uso(&self) -> bool {
        self.uso
    }

    fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        let Some(first) = self.queues.first() else {
            return Ok(());
        };
        // SAFETY: takes a number.
        check(unsafe { libc::ioctl(first.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
    }

    fn set_header(&self, bytes: usize) -> io::Result<()> {
        let mut size = bytes as c_int;
        let set = |queue| ioctl(queue, libc::TUNSETVNETHDRSZ, &mut size);
        self.queues.first().map_or(Ok(()), set)
    }

    fn attach(&self, queue: usize, on: bool) -> io::Result<()> {
        if self.queues.len() < 2 {
            return Ok(());
        }
        let mut request = named("");
        request.ifr_ifru.ifru_flags = match on {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        } as c_short;
        match ioctl(&self.queues[queue], libc::TUNSETQUEUE, &mut request) {
            // It is as it should be.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }
}

fn named(name: &str) -> ifreq {
    // SAFETY: a structure of numbers, of which none must not be zero.
    let mut request: ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request
}

fn ioctl<T>(queue: &OwnedFd, request: libc::Ioctl, value: &mut T) -> io::Result<()> {
    // SAFETY: each of the requests here takes a pointer to what its callers pass.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), request, &raw mut *value) })
}

fn check(result: c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let number = file.as_raw_fd();
        assert!(matches!(Tap::adopt(&[number]), Err(TapError::Descriptor)));
        assert!(matches!(Tap::adopt(&[-1]), Err(TapError::Descriptor)));
        for name in ["", "pericarp-there-is-none", "no\0ne", &"n".repeat(40)] {
            let opened = Tap::open(name, 1);
            assert!(matches!(opened, Err(TapError::Missing { .. })), "{name:?}");
        }
    }
}
