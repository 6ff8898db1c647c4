//! Values of options: numbers, CPU lists, names.

use std::fmt::Display;
use std::str::FromStr;

use log::LevelFilter;
use pericarp_uring::EngineKind;

use super::{BadOption, bad};

pub(super) fn unknown(name: &str) -> BadOption {
    bad(name, "", "unknown option; see --help")
}

pub(super) fn number<T>(name: &str, value: &str, low: T, high: T) -> Result<T, BadOption>
where
    T: FromStr + PartialOrd + Display + Copy,
{
    value
        .parse()
        .ok()
        .filter(|n| (low..=high).contains(n))
        .ok_or_else(|| {
            bad(
                name,
                format!("{value:?}"),
                format!("not a number from {low} to {high}"),
            )
        })
}

/// A whole number with an optional suffix K, M or G, by 1024 each.
pub(super) fn amount(name: &str, value: &str) -> Result<u64, BadOption> {
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

pub(super) fn cpu_list(name: &str, value: &str) -> Result<Vec<usize>, BadOption> {
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

pub(super) fn io_engine(name: &str, value: &str) -> Result<EngineKind, BadOption> {
    match value {
        "auto" => Ok(EngineKind::Auto),
        "uring" => Ok(EngineKind::Uring),
        "sync" => Ok(EngineKind::Sync),
        _ => Err(bad(
            name,
            format!("{value:?}"),
            "unknown engine: use auto, uring or sync",
        )),
    }
}

pub(super) fn log_level(name: &str, value: &str) -> Result<LevelFilter, BadOption> {
    let known = value.parse().ok().filter(|l| *l != LevelFilter::Trace);
    let rule = "unknown level: use error, warn, info, debug or off";
    known.ok_or_else(|| bad(name, format!("{value:?}"), rule))
}
