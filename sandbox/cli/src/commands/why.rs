//! `pericarp why`: what went wrong in a pod, in one sentence first, as its shim has written it down;
//! and, of one that runs, how long its start took.

use std::{
    ffi::OsString,
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use pericarp_api::hello::printable;
use pericarp_pod::{
    history::{self, BASE, Cause, History, Kind},
    starts::{self, Part},
};
use serde_json::{Value, json};

use crate::commands::{Refusal, pods, print, reader::Grammar};

const HELP: &str = "\
Says why a pod of containerd's, or a container of it, has ended, was not started or was refused: the
cause in one sentence, which is what containerd was told, then what shows it. The last 256 pods in
which something went wrong are remembered until the node is started again. Of a pod that runs it
also says how long the parts of its start took. As root.

Usage: pericarp why [OPTIONS] POD

POD is NAMESPACE/NAME, NAME, or an id or its beginning.

Options:
      --json  one JSON object
  -h, --help  show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp why",
    help: HELP,
    flags: &[(' ', "json")],
    options: &[],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let [wanted] = &given.operands[..] else {
        return Err(GRAMMAR.missing("POD", "is to be named, and one only"));
    };
    let running = pods::in_a_machine(wanted)?;
    let all = history::all(Path::new(BASE));
    let found = match &running {
        // The one that runs is meant, and not one of its name that has ended; unless that is why
        // there is another machine.
        Some(pod) => {
            let is_own = |one: &History| one.id == pod.record.id;
            let lost = |one: &History| {
                !one.uid.is_empty()
                    && one.uid == pod.record.uid
                    && one.main().is_some_and(|it| it.kind >= Kind::Machine)
            };
            let found = all.iter().position(is_own);
            let found = found.or_else(|| all.iter().position(lost));
            found.and_then(|index| all.into_iter().nth(index))
        }
        None => {
            let names = |one: &History| (one.name.clone(), one.id.clone());
            let named: Vec<(String, String)> = all.iter().map(names).collect();
            let meant = pods::pick(&named, wanted)?;
            let found = meant.and_then(|index| all.into_iter().nth(index));
            Some(found.ok_or_else(|| pods::unknown(wanted))?)
        }
    };
    let history = found.unwrap_or_else(|| History {
        name: running
            .as_ref()
            .map_or_else(String::new, |pod| pod.record.name.clone()),
        ..History::default()
    });
    let state = match &running {
        None => State::Ended,
        Some(pod) if history.id.is_empty() || history.id == pod.record.id => State::Runs,
        Some(_) => State::RunsAgain,
    };
    let parts = running
        .as_ref()
        .map(|pod| starts::read(&pod.directory))
        .unwrap_or_default();
    print(&match given.flag("json") {
        true => as_json(&history, running.is_some(), &parts) + "\n",
        false => text(&history, state) + &start(&parts),
    })?;
    Ok(0)
}

fn as_json(history: &History, runs: bool, parts: &[Part]) -> String {
    json!({
        "pod": history.name,
        "id": history.id,
        "running": runs,
        "cause": history.main().map_or(Value::Null, |cause| json!(cause)),
        "causes": history.causes,
        "left_out": history.left_out,
        "start": parts,
    })
    .to_string()
}

/// What has become of the pod.
#[derive(Clone, Copy)]
enum State {
    Runs,
    /// In another machine than the one of which something is known.
    RunsAgain,
    Ended,
}

fn text(history: &History, state: State) -> String {
    let name = &history.name;
    let Some(main) = history.main() else {
        return format!("{name}: runs, and nothing has gone wrong in it\n");
    };
    let mut text = format!("{name}: {}\n", printable(&main.sentence));
    let container = main.container.as_deref();
    let facts = [
        ("when", when(main)),
        ("phase", main.phase.clone()),
        ("container", container.unwrap_or_default().to_owned()),
        (
            "the pod",
            match state {
                State::Runs => "runs",
                State::RunsAgain => "runs, in another machine by now",
                State::Ended => "has ended",
            }
            .to_owned(),
        ),
    ];
    for (label, fact) in facts.iter().filter(|(_, fact)| !fact.is_empty()) {
        text += &format!("  {label:10}{fact}\n");
    }
    for (index, line) in main.evidence.iter().enumerate() {
        let label = if index == 0 { "evidence" } else { "" };
        text += &format!("  {label:10}{}\n", printable(line));
    }
    let others: Vec<&Cause> = history
        .causes
        .iter()
        .filter(|one| !std::ptr::eq(*one, main))
        .collect();
    if !others.is_empty() {
        text += "What else there was:\n";
    }
    for one in others {
        text += &format!("  {}  {}\n", when(one), printable(&one.sentence));
    }
    text
}

/// How long the parts of the pod's start took, which are the first and all have one id.
fn start(parts: &[Part]) -> String {
    let Some(first) = parts.first() else {
        return String::new();
    };
    let of_pod = parts.iter().take_while(|part| part.id == first.id);
    let (mut said, mut total) = (Vec::new(), 0);
    for part in of_pod {
        said.push(format!("{} {}", part.phase, part.took_us / 1000));
        total = part.at_us / 1000;
    }
    format!("  start     {total} ms: {}\n", said.join(", "))
}

fn when(cause: &Cause) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(cause.at);
    let at = humantime::format_rfc3339_seconds(at).to_string();
    match cause.times {
        0 | 1 => at,
        times => format!("{at} (the last of {times} times)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_comes_first_and_the_evidence_after_it() {
        let mut history = History {
            name: "default/web".into(),
            ..History::default()
        };
        let cause = |kind, sentence: &str| Cause {
            at: 1_000,
            kind,
            phase: "run".into(),
            sentence: sentence.into(),
            ..Cause::default()
        };
        history.add(Cause {
            container: Some("app".into()),
            ..cause(Kind::OutOfMemory, "container app: it wanted too much")
        });
        history.add(Cause {
            evidence: vec!["a line\u{1b}".into(), "another".into()],
            ..cause(Kind::Machine, "the pod's machine has ended: it died")
        });
        assert_eq!(
            text(&history, State::Ended),
            "default/web: the pod's machine has ended: it died\n\
             \x20 when      1970-01-01T00:00:01Z\n\
             \x20 phase     run\n\
             \x20 the pod   has ended\n\
             \x20 evidence  a line\u{fffd}\n\
             \x20           another\n\
             What else there was:\n\
             \x20 1970-01-01T00:00:01Z  container app: it wanted too much\n"
        );
        let part = |id: &str, phase: &str, at_us| Part {
            id: id.into(),
            phase: phase.into(),
            at_us,
            took_us: 1_900,
        };
        let parts = [
            part("p", "shim", 1_900),
            part("p", "call", 3_800),
            part("c", "show", 9),
        ];
        assert_eq!(start(&parts), "  start     3 ms: shim 1, call 1\n");
        assert_eq!(start(&[]), "");
        let said: Value = serde_json::from_str(&as_json(&history, false, &parts)).unwrap();
        assert_eq!(said["start"][2]["phase"], "show");
        assert_eq!(said["cause"]["kind"], "machine");
        assert_eq!(said["causes"][0]["container"], "app");
        let again = text(&history, State::RunsAgain);
        assert!(
            again.contains("\n  the pod   runs, in another machine by now\n"),
            "{again}"
        );
        let text = text(&History::default(), State::Runs);
        assert!(text.contains("nothing has gone wrong"));
    }
}
