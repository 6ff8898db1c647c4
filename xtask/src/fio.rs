//! Reading fio's JSON report.
//!
//! Called by the demo. Programs that print a line of their own before the
//! report are common (a guest's console, fio's warnings), so the report is
//! searched for, not assumed to be all there is.

use serde_json::Value;

use crate::command::Failure;

/// The three numbers of a random read job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reads {
    pub(crate) iops: f64,
    /// Median and 99th percentile of the completion latency, in microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Finds the report in what a run printed and reads the first job's numbers.
/// Also returns the report's own text, to be kept with the claim.
pub(crate) fn reads(printed: &str) -> Result<(Reads, &str), Failure> {
    let report = report_in(printed).ok_or("fio printed no JSON report")?;
    let json: Value =
        serde_json::from_str(report).map_err(|e| format!("fio's report is not JSON: {e}"))?;
    let job = &json["jobs"][0];
    match job["error"].as_i64() {
        Some(0) => {}
        Some(errno) => return Err(format!("fio's job ended with error {errno}").into()),
        None => return Err("fio's report has no job in it".into()),
    }
    let read = &job["read"];
    let percentile = |name: &str| {
        read["clat_ns"]["percentile"][name]
            .as_f64()
            .map(|ns| ns / 1000.0)
            .ok_or_else(|| Failure::from(format!("fio's report has no percentile {name}")))
    };
    let iops = read["iops"]
        .as_f64()
        .filter(|&iops| iops > 0.0)
        .ok_or("fio's report shows no reads")?;
    let reads = Reads {
        iops,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
    };
    Ok((reads, report))
}

/// The text from the first line that is a lone brace to the last such line.
fn report_in(printed: &str) -> Option<&str> {
    let mut start = None;
    let mut end = None;
    let mut offset = 0;
    for line in printed.split_inclusive('\n') {
        match line.trim_end() {
            "{" if start.is_none() => start = Some(offset),
            "}" => end = Some(offset + 1),
            _ => {}
        }
        offset += line.len();
    }
    printed.get(start?..end?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{
  "fio version" : "fio-3.33",
  "jobs" : [
    {
      "jobname" : "randread",
      "error" : 0,
      "read" : {
        "iops" : 51234.5,
        "clat_ns" : {
          "percentile" : {
            "50.000000" : 602112,
            "99.000000" : 1204224
          }
        }
      }
    }
  ]
}
"#;

    #[test]
    fn numbers_come_from_the_first_job() {
        let (reads, report) = reads(REPORT).unwrap();
        assert_eq!(reads.iops, 51234.5);
        assert_eq!(reads.p50_us, 602.112);
        assert_eq!(reads.p99_us, 1204.224);
        assert_eq!(report, REPORT.trim_end());
    }

    #[test]
    fn lines_around_the_report_do_not_matter() {
        let printed = format!(
            "fio: a note\r\n{}reboot: System halted\n",
            REPORT.replace('\n', "\r\n")
        );
        assert_eq!(reads(&printed).unwrap().0.iops, 51234.5);
    }

    #[test]
    fn a_failed_job_is_an_error() {
        let failed = REPORT.replace("\"error\" : 0", "\"error\" : 5");
        assert_eq!(
            reads(&failed).unwrap_err().to_string(),
            "fio's job ended with error 5"
        );
    }

    #[test]
    fn no_report_is_an_error() {
        for printed in ["", "{", "fio: command not found\n", "}\n{\n"] {
            assert!(reads(printed).is_err(), "{printed:?}");
        }
    }
}
