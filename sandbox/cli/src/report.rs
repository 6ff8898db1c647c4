//! What `pericarp run` itself says: problems, failures, timing.
//!
//! All of it goes to the error output, apart from the command's own and never in between while the
//! command runs. With `--json` each message is one JSON object on a line.

use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::{failure::Failure, input::problem::Problem};

/// What is said when the kernel killed the command for want of memory.
pub(crate) const OUT_OF_MEMORY: &str =
    "the command was killed: it used more memory than its --memory limit";

/// When each phase of a run ended.
pub(crate) struct Timing {
    last: Instant,
    phases: Vec<(&'static str, u64)>,
    notes: Vec<(&'static str, String)>,
}

impl Timing {
    pub(crate) fn begin() -> Self {
        Self {
            last: Instant::now(),
            phases: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Ends the current phase under this name.
    pub(crate) fn mark(&mut self, phase: &'static str) {
        self.mark_at(phase, Instant::now());
    }

    /// Ends the current phase at a moment that has passed.
    pub(crate) fn mark_at(&mut self, phase: &'static str, now: Instant) {
        let ms = now.saturating_duration_since(self.last).as_millis();
        self.phases
            .push((phase, u64::try_from(ms).unwrap_or(u64::MAX)));
        self.last = now.max(self.last);
    }

    /// Adds a fact that goes with the times.
    pub(crate) fn note(&mut self, name: &'static str, value: impl Into<String>) {
        self.notes.push((name, value.into()));
    }
}

/// Prints every problem of the input; returns the exit code.
pub(crate) fn refuse(command: &str, problems: &[Problem], json: bool) -> i32 {
    for problem in problems {
        if json {
            eprintln!(
                "{}",
                json!({"event": "refused", "option": problem.option(), "message": problem.to_string()})
            );
        } else {
            eprintln!("pericarp {command}: {problem}");
        }
    }
    2
}

/// Prints a failure, with the console's last lines below it.
pub(crate) fn failure(failure: &Failure, json: bool) {
    let console = failure.console();
    if json {
        let mut object =
            json!({"event": "error", "message": failure.to_string(), "console": console});
        if let Some(hypervisor) = failure.hypervisor() {
            object["hypervisor"] = hypervisor.into();
        }
        eprintln!("{object}");
        return;
    }
    eprintln!("pericarp: {failure}");
    if let Some(hypervisor) = failure.hypervisor() {
        eprintln!("  run by {hypervisor}");
    }
    for line in console {
        eprintln!("  console: {line}");
    }
}

/// Prints text that was asked for; returns the exit code.
pub(crate) fn show(text: &str) -> i32 {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => 125,
    }
}

/// One line about something that is not as asked for, but does not stop the run.
pub(crate) fn warn(message: &str) {
    eprintln!("pericarp: {message}");
}

pub(crate) fn end_json(code: i32, timing: &Timing) {
    let phases: Map<String, Value> = timing
        .phases
        .iter()
        .map(|(name, ms)| ((*name).to_owned(), json!(ms)))
        .collect();
    let mut object = json!({"event": "end", "exit_code": code, "phases_ms": phases});
    for (name, value) in &timing.notes {
        object[*name] = value.as_str().into();
    }
    eprintln!("{object}");
}

pub(crate) fn end_text(timing: &Timing) {
    for (name, value) in &timing.notes {
        eprintln!("pericarp: {name}: {value}");
    }
    let phases: Vec<String> = timing
        .phases
        .iter()
        .map(|(name, ms)| format!("{name} {ms} ms"))
        .collect();
    eprintln!("pericarp: timing: {}", phases.join(", "));
}
