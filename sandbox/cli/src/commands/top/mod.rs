//! `pericarp top`: what all machines of this host do at the moment, pod by pod and volume by volume.
//!
//! Two looks at the counters (`observe`) and what lies between; `rates` computes it, `table` shows it
//! to people. On a terminal the table is drawn again and again in its place; elsewhere each follows
//! the one before.

mod rates;
mod table;

use std::{
    ffi::OsString,
    io::IsTerminal as _,
    thread,
    time::{Duration, Instant},
};

use crate::{
    commands::{
        Refusal, print,
        reader::{Given, Grammar},
    },
    input::problem::Problem,
    observe, terminal,
};

const HELP: &str = "\
Shows what all machines of this host do: pods of containerd's and this user's own runs. For each volume
its requests and MB in a second, and how long they took (50 and 99 of 100 took no longer, in us):
waiting in the ring, in the sidecar (backend), in the host's kernel (disk). For each card packets and MB.
CPU in percent of one CPU, for the guest and for each process beside it; memory that the guest has been
given, and what each process has of its own. As root, for pods.

Usage: pericarp top [OPTIONS]

Options:
  -n, --interval SECONDS  between two looks, 0.1 to 3600 [2]
      --once              show it once, after one interval, and end
      --json              one JSON object for each look, with all numbers
  -h, --help              show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp top",
    help: HELP,
    flags: &[(' ', "once"), (' ', "json")],
    options: &[('n', "interval", false)],
    ends_at_operand: false,
};

/// To the upper left, and all below is cleared once it has been written over.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K\n";
const CLEAR_REST: &str = "\x1b[J";
const CLEAR: &str = "\x1b[2J";

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    let interval = interval(&given)?;
    super::serve::allow_files();
    let redraws = !given.flag("json") && !given.flag("once") && std::io::stdout().is_terminal();
    let (mut earlier, mut then) = (observe::look(None), Instant::now());
    if redraws {
        print(CLEAR)?;
    }
    loop {
        thread::sleep(interval);
        let (now, at) = (observe::look(None), Instant::now());
        let rates = rates::between(&earlier, &now, at - then);
        print(&match (given.flag("json"), redraws) {
            (true, _) => rates.json().to_string() + "\n",
            (false, true) => screen(&table::table(&rates)),
            (false, false) => table::table(&rates) + if given.flag("once") { "" } else { "\n" },
        })?;
        if given.flag("once") {
            return Ok(0);
        }
        (earlier, then) = (now, at);
    }
}

fn interval(given: &Given) -> Result<Duration, Problem> {
    let Some(text) = given.value("interval") else {
        return Ok(Duration::from_secs(2));
    };
    let seconds: Option<f64> = text.parse().ok();
    let allowed = seconds.filter(|seconds| (0.1..=3600.0).contains(seconds));
    allowed.map(Duration::from_secs_f64).ok_or_else(|| {
        let rule = "is no number from 0.1 to 3600";
        Problem::new("--interval", text.to_owned(), rule, "such as 2")
    })
}

/// What of the table fits the terminal, written over what is there.
fn screen(table: &str) -> String {
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    fit(table, usize::from(columns), usize::from(rows))
}

fn fit(table: &str, columns: usize, rows: usize) -> String {
    let lines: Vec<&str> = table.lines().collect();
    // The last row would move all others.
    let shown = lines.len().min(rows.saturating_sub(1));
    let mut text = HOME.to_owned();
    for line in &lines[..shown] {
        text.extend(line.chars().take(columns));
        text += CLEAR_LINE;
    }
    text + CLEAR_REST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_a_number_of_seconds() {
        let read = |text: &str| {
            let given = GRAMMAR.read(vec!["-n".into(), text.into()]).unwrap();
            interval(&given)
        };
        assert_eq!(read("0.5").unwrap(), Duration::from_millis(500));
        for odd in ["0", "x", "-1", "nan", "inf", "1e9"] {
            let problem = read(odd).unwrap_err().to_string();
            assert!(problem.starts_with("--interval '"), "{problem}");
        }
    }

    #[test]
    fn a_small_terminal_is_not_scrolled() {
        let text = fit("abcdef\nghi\njkl\n", 4, 3);
        assert_eq!(text, "\x1b[Habcd\x1b[K\nghi\x1b[K\n\x1b[J");
    }
}
