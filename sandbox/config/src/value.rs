//! Numbers, sizes and lists as people write them.
//!
//! Each reader returns the value or the rule that the text breaks. Used for the configuration and for
//! annotations alike, so that both take the same words.

use std::{collections::BTreeSet, fmt, path::PathBuf, time::Duration};

use crate::problem::Broken;

/// Largest number of a CPU, as the kernel's own sets have it (CPU_SETSIZE).
const LAST_CPU: u32 = 1023;
/// Most characters of kernel parameters, so that a profile's, a pod's and those of the machine
/// itself fit in what a machine takes together.
pub(crate) const MAX_PARAMETERS: usize = 800;
/// Parameters the machine's own start depends on.
const OWN_PARAMETERS: [&str; 5] = ["console", "init", "panic", "rdinit", "root"];

/// Reads a whole number in a range.
pub(crate) fn number(text: &str, least: u64, most: u64) -> Result<u64, Broken> {
    let cure = || format!("write a whole number from {least} to {most}");
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        let negative = text
            .strip_prefix('-')
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()));
        let rule = if negative {
            "is negative"
        } else {
            "is not a whole number"
        };
        return Err(Broken::new(rule, cure()));
    }
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(Broken::new("is out of range", cure())),
    }
}

/// Reads a size in bytes, with or without a unit; K, M, G and T are powers of 1024, as in every
/// command of ours. A fraction of a byte is rounded up.
pub(crate) fn bytes(text: &str, least: u64, most: u64) -> Result<u64, Broken> {
    let cure = || {
        format!(
            "write a number and a unit, such as 512M or 1.5G, from {} to {}",
            size(least),
            size(most)
        )
    };
    let broken = |rule: &str| Broken::new(rule, cure());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        "t" | "tb" | "ti" | "tib" => 40,
        _ if digits.is_empty() => return Err(broken("is not a size")),
        _ => return Err(broken(&format!("has the unknown unit '{unit}'"))),
    };
    if digits.starts_with('-') {
        return Err(broken("is negative"));
    }
    // Exact: a whole number of 10^-places units.
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all: String = [whole, fraction].concat();
    if all.is_empty() || !all.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(broken("is not a size"));
    }
    // Neither overflows: 25 digits are less than 2^84, a unit is at most 2^40.
    let places = fraction.len() as u32;
    let number: u128 = match all.parse() {
        Ok(number) if all.len() <= 25 => number,
        _ => return Err(broken("has too many digits")),
    };
    let exact = (number << shift).div_ceil(10u128.pow(places));
    match u64::try_from(exact) {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(broken("is out of range")),
    }
}

/// A size in the largest unit that shows it exactly, else in bytes.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Reads a number of seconds, which may have a fraction.
pub(crate) fn seconds(text: &str) -> Result<Duration, Broken> {
    let cure = "write seconds from 0.1 to 3600, such as 30";
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
        && text.len() <= 20;
    let number: Option<f64> = plain.then(|| text.parse().ok()).flatten();
    match number {
        None => Err(Broken::new("is not a number of seconds", cure)),
        Some(number) if (0.1..=3600.0).contains(&number) => Ok(Duration::from_secs_f64(number)),
        Some(_) => Err(Broken::new("is out of range", cure)),
    }
}

/// CPUs of the host, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// Reads a list such as `0-3,8`, as the kernel's cpuset has it.
    pub(crate) fn parse(text: &str) -> Result<Self, Broken> {
        let cure = "write numbers and ranges with commas between them, such as 0-3,8";
        let cpu = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number: Option<u32> = digits.then(|| text.parse().ok()).flatten();
            number.ok_or_else(|| Broken::new("is not a list of CPUs", cure))
        };
        let mut cpus = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (cpu(first)?, cpu(last)?);
            if first > last {
                let rule = format!("has the range '{part}', which ends before it begins");
                return Err(Broken::new(rule, cure));
            }
            if last > LAST_CPU {
                let rule = format!("names CPU {last}, and the last there can be is {LAST_CPU}");
                return Err(Broken::new(rule, cure));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }

    /// The CPUs, in ascending order; there is at least one.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Whether all of these CPUs are among `others`.
    #[must_use]
    pub fn is_subset(&self, others: &Self) -> bool {
        self.0.is_subset(&others.0)
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

/// Reads kernel parameters: words on one line.
pub(crate) fn parameters(text: &str) -> Result<String, Broken> {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let cure = "write words with a space between them, such as 'transparent_hugepage=never'";
    if words.is_empty() {
        return Err(Broken::new("is empty", "leave the key out"));
    }
    if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        let rule = "has characters that are not printable ASCII";
        return Err(Broken::new(rule, cure));
    }
    if text.len() > MAX_PARAMETERS {
        let rule = format!("is longer than {MAX_PARAMETERS} characters");
        return Err(Broken::new(rule, "use fewer"));
    }
    for word in &words {
        // The kernel hands what follows to the first process, and reads both spellings.
        let name = word.split(['=', '.']).next().unwrap_or(word);
        let name = name.replace('-', "_");
        if *word == "--" || OWN_PARAMETERS.contains(&name.as_str()) {
            let rule = format!("has '{word}', which the machine's own start depends on");
            return Err(Broken::new(rule, "leave it out"));
        }
        // A quote would join words that are checked apart.
        if word.contains('"') {
            return Err(Broken::new("has a quotation mark", "leave it out"));
        }
    }
    Ok(words.join(" "))
}

/// Reads the path of a directory.
pub(crate) fn directory(text: &str) -> Result<PathBuf, Broken> {
    let path = PathBuf::from(text);
    let cure = "begin it with '/'";
    if !path.is_absolute() {
        return Err(Broken::new("is not an absolute path", cure));
    }
    if text.contains('\0') {
        return Err(Broken::new("has a zero byte", "leave it out"));
    }
    Ok(path)
}

/// Whether containerd and Kubernetes take `name` for a handler: an RFC 1123 label.
pub(crate) fn is_handler(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIB: u64 = 1 << 40;

    #[test]
    fn sizes_have_units_of_1024_and_are_exact() {
        for (text, expected) in [
            ("512M", 512 << 20),
            ("512Mi", 512 << 20),
            ("1.5G", 3 << 29),
            ("0.1k", 103),
            ("4096", 4096),
            ("1tib", TIB),
            ("8388608.0", 8 << 20),
        ] {
            assert_eq!(bytes(text, 1, TIB), Ok(expected), "{text}");
        }
        for (text, rule) in [
            ("", "is not a size"),
            ("G", "is not a size"),
            (".", "is not a size"),
            ("1.2.3", "is not a size"),
            ("1e3", "is not a size"),
            ("+1", "is not a size"),
            ("10 G", "is not a size"),
            ("ä", "is not a size"),
            ("10X", "has the unknown unit 'X'"),
            ("-1", "is negative"),
            ("-1G", "is negative"),
            ("0", "is out of range"),
            ("2T", "is out of range"),
            ("9999999999999999999999T", "is out of range"),
            ("0.00000000000000000000000001T", "has too many digits"),
        ] {
            assert_eq!(bytes(text, 1, TIB).unwrap_err().rule, rule, "{text}");
        }
    }

    #[test]
    fn whole_numbers_only() {
        assert_eq!(number("255", 1, 255), Ok(255));
        for (text, rule) in [
            ("0", "is out of range"),
            ("256", "is out of range"),
            ("99999999999999999999999", "is out of range"),
            ("-1", "is negative"),
            ("1.5", "is not a whole number"),
            ("+1", "is not a whole number"),
            ("", "is not a whole number"),
            ("-", "is not a whole number"),
            ("many", "is not a whole number"),
        ] {
            assert_eq!(number(text, 1, 255).unwrap_err().rule, rule, "{text}");
        }
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "3601", "-1", "inf", "nan", "1e3", "", "."] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_of_cpus_are_read_and_written_in_short() {
        for (text, shown) in [
            ("0", "0"),
            ("3,1,2,7", "1-3,7"),
            ("0-3,8", "0-3,8"),
            ("0-3,2-5", "0-5"),
            ("1023", "1023"),
        ] {
            assert_eq!(CpuSet::parse(text).unwrap().to_string(), shown);
        }
        for text in [
            "",
            "a",
            "1-",
            "-1",
            "3-1",
            "1,,2",
            "0-1024",
            "4294967296",
            "1 2",
        ] {
            assert!(CpuSet::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn parameters_are_words_that_leave_the_start_alone() {
        assert_eq!(parameters(" a=1  b "), Ok("a=1 b".into()));
        for text in [
            "",
            "  ",
            "a\nb",
            "a\tb",
            "ä",
            "init=/bin/sh",
            "rdinit=/x",
            "a -- b",
            "console=ttyS1",
            "panic=0",
            "a=\"b c\"",
            &"a".repeat(801),
        ] {
            assert!(parameters(text).is_err(), "{text}");
        }
        assert!(parameters("initcall_debug panic_on_oops=1").is_ok());
    }

    #[test]
    fn handlers_are_labels() {
        for good in ["kata", "a", "kata-mshv-vm-isolation", "9"] {
            assert!(is_handler(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(64)] {
            assert!(!is_handler(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_of_a_size_is_read_as_the_same(value in 1..=TIB) {
            let text = size(value).replace(' ', "").replace("bytes", "");
            prop_assert_eq!(bytes(&text, 1, TIB), Ok(value));
        }

        #[test]
        fn what_is_shown_of_a_set_is_read_as_the_same(
            cpus in prop::collection::btree_set(0..=LAST_CPU, 1..40),
        ) {
            let set = CpuSet(cpus);
            prop_assert_eq!(CpuSet::parse(&set.to_string()), Ok(set));
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = bytes(&text, 1, TIB);
            let _ = number(&text, 1, 9);
            let _ = seconds(&text);
            let _ = CpuSet::parse(&text);
            let _ = parameters(&text);
        }
    }
}
