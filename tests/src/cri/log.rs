//! The files that containers' output is in, line by line: when, on which stream, whether it ends
//! there, and the text. Kubernetes fixed the form in design-proposals-archive,
//! node/kubelet-cri-logging.md. Called by `pod`.

use thiserror::Error;

/// Which of a container's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

/// One line of a log file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, in nanoseconds since midnight of the first day of the year 0.
    pub time: i128,
    /// Where it came from.
    pub stream: Stream,
    /// False when the container's line goes on in the next one.
    pub whole: bool,
    /// What was written, without its newline.
    pub text: String,
}

/// A line that is none.
#[derive(Debug, Error)]
#[error("{0:?} is no line of a log")]
pub struct BadLine(String);

/// Reads a log.
///
/// # Errors
/// When a line is none.
pub fn parse(text: &str) -> Result<Vec<Line>, BadLine> {
    let lines = text.lines();
    lines
        .map(|line| one(line).ok_or_else(|| BadLine(line.into())))
        .collect()
}

fn one(line: &str) -> Option<Line> {
    let mut parts = line.splitn(4, ' ');
    let time = time(parts.next()?)?;
    let stream = match parts.next()? {
        "stdout" => Stream::Output,
        "stderr" => Stream::Error,
        _ => return None,
    };
    // There may be more tags some day, after a colon.
    let whole = match parts.next()?.split(':').next()? {
        "F" => true,
        "P" => false,
        _ => return None,
    };
    Some(Line {
        time,
        stream,
        whole,
        text: parts.next()?.to_owned(),
    })
}

/// A time of RFC 3339 with up to nine digits of a fraction.
fn time(text: &str) -> Option<i128> {
    let (date, clock) = text.split_once('T')?;
    let (clock, ahead) = zone(clock)?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let [year, month, day] = numbers(date, '-')?;
    let [hours, minutes, seconds] = numbers(clock, ':')?;
    let nanoseconds: i64 = format!("{fraction:0<9}").parse().ok()?;
    let sane = fraction.len() <= 9
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hours < 24
        && minutes < 60
        && seconds < 61;
    if !sane {
        return None;
    }
    // Months from March on, so that the day that is not always there is the last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    let whole = ((days * 24 + hours) * 60 + minutes - ahead) * 60 + seconds;
    Some(i128::from(whole) * 1_000_000_000 + i128::from(nanoseconds))
}

/// Takes the zone off a time of the day; how many minutes it is ahead.
fn zone(clock: &str) -> Option<(&str, i64)> {
    if let Some(clock) = clock.strip_suffix('Z') {
        return Some((clock, 0));
    }
    let sign = clock.rfind(['+', '-'])?;
    let (clock, zone) = clock.split_at(sign);
    let [hours, minutes] = numbers(&zone[1..], ':')?;
    let ahead = hours * 60 + minutes;
    Some((clock, if zone.starts_with('-') { -ahead } else { ahead }))
}

fn numbers<const N: usize>(text: &str, between: char) -> Option<[i64; N]> {
    let numbers: Option<Vec<i64>> = text.split(between).map(|part| part.parse().ok()).collect();
    numbers?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_four_parts() {
        let text =
            "2026-02-28T23:59:59.9Z stdout F a b\n2026-03-01T02:00:00.00000001+02:00 stderr P \n";
        let lines = parse(text).unwrap();
        assert_eq!(lines[0].text, "a b");
        assert!(lines[0].whole && lines[0].stream == Stream::Output);
        assert!(!lines[1].whole && lines[1].stream == Stream::Error);
        assert_eq!(lines[1].text, "");
        assert_eq!(lines[1].time - lines[0].time, 100_000_010);
    }

    #[test]
    fn leap_days_count() {
        let at = |date: &str| time(&format!("{date}T00:00:00Z")).unwrap();
        let day = 86_400_000_000_000;
        assert_eq!(at("2028-03-01") - at("2028-02-28"), 2 * day);
        assert_eq!(at("2027-03-01") - at("2027-02-28"), day);
        assert_eq!(at("2027-01-01") - at("2026-12-31"), day);
    }

    #[test]
    fn what_is_no_line_is_refused() {
        for line in [
            "2026-02-28T23:59:59Z stdout F",
            "2026-02-28T23:59:59Z stdin F x",
            "2026-02-28T23:59:59Z stdout X x",
            "2026-02-28T23:59:59 stdout F x",
            "2026-13-28T23:59:59Z stdout F x",
            "dots",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
