//! Numbers and sizes as people write them.
//!
//! Each reader returns the value or the rule that the text breaks; range checks that need the
//! host are in `check`.

/// A rule that was broken, and how to keep it.
pub(crate) type Broken = (String, String);

/// Smallest share of a CPU the kernel can enforce.
pub(crate) const LEAST_MILLI_CPUS: u32 = 10;
/// Smallest memory limit with which a shell still runs.
pub(crate) const LEAST_MEMORY: u64 = 8 << 20;

/// Reads a number of CPUs, which may have a fraction, as thousandths.
pub(crate) fn milli_cpus(text: &str, host_cpus: u32) -> Result<u32, Broken> {
    let cure = || format!("write a number from 0.01 to {host_cpus}, such as 0.5");
    let number: f64 = plain_decimal(text).ok_or_else(|| ("is not a number".to_owned(), cure()))?;
    if number < f64::from(LEAST_MILLI_CPUS) / 1000.0 {
        return Err(("is less than 0.01 CPUs".into(), cure()));
    }
    if number > f64::from(host_cpus) {
        return Err((
            format!("is more than the {host_cpus} CPUs of this host"),
            cure(),
        ));
    }
    // Between 10 and the host's CPUs times 1000 by the lines above.
    Ok((number * 1000.0).round() as u32)
}

/// Reads a memory size in bytes or with a unit; K, M, G, T are powers of 1024, as podman has them.
pub(crate) fn memory(text: &str) -> Result<u64, Broken> {
    let cure = || "write a number and a unit, such as 512M or 1.5G".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        "t" | "tb" | "ti" | "tib" => 40,
        _ if digits.is_empty() => return Err(("is not a size".into(), cure())),
        _ => return Err((format!("has the unknown unit '{unit}'"), cure())),
    };
    let number = plain_decimal(digits).ok_or_else(|| ("is not a size".to_owned(), cure()))?;
    let bytes = number * (1u64 << shift) as f64;
    // More than any machine has, and still exact in the arithmetic that follows.
    if bytes > (1u64 << 50) as f64 {
        return Err(("is more than any host has".into(), cure()));
    }
    let bytes = bytes.round() as u64;
    if bytes < LEAST_MEMORY {
        let rule = format!(
            "is less than {}, which a command needs at least",
            size(LEAST_MEMORY)
        );
        return Err((rule, cure()));
    }
    Ok(bytes)
}

/// Reads a number of seconds.
pub(crate) fn seconds(text: &str) -> Result<f64, Broken> {
    let cure = || "write seconds from 0.1 to 3600, such as 30".to_owned();
    let number = plain_decimal(text).ok_or_else(|| ("is not a number".to_owned(), cure()))?;
    if (0.1..=3600.0).contains(&number) {
        Ok(number)
    } else {
        Err(("is out of range".into(), cure()))
    }
}

/// Digits with at most one point: no sign, no exponent, no `nan` or `inf`. A minus sign is let
/// through so that the range check names the true cause.
fn plain_decimal(text: &str) -> Option<f64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    (plain && digits.bytes().any(|byte| byte.is_ascii_digit()) && digits.len() <= 20)
        .then(|| text.parse().ok())
        .flatten()
}

/// A size in the largest unit that shows it exactly, else with one decimal.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift {
            return if bytes.is_multiple_of(1 << shift) {
                format!("{} {unit}", bytes >> shift)
            } else {
                format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64)
            };
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_in_thousandths() {
        for (text, milli) in [
            ("1", 1000),
            ("0.5", 500),
            ("2.0", 2000),
            (".25", 250),
            ("1.", 1000),
        ] {
            assert_eq!(milli_cpus(text, 2), Ok(milli), "{text}");
        }
        for (text, rule) in [
            ("0", "is less than 0.01 CPUs"),
            ("-1", "is less than 0.01 CPUs"),
            ("2.1", "is more than the 2 CPUs of this host"),
            (
                "99999999999999999999",
                "is more than the 2 CPUs of this host",
            ),
            ("nan", "is not a number"),
            ("NaN", "is not a number"),
            ("inf", "is not a number"),
            ("1e3", "is not a number"),
            ("", "is not a number"),
            (".", "is not a number"),
            ("1.2.3", "is not a number"),
            ("two", "is not a number"),
        ] {
            assert_eq!(milli_cpus(text, 2).unwrap_err().0, rule, "{text}");
        }
    }

    #[test]
    fn memory_has_units_of_1024() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512Mi", 512 << 20),
            ("1.5G", 3 << 29),
            ("16777216", 16 << 20),
            ("16384KiB", 16 << 20),
            ("1t", 1 << 40),
        ] {
            assert_eq!(memory(text), Ok(bytes), "{text}");
        }
        for (text, rule) in [
            ("4M", "is less than 8 MiB, which a command needs at least"),
            ("0", "is less than 8 MiB, which a command needs at least"),
            ("-1G", "is less than 8 MiB, which a command needs at least"),
            ("10X", "has the unknown unit 'X'"),
            ("10 G", "is not a size"),
            ("G", "is not a size"),
            ("much", "is not a size"),
            ("", "is not a size"),
            ("99999999T", "is more than any host has"),
        ] {
            assert_eq!(memory(text).unwrap_err().0, rule, "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_as_people_write_them() {
        assert_eq!(size(2 << 30), "2 GiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(64 << 20), "64 MiB");
        assert_eq!(size(513), "513 bytes");
    }
}
