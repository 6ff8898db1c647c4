//! `pericarp rm`: forgets detached runs that have ended.

use std::{ffi::OsString, fs, time::Duration};

use crate::{
    commands::{Refusal, find, reader::Grammar, stop},
    failure::during,
    input::problem::Problem,
    registry::Entry,
    rundir,
};

const HELP: &str = "\
Forgets detached runs that have ended, and their logs.

Usage: pericarp rm [OPTIONS] NAME...

Options:
  -f, --force  end a run that is still there; a run that is not there is no error
  -h, --help   show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp rm",
    help: HELP,
    flags: &[('f', "force")],
    options: &[],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if given.operands.is_empty() {
        return Err(GRAMMAR.missing("NAME", "at least one run has to be named"));
    }
    let force = given.flag("force");
    let mut entries = Vec::new();
    for name in &given.operands {
        match find(name) {
            Ok(entry) if entry.alive && !force => {
                let rule = format!("is still there: it is {}", entry.state());
                let cure = "stop it first, or use '--force'";
                return Err(Problem::new("NAME", name.clone(), rule, cure).into());
            }
            Ok(entry) => entries.push(entry),
            Err(Refusal::Input(_)) if force => {}
            Err(other) => return Err(other),
        }
    }
    for entry in entries {
        stop::end(&entry, Duration::ZERO)?;
        forget(&entry)?;
        println!("{}", entry.record.name);
    }
    Ok(0)
}

fn forget(entry: &Entry) -> Result<(), Refusal> {
    let base = rundir::base();
    let failed = || during(format!("'{}' cannot be removed", entry.path.display()));
    let _lock = rundir::lock_base(&base).map_err(failed())?;
    // Nobody would know of it any more.
    rundir::settle(&entry.path);
    match fs::remove_dir_all(&entry.path) {
        // A run in the foreground has taken it along.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(failed()(error).into());
        }
        _ => {}
    }
    // Where it was the last.
    let _ = fs::remove_dir(&base);
    Ok(())
}
