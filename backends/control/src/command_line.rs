//! What the command lines of all sidecars have in common: mistakes of one line,
//! and the values that mean the same everywhere.
//!
//! Called by each program's own `options`, which knows what options there are.

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

/// The name of the next option, dashes included; `-h` and `-V` by their long
/// names.
///
/// # Errors
/// When something else comes next.
pub fn next(parser: &mut lexopt::Parser) -> Result<Option<String>, BadOption> {
    let argument = parser
        .next()
        .map_err(|e| bad("command line", "", format!("{e}; see --help")))?;
    match argument {
        None => Ok(None),
        Some(Long(name)) => Ok(Some(format!("--{name}"))),
        Some(Short('h')) => Ok(Some("--help".to_owned())),
        Some(Short('V')) => Ok(Some("--version".to_owned())),
        Some(Short(c)) => Err(unknown(&format!("-{c}"))),
        Some(Value(v)) => {
            let rule = "not an option: every value belongs to one; see --help";
            Err(bad(&v.to_string_lossy(), "", rule))
        }
    }
}

/// The value of the option `name`, which was just read.
///
/// # Errors
/// When there is none, or it is not text.
pub fn value(parser: &mut lexopt::Parser, name: &str) -> Result<String, BadOption> {
    let value = parser
        .value()
        .map_err(|_| bad(name, "", "its value is missing; see --help"))?;
    value
        .into_string()
        .map_err(|v| bad(name, v.display(), "not valid UTF-8: choose another name"))
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

/// `--socket-path`.
///
/// # Errors
/// When it is empty.
pub fn socket_path(name: &str, value: &str) -> Result<SocketOption, BadOption> {
    if value.is_empty() {
        return Err(bad(name, "\"\"", "empty: give the path of a socket"));
    }
    Ok(SocketOption::Path(value.into()))
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
