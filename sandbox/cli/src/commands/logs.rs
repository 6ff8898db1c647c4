//! `pericarp logs`: what the command of a detached run has said.

use std::{ffi::OsString, io::Write, thread, time::Duration};

use crate::{
    commands::{Refusal, find, reader::Grammar},
    failure::Failure,
    input::problem::Problem,
    log::{Line, Reader},
    registry,
};

const HELP: &str = "\
Shows what the command of a detached run has said; its two outputs stay apart.

Usage: pericarp logs [OPTIONS] NAME

Options:
  -f, --follow      go on until the command ends
  -t, --timestamps  put the time before each line
      --tail N      begin with the last N lines
  -h, --help        show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp logs",
    help: HELP,
    flags: &[('f', "follow"), ('t', "timestamps")],
    options: &[(' ', "tail", false)],
    ends_at_operand: false,
};

/// How often a log that is followed is looked at.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let [name] = given.operands.as_slice() else {
        return Err(GRAMMAR.missing("NAME", "exactly one run has to be named"));
    };
    let tail = given
        .value("tail")
        .map(|text| {
            text.parse::<usize>().map_err(|_| {
                let rule = "is not a number of lines";
                Problem::new("--tail", text.to_owned(), rule, "write one, such as 20")
            })
        })
        .transpose()?;
    let entry = find(name)?;
    if !entry.record.detached {
        let rule = "is no detached run, so its output went to whoever started it";
        return Err(Problem::new("NAME", name.clone(), rule, "start it with '-d'").into());
    }
    let timestamps = given.flag("timestamps");
    let mut reader = Reader::new(&entry.path);
    let failed = |source| Failure::System {
        what: "the log".into(),
        source,
    };
    // As far as it goes now, of which the end is wanted perhaps.
    let mut lines = std::collections::VecDeque::new();
    while let Some(line) = reader.next().map_err(failed)? {
        match tail {
            None => show(&line, timestamps)?,
            Some(count) => {
                lines.push_back(line);
                if lines.len() > count {
                    lines.pop_front();
                }
            }
        }
    }
    for line in &lines {
        show(line, timestamps)?;
    }
    while given.flag("follow") {
        // Looked at before the log: what was written until the end is still shown.
        let over = !registry::find(&entry.record.id)?.is_ok_and(|now| now.alive);
        while let Some(line) = reader.next().map_err(failed)? {
            show(&line, timestamps)?;
        }
        if over {
            break;
        }
        thread::sleep(PAUSE);
    }
    Ok(0)
}

fn show(line: &Line, timestamps: bool) -> Result<(), Failure> {
    let mut text = Vec::new();
    if timestamps {
        text.extend_from_slice(line.time.as_bytes());
        text.push(b' ');
    }
    text.extend_from_slice(&line.text);
    let (stream, written) = if line.is_stderr {
        ("the error output", std::io::stderr().write_all(&text))
    } else {
        let mut out = std::io::stdout();
        let written = out.write_all(&text).and_then(|()| out.flush());
        ("standard output", written)
    };
    written.map_err(|source| Failure::Output { stream, source })
}
