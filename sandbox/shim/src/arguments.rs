//! The command line, as containerd writes it: Go's flags, with one dash, before an action.

use std::{ffi::OsString, path::PathBuf};

use crate::error::ShimError;

/// What the program is started for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Action {
    /// To serve, on the socket that is its standard input.
    #[default]
    Serve,
    Start,
    Delete,
    Version,
    Info,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// containerd's, in which ids are unique.
    pub(crate) namespace: String,
    /// Of the container.
    pub(crate) id: String,
    /// containerd's socket.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    /// Empty: the working directory.
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
    pub(crate) action: Action,
}

impl Arguments {
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, ShimError> {
        let text = |argument: OsString| {
            argument
                .into_string()
                .map_err(|odd| ShimError::Invalid(format!("{}: is no text", odd.to_string_lossy())))
        };
        let mut parsed = Self::default();
        let mut arguments = arguments.into_iter().map(text);
        while let Some(argument) = arguments.next().transpose()? {
            let Some(flag) = argument.strip_prefix('-') else {
                parsed.action = match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => {
                        let rule = "is no action: start and delete are";
                        return Err(ShimError::Invalid(format!("{argument}: {rule}")));
                    }
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => parsed.debug = value.is_none_or(|value| value == "true"),
                "v" | "version" => parsed.action = Action::Version,
                "info" => parsed.action = Action::Info,
                _ => {
                    let missing = || ShimError::Invalid(format!("-{name}: needs a value"));
                    let mut value = || match &value {
                        Some(value) => Ok(value.clone()),
                        None => arguments.next().transpose()?.ok_or_else(missing),
                    };
                    match name {
                        "namespace" => parsed.namespace = value()?,
                        "id" => parsed.id = value()?,
                        "address" => parsed.address = value()?,
                        "publish-binary" => parsed.publish_binary = value()?,
                        "bundle" => parsed.bundle = value()?.into(),
                        // Where we serve is ours to say.
                        "socket" => drop(value()?),
                        _ => {
                            let rule = "no such flag";
                            return Err(ShimError::Invalid(format!("-{name}: {rule}")));
                        }
                    }
                }
            }
        }
        if matches!(parsed.action, Action::Version | Action::Info) {
            return Ok(parsed);
        }
        for (name, value) in [("namespace", &parsed.namespace), ("id", &parsed.id)] {
            // They become names of directories.
            if value.is_empty() || value.starts_with('.') || value.contains(['/', '\0']) {
                let rule = "must be given, without slashes and no dot at its beginning";
                return Err(ShimError::Invalid(format!("-{name} '{value}': {rule}")));
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        let words = line.split_whitespace().map(OsString::from);
        Arguments::parse(words).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_written_as_go_programs_write_them() {
        let parsed =
            parse("-namespace k8s.io --address=/c.sock -publish-binary /c -id a -debug start");
        assert_eq!(
            parsed.unwrap(),
            Arguments {
                namespace: "k8s.io".into(),
                id: "a".into(),
                address: "/c.sock".into(),
                publish_binary: "/c".into(),
                debug: true,
                action: Action::Start,
                ..Arguments::default()
            }
        );
        let parsed = parse("-namespace n -id a -bundle /b delete").unwrap();
        assert_eq!(parsed.action, Action::Delete);
        assert_eq!(parsed.bundle, PathBuf::from("/b"));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-namespace n -id a").unwrap().action, Action::Serve);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, said) in [
            ("-id a start", "-namespace ''"),
            ("-namespace n -id ../a start", "-id '../a'"),
            ("-namespace n -id a stop", "stop: is no action"),
            ("-namespace n -id", "-id: needs a value"),
            ("-nonsense", "-nonsense: no such flag"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.starts_with(said), "{line}: {error}");
        }
    }
}
