//! `pericarp`: runs a command in a virtual machine of its own, or in a plain container.
//!
//! This file knows the subcommands and the exit codes: 2 for bad input, 125 for a failure of our
//! own, 126 and 127 as shells have them, else the command's own code or 128 plus its signal.
//! Everything else is in the modules; nothing below `main` may end the process, so that whatever
//! was created is removed on every path.

mod assets;
mod cpio;
mod failure;
mod input;
mod report;
mod rootdir;
mod run;
mod runc;
mod rundir;
mod signals;
mod sizing;
mod vm;

use std::ffi::OsString;

use crate::input::problem::{Problem, nearest};

const HELP: &str = "\
pericarp runs each workload in a virtual machine of its own.

Usage: pericarp COMMAND [OPTIONS]

Commands:
  run      run a command in a virtual machine, or in a plain container
  help     show this text; `pericarp run --help` shows the options of run

Options:
  --version  print the version
  --help     show this text
";

const COMMANDS: [&str; 2] = ["run", "help"];

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let code = match arguments.next() {
        None => {
            eprint!("{HELP}");
            2
        }
        Some(first) => match first.to_str() {
            Some("run") => run(arguments.collect()),
            Some("help" | "--help" | "-h") => show(HELP),
            Some("--version" | "-V") => show(concat!("pericarp ", env!("CARGO_PKG_VERSION"), "\n")),
            _ => {
                let name = first.to_string_lossy();
                let problem =
                    Problem::unknown("command", &name, nearest(&name, COMMANDS), "pericarp help");
                eprintln!("pericarp: {problem}");
                2
            }
        },
    };
    std::process::exit(code);
}

/// Prints text that was asked for.
fn show(text: &str) -> i32 {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => 125,
    }
}

fn run(arguments: Vec<OsString>) -> i32 {
    let wants_json = arguments
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a == "--json");
    let request = match input::options::parse(arguments) {
        Ok(input::options::Parsed::Help) => return show(input::options::HELP),
        Ok(input::options::Parsed::Run(request)) => *request,
        Err(problems) => return report::refuse(&problems, wants_json),
    };
    let plan = match input::check::check(request) {
        Ok(plan) => plan,
        Err(problems) => return report::refuse(&problems, wants_json),
    };
    let mut timing = report::Timing::begin();
    let wants_timing = plan.timing;
    let outcome = run::run(plan, &mut timing);
    timing.mark("cleanup");
    if let Err(failure) = &outcome {
        report::failure(failure, wants_json);
    }
    let code = match &outcome {
        Ok(code) => *code,
        Err(failure) => failure.exit_code(),
    };
    if wants_json {
        report::end_json(code, &timing);
    } else if wants_timing {
        report::end_text(&timing);
    }
    code
}
