//! `pericarp-endure kills|soak`: pods of containerd's whose I/O is verified, while their processes are
//! killed at random, or for a long time while what they hold is watched. As root. The suite `endure`
//! does the first in short.
//!
//! Exit codes: 0 where nothing was wrong, 1 where something was, 2 for bad input.

use std::process::ExitCode;
use std::time::Duration;

use pericarp_tests::endure::{kills, soak};
use serde_json::Value;

const PROGRAM: &str = "pericarp-endure";
const HELP: &str = "\
pericarp-endure kills [--pods N] [--seconds S] [--seed X] [--apart S] [--json]
pericarp-endure soak  [--pods N] [--seconds S] [--every S] [--json]

Starts a containerd in namespaces of its own and N pods in machines on it. In each a program writes
blocks to a raw block volume and to a file of a hostPath volume, makes and removes trees of files, and
sends over the pod's network; it compares all it reads, and tells which blocks are flushed.

kills   Kills with SIGKILL, at random and several at a time: pericarp-block, -net, -fs, -vsock, the
        machine, the shim, and containerd, which is started again. Each pod has to go on within 60 s
        without an error in the guest, or to end within 60 s with the reason and be replaced on the same
        volumes, where every block that was told to be flushed must be found. At the end nothing may be
        left on the node.
soak    Looks every so many seconds at the memory (PSS and private, without the guest's), descriptors
        and threads of each process. The first eighth is for warming up; of the rest the first and the
        last quarter are compared. It fails where memory is in the mean more than a tenth and 1 MiB
        larger, where there are at the least two more descriptors or threads, or eight more threads of
        rings, and where a process was not there all the time.

  --pods N      pods, 1 to 60 (8; soak: 4)
  --seconds S   for how long (1800; soak: 7200)
  --seed X      of the choices (1)
  --apart S     the longest time between two rounds of kills (5)
  --every S     seconds between two looks (30); S of --seconds is at least nine times that
  --json        the result as JSON

Exit codes: 0 where nothing was wrong, 1 where something was, 2 for bad input.
";

#[derive(Debug)]
enum Task {
    Help,
    Kills(kills::Options),
    Soak(soak::Options),
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (task, json) = match parse(&words) {
        Ok(task) => task,
        Err(line) => {
            eprintln!("{PROGRAM}: {line}");
            return ExitCode::from(2);
        }
    };
    let (table, value, good) = match task {
        Task::Help => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ if !rustix::process::geteuid().is_root() => {
            eprintln!("{PROGRAM}: pods and their networks take root; run it as root");
            return ExitCode::from(2);
        }
        Task::Kills(options) => match kills::run(&options) {
            Ok(report) => (report.table(), report.json(), report.faults.is_empty()),
            Err(error) => return failed(&error),
        },
        Task::Soak(options) => match soak::run(&options) {
            Ok(report) => (report.table(), report.json(), report.is_good()),
            Err(error) => return failed(&error),
        },
    };
    show(json, &table, &value);
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn failed(error: &str) -> ExitCode {
    eprintln!("{PROGRAM}: {error}");
    ExitCode::FAILURE
}

fn show(json: bool, table: &str, value: &Value) {
    if json {
        println!("{value:#}");
    } else {
        print!("{table}");
    }
}

fn parse(words: &[String]) -> Result<(Task, bool), String> {
    let (name, options) = match words.split_first() {
        Some((name, _)) if matches!(name.as_str(), "--help" | "-h") => {
            return Ok((Task::Help, false));
        }
        Some((name, options)) if matches!(name.as_str(), "kills" | "soak") => (name, options),
        Some((other, _)) => return Err(format!("'{other}': no such task; kills and soak are")),
        None => return Err("no task is named; kills and soak are".to_owned()),
    };
    let is_soak = name == "soak";
    let (mut pods, mut seconds) = if is_soak { (4, 7200) } else { (8, 1800) };
    let (mut seed, mut apart, mut every, mut json) = (1, 5, 30, false);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let mut number = |least: u64, most: u64| -> Result<u64, String> {
            let word = options.next().map_or("", String::as_str);
            let number = word.parse().ok();
            let number = number.filter(|number| (least..=most).contains(number));
            number.ok_or(format!(
                "{option} '{word}': is no number from {least} to {most}; give one"
            ))
        };
        match option.as_str() {
            "--help" | "-h" => return Ok((Task::Help, false)),
            "--json" => json = true,
            // Of writers' tags there are two for each pod, and 64 blocks for each of them.
            "--pods" => pods = number(1, 60)? as usize,
            "--seconds" => seconds = number(1, 1_000_000)?,
            "--seed" if !is_soak => seed = number(0, u64::MAX)?,
            "--apart" if !is_soak => apart = number(0, 3600)?,
            "--every" if is_soak => every = number(1, 3600)?,
            other => return Err(format!("'{other}': no such option of {name}; see --help")),
        }
    }
    // All pods together have so much to do that two CPUs, which are emulated, can do it.
    let pause = Duration::from_millis(60 * pods as u64);
    if !is_soak {
        let options = kills::Options {
            pods,
            seconds,
            most: u64::MAX,
            seed,
            apart: Duration::from_secs(apart),
            pause,
        };
        return Ok((Task::Kills(options), json));
    }
    if seconds < soak::LEAST * every {
        let rule = format!("is less than {} looks", soak::LEAST);
        return Err(format!(
            "--seconds '{seconds}': {rule} of {every} s; give more, or fewer to --every"
        ));
    }
    let options = soak::Options {
        pods,
        seconds,
        every,
        pause,
    };
    Ok((Task::Soak(options), json))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<(Task, bool), String> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_read_and_wrong_ones_are_one_line() {
        let (task, json) = of("kills --pods 3 --seconds 60 --seed 7 --json").unwrap();
        let Task::Kills(options) = task else {
            panic!("{task:?}");
        };
        assert_eq!(
            (options.pods, options.seconds, options.seed, json),
            (3, 60, 7, true)
        );
        assert!(matches!(of("soak").unwrap().0, Task::Soak(options) if options.pods == 4));
        for (line, said) in [
            ("", "'': no such task"),
            ("kill", "'kill': no such task"),
            ("kills --pods 0", "--pods '0': is no number from 1 to 60"),
            ("kills --seed", "--seed '': is no number"),
            ("kills --every 3", "'--every': no such option of kills"),
            ("soak --seed 3", "'--seed': no such option of soak"),
            (
                "soak --seconds 100",
                "--seconds '100': is less than 9 looks of 30 s",
            ),
        ] {
            let error = of(line).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
