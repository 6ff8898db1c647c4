//! What runc's log says when it could not start the container.

use serde_json::Value;

use crate::failure::Failure;

/// Why the container was not started, if runc's log says so. A command that ran and failed leaves
/// nothing there.
pub(crate) fn start_failure(log: &str) -> Option<Failure> {
    let message = log.lines().find_map(|line| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let message = entry["msg"].as_str()?.strip_prefix("runc run failed: ")?;
        Some(pericarp_api::hello::printable(message))
    })?;
    let reason = message
        .strip_prefix("unable to start container process: ")
        .unwrap_or(&message);
    Some(if !reason.starts_with("exec: ") {
        Failure::Runc(message)
    } else if reason.contains("not found") || reason.contains("no such file") {
        Failure::NotFound(reason.to_owned())
    } else {
        Failure::NotExecutable(reason.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn runcs_own_failures_are_told_from_the_commands() {
        let line = |text: &str| json!({"level": "error", "msg": text}).to_string();
        let prefix = "runc run failed: unable to start container process: ";
        for (text, code) in [
            (
                format!("{prefix}exec: \"nope\": executable file not found in $PATH"),
                127,
            ),
            (
                format!("{prefix}exec: \"/nope\": stat /nope: no such file or directory"),
                127,
            ),
            (format!("{prefix}exec: \"/etc\": permission denied"), 126),
            (format!("{prefix}error during container init"), 125),
            ("runc run failed: cannot set memory limit".to_owned(), 125),
        ] {
            assert_eq!(
                start_failure(&line(&text)).unwrap().exit_code(),
                code,
                "{text}"
            );
        }
        assert!(start_failure("").is_none());
        assert!(start_failure(&line("some warning")).is_none());
    }
}
