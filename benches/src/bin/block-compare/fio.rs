//! What the file itself can do: `fio` with io_uring on the host, submitting and
//! reaping in batches as the backends do.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pericarp_tests::peer::Cache;
use serde_json::Value;

use crate::Outcome;
use crate::cases::{Case, Measured};

pub(crate) fn run(case: &Case, file: &Path, turn: Duration) -> Outcome<Measured> {
    let section = if case.write { "write" } else { "read" };
    let order = if case.sequential { "" } else { "rand" };
    let direct = u8::from(case.cache == Cache::Direct);
    // Depth 1 is a thread that waits for its system call.
    let engine = if case.depth == 1 { "psync" } else { "io_uring" };
    let batch = case.depth.div_ceil(2);
    let output = Command::new("fio")
        .args([
            "--name=host",
            "--output-format=json",
            "--time_based",
            "--allow_file_create=0",
        ])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={order}{section}"))
        .arg(format!("--bs={}", case.block))
        .arg(format!("--direct={direct}"))
        .arg(format!("--ioengine={engine}"))
        .arg(format!("--iodepth={}", case.depth))
        .arg(format!("--iodepth_batch_submit={batch}"))
        .arg("--iodepth_batch_complete_min=1")
        .arg(format!("--iodepth_batch_complete_max={}", case.depth))
        .arg("--norandommap")
        .arg("--invalidate=0")
        .arg(format!("--runtime={}", turn.as_secs()))
        .output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("fio failed: {}", text.trim()).into());
    }
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let job = &report["jobs"][0];
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let data = &job[section];
    let percentile = |name: &str| number(&data["clat_ns"]["percentile"][name]) / 1e3;
    let cpu_share = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0;
    let iops = number(&data["iops"]);
    Ok(Measured {
        iops,
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        cpu_us: cpu_share * 1e6 / iops,
    })
}
