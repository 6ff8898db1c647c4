//! The threads that carry bytes between our own streams and those of a process in the guest.
//!
//! One thread per stream with one buffer, so what a guest can make us hold is the buffer and no
//! more: while our own reader is slow, the guest waits. Started by whoever attached to the process,
//! who is told of the outputs' ends.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fd::OwnedFd,
    io::Errno,
};

/// As much as the vsock device carries at once.
const BUFFER: usize = 64 * 1024;

/// How a stream from the guest came to its end.
#[derive(Debug)]
pub enum OutputEnd {
    /// The guest closed it, or nobody reads ours any more.
    Closed,
    /// Ours cannot be written.
    Failed(io::Error),
}

/// A running output, seen from outside.
#[derive(Debug)]
pub struct Output {
    socket: UnixStream,
    stop: Arc<OwnedFd>,
    progress: Arc<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    bytes: AtomicU64,
    /// It waits for our own reader, not for the guest.
    writing: AtomicBool,
}

impl Output {
    /// Carries what the guest sends to `sink`; `ended` is called on the thread at the end.
    pub fn start(
        name: &str,
        socket: UnixStream,
        sink: impl Write + Send + 'static,
        ended: impl FnOnce(OutputEnd) + Send + 'static,
    ) -> io::Result<Self> {
        Self::begin(name, socket, new_stop()?, sink, ended)
    }

    /// The same to a pipe of ours, which [`Output::give_up`] lets go of even while nobody reads it.
    /// `first` is called on the thread when something has been written to it for the first time.
    pub fn to_pipe(
        name: &str,
        socket: UnixStream,
        pipe: OwnedFd,
        first: impl FnOnce() + Send + 'static,
        ended: impl FnOnce(OutputEnd) + Send + 'static,
    ) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        let stop = new_stop()?;
        let sink = Pipe {
            pipe,
            stop: Arc::clone(&stop),
            first: Some(first),
        };
        Self::begin(name, socket, stop, sink, ended)
    }

    fn begin(
        name: &str,
        socket: UnixStream,
        stop: Arc<OwnedFd>,
        sink: impl Write + Send + 'static,
        ended: impl FnOnce(OutputEnd) + Send + 'static,
    ) -> io::Result<Self> {
        let progress = Arc::new(Progress::default());
        let output = Self {
            socket: socket.try_clone()?,
            stop,
            progress: Arc::clone(&progress),
        };
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || ended(carry(socket, sink, &progress)))?;
        Ok(output)
    }

    /// Bytes carried so far; None while it waits for our own reader.
    pub fn waits_since(&self) -> Option<u64> {
        (!self.progress.writing.load(Ordering::Relaxed))
            .then(|| self.progress.bytes.load(Ordering::Relaxed))
    }

    /// Bytes that our own reader has taken so far.
    pub fn carried(&self) -> u64 {
        self.progress.bytes.load(Ordering::Relaxed)
    }

    /// Ends it: what the guest has not sent by now is not waited for.
    pub fn cut(&self) {
        // It may have ended by itself.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends it, whoever is slow: what our own reader does not take at once is lost as well.
    pub fn give_up(&self) {
        // A full counter is readable, too.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        self.cut();
    }
}

fn new_stop() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?))
}

/// A pipe that does not block, and what ends the wait for its reader. A write to a pipe whose other
/// end we hold ourselves never fails for want of a reader.
struct Pipe<F> {
    pipe: OwnedFd,
    stop: Arc<OwnedFd>,
    /// Until something has been written.
    first: Option<F>,
}

impl<F: FnOnce()> Write for Pipe<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.pipe, bytes) {
                Err(Errno::AGAIN) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
                Ok(written) => {
                    if let Some(first) = self.first.take() {
                        first();
                    }
                    return Ok(written);
                }
            }
            let mut fds = [
                PollFd::new(&self.pipe, PollFlags::OUT),
                PollFd::new(&*self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if !fds[1].revents().is_empty() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn carry(mut socket: UnixStream, mut sink: impl Write, progress: &Progress) -> OutputEnd {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A guest that goes without a word closes its streams as well as it can.
            Err(_) => break,
        };
        progress.writing.store(true, Ordering::Relaxed);
        let written = write_all(&mut sink, &buffer[..count], &progress.bytes);
        progress.writing.store(false, Ordering::Relaxed);
        if let Err(error) = written {
            // The process notices at its next write, as it would with a pipe.
            let _ = socket.shutdown(Shutdown::Both);
            return match error.kind() {
                io::ErrorKind::BrokenPipe => OutputEnd::Closed,
                _ => OutputEnd::Failed(error),
            };
        }
    }
    OutputEnd::Closed
}

/// Writes all of it, and counts what has been taken meanwhile: a slow reader is told from none.
fn write_all(sink: &mut impl Write, mut bytes: &[u8], taken: &AtomicU64) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                taken.fetch_add(count as u64, Ordering::Relaxed);
                bytes = bytes.get(count..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    sink.flush()
}

/// A running input, seen from outside. Dropping it ends the thread: what is typed from then on is
/// for whoever reads next.
#[derive(Debug)]
pub struct Input {
    socket: UnixStream,
    stop: Arc<OwnedFd>,
}

impl Input {
    /// Carries what `source` has to the guest, to the end of either.
    pub fn start(source: impl AsFd + Send + 'static, socket: UnixStream) -> io::Result<Self> {
        let stop = new_stop()?;
        let input = Self {
            socket: socket.try_clone()?,
            stop: Arc::clone(&stop),
        };
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || feed(&source, socket, &stop))?;
        Ok(input)
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        // Neither fails in a way that matters: a full counter is readable, a closed socket closed.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn feed(source: &impl AsFd, mut socket: UnixStream, stop: &OwnedFd) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [
            PollFd::new(source, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
            // A process that reads no more: hang-up and error are reported unasked.
            PollFd::new(&socket, PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        if !fds[1].revents().is_empty() || !fds[2].revents().is_empty() {
            return;
        }
        match rustix::io::read(source, &mut buffer) {
            Ok(count @ 1..) => {
                if socket.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // An input that cannot be read, such as a terminal that has gone, is at its end.
            Ok(0) | Err(_) => {
                let _ = socket.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        sync::mpsc::{self, Receiver},
        time::Duration,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn start(sink: impl Write + Send + 'static) -> (UnixStream, Output, Receiver<OutputEnd>) {
        let (guest, ours) = UnixStream::pair().unwrap();
        let (tell, ends) = mpsc::channel();
        let output = Output::start("out", ours, sink, move |end| tell.send(end).unwrap()).unwrap();
        (guest, output, ends)
    }

    #[test]
    fn output_arrives_whole_and_ends() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (mut guest, output, ends) = start(writer);
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let writing = thread::spawn(move || guest.write_all(&copy).unwrap());
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        writing.join().unwrap();
        assert!(seen == sent);
        assert!(matches!(ends.recv_timeout(LIMIT), Ok(OutputEnd::Closed)));
        assert_eq!(output.waits_since(), Some(300_000));
    }

    #[test]
    fn a_reader_that_has_gone_reaches_the_guest() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let (mut guest, _output, ends) = start(writer);
        guest.write_all(b"lost").unwrap();
        assert!(matches!(ends.recv_timeout(LIMIT), Ok(OutputEnd::Closed)));
        assert!(guest.write_all(b"more").is_err());
    }

    #[test]
    fn an_output_that_fails_says_why() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (mut guest, _output, ends) = start(full);
        guest.write_all(b"x").unwrap();
        let Ok(OutputEnd::Failed(error)) = ends.recv_timeout(LIMIT) else {
            panic!("no error");
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_silent_guest_can_be_cut() {
        let (_guest, output, ends) = start(io::sink());
        assert_eq!(output.waits_since(), Some(0));
        output.cut();
        assert!(matches!(ends.recv_timeout(LIMIT), Ok(OutputEnd::Closed)));
    }

    #[test]
    fn a_slow_reader_holds_the_guest_and_not_our_memory() {
        let (reader, writer) = io::pipe().unwrap();
        let (mut guest, output, _ends) = start(writer);
        guest.set_nonblocking(true).unwrap();
        let piece = [b'x'; 4096];
        let mut taken = 0;
        // Until the pipe, the buffer and the socket are full and stay so.
        let mut refusals = 0;
        while refusals < 50 {
            match guest.write(&piece) {
                Ok(count) => {
                    taken += count;
                    refusals = 0;
                }
                Err(_) => {
                    refusals += 1;
                    thread::sleep(Duration::from_millis(2));
                }
            }
            assert!(taken < 4 << 20, "the guest is never held");
        }
        assert_eq!(output.waits_since(), None, "it waits for the reader");
        drop(reader);
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_given_up() {
        // As a FIFO whose both ends are ours: the reader is there and reads nothing.
        let (_reader, writer) = io::pipe().unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (tell, ends) = mpsc::channel();
        let ended = move |end| tell.send(end).unwrap();
        let output = Output::to_pipe("out", ours, writer.into(), || {}, ended).unwrap();
        let talk = thread::spawn(move || while guest.write_all(&[b'x'; 4096]).is_ok() {});
        while output.waits_since().is_some() || output.carried() < 64 << 10 {
            thread::sleep(Duration::from_millis(2));
        }
        output.cut();
        assert!(ends.recv_timeout(Duration::from_millis(300)).is_err());
        output.give_up();
        assert!(matches!(ends.recv_timeout(LIMIT), Ok(OutputEnd::Closed)));
        talk.join().unwrap();
    }

    #[test]
    fn a_slow_reader_of_a_pipe_gets_everything() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (tell, ends) = mpsc::channel();
        let ended = move |end| tell.send(end).unwrap();
        let (tell, firsts) = mpsc::channel();
        let first = move || tell.send(()).unwrap();
        let output = Output::to_pipe("out", ours, writer.into(), first, ended).unwrap();
        assert!(firsts.try_recv().is_err(), "nothing has been written");
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let talk = thread::spawn(move || guest.write_all(&copy).unwrap());
        let (mut seen, mut piece) = (Vec::<u8>::new(), [0; 10_000]);
        loop {
            thread::sleep(Duration::from_millis(5));
            match reader.read(&mut piece).unwrap() {
                0 => break,
                count => seen.extend(&piece[..count]),
            }
        }
        talk.join().unwrap();
        assert!(seen == sent);
        assert!(matches!(ends.recv_timeout(LIMIT), Ok(OutputEnd::Closed)));
        assert_eq!(output.carried(), 300_000);
        assert!(firsts.try_recv().is_ok());
    }

    #[test]
    fn input_is_half_closed_at_its_end() {
        let (source, mut ours) = io::pipe().unwrap();
        let (mut guest, socket) = UnixStream::pair().unwrap();
        let _input = Input::start(source, socket).unwrap();
        ours.write_all(b"abc").unwrap();
        drop(ours);
        let mut seen = Vec::new();
        guest.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"abc");
        // The other direction is still open.
        guest.write_all(b"x").unwrap();
    }

    #[test]
    fn input_stops_reading_when_dropped() {
        let (source, mut ours) = io::pipe().unwrap();
        let (mut guest, socket) = UnixStream::pair().unwrap();
        let mut rest = source.try_clone().unwrap();
        let input = Input::start(source, socket).unwrap();
        drop(input);
        let mut seen = Vec::new();
        guest.read_to_end(&mut seen).unwrap();
        ours.write_all(b"for the next").unwrap();
        drop(ours);
        rest.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"for the next");
    }
}
