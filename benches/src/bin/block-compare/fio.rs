//! What the file itself can do: `fio` with io_uring on the host, submitting and
//! reaping in batches as the backends do.

use std::path::Path;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_benches::fio::{self, SLACK};
use pericarp_benches::turns::Measured;
use pericarp_tests::parts::Part;
use pericarp_tests::peer::Cache;
use pericarp_tests::process::command;
use pericarp_tests::scratch::Scratch;

use crate::cases::Case;

pub(crate) fn run(
    case: &Case,
    file: &Path,
    turn: Duration,
    scratch: &Scratch,
) -> Outcome<Measured> {
    let section = if case.write { "write" } else { "read" };
    let order = if case.sequential { "" } else { "rand" };
    let direct = u8::from(case.cache == Cache::Direct);
    // Depth 1 is a thread that waits for its system call.
    let engine = if case.depth == 1 { "psync" } else { "io_uring" };
    let batch = case.depth.div_ceil(2);
    let program = Part::Fio.find().ok_or("no fio")?;
    let mut command = command(&program);
    command
        .args(["--name=host", "--time_based", "--allow_file_create=0"])
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
        .arg(format!("--runtime={}", turn.as_secs()));
    Ok(fio::run(&mut command, scratch, turn + SLACK)?.measured)
}
