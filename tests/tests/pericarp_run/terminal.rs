//! `-it`: a real pseudo-terminal on our side, one of the guest's on the other.

use std::thread;
use std::time::Duration;

use pericarp_tests::screen::Screen;

use super::rig::*;

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
    screen.type_until("stty size\r", "17 71");
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
