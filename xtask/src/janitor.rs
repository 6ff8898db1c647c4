//! Cleans up after a demo or a bench that ended early, by Ctrl-C or by a kill
//! that leaves no time for anything.
//!
//! The demo starts this program a second time as `xtask janitor`, in a process
//! group of its own, and tells it over a pipe which process groups and which
//! directories exist. When the pipe closes, whatever the reason, the janitor
//! ends the groups still there and removes the directories and control groups. Every process the
//! demo starts must be started through [`Janitor::run`], or nobody ends it.

use std::fs;
use std::io::{BufRead, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{self, Failure, cannot_start};

/// How long a process group may take to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Our end of the pipe.
pub(crate) struct Janitor {
    process: Child,
}

/// What a finished program printed.
pub(crate) struct Output {
    pub(crate) success: bool,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Janitor {
    /// Starts the janitor.
    pub(crate) fn start() -> Result<Self, Failure> {
        let exe = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
        let mut command = Command::new(exe);
        command
            .arg("janitor")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0);
        let process = command
            .spawn()
            .map_err(|error| cannot_start(&command, &error))?;
        Ok(Self { process })
    }

    /// Creates a directory that goes away with us.
    pub(crate) fn directory(&mut self, dir: &Path) -> Result<(), Failure> {
        self.tell(
            "remove",
            dir.to_str().ok_or("a directory name is not text")?,
        )?;
        fs::create_dir_all(dir).map_err(|e| format!("cannot create {}: {e}", dir.display()).into())
    }

    /// Has the control groups go away with us that are named `prefix` and the
    /// number of a process that is no more.
    pub(crate) fn control_groups(&mut self, prefix: &str) -> Result<(), Failure> {
        self.tell("ungroup", prefix)
    }

    /// Runs `command` to its end in a process group of its own, so that a
    /// Ctrl-C at the terminal reaches it through the janitor, in order.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<Output, Failure> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| cannot_start(command, &error))?;
        let group = child.id().to_string();
        self.tell("group", &group)?;
        let stderr = child.stderr.take();
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut stderr) = stderr {
                let _ = stderr.read_to_end(&mut text);
            }
            text
        });
        let mut text = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout
                .read_to_end(&mut text)
                .map_err(|e| format!("cannot read what a program prints: {e}"))?;
        }
        let status = child
            .wait()
            .map_err(|e| format!("cannot wait for a program: {e}"))?;
        self.tell("gone", &group)?;
        Ok(Output {
            success: status.success(),
            code: status.code(),
            stdout: String::from_utf8_lossy(&text).into_owned(),
            stderr: String::from_utf8_lossy(&errors.join().unwrap_or_default()).into_owned(),
        })
    }

    /// Runs `command` like [`Janitor::run`]; anything but success is an error
    /// that shows the last lines it wrote.
    pub(crate) fn run_well(&mut self, command: &mut Command) -> Result<Output, Failure> {
        let output = self.run(command)?;
        if output.success {
            return Ok(output);
        }
        let last: Vec<&str> = output.stderr.lines().rev().take(20).collect();
        for line in last.iter().rev() {
            eprintln!("  | {line}");
        }
        let program = Path::new(command.get_program())
            .file_name()
            .unwrap_or(command.get_program())
            .to_string_lossy()
            .into_owned();
        Err(match output.code {
            Some(code) => {
                format!("{program} failed with exit code {code}; its last lines are above")
            }
            None => format!("{program} was ended by a signal"),
        }
        .into())
    }

    fn tell(&mut self, word: &str, value: &str) -> Result<(), Failure> {
        let pipe = self
            .process
            .stdin
            .as_mut()
            .ok_or("the janitor has no pipe")?;
        writeln!(pipe, "{word} {value}")
            .map_err(|e| format!("the janitor process is gone: {e}").into())
    }
}

impl Drop for Janitor {
    /// Lets the janitor do its work now and waits for it.
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The janitor's own side: remembers until the pipe closes, then cleans up.
pub(crate) fn serve(orders: impl BufRead) -> Result<(), Failure> {
    let mut duties = Duties::default();
    for order in orders.lines().map_while(Result::ok) {
        duties.note(&order);
    }
    for group in &duties.groups {
        end_group(*group);
    }
    for dir in &duties.directories {
        let _ = fs::remove_dir_all(dir);
    }
    for prefix in &duties.control_groups {
        let deadline = Instant::now() + PATIENCE;
        while !remove_groups(Path::new("/sys/fs/cgroup"), prefix) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Removes the control groups below `base` that are named `prefix` and the number
/// of a process that is no more. False when there are others: their process may
/// be about to end.
fn remove_groups(base: &Path, prefix: &str) -> bool {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let hierarchies = entries(base).map(|entry| entry.path());
    let all = hierarchies.chain([base.to_owned()]);
    let mut done = true;
    for group in all.flat_map(|hierarchy| entries(&hierarchy)) {
        let name = group.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let process = number.and_then(|number| number.parse::<u32>().ok());
        if let Some(id) = process {
            let ended = !Path::new("/proc").join(id.to_string()).exists();
            done &= ended && fs::remove_dir(group.path()).is_ok();
        }
    }
    done
}

#[derive(Debug, Default, PartialEq)]
struct Duties {
    groups: Vec<u32>,
    directories: Vec<PathBuf>,
    /// What their names begin with.
    control_groups: Vec<String>,
}

impl Duties {
    fn note(&mut self, order: &str) {
        match order.split_once(' ') {
            Some(("group", id)) => self.groups.extend(id.parse::<u32>()),
            Some(("gone", id)) => self.groups.retain(|group| group.to_string() != id),
            Some(("remove", dir)) => self.directories.push(dir.into()),
            Some(("ungroup", prefix)) => self.control_groups.push(prefix.to_owned()),
            _ => {}
        }
    }
}

/// Asks a process group to end, and makes it end when it does not.
fn end_group(group: u32) {
    signal(group, "TERM");
    let deadline = Instant::now() + PATIENCE;
    while signal(group, "0") {
        if Instant::now() > deadline {
            signal(group, "KILL");
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Sends a signal to a group; false when there is no such group. The shell's
/// own `kill` does it: not every machine has the program.
fn signal(group: u32, name: &str) -> bool {
    command::capture(
        Command::new("sh").args(["-c", &format!("kill -s {name} -- -{group} 2>/dev/null")]),
    )
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duties_are_what_was_said_and_not_taken_back() {
        let mut duties = Duties::default();
        for order in [
            "group 12",
            "remove /tmp/a b",
            "group 13",
            "gone 12",
            "ungroup some-",
            "nonsense",
        ] {
            duties.note(order);
        }
        assert_eq!(
            duties,
            Duties {
                groups: vec![13],
                directories: vec!["/tmp/a b".into()],
                control_groups: vec!["some-".to_owned()],
            }
        );
    }

    #[test]
    fn cleaning_up_ends_groups_and_removes_directories() {
        let dir = std::env::temp_dir().join(format!("xtask-janitor-{}", std::process::id()));
        fs::create_dir_all(dir.join("inside")).unwrap();
        let mut sleeper = Command::new("sleep")
            .arg("60")
            .process_group(0)
            .spawn()
            .unwrap();
        let waiter = {
            let orders = format!("group {}\nremove {}\n", sleeper.id(), dir.display());
            thread::spawn(move || serve(orders.as_bytes()))
        };
        assert!(!sleeper.wait().unwrap().success());
        waiter.join().unwrap().unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn groups_of_processes_that_are_no_more_are_removed() {
        let dir = std::env::temp_dir().join(format!("xtask-groups-{}", std::process::id()));
        let ours = format!("cpu/pre-{}", std::process::id());
        // No process has a number like the first two.
        let names = ["cpu/pre-4294967295", "pre-4294967294", "cpu/pre-x", &ours];
        for name in names {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        assert!(!remove_groups(&dir, "pre-"));
        let left = names.map(|name| dir.join(name).exists());
        assert_eq!(left, [false, false, true, true]);
        fs::remove_dir(dir.join(&ours)).unwrap();
        assert!(remove_groups(&dir, "pre-"));
        fs::create_dir_all(dir.join("cpu/pre-4294967293/in use")).unwrap();
        assert!(!remove_groups(&dir, "pre-"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
