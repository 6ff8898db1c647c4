//! Every call of a start that can fail for want of descriptors, memory or room does, each
//! in a start of its own. The program then ends with one line, code 1 and nothing left
//! behind, or it serves all the same.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use pericarp_tests::failing::{Tried, fail};
use pericarp_tests::scratch::Scratch;

use super::programs::{LIMIT, Program, ending, picture};

/// More calls than any start makes.
const MANY: usize = 1000;

/// How the starts of a program ended.
#[derive(Default)]
struct Tally {
    refused: usize,
    served: usize,
    /// What was said, and how often.
    lines: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

fn sweep(program: Program, test: &str) {
    let Some(_ground) = program.ground(test) else {
        return;
    };
    let scratch = Scratch::new();
    let mut tally = Tally::default();
    let (mut done, mut is_confining) = (false, false);
    for nth in 0..MANY {
        let dir = scratch.path(&nth.to_string());
        program.prepare(&dir);
        let before = picture(&dir);
        let mut command = Command::new(program.path());
        program.describe(&dir, &mut command);
        let mut answered = Ok(());
        let tried = fail(&mut command, nth, LIMIT, |_| {
            answered = program.answers(&dir)
        })
        .unwrap();
        let Some((call, _)) = tried.failed else {
            // All of them worked: so does it.
            assert_eq!(
                (answered, tried.end),
                (Ok(()), Some(Ok(0))),
                "{}",
                tried.said
            );
            done = true;
            break;
        };
        let mut wrong = judge(program, &tried, &answered, &mut tally);
        let mut after = picture(&dir);
        is_confining |= tried.said.contains("cannot confine itself");
        if tried.served || is_confining {
            // For its successor; once it is confined no path leads to them any more.
            after.retain(|name, _| !["inflight", "state"].contains(&name.as_str()));
        }
        if after != before {
            wrong.push(format!("left behind: {after:?}"));
        }
        if !wrong.is_empty() {
            let line = format!(
                "{nth}, {call}: {}: {}",
                wrong.join(", "),
                tried.said.trim_end()
            );
            tally.wrong.push(line);
        }
        fs::remove_dir_all(dir).unwrap();
    }
    for (line, count) in &tally.lines {
        eprintln!("{count:4} {line}");
    }
    let (refused, served) = (tally.refused, tally.served);
    eprintln!("{test}: {refused} starts ended with a line, {served} served");
    assert!(done && refused > 0 && served > 0);
    let count = tally.wrong.len();
    assert!(
        count == 0,
        "{count} of them wrong:\n  {}",
        tally.wrong.join("\n  ")
    );
}

fn judge(
    program: Program,
    tried: &Tried,
    answered: &Result<(), String>,
    tally: &mut Tally,
) -> Vec<String> {
    if tried.hung {
        return vec!["it hangs".into()];
    }
    let code = tried.end.and_then(Result::ok);
    if tried.served && code == Some(0) {
        tally.served += 1;
        for line in tried.said.lines() {
            *tally.lines.entry(line.to_owned()).or_default() += 1;
        }
        return match answered {
            Ok(()) => Vec::new(),
            Err(why) => vec![format!("it serves nobody: {why}")],
        };
    }
    tally.refused += 1;
    // A full disk is the operator's to mend, and some lines do not say what the kernel said.
    let vague = [
        "(os error 28)",
        "cannot be mapped (",
        "no interface has this name",
    ];
    let codes: &[i32] = match vague.iter().any(|words| tried.said.contains(words)) {
        true => &[1, 2],
        false => &[1],
    };
    let wrong = ending(program, &tried.said, code, codes);
    match tried.end {
        Some(Err(signal)) => vec![format!("signal {signal}")],
        _ => wrong,
    }
}

#[test]
fn a_block_server_starts_or_leaves_nothing() {
    sweep(Program::Block, "a_block_server_starts_or_leaves_nothing");
}

#[test]
fn a_file_server_starts_or_leaves_nothing() {
    sweep(Program::Fs, "a_file_server_starts_or_leaves_nothing");
}

#[test]
fn a_network_card_starts_or_leaves_nothing() {
    sweep(Program::Net, "a_network_card_starts_or_leaves_nothing");
}

#[test]
fn a_vsock_starts_or_leaves_nothing() {
    sweep(Program::Vsock, "a_vsock_starts_or_leaves_nothing");
}
