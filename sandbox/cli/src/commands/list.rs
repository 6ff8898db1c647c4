//! `pericarp ps`: the runs of this user.

use std::ffi::OsString;

use serde_json::json;

use crate::{
    commands::{Refusal, columns, print, reader::Grammar},
    registry::{self, Entry, now},
};

const HELP: &str = "\
Lists the runs that are there.

Usage: pericarp ps [OPTIONS]

Options:
  -a, --all     also detached runs that have ended
  -q, --quiet   ids only
      --json    one JSON object a line
  -h, --help    show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp ps",
    help: HELP,
    flags: &[('a', "all"), ('q', "quiet"), (' ', "json")],
    options: &[],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    let mut entries = registry::all()?;
    entries.retain(|entry| entry.alive || given.flag("all"));
    let text = if given.flag("json") {
        entries.iter().map(|entry| as_json(entry) + "\n").collect()
    } else if given.flag("quiet") {
        let ids = entries.iter().map(|entry| entry.record.id.clone() + "\n");
        ids.collect()
    } else {
        table(&entries)
    };
    print(&text)?;
    Ok(0)
}

fn as_json(entry: &Entry) -> String {
    let record = &entry.record;
    json!({
        "id": record.id,
        "name": record.name,
        "runtime": record.runtime,
        "image": record.image,
        "command": record.command,
        "state": entry.state(),
        "exit_code": record.exit_code,
        "error": record.error,
        "created": record.created,
        "finished": record.finished,
        "pid": entry.alive.then_some(record.pid),
        "detached": record.detached,
    })
    .to_string()
}

fn table(entries: &[Entry]) -> String {
    let head = ["ID", "IMAGE", "COMMAND", "CREATED", "STATE", "NAME"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head)
        .chain(entries.iter().map(|entry| {
            let record = &entry.record;
            let image = record.image.rsplit('/').next().unwrap_or_default();
            [
                record.id.clone(),
                short(image, 30),
                short(&record.command.join(" "), 30),
                ago(now().saturating_sub(record.created)),
                entry.state(),
                record.name.clone(),
            ]
        }))
        .collect();
    columns(&rows)
}

/// The beginning of a text, on one line.
fn short(text: &str, length: usize) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match text.char_indices().nth(length) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

fn ago(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural} ago")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{Record, Status};

    #[test]
    fn the_table_is_aligned_and_says_what_is_what() {
        let entry = Entry {
            record: Record {
                id: "0123456789ab".into(),
                name: "web".into(),
                image: "/images/demo.tar".into(),
                command: vec!["sh".into(), "-c".into(), "a\nb".into()],
                created: now() - 61,
                status: Status::Running,
                ..Record::default()
            },
            path: "/r".into(),
            alive: true,
        };
        assert_eq!(
            table(&[entry]),
            "ID            IMAGE     COMMAND    CREATED       STATE    NAME\n\
             0123456789ab  demo.tar  sh -c a b  1 minute ago  running  web\n"
        );
        assert_eq!(ago(7200), "2 hours ago");
        assert_eq!(short("aäb", 2), "aä...");
    }
}
