//! What the command lines of all sidecars have in common: mistakes of one line,
//! and the values that mean the same everywhere.
//!
//! Called by each program's own `options`, which knows what options there are.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::prelude::*;
use log::LevelFilter;
use thiserror::Error;

/// A mistake on the command line.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{option}{}{value}: {rule}", if value.is_empty() { "" } else { " " })]
pub struct BadOption {
    /// The option as it is written.
    pub option: String,
    /// Its value, quoted where that helps.
    pub value: String,
    /// Which rule it breaks, and the cure.
    pub rule: String,
}

/// Where a front end's socket comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketOption {
    /// Bind it here.
    Path(PathBuf),
    /// It was passed as this descriptor.
    Descriptor(i32),
}

/// A [`BadOption`]; `value` may be empty.
pub fn bad(option: &str, value: impl Display, rule: impl Into<String>) -> BadOption {
    BadOption {
        option: option.to_owned(),
        value: value.to_string(),
        rule: rule.into(),
    }
}

/// Nobody knows this option.
pub fn unknown(name: &str) -> BadOption {
    bad(name, "", "unknown option; see --help")
}

/// The arguments of a program, read one after another.
#[derive(Debug)]
pub struct CommandLine {
    parser: lexopt::Parser,
    seen: HashSet<String>,
    repeatable: &'static [&'static str],
}

impl CommandLine {
    /// These, without the program's name. An option comes once, unless it is
    /// repeatable.
    pub fn new(
        args: impl IntoIterator<Item = OsString>,
        repeatable: &'static [&'static str],
    ) -> Self {
        Self {
            parser: lexopt::Parser::from_args(args),
            seen: HashSet::new(),
            repeatable,
        }
    }

    /// The name of the next option, dashes included; `-h` and `-V` by their long
    /// names.
    ///
    /// # Errors
    /// When something else comes next, or an option again.
    pub fn next_option(&mut self) -> Result<Option<String>, BadOption> {
        let argument = self
            .parser
            .next()
            .map_err(|e| bad("command line", "", format!("{e}; see --help")))?;
        let name = match argument {
            None => return Ok(None),
            Some(Long(name)) => format!("--{name}"),
            Some(Short('h')) => "--help".to_owned(),
            Some(Short('V')) => "--version".to_owned(),
            Some(Short(c)) => return Err(unknown(&format!("-{c}"))),
            Some(Value(v)) => {
                let rule = "not an option: every value belongs to one; see --help";
                return Err(bad(&v.to_string_lossy(), "", rule));
            }
        };
        let repeatable = self.repeatable.contains(&name.as_str());
        if !repeatable && !self.seen.insert(name.clone()) {
            return Err(bad(&name, "", "given twice: give it once"));
        }
        Ok(Some(name))
    }

    /// The value of the option `name`, which was just read.
    ///
    /// # Errors
    /// When there is none, or it is not text.
    pub fn value(&mut self, name: &str) -> Result<String, BadOption> {
        let value = self
            .parser
            .value()
            .map_err(|_| bad(name, "", "its value is missing; see --help"))?;
        value
            .into_string()
            .map_err(|v| bad(name, v.display(), "not valid UTF-8: choose another name"))
    }

    /// The options so far, but for the repeatable ones.
    pub fn seen(&self) -> &HashSet<String> {
        &self.seen
    }
}

/// Calls `set` for each pair of `key=value,key=value`, where a doubled comma
/// stands for one: the value of `option`.
///
/// # Errors
/// What is no pair, a key that comes twice, and what `set` refuses.
pub fn keys(
    option: &str,
    text: &str,
    mut set: impl FnMut(&str, &str) -> Result<(), BadOption>,
) -> Result<(), BadOption> {
    let mut seen = HashSet::new();
    for part in text.replace(",,", "\0").split(',') {
        let part = part.replace('\0', ",");
        let (key, value) = part.split_once('=').ok_or_else(|| {
            let rule = "not key=value; a comma in a value is written twice";
            bad(option, format!("{part:?}"), rule)
        })?;
        if !seen.insert(key.to_owned()) {
            let name = format!("{option} {key}");
            return Err(bad(&name, value, "given twice: give it once"));
        }
        set(key, value)?;
    }
    Ok(())
}

/// A whole number in a range.
///
/// # Errors
/// When it is none.
pub fn number<T>(name: &str, value: &str, low: T, high: T) -> Result<T, BadOption>
where
    T: FromStr + PartialOrd + Display + Copy,
{
    let number = value.parse().ok().filter(|n| (low..=high).contains(n));
    number.ok_or_else(|| {
        let rule = format!("not a number from {low} to {high}");
        bad(name, format!("{value:?}"), rule)
    })
}

/// A whole number with an optional suffix K, M or G, by 1024 each.
///
/// # Errors
/// When it is none, or does not fit.
pub fn amount(name: &str, value: &str) -> Result<u64, BadOption> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K') => (&value[..value.len() - 1], 10),
        Some(b'M') => (&value[..value.len() - 1], 20),
        Some(b'G') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    let number = digits.parse::<u64>().ok().filter(|_| plain);
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| {
            let rule = "not a number such as 500, 64K or 100M: use 0 for no limit";
            bad(name, format!("{value:?}"), rule)
        })
}

/// CPUs such as `0,2-3`.
///
/// # Errors
/// When it is no such list.
pub fn cpu_list(name: &str, value: &str) -> Result<Vec<usize>, BadOption> {
    let rule = "a CPU list looks like 0,2-3, with CPUs below 1024";
    let cpu = |text: &str| number::<usize>(name, text, 0, 1023);
    let mut cpus = Vec::new();
    for part in value.split(',') {
        let range = match part.split_once('-') {
            Some((low, high)) => (cpu(low), cpu(high)),
            None => (cpu(part), cpu(part)),
        };
        match range {
            (Ok(low), Ok(high)) if low <= high => cpus.extend(low..=high),
            _ => return Err(bad(name, format!("{value:?}"), rule)),
        }
    }
    Ok(cpus)
}

/// What a key turns on or off.
///
/// # Errors
/// When it is neither.
pub fn on_or_off(name: &str, value: &str) -> Result<bool, BadOption> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad(name, format!("{value:?}"), "say on or off")),
    }
}

/// A path; `what` says of what, for whoever gave none.
///
/// # Errors
/// When it is empty.
pub fn path(name: &str, value: String, what: &str) -> Result<PathBuf, BadOption> {
    if value.is_empty() {
        return Err(bad(name, "\"\"", format!("empty: give {what}")));
    }
    Ok(value.into())
}

/// `--socket-path`.
///
/// # Errors
/// When it is empty.
pub fn socket_path(name: &str, value: &str) -> Result<SocketOption, BadOption> {
    path(name, value.to_owned(), "the path of a socket").map(SocketOption::Path)
}

/// `--fd`. The first three are ours.
///
/// # Errors
/// When it can be no socket.
pub fn descriptor(name: &str, value: &str) -> Result<SocketOption, BadOption> {
    number(name, value, 3, i32::MAX).map(SocketOption::Descriptor)
}

/// `--log-level`.
///
/// # Errors
/// When there is no such level.
pub fn log_level(name: &str, value: &str) -> Result<LevelFilter, BadOption> {
    let known = value.parse().ok().filter(|l| *l != LevelFilter::Trace);
    let rule = "unknown level: use error, warn, info, debug or off";
    known.ok_or_else(|| bad(name, format!("{value:?}"), rule))
}
