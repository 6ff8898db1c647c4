//! `pericarp config explain`: what can be configured, what is, and where.

use std::{ffi::OsString, path::Path};

use pericarp_config::Config;

use crate::commands::{Refusal, print, reader::Grammar, violations};

const HELP: &str = "\
Says what a key of the configuration means, what it may be, and what it is set to; without one,
of all of them.

Usage: pericarp config explain [OPTIONS] [KEY]

KEY is a name (sizing), one with its profile (profiles.pericarp.sizing) or an annotation of pods
(io.pericarp/memory).

Options:
      --config FILE  our configuration [/etc/pericarp/config.toml, if it is there]
  -h, --help         show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp config",
    help: HELP,
    flags: &[],
    options: &[(' ', "config", false)],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let key = match given
        .operands
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()[..]
    {
        ["explain"] => None,
        ["explain", key] => Some(key.to_owned()),
        [odd, ..] if odd != "explain" => {
            return Err(GRAMMAR.missing(odd, "is not an action: explain is"));
        }
        _ => return Err(GRAMMAR.missing("ACTION", "is missing: explain, and one key at most")),
    };
    let config = Config::load(given.value("config").map(Path::new)).map_err(violations)?;
    let names = match key {
        Some(key) => vec![key],
        None => Config::keys().map(|key| key.name().to_owned()).collect(),
    };
    let mut all = Vec::new();
    for name in names {
        let explained = config.explain(&name);
        all.push(explained.map_err(|one| violations(pericarp_config::Violations(vec![one])))?);
    }
    let text: Vec<String> = all.iter().map(ToString::to_string).collect();
    print(&(text.join("\n") + "\n"))?;
    Ok(0)
}
