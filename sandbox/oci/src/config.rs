//! What a container runs: the image's defaults and the command line, put together as podman does.
//!
//! Called by `pericarp run` with an opened image, and without one for a plain root directory (then
//! the defaults are empty). Looks nothing up in the container's files: users stay names here.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::image::Defaults;

/// Where programs are looked for when neither image nor command line says.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SIGTERM: u32 = 15;
const SIGRTMIN: u32 = 34;
const SIGRTMAX: u32 = 64;

/// What the command line says about one container.
#[derive(Debug, Clone, Default)]
pub struct Wishes<'a> {
    /// Replaces the image's entrypoint, and with it the image's command; empty: none at all.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// `K=V`, `K` (its value from `caller`) or `K*` (all of the caller's that begin so), in order.
    pub env: Vec<String>,
    /// Of whoever calls.
    pub caller: Option<&'a BTreeMap<String, String>>,
    /// Absolute path.
    pub working_dir: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// The container gets a terminal.
    pub terminal: bool,
    /// The container's host name.
    pub hostname: String,
}

/// What a container runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Program and arguments, at least one.
    pub args: Vec<String>,
    /// `KEY=VALUE`, each key once. Without `HOME`, which the runtime takes from the container's
    /// own `/etc/passwd`, unless image or command line set it.
    pub env: Vec<String>,
    /// Absolute path.
    pub cwd: String,
    /// `user[:group]`; empty: root.
    pub user: String,
    /// It has a terminal.
    pub terminal: bool,
    /// Asks it to end.
    pub stop_signal: u32,
}

/// A container that cannot be put together.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Nothing to run.
    #[error("no command was given and the image names none; add one behind `--`")]
    NoCommand,
    /// A variable without a name.
    #[error("environment variable '{0}' has no name; write NAME=VALUE")]
    Variable(String),
    /// Text that no program could be given.
    #[error("{0} contains a zero byte")]
    Zero(&'static str),
    /// A directory that depends on where one is.
    #[error("working directory '{directory}' ({origin}) is not absolute; begin it with /")]
    WorkingDir {
        /// As written.
        directory: String,
        /// Who wrote it.
        origin: &'static str,
    },
    /// A signal that Linux does not have.
    #[error("the image's stop signal '{0}' is no signal; Linux has SIGTERM, TERM, 15 and the like")]
    StopSignal(String),
}

/// Puts the two together.
pub fn merge(defaults: &Defaults, wishes: &Wishes<'_>) -> Result<Process, ConfigError> {
    let args = args(defaults, wishes)?;
    let env = env(defaults, wishes)?;
    for text in args
        .iter()
        .chain(&env)
        .chain(&wishes.user)
        .chain(&wishes.working_dir)
    {
        if text.contains('\0') {
            return Err(ConfigError::Zero(
                "the command, its environment or its user",
            ));
        }
    }
    Ok(Process {
        args,
        env,
        cwd: cwd(defaults, wishes)?,
        user: wishes.user.as_ref().unwrap_or(&defaults.user).clone(),
        terminal: wishes.terminal,
        stop_signal: signal(&defaults.stop_signal)?,
    })
}

/// The variables that `exec` adds to those of the container.
pub fn extra_env(
    env: &[String],
    caller: &BTreeMap<String, String>,
) -> Result<Vec<String>, ConfigError> {
    let mut found = Variables::default();
    for entry in env {
        found.wish(entry, Some(caller))?;
    }
    Ok(found.texts())
}

fn args(defaults: &Defaults, wishes: &Wishes<'_>) -> Result<Vec<String>, ConfigError> {
    let mut args = wishes
        .entrypoint
        .as_ref()
        .unwrap_or(&defaults.entrypoint)
        .clone();
    // An empty word is how one says "no entrypoint".
    args.retain(|word| !word.is_empty() || wishes.entrypoint.is_none());
    if !wishes.command.is_empty() {
        args.extend_from_slice(&wishes.command);
    } else if wishes.entrypoint.is_none() {
        args.extend_from_slice(&defaults.cmd);
    }
    if args.is_empty() || args[0].is_empty() {
        return Err(ConfigError::NoCommand);
    }
    Ok(args)
}

/// Ours, then the image's, then the command line's: the later wins and keeps the earlier's place.
fn env(defaults: &Defaults, wishes: &Wishes<'_>) -> Result<Vec<String>, ConfigError> {
    let mut env = Variables::default();
    env.set("PATH", DEFAULT_PATH);
    if wishes.terminal {
        env.set("TERM", "xterm");
    }
    env.set("container", "pericarp");
    env.set("HOSTNAME", &wishes.hostname);
    for entry in &defaults.env {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        if key.is_empty() {
            return Err(ConfigError::Variable(entry.clone()));
        }
        env.set(key, value);
    }
    for entry in &wishes.env {
        env.wish(entry, wishes.caller)?;
    }
    Ok(env.texts())
}

fn cwd(defaults: &Defaults, wishes: &Wishes<'_>) -> Result<String, ConfigError> {
    let (directory, origin) = match &wishes.working_dir {
        Some(directory) => (directory, "from the command line"),
        None if defaults.working_dir.is_empty() => return Ok("/".to_owned()),
        None => (&defaults.working_dir, "from the image"),
    };
    if !directory.starts_with('/') || directory.contains('\0') {
        return Err(ConfigError::WorkingDir {
            directory: crate::image::printable(directory),
            origin,
        });
    }
    Ok(directory.clone())
}

/// Variables in the order they were first set.
#[derive(Default)]
struct Variables(Vec<(String, String)>);

impl Variables {
    fn set(&mut self, key: &str, value: &str) {
        match self.0.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => value.clone_into(old),
            None => self.0.push((key.to_owned(), value.to_owned())),
        }
    }

    fn wish(
        &mut self,
        entry: &str,
        caller: Option<&BTreeMap<String, String>>,
    ) -> Result<(), ConfigError> {
        match entry.split_once('=') {
            Some((key, value)) if !key.is_empty() => self.set(key, value),
            None if entry.is_empty() => return Err(ConfigError::Variable(entry.to_owned())),
            Some(_) => return Err(ConfigError::Variable(entry.to_owned())),
            None => {
                let begin = entry.strip_suffix('*');
                // What the caller does not have stays as it is, as with podman.
                for (key, value) in caller.into_iter().flatten() {
                    if key == entry || begin.is_some_and(|begin| key.starts_with(begin)) {
                        self.set(key, value);
                    }
                }
            }
        }
        Ok(())
    }

    fn texts(self) -> Vec<String> {
        self.0
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    }
}

/// The number of a signal, by number or by name with or without `SIG`.
fn signal(text: &str) -> Result<u32, ConfigError> {
    if text.is_empty() {
        return Ok(SIGTERM);
    }
    let wrong = || ConfigError::StopSignal(crate::image::printable(text));
    if let Ok(number) = text.parse::<u32>() {
        return Some(number)
            .filter(|number| (1..=SIGRTMAX).contains(number))
            .ok_or_else(wrong);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(number) = real_time(name) {
        return Ok(number);
    }
    NAMES
        .iter()
        .position(|known| *known == name)
        .and_then(|at| u32::try_from(at + 1).ok())
        .ok_or_else(wrong)
}

/// `RTMIN+3`, what systemd takes as "power off".
fn real_time(name: &str) -> Option<u32> {
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        let by = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('+')?.parse().ok()?
        };
        SIGRTMIN.checked_add(by)
    } else {
        let rest = name.strip_prefix("RTMAX")?;
        let by = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('-')?.parse().ok()?
        };
        SIGRTMAX.checked_sub(by)
    };
    number.filter(|number| (SIGRTMIN..=SIGRTMAX).contains(number))
}

/// Of x86-64, from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn entrypoint_and_command_are_put_together_as_podman_does() {
        // Image's entrypoint and command, the wishes' two, the result.
        for (entrypoint, cmd, wish, command, expected) in [
            ("", "bash", None, "", "bash"),
            ("", "bash", None, "ls -l", "ls -l"),
            ("init --", "bash", None, "", "init -- bash"),
            ("init --", "bash", None, "ls", "init -- ls"),
            ("init --", "bash", Some("other"), "", "other"),
            ("init --", "bash", Some("other"), "ls", "other ls"),
            ("init --", "bash", Some(""), "ls", "ls"),
            ("init", "", None, "", "init"),
        ] {
            let defaults = Defaults {
                entrypoint: words(entrypoint),
                cmd: words(cmd),
                ..Defaults::default()
            };
            let wishes = Wishes {
                entrypoint: wish.map(|it| it.split(' ').map(str::to_owned).collect()),
                command: words(command),
                ..Wishes::default()
            };
            let process = merge(&defaults, &wishes).unwrap();
            assert_eq!(
                process.args,
                words(expected),
                "{entrypoint:?} {cmd:?} {wish:?} {command:?}"
            );
        }
        for wish in [None, Some(vec![String::new()])] {
            let wishes = Wishes {
                entrypoint: wish,
                ..Wishes::default()
            };
            assert_eq!(
                merge(&Defaults::default(), &wishes),
                Err(ConfigError::NoCommand)
            );
        }
    }

    #[test]
    fn later_variables_win_and_the_callers_are_taken_by_name() {
        let defaults = Defaults {
            env: words("PATH=/app LANG=C EMPTY"),
            cmd: words("x"),
            ..Defaults::default()
        };
        let caller = BTreeMap::from(
            [
                ("TOKEN", "secret"),
                ("LC_ALL", "de"),
                ("LC_TIME", "fr"),
                ("OTHER", "no"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        let wishes = Wishes {
            env: words("LANG=D= TOKEN ABSENT LC_* container=x"),
            caller: Some(&caller),
            terminal: true,
            hostname: "pod".into(),
            ..Wishes::default()
        };
        assert_eq!(
            merge(&defaults, &wishes).unwrap().env,
            words(
                "PATH=/app TERM=xterm container=x HOSTNAME=pod LANG=D= EMPTY= TOKEN=secret \
                 LC_ALL=de LC_TIME=fr"
            )
        );
        let plain = Wishes {
            command: words("x"),
            hostname: "h".into(),
            ..Wishes::default()
        };
        assert_eq!(
            merge(&Defaults::default(), &plain).unwrap().env,
            [
                &format!("PATH={DEFAULT_PATH}"),
                "container=pericarp",
                "HOSTNAME=h"
            ]
        );
        for bad in ["", "=x"] {
            let wishes = Wishes {
                env: vec![bad.into()],
                ..plain.clone()
            };
            assert_eq!(
                merge(&Defaults::default(), &wishes),
                Err(ConfigError::Variable(bad.into()))
            );
            assert!(extra_env(&[bad.to_owned()], &caller).is_err());
        }
        assert_eq!(
            extra_env(&words("A=1 TOKEN A=2"), &caller).unwrap(),
            words("A=2 TOKEN=secret")
        );
    }

    #[test]
    fn directory_user_and_signal_have_defaults_and_rules() {
        let mut defaults = Defaults {
            cmd: words("x"),
            ..Defaults::default()
        };
        let mut wishes = Wishes::default();
        let process = merge(&defaults, &wishes).unwrap();
        assert_eq!(
            (&process.cwd[..], &process.user[..], process.stop_signal),
            ("/", "", 15)
        );
        defaults.working_dir = "/app".into();
        defaults.user = "app:web".into();
        defaults.stop_signal = "SIGRTMIN+3".into();
        let process = merge(&defaults, &wishes).unwrap();
        assert_eq!(
            (&process.cwd[..], &process.user[..], process.stop_signal),
            ("/app", "app:web", 37)
        );
        wishes.working_dir = Some("/else".into());
        wishes.user = Some("0".into());
        let process = merge(&defaults, &wishes).unwrap();
        assert_eq!((&process.cwd[..], &process.user[..]), ("/else", "0"));
        wishes.working_dir = Some("else".into());
        assert!(matches!(
            merge(&defaults, &wishes),
            Err(ConfigError::WorkingDir { .. })
        ));
        wishes.working_dir = None;
        wishes.command = vec!["a\0b".into()];
        assert!(matches!(
            merge(&defaults, &wishes),
            Err(ConfigError::Zero(_))
        ));
    }

    #[test]
    fn signals_are_named_in_all_the_usual_ways() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigquit", 3),
            ("9", 9),
            ("SYS", 31),
            ("64", 64),
            ("RTMIN", 34),
            ("SIGRTMAX-1", 63),
            ("rtmax", 64),
        ] {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in [
            "0", "65", "SIG", "NOPE", "RTMIN+31", "RTMAX-31", "RTMIN-1", "-1",
        ] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
