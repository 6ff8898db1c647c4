//! fio: one bounded run on this machine, and what its JSON report says, wherever
//! it ran.

use std::fs;
use std::process::Command;
use std::time::Duration;

use pericarp_tests::process::Process;
use pericarp_tests::scratch::Scratch;
use serde_json::Value;

use crate::Outcome;
use crate::turns::Measured;

/// What fio may take over the time it is told.
pub const SLACK: Duration = Duration::from_secs(30);

/// A report's numbers.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// With fio's own CPU time.
    pub measured: Measured,
    /// Requests that were done.
    pub requests: u64,
}

/// Runs `fio`, a command with the job but no word on its output, which must end
/// within `limit`.
///
/// # Errors
/// When it fails, takes longer, or reports nothing.
pub fn run(fio: &mut Command, scratch: &Scratch, limit: Duration) -> Outcome<Report> {
    let path = scratch.path("fio.json");
    fio.arg("--output-format=json")
        .arg(format!("--output={}", path.display()));
    let mut process = Process::start(fio, limit + Duration::from_secs(5))?;
    let ended = process.wait(limit);
    let epitaph = process.epitaph();
    process.kill();
    if !ended.is_some_and(|status| status.success()) {
        let said = process.output().last(5);
        return Err(format!("fio {epitaph}; it wrote: {said}").into());
    }
    read(&fs::read_to_string(path)?)
}

/// Reads the report of a run with one job that only reads or only writes.
///
/// # Errors
/// When it is none, or the job failed or did nothing.
pub fn read(report: &str) -> Outcome<Report> {
    let report: Value =
        serde_json::from_str(report).map_err(|e| format!("fio's report is not JSON: {e}"))?;
    let job = &report["jobs"][0];
    if job["error"] != 0 {
        return Err(format!("fio's job ended with error {}", job["error"]).into());
    }
    let requests = |way: &str| job[way]["total_ios"].as_u64().unwrap_or(0);
    let way = if requests("write") > 0 {
        "write"
    } else {
        "read"
    };
    let data = &job[way];
    let number = |value: &Value| {
        let number = value.as_f64().filter(|n| n.is_finite());
        number.ok_or("fio's report lacks a number")
    };
    let percentile = |name: &str| number(&data["clat_ns"]["percentile"][name]).map(|ns| ns / 1e3);
    let cpu_share = (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0;
    let iops = number(&data["iops"])?;
    if requests(way) == 0 || iops <= 0.0 {
        return Err("fio's job did nothing".into());
    }
    Ok(Report {
        measured: Measured {
            iops,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
            cpu_us: cpu_share * 1e6 / iops,
        },
        requests: requests(way),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = r#"{"jobs": [{
        "error": 0, "usr_cpu": 10.0, "sys_cpu": 20.0,
        "read": {"total_ios": 0, "iops": 0.0},
        "write": {"total_ios": 3000, "iops": 1000.0, "clat_ns": {"percentile":
            {"50.000000": 700000, "99.000000": 900000}}}
    }]}"#;

    #[test]
    fn numbers_are_those_of_what_was_done() {
        let report = read(JOB).unwrap();
        assert_eq!(report.requests, 3000);
        let want = [1000.0, 700.0, 900.0, 300.0];
        let m = report.measured;
        for (have, want) in [m.iops, m.p50_us, m.p99_us, m.cpu_us].iter().zip(want) {
            assert!((have - want).abs() < 1e-6, "{report:?}");
        }
    }

    #[test]
    fn a_job_that_failed_or_did_nothing_is_an_error() {
        let failed = JOB.replace(r#""error": 0"#, r#""error": 5"#);
        assert!(read(&failed).unwrap_err().to_string().contains("error 5"));
        let idle = JOB.replace("3000", "0");
        assert!(read(&idle).is_err());
        for text in ["", "{}", "fio: note"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
