//! Moves bytes between a process and the connections of the host.
//!
//! Each function serves one stream of one process to its end, on a thread of its own. Bytes go
//! from descriptor to descriptor by splice(2), so that a stream that only waits costs a few pages.
//! The connections are non-blocking and are polled before: splice holds the pipe's lock, and were
//! it to wait for a slow host, the container's own writes, and its end, would hang on that lock.
//!
//! Every wait also ends when the process has ended (`over`); what an output still holds is then
//! handed over before it is closed, whoever else has it open.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SendFlags, send},
    pipe::{SpliceFlags, splice},
};

/// As much as a pipe holds.
const PIECE: usize = 64 * 1024;
/// As much as a terminal hands out at once.
const TERMINAL_PIECE: usize = 4096;
/// More than the kernel keeps of what was written to a terminal (`TTYB_DEFAULT_MEM_LIMIT`).
const TERMINAL_QUEUE: usize = 128 * 1024;
/// How often a terminal that nobody has open is looked at again.
const REOPEN_PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

const GONE: PollFlags = PollFlags::ERR.union(PollFlags::HUP);

/// What there is to see at some descriptors, now or when something happens.
fn look<const N: usize>(
    wanted: [(&OwnedFd, PollFlags); N],
    limit: Option<&Timespec>,
) -> io::Result<[PollFlags; N]> {
    let mut fds = wanted.map(|(fd, events)| PollFd::from_borrowed_fd(fd.as_fd(), events));
    loop {
        match poll(&mut fds, limit) {
            Ok(_) => return Ok(fds.map(|fd| fd.revents())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_over(over: &OwnedFd) -> io::Result<bool> {
    let [seen] = look([(over, PollFlags::IN)], Some(&NOW))?;
    Ok(!seen.is_empty())
}

/// The host's end of an output connection: whether somebody is still there to take the output.
struct Taker<'a> {
    connection: &'a OwnedFd,
    /// Asked for until it comes: from then on it would always be there.
    watched: PollFlags,
}

impl<'a> Taker<'a> {
    fn new(connection: &'a OwnedFd) -> Self {
        Self {
            connection,
            watched: PollFlags::RDHUP,
        }
    }

    /// Whether the host has gone, from what was seen.
    fn has_gone(&mut self, seen: PollFlags) -> bool {
        if seen.intersects(GONE) {
            return true;
        }
        if seen.contains(PollFlags::RDHUP) {
            self.watched = PollFlags::empty();
            // It sends no more, which is its right. An empty send tells whether it still takes.
            let nothing = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            return send(self.connection, &[], nothing) == Err(Errno::PIPE);
        }
        false
    }

    /// Waits until the host takes more. False when it has gone.
    fn wait(&mut self) -> io::Result<bool> {
        loop {
            let [seen] = look([(self.connection, PollFlags::OUT | self.watched)], None)?;
            if self.has_gone(seen) {
                return Ok(false);
            }
            if seen.contains(PollFlags::OUT) {
                return Ok(true);
            }
        }
    }
}

/// From a pipe of the process to the host.
pub(crate) fn output(pipe: &OwnedFd, connection: &OwnedFd, over: &OwnedFd) -> io::Result<()> {
    let mut taker = Taker::new(connection);
    // What is still to be handed over, once the process has ended: what is in the pipe then. Those
    // who go on writing to it do not keep it open.
    let mut left = None;
    loop {
        if left.is_none() {
            let [readable, taken, ended] = look(
                [
                    (pipe, PollFlags::IN),
                    (connection, taker.watched),
                    (over, PollFlags::IN),
                ],
                None,
            )?;
            if taker.has_gone(taken) {
                return Ok(());
            }
            if !ended.is_empty() {
                left = Some(usize::try_from(rustix::io::ioctl_fionread(pipe)?).unwrap_or(PIECE));
            } else if readable.is_empty() {
                continue;
            }
        }
        let piece = left.map_or(PIECE, |left| left.min(PIECE));
        if piece == 0 {
            return Ok(());
        }
        match splice(pipe, None, connection, None, piece, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok(()),
            Ok(count) => left = left.map(|left| left.saturating_sub(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let [readable] = look([(pipe, PollFlags::IN)], Some(&NOW))?;
                if readable.contains(PollFlags::IN) {
                    if !taker.wait()? {
                        return Ok(());
                    }
                } else if left.is_some() {
                    // Somebody who was left behind has read what was still to be handed over.
                    return Ok(());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// From the host to a pipe of the process.
pub(crate) fn input(connection: &OwnedFd, pipe: &OwnedFd, over: &OwnedFd) -> io::Result<()> {
    loop {
        // Of the pipe only the end of its reader is of interest, which is always reported.
        let [readable, reader, ended] = look(
            [
                (connection, PollFlags::IN),
                (pipe, PollFlags::empty()),
                (over, PollFlags::IN),
            ],
            None,
        )?;
        if !ended.is_empty() || reader.intersects(GONE) {
            return Ok(());
        }
        if readable.is_empty() {
            continue;
        }
        match splice(connection, None, pipe, None, PIECE, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // Either there was nothing after all, or the process is slow.
                let [readable] = look([(connection, PollFlags::IN)], Some(&NOW))?;
                if !readable.is_empty() {
                    look([(pipe, PollFlags::OUT), (over, PollFlags::IN)], None)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// From a terminal to the host.
pub(crate) fn terminal_output(
    terminal: &OwnedFd,
    connection: &OwnedFd,
    over: &OwnedFd,
) -> io::Result<()> {
    let mut taker = Taker::new(connection);
    let mut buffer = [0; TERMINAL_PIECE];
    // Those who go on writing to it do not keep it open.
    let mut left = TERMINAL_QUEUE;
    loop {
        let [readable, taken, ended] = look(
            [
                (terminal, PollFlags::IN),
                (connection, taker.watched),
                (over, PollFlags::IN),
            ],
            None,
        )?;
        if taker.has_gone(taken) {
            return Ok(());
        }
        let draining = !ended.is_empty();
        if readable.is_empty() && !draining {
            continue;
        }
        match rustix::io::read(terminal, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                if !write_all(&mut taker, &buffer[..count])? {
                    return Ok(());
                }
                if draining {
                    left = left.saturating_sub(count);
                    if left == 0 {
                        return Ok(());
                    }
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN | Errno::IO) if draining => return Ok(()),
            Err(Errno::AGAIN) => {}
            // Nobody has it open; a process of this session may open /dev/tty again.
            Err(Errno::IO) => {
                look([(over, PollFlags::IN)], Some(&REOPEN_PAUSE))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Hands all of it to the host. False when that has gone.
fn write_all(taker: &mut Taker<'_>, mut bytes: &[u8]) -> io::Result<bool> {
    while !bytes.is_empty() {
        match rustix::io::write(taker.connection, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !taker.wait()? {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// What is typed, from the host to a terminal. Its end is no end of the terminal.
pub(crate) fn terminal_input(
    connection: &OwnedFd,
    terminal: &OwnedFd,
    over: &OwnedFd,
) -> io::Result<()> {
    let mut buffer = [0; TERMINAL_PIECE];
    loop {
        let [readable, ended] = look([(connection, PollFlags::IN), (over, PollFlags::IN)], None)?;
        if !ended.is_empty() {
            return Ok(());
        }
        if readable.is_empty() {
            continue;
        }
        let mut typed = match rustix::io::read(connection, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => &buffer[..count],
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        while !typed.is_empty() {
            match rustix::io::write(terminal, typed) {
                Ok(count) => typed = typed.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    look([(terminal, PollFlags::OUT), (over, PollFlags::IN)], None)?;
                    if is_over(over)? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        net::Shutdown,
        os::unix::net::UnixStream,
        thread::{self, JoinHandle},
        time::{Duration, Instant},
    };

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    struct Rig {
        host: UnixStream,
        process: File,
        over: OwnedFd,
        thread: JoinHandle<io::Result<()>>,
    }

    /// A pump between a pipe, whose other end is `process`, and a socket, whose other end is `host`.
    fn start(is_output: bool) -> Rig {
        let (host, connection) = UnixStream::pair().unwrap();
        connection.set_nonblocking(true).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let (ours, theirs): (OwnedFd, OwnedFd) = if is_output {
            (reader.into(), writer.into())
        } else {
            (writer.into(), reader.into())
        };
        let over = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ended = over.try_clone().unwrap();
        let thread = thread::spawn(move || {
            let connection = OwnedFd::from(connection);
            if is_output {
                output(&ours, &connection, &ended)
            } else {
                input(&connection, &ours, &ended)
            }
        });
        Rig {
            host,
            process: theirs.into(),
            over,
            thread,
        }
    }

    fn end(over: &OwnedFd) {
        rustix::io::write(over, &1u64.to_ne_bytes()).unwrap();
    }

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn output_arrives_whole_and_ends_with_its_last_writer() {
        let mut rig = start(true);
        let sent = sample(3_000_000);
        let wanted = sent.clone();
        let writer = thread::spawn(move || rig.process.write_all(&sent));
        let mut seen = Vec::new();
        rig.host.read_to_end(&mut seen).unwrap();
        writer.join().unwrap().unwrap();
        assert!(seen == wanted);
        rig.thread.join().unwrap().unwrap();
    }

    #[test]
    fn the_end_of_the_process_hands_over_what_there_is_and_no_more() {
        let mut rig = start(true);
        // More than the socket takes, so that some of it is still in the pipe at the end.
        let sent = sample(200_000);
        let mut all = sent.clone();
        let mut process = rig.process.try_clone().unwrap();
        let writer = thread::spawn(move || process.write_all(&sent));
        thread::sleep(Duration::from_millis(200));
        end(&rig.over);
        let mut seen = Vec::new();
        rig.host.read_to_end(&mut seen).unwrap();
        // A writer is still there, and finds nobody reading.
        rig.thread.join().unwrap().unwrap();
        let _ = writer.join().unwrap();
        assert!(rig.process.write_all(b"late").is_err());
        all.truncate(seen.len());
        assert!(seen == all && !seen.is_empty(), "{}", seen.len());
    }

    #[test]
    fn what_somebody_else_reads_from_the_pipe_is_not_waited_for() {
        const HELD: usize = 1 << 20;
        let (mut host, connection) = UnixStream::pair().unwrap();
        connection.set_nonblocking(true).unwrap();
        let (mut reader, mut writer) = io::pipe().unwrap();
        // More than the connection takes, so that some of it is still to be handed over.
        rustix::pipe::fcntl_setpipe_size(&writer, HELD).unwrap();
        writer.write_all(&sample(HELD)).unwrap();
        let over = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        end(&over);
        // A child that was left behind may have opened it again (/proc/self/fd/1).
        let ours = OwnedFd::from(reader.try_clone().unwrap());
        let pump = thread::spawn(move || output(&ours, &connection.into(), &over));
        thread::sleep(Duration::from_millis(200));
        let left = rustix::io::ioctl_fionread(&reader).unwrap();
        assert!(left > 0 && !pump.is_finished());
        let mut piece = vec![0; usize::try_from(left).unwrap()];
        reader.read_exact(&mut piece).unwrap();
        // Now the connection takes more, and the pipe, whose writer is still there, has nothing.
        host.set_nonblocking(true).unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        while !pump.is_finished() {
            assert!(Instant::now() < limit, "it goes round and round");
            if host.read(&mut piece).is_err() {
                thread::sleep(Duration::from_millis(5));
            }
        }
        pump.join().unwrap().unwrap();
    }

    #[test]
    fn a_host_that_goes_ends_the_output_at_once() {
        let mut rig = start(true);
        drop(rig.host);
        rig.thread.join().unwrap().unwrap();
        assert_eq!(
            rig.process.write_all(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn a_host_that_only_listens_gets_the_output() {
        let mut rig = start(true);
        rig.host.shutdown(Shutdown::Write).unwrap();
        thread::sleep(Duration::from_millis(50));
        rig.process.write_all(b"still here").unwrap();
        drop(rig.process);
        let mut seen = String::new();
        rig.host.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "still here");
        rig.thread.join().unwrap().unwrap();
    }

    #[test]
    fn input_arrives_whole_and_ends_with_the_hosts_half_close() {
        let mut rig = start(false);
        let sent = sample(3_000_000);
        let wanted = sent.clone();
        let writer = thread::spawn(move || {
            rig.host.write_all(&sent).unwrap();
            rig.host.shutdown(Shutdown::Write).unwrap();
            rig.host
        });
        let mut seen = Vec::new();
        rig.process.read_to_end(&mut seen).unwrap();
        assert!(seen == wanted);
        rig.thread.join().unwrap().unwrap();
        drop(writer.join().unwrap());
    }

    #[test]
    fn input_stops_when_nobody_reads_it() {
        // The process closes it, or ends while its input is full.
        let rig = start(false);
        drop(rig.process);
        rig.thread.join().unwrap().unwrap();
        let mut rig = start(false);
        rig.host.set_nonblocking(true).unwrap();
        while rig.host.write(&[0; 4096]).is_ok() {}
        end(&rig.over);
        rig.thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_terminal_carries_both_directions() {
        let master =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY);
        let Ok(master) = master else { return };
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        rustix::fs::fcntl_setfl(&master, rustix::fs::OFlags::NONBLOCK).unwrap();
        let (mut host, connection) = UnixStream::pair().unwrap();
        connection.set_nonblocking(true).unwrap();
        let over = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let connection = OwnedFd::from(connection);
        thread::scope(|scope| {
            scope.spawn(|| terminal_output(&master, &connection, &over).unwrap());
            scope.spawn(|| terminal_input(&connection, &master, &over).unwrap());
            host.write_all(b"typed\n").unwrap();
            let mut line = [0; 16];
            let count = rustix::io::read(&slave, &mut line).unwrap();
            assert_eq!(&line[..count], b"typed\n");
            (&slave).write_all(b"shown").unwrap();
            // The echo of what was typed comes first.
            let mut seen = [0; 12];
            host.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"typed\r\nshown");
            end(&over);
        });
    }
}
