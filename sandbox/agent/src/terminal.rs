//! Terminals: crun makes one inside the container and hands over its other end.
//!
//! Called by `container` around a start. The hand-over is crun's `--console-socket`: one message
//! on a unix socket that carries one descriptor.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
};

use rustix::{
    fs::OFlags,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg},
    termios::{Winsize, tcsetwinsize},
};

/// Where crun will hand a terminal over.
pub(crate) struct Console(UnixListener);

impl Console {
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// The terminal that was handed over; call when crun has ended. It is set non-blocking.
    pub(crate) fn receive(self) -> io::Result<OwnedFd> {
        let (connection, _) = self.0.accept()?;
        connection.set_nonblocking(true)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // Its name, which nobody needs.
        let mut name = [0; 256];
        let message = recvmsg(
            &connection,
            &mut [IoSliceMut::new(&mut name)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let terminal = control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            })
            .ok_or(io::ErrorKind::InvalidData)?;
        rustix::fs::fcntl_setfl(&terminal, OFlags::RDWR | OFlags::NONBLOCK)?;
        Ok(terminal)
    }
}

/// Tells the terminal, and by SIGWINCH those who use it, how large it is.
pub(crate) fn resize(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    tcsetwinsize(
        terminal,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{io::IoSlice, os::unix::net::UnixStream, path::PathBuf};

    use rustix::{
        net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
        termios::tcgetwinsize,
    };

    use super::*;

    fn socket(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("pericarp-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_terminal_is_handed_over_and_resized() {
        let path = socket("console");
        let console = Console::listen(&path).unwrap();
        let terminal = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/ptmx")
            .unwrap();
        let sender = UnixStream::connect(&path).unwrap();
        let descriptors = [terminal.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let name = [IoSlice::new(b"/dev/pts/0")];
        sendmsg(&sender, &name, &mut control, SendFlags::empty()).unwrap();
        let received = console.receive().unwrap();
        std::fs::remove_file(path).unwrap();
        resize(&received, 100, 30).unwrap();
        let size = tcgetwinsize(&terminal).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (100, 30));
    }

    #[test]
    fn nothing_handed_over_is_an_error_and_no_wait() {
        let path = socket("no-console");
        let console = Console::listen(&path).unwrap();
        assert!(console.receive().is_err());
        let console = {
            std::fs::remove_file(&path).unwrap();
            Console::listen(&path).unwrap()
        };
        let _sender = UnixStream::connect(&path).unwrap();
        assert!(console.receive().is_err());
        std::fs::remove_file(path).unwrap();
    }
}
