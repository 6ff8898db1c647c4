//! CPU time of a backend, seen from outside.

use std::fs;
use std::time::Duration;

use crate::Outcome;

/// CPU time of all threads of a process, the kernel's workers for it included.
///
/// # Errors
/// When there is no such process.
pub fn time(pid: i32) -> Outcome<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the look.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        let running = text.split_whitespace().next().unwrap_or("0");
        total += running.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}
