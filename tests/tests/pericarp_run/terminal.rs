//! `-it`: a real pseudo-terminal on our side, one of the guest's on the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use super::rig::*;

/// A terminal with a program on it, and who looks at it.
struct Screen {
    master: File,
    slave: OwnedFd,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

impl Screen {
    fn open(mut command: Command, columns: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap()
            .into();
        let master = File::from(master);
        // Before the program looks, as a terminal's is.
        set_size(&master, columns, rows);
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let screen = Self {
            slave,
            child,
            seen: Arc::clone(&seen),
            master,
        };
        let mut source = screen.master.try_clone().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                seen.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        screen
    }

    /// As a window does: the terminal knows, and its program is told. The test
    /// is no session leader, so the kernel does not tell it.
    fn resize(&self, columns: u16, rows: u16) {
        set_size(&self.master, columns, rows);
        kill_process(Pid::from_child(&self.child), Signal::WINCH).unwrap();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        let end = Instant::now() + LIMIT;
        while !self.text().contains(text) {
            assert!(Instant::now() < end, "no {text:?} in {:?}", self.text());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Whether the terminal handles lines itself, as before and after a session.
    fn is_cooked(&self) -> bool {
        let modes = tcgetattr(self.slave.as_fd()).unwrap();
        modes.local_modes.contains(LocalModes::ICANON)
    }

    fn code(&mut self) -> i32 {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "no end: {:?}", self.text());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_shell_is_used_through_a_terminal() {
    let Some(rig) = Rig::new("a_shell_is_used_through_a_terminal", &VM) else {
        return;
    };
    let image = rig.image();
    let arguments = ["--rootfs-image", &image, "-it", "--name", "shell", "--"];
    let command = rig.command(&[&arguments[..], &["sh"]].concat());
    let mut screen = Screen::open(command, 100, 30);
    assert!(screen.is_cooked());
    // The prompt, which only an interactive shell shows.
    screen.wait_for("# ");
    assert!(!screen.is_cooked(), "keys are passed on as they are");
    screen.type_in("test -t 0 && test -t 2 && echo is$((40 + 2)) && stty size\r");
    screen.wait_for("is42\r\n30 100\r\n");
    screen.resize(71, 17);
    let end = Instant::now() + LIMIT;
    while !screen.text().contains("17 71") {
        assert!(Instant::now() < end, "{:?}", screen.text());
        screen.type_in("stty size\r");
        thread::sleep(Duration::from_millis(500));
    }
    // Ctrl-C ends the command in the guest and nothing else.
    screen.type_in("echo sle''eps; sleep 1000\r");
    screen.wait_for("sleeps\r\n");
    thread::sleep(Duration::from_millis(500));
    screen.type_in("\x03");
    screen.type_in("echo code $?\r");
    screen.wait_for("code 130\r\n");

    // A second terminal in the same container.
    let mut command = rig.pericarp("exec");
    command.args(["-it", "-e", "MARK=7", "shell", "sh"]);
    let mut second = Screen::open(command, 80, 24);
    second.wait_for("# ");
    second.type_in("echo mark$MARK; stty size; exit 5\r");
    second.wait_for("mark7\r\n24 80\r\n");
    assert_eq!(second.code(), 5);
    assert!(second.is_cooked());

    screen.type_in("exit 9\r");
    assert_eq!(screen.code(), 9, "{:?}", screen.text());
    assert!(screen.is_cooked(), "the terminal is as it was");
    rig.assert_clean();
}
