//! The command line of `pericarp-vsock`.
//!
//! `main` parses it whole before it touches anything. Every mistake becomes one
//! line that names the option, the value, the rule and the cure.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use log::LevelFilter;
pub use pericarp_control::command_line::{BadOption, SocketOption};
use pericarp_control::command_line::{
    CommandLine, bad, descriptor, log_level, number, socket_path, unknown,
};

/// What `--help` prints.
pub const HELP: &str = "\
pericarp-vsock: a vhost-user vsock device with unix sockets on the host

usage:
  pericarp-vsock --socket-path PATH --guest-cid N --uds-path PATH [options]

the device:
  --socket-path PATH    listen here for the front end; a dead socket is replaced,
                        a live one is an error
  --fd N                use this listening socket instead
  --guest-cid N         the guest's context id, 3 to 4294967294
  --uds-path PATH       host programs connect here, send \"CONNECT port\" and a new
                        line, and are answered \"OK host-port\"; a guest that dials
                        port N reaches who listens on PATH_N

the process:
  --log-level LEVEL     error, warn (default), info, debug or off
  --no-confine          keep all privileges; for debugging only
  --print-capabilities  print what this program can do as JSON
  --version, --help
";

/// The longest name a port number can be appended to in a socket address.
const LONGEST_NAME: usize = 107 - "_4294967295".len();

/// The whole command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The front end's socket.
    pub socket: SocketOption,
    /// The guest's context id.
    pub guest_cid: u64,
    /// The host programs' socket.
    pub uds_path: PathBuf,
    /// The name in that path.
    pub uds_name: String,
    /// Log level.
    pub log_level: LevelFilter,
    /// Confine the process.
    pub confine: bool,
}

/// What the operator wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve the device.
    Serve(Options),
    /// Print capabilities.
    Capabilities,
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
}

/// Parses the arguments, without the program's name.
///
/// # Errors
/// The first [`BadOption`].
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, BadOption> {
    let mut line = CommandLine::new(args, &[]);
    let (mut socket, mut cid, mut uds, mut level) = (None, None, None, None);
    let mut confine = true;
    while let Some(name) = line.next_option()? {
        let mut value = || line.value(&name);
        match name.as_str() {
            "--help" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--print-capabilities" => return Ok(Command::Capabilities),
            "--no-confine" => confine = false,
            "--log-level" => level = Some(log_level(&name, &value()?)?),
            "--guest-cid" => {
                cid = Some(number(&name, &value()?, 3, u64::from(u32::MAX) - 1)?);
            }
            "--uds-path" => uds = Some(uds_path(&name, &value()?)?),
            "--socket-path" | "--fd" if socket.is_some() => {
                let rule = "give either --socket-path or --fd, not both";
                return Err(bad(&name, value()?, rule));
            }
            "--socket-path" => socket = Some(socket_path(&name, &value()?)?),
            "--fd" => socket = Some(descriptor(&name, &value()?)?),
            _ => return Err(unknown(&name)),
        }
    }
    let missing = |name, what| bad(name, "", format!("missing: say {what}"));
    let socket = socket.ok_or_else(|| missing("--socket-path", "where to listen"))?;
    let guest_cid = cid.ok_or_else(|| missing("--guest-cid", "which context id the guest has"))?;
    let (uds_path, uds_name) =
        uds.ok_or_else(|| missing("--uds-path", "where host programs connect"))?;
    Ok(Command::Serve(Options {
        socket,
        guest_cid,
        uds_path,
        uds_name,
        log_level: level.unwrap_or(LevelFilter::Warn),
        confine,
    }))
}

/// The path and the name in it.
fn uds_path(option: &str, value: &str) -> Result<(PathBuf, String), BadOption> {
    let path = PathBuf::from(value);
    let name = path.file_name().and_then(|name| name.to_str());
    match name {
        Some(name) if name.len() <= LONGEST_NAME => {
            let name = name.to_owned();
            Ok((path, name))
        }
        Some(name) => {
            let rule = format!(
                "its last part is {} bytes long and may have {LONGEST_NAME}, since ports are \
                 appended to it: choose a shorter name",
                name.len()
            );
            Err(bad(option, value, rule))
        }
        None => {
            let rule = "not the path of a socket: give a directory and a name";
            Err(bad(option, format!("{value:?}"), rule))
        }
    }
}

impl Options {
    /// Says whether the guest could dial its own front end's socket, or that
    /// socket is the host programs'. Looks at directories, changes nothing.
    ///
    /// # Errors
    /// The [`BadOption`] if so.
    pub fn check_apart(&self) -> Result<(), BadOption> {
        let SocketOption::Path(socket) = &self.socket else {
            return Ok(());
        };
        let own = socket.file_name().and_then(|name| name.to_str());
        let rest = own.and_then(|own| own.strip_prefix(&self.uds_name));
        let port = |rest: &str| {
            let number = rest.strip_prefix('_').map(str::parse::<u32>);
            rest.is_empty() || number.is_some_and(|port| port.is_ok())
        };
        if rest.is_some_and(port) && directory(socket) == directory(&self.uds_path) {
            let rule = "it is the --uds-path or one of its ports: choose another name";
            return Err(bad("--socket-path", socket.display(), rule));
        }
        Ok(())
    }
}

/// The directory of a path, without links and detours where it exists.
fn directory(path: &Path) -> PathBuf {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    parent.canonicalize().unwrap_or_else(|_| parent.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(args: &str) -> Result<Command, String> {
        parse(args.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_device_with_defaults() {
        let command = line("--socket-path /s --guest-cid 3 --uds-path=/d/p").unwrap();
        let options = Options {
            socket: SocketOption::Path("/s".into()),
            guest_cid: 3,
            uds_path: "/d/p".into(),
            uds_name: "p".into(),
            log_level: LevelFilter::Warn,
            confine: true,
        };
        assert_eq!(command, Command::Serve(options));
    }

    #[test]
    fn information_requests() {
        for (args, command) in [
            ("--help", Command::Help),
            ("-h", Command::Help),
            ("-V", Command::Version),
            ("--version", Command::Version),
            ("--print-capabilities", Command::Capabilities),
        ] {
            assert_eq!(line(args), Ok(command));
        }
    }

    #[test]
    fn every_mistake_names_option_value_rule_and_cure() {
        for (args, want) in [
            ("", "--socket-path: missing: say where to listen"),
            (
                "--fd 3",
                "--guest-cid: missing: say which context id the guest has",
            ),
            (
                "--fd 3 --guest-cid 3",
                "--uds-path: missing: say where host programs connect",
            ),
            ("--fd 2", "--fd \"2\": not a number from 3 to 2147483647"),
            (
                "--guest-cid 2",
                "--guest-cid \"2\": not a number from 3 to 4294967294",
            ),
            (
                "--guest-cid 4294967295",
                "--guest-cid \"4294967295\": not a number from 3 to 4294967294",
            ),
            (
                "--uds-path /",
                "--uds-path \"/\": not the path of a socket: give a directory and a name",
            ),
            (
                "--socket-path /a --fd 5",
                "--fd 5: give either --socket-path or --fd, not both",
            ),
            (
                "--socket-path",
                "--socket-path: its value is missing; see --help",
            ),
            ("--fd 3 --fd 4", "--fd: given twice: give it once"),
            ("--bogus", "--bogus: unknown option; see --help"),
            ("-x", "-x: unknown option; see --help"),
            (
                "extra",
                "extra: not an option: every value belongs to one; see --help",
            ),
            (
                "--log-level loud",
                "--log-level \"loud\": unknown level: use error, warn, info, debug or off",
            ),
        ] {
            assert_eq!(line(args).unwrap_err(), want, "{args}");
        }
        let long = format!("--uds-path /d/{}", "x".repeat(97));
        assert!(
            line(&long)
                .unwrap_err()
                .contains("97 bytes long and may have 96")
        );
    }

    #[test]
    fn the_two_sockets_are_apart() {
        let check = |socket: &str, uds: &str| {
            let args = format!("--guest-cid 3 --socket-path {socket} --uds-path {uds}");
            match line(&args).unwrap() {
                Command::Serve(options) => options.check_apart().map_err(|e| e.to_string()),
                other => panic!("{other:?}"),
            }
        };
        let rule = "it is the --uds-path or one of its ports: choose another name";
        for socket in [
            "/tmp/p",
            "/tmp/p_80",
            "/tmp/./p",
            "/tmp/../tmp/p_4294967295",
        ] {
            let want = Err(format!("--socket-path {socket}: {rule}"));
            assert_eq!(check(socket, "/tmp/p"), want);
        }
        assert!(check("./p_1", "p").is_err());
        for socket in ["/tmp/p_x", "/tmp/p_4294967296", "/tmp/px", "/p_1", "/tmp/q"] {
            assert_eq!(check(socket, "/tmp/p"), Ok(()));
        }
    }
}
