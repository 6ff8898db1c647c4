//! fio: one bounded run on this machine, and what its JSON report says, wherever
//! it ran.

use std::fs;
use std::path::Path;
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
    finish(fio, &path, limit)
}

/// Runs `fio`, a command that leaves its JSON report in `report` and must end
/// within `limit`.
///
/// # Errors
/// When it fails, takes longer, or reports nothing.
pub fn finish(fio: &mut Command, report: &Path, limit: Duration) -> Outcome<Report> {
    let mut process = Process::start(fio, limit + Duration::from_secs(5))?;
    let ended = process.wait(limit);
    let epitaph = process.epitaph();
    process.kill();
    if !ended.is_some_and(|status| status.success()) {
        let said = process.output().last(5);
        return Err(format!("fio {epitaph}; it wrote: {said}").into());
    }
    read(&fs::read_to_string(report)?)
}

/// Reads the report of a run whose jobs follow one another: all they did, over
/// the time it took them. Latencies are those of what was done most often, the
/// first of equals; those of the syncs where there is one for each write.
///
/// # Errors
/// When it is none, or a job failed or did nothing.
pub fn read(report: &str) -> Outcome<Report> {
    let report: Value =
        serde_json::from_str(report).map_err(|e| format!("fio's report is not JSON: {e}"))?;
    let number = |value: &Value| {
        let number = value.as_f64().filter(|n| n.is_finite());
        number.ok_or("fio's report lacks a number")
    };
    let jobs = report["jobs"]
        .as_array()
        .ok_or("fio's report has no jobs in it")?;
    let (mut requests, mut seconds, mut cpu) = (0, 0.0, 0.0);
    let mut most: Option<(u64, &Value)> = None;
    for job in jobs {
        if job["error"] != 0 {
            return Err(format!("fio's job ended with error {}", job["error"]).into());
        }
        // Reads and writes of one job go on at the same time.
        let mut took = 0.0f64;
        for data in [&job["read"], &job["write"]] {
            let count = data["total_ios"].as_u64().unwrap_or(0);
            if count == 0 {
                continue;
            }
            took = took.max(count as f64 / number(&data["iops"])?);
            requests += count;
            if most.is_none_or(|(least, _)| count > least) {
                most = Some((count, &data["clat_ns"]));
            }
        }
        // The last write's may not have been waited for.
        let syncs = job["sync"]["lat_ns"]["N"].as_u64().unwrap_or(0) + 1;
        if syncs > 1 && most.is_some_and(|(count, _)| syncs >= count) {
            most = Some((syncs, &job["sync"]["lat_ns"]));
        }
        if !took.is_finite() || took <= 0.0 {
            return Err("fio's job did nothing".into());
        }
        seconds += took;
        cpu += took * (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0;
    }
    let (_, data) = most.ok_or("fio's job did nothing")?;
    let percentile = |name: &str| number(&data["percentile"][name]).map(|ns| ns / 1e3);
    Ok(Report {
        measured: Measured {
            iops: requests as f64 / seconds,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
            cpu_us: cpu * 1e6 / requests as f64,
            ..Measured::default()
        },
        requests,
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
    fn jobs_that_follow_one_another_are_added_up() {
        let first = r#"{"error": 0, "usr_cpu": 50.0, "sys_cpu": 50.0,
            "read": {"total_ios": 700, "iops": 700.0, "clat_ns": {"percentile":
                {"50.000000": 1000, "99.000000": 2000}}},
            "write": {"total_ios": 300, "iops": 300.0, "clat_ns": {"percentile":
                {"50.000000": 9000, "99.000000": 9000}}}}"#;
        let second = first.replace("iops\": 7", "iops\": 3.5");
        let second = second.replace("iops\": 3.500.0", "iops\": 350.0");
        let report = read(&format!(r#"{{"jobs": [{first}, {second}]}}"#)).unwrap();
        assert_eq!(report.requests, 2000);
        // One second, then two.
        let want = [2000.0 / 3.0, 1.0, 2.0, 1500.0];
        let m = report.measured;
        for (have, want) in [m.iops, m.p50_us, m.p99_us, m.cpu_us].iter().zip(want) {
            assert!((have - want).abs() < 1e-6, "{report:?}");
        }
    }

    #[test]
    fn who_waits_for_each_sync_has_its_latency() {
        let syncs = |count: u64| {
            let sync = format!(
                r#""error": 0, "sync": {{"lat_ns": {{"N": {count}, "percentile":
                    {{"50.000000": 5000, "99.000000": 6000}}}}}}"#
            );
            let report = read(&JOB.replace(r#""error": 0"#, &sync)).unwrap();
            assert_eq!(report.requests, 3000);
            report.measured.p50_us
        };
        for (count, want) in [(0, 700.0), (500, 700.0), (2999, 5.0), (3000, 5.0)] {
            assert!((syncs(count) - want).abs() < 1e-6, "{count}");
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
