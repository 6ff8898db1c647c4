//! The few ports this machine has: a 16550, the port of power and reset, and the
//! port of the boot's marks. Every other port reads as all ones. Called by the
//! threads of the virtual CPUs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::layout;

/// How long a CPU waits for whoever reads the console, which may be slow; after
/// that what does not fit is dropped and counted.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// What a guest asked of the machine by a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// To switch it off.
    PowerOff,
    /// To start it again.
    Reset,
}

/// Where the console's bytes go. Never an error to the guest, and never a wait
/// without end.
#[derive(Debug)]
pub struct Console {
    sink: Option<File>,
    dropped: Arc<AtomicU64>,
    /// The reader did not keep up: nothing waits for it until it does.
    slow: bool,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(sink) = &self.sink else {
            return Ok(bytes.len());
        };
        let patience = if self.slow {
            Timespec::default()
        } else {
            PATIENCE
        };
        let mut fds = [PollFd::from_borrowed_fd(sink.as_fd(), PollFlags::OUT)];
        let ready = poll(&mut fds, Some(&patience)).is_ok_and(|ready| ready > 0);
        self.slow = !ready;
        let written = ready && rustix::io::write(sink, bytes).is_ok();
        if !written {
            let count = bytes.len() as u64;
            self.dropped.fetch_add(count, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Interrupt of the 16550.
#[derive(Debug, Clone)]
pub struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = Serial<Line, NoEvents, Console>;

/// The ports.
#[derive(Debug)]
pub struct Ports {
    uart: Mutex<Uart>,
    line: Arc<EventFd>,
    dropped: Arc<AtomicU64>,
    begun: Instant,
    marks: Mutex<BTreeMap<u8, Duration>>,
    unclaimed: AtomicU64,
}

impl Ports {
    /// The ports of a machine that begins at `begun`, with its console going nowhere yet.
    ///
    /// # Errors
    /// No eventfd.
    pub fn new(begun: Instant) -> io::Result<Self> {
        let line = Arc::new(event::new()?);
        let dropped = Arc::new(AtomicU64::new(0));
        let console = Console {
            sink: None,
            dropped: Arc::clone(&dropped),
            slow: false,
        };
        Ok(Self {
            uart: Mutex::new(Serial::new(Line(Arc::clone(&line)), console)),
            line,
            dropped,
            begun,
            marks: Mutex::default(),
            unclaimed: AtomicU64::new(0),
        })
    }

    /// The console goes to `sink` from now on.
    pub fn attach(&self, sink: File) {
        self.uart().writer_mut().sink = Some(sink);
    }

    /// The eventfd of the 16550's interrupt.
    pub fn serial_interrupt(&self) -> &EventFd {
        &self.line
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What somebody typed: how much of it the 16550 has room for is taken.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        let room = uart.fifo_capacity().min(bytes.len());
        uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    /// The guest reads a port.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port.wrapping_sub(layout::SERIAL_PORT), data) {
            (register @ 0..layout::SERIAL_PORTS, [byte]) => {
                *byte = self.uart().read(register as u8);
            }
            (_, data) if port == layout::SLEEP_PORT => data.fill(0),
            _ => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The guest writes a port, and may ask for something by it.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        match (port, data) {
            (layout::SLEEP_PORT, [layout::SLEEP_S5]) => return Some(Request::PowerOff),
            (layout::SLEEP_PORT, [layout::SLEEP_RESET]) => return Some(Request::Reset),
            (layout::MARK_PORT, [mark]) => {
                let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
                // The first of each counts: kernels use the port to pass the time.
                marks.entry(*mark).or_insert_with(|| self.begun.elapsed());
            }
            (port, [byte]) => match port.wrapping_sub(layout::SERIAL_PORT) {
                register @ 0..layout::SERIAL_PORTS => {
                    // Only an interrupt can fail, and an eventfd's does not.
                    let _ = self.uart().write(register as u8, *byte);
                }
                _ => {
                    self.unclaimed.fetch_add(1, Ordering::Relaxed);
                }
            },
            _ => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
        None
    }

    /// The marks the guest has made, and when, since the machine began.
    pub fn marks(&self) -> BTreeMap<u8, Duration> {
        self.marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Bytes of the console that nobody took.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Accesses to ports that are not there.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn ports() -> (Ports, File) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let ports = Ports::new(Instant::now()).unwrap();
        ports.attach(writer.into());
        (ports, reader.into())
    }

    #[test]
    fn the_console_is_written_and_power_is_one_port() {
        let (ports, mut reader) = ports();
        for byte in b"hi" {
            assert_eq!(ports.write(0x3f8, &[*byte]), None);
        }
        let mut said = [0; 2];
        reader.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hi");
        assert_eq!(ports.write(0x600, &[0x34]), Some(Request::PowerOff));
        assert_eq!(ports.write(0x600, &[1]), Some(Request::Reset));
        assert_eq!(ports.write(0x600, &[0]), None);
        assert_eq!(ports.write(0x600, &[0x34, 0]), None);
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let (ports, _reader) = ports();
        for (port, size) in [(0xcf8, 4), (0x60, 1), (0x3f8, 2), (0x400, 1), (0xffff, 4)] {
            let mut data = vec![0; size];
            ports.read(port, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{port:#x}");
            ports.write(port, &data);
        }
        assert!(ports.unclaimed() > 0);
    }

    #[test]
    fn a_reader_that_does_not_read_costs_bytes_and_not_the_guest() {
        let (ports, reader) = ports();
        for _ in 0..2 * 64 * 1024 {
            ports.write(0x3f8, b"x");
        }
        assert!(ports.dropped() >= 64 * 1024);
        drop(reader);
    }

    #[test]
    fn typed_bytes_fit_the_queue_or_stay() {
        let (ports, _reader) = ports();
        assert_eq!(ports.type_in(&[b'a'; 100]), 64);
        assert_eq!(ports.type_in(b"b"), 0);
        let mut byte = [0];
        ports.read(0x3f8, &mut byte);
        assert_eq!(&byte, b"a");
        assert_eq!(ports.type_in(b"b"), 1);
    }

    #[test]
    fn the_first_mark_of_a_kind_counts() {
        let (ports, _reader) = ports();
        ports.write(layout::MARK_PORT, &[7]);
        let first = ports.marks()[&7];
        ports.write(layout::MARK_PORT, &[7]);
        assert_eq!(ports.marks()[&7], first);
        assert_eq!(ports.marks().len(), 1);
    }
}
