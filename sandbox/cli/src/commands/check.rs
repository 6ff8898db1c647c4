//! `pericarp check`: whether this node has what pods need.

use std::{ffi::OsString, path::PathBuf};

use pericarp_node::check::{Finding, Places, State, all};
use serde_json::json;

use crate::commands::{Refusal, print, reader::Grammar};

const HELP: &str = "\
Looks at this node and says of each rule whether it is kept, what was found, and what to do.
Ends with 0 if pods can run, degraded or not, and with 1 if something is missing.

Usage: pericarp check [OPTIONS]

Options:
      --config FILE             our configuration [/etc/pericarp/config.toml, if it is there]
      --containerd-config FILE  that of containerd [/etc/containerd/config.toml]
      --json                    one JSON object
  -h, --help                    show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp check",
    help: HELP,
    flags: &[(' ', "json")],
    options: &[(' ', "config", false), (' ', "containerd-config", false)],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    let mut places = Places {
        config: given.value("config").map(PathBuf::from),
        ..Places::default()
    };
    if let Some(path) = given.value("containerd-config") {
        places.containerd = path.into();
    }
    let findings = all(&places);
    let worst = findings.iter().map(|finding| finding.state).max();
    let usable = worst != Some(State::Missing);
    let text = match given.flag("json") {
        true => {
            let all: Vec<_> = findings.iter().map(Finding::json).collect();
            json!({"usable": usable, "findings": all}).to_string() + "\n"
        }
        false => findings
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect(),
    };
    print(&text)?;
    Ok(i32::from(!usable))
}
