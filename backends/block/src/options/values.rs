//! Values of options that only disks have: amounts, CPU lists, engines.

use pericarp_control::command_line::{BadOption, bad, number};
use pericarp_uring::EngineKind;

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
