//! `block-calls`: what one 4 KiB read costs one build of `pericarp-block` in
//! system calls, kicks, calls and time, on each of a few loads.
//!
//! `cargo xtask bench regress` starts it, with the builds of two commits in
//! turn. `load` says what makes the counts repeatable.

mod load;

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;
use pericarp_benches::{Outcome, disk};
use serde_json::json;

use load::CASES;

/// All of it is read before the first request, so that the page cache has it.
const DISK_BYTES: u64 = 64 << 20;

const HELP: &str = "\
block-calls --program PATH [--file PATH] [--case NAME] [--requests N]

  --program PATH  the build of pericarp-block to measure
  --file PATH     the disk image; made and filled with 64 MiB if missing
                  (default target/bench/calls.img)
  --case NAME     cached-1, cached-32, direct-1 or direct-32; may be repeated (default: all)
  --requests N    requests to count, a multiple of 32 (default 3200)

Prints one line of JSON for each case, all numbers per request.
";

struct Options {
    program: PathBuf,
    file: PathBuf,
    cases: Vec<String>,
    requests: usize,
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(mistake) => {
            eprintln!("block-calls: {mistake}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("block-calls: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `None` asks for help.
fn parse() -> Result<Option<Options>, String> {
    let mut program = None;
    let mut options = Options {
        program: PathBuf::new(),
        file: "target/bench/calls.img".into(),
        cases: Vec::new(),
        requests: 3200,
    };
    let text = |e: lexopt::Error| format!("{e}; see --help");
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next().map_err(text)? {
        let name = match argument {
            Short('h') | Long("help") => return Ok(None),
            Long(name) => name.to_owned(),
            other => return Err(text(other.unexpected())),
        };
        let mut value = || parser.value().and_then(|v| v.string()).map_err(text);
        match name.as_str() {
            "program" => program = Some(PathBuf::from(value()?)),
            "file" => options.file = value()?.into(),
            "case" => {
                let name = value()?;
                if !CASES.iter().any(|case| case.name == name) {
                    return Err(format!("--case {name:?}: unknown; see --help"));
                }
                options.cases.push(name);
            }
            "requests" => {
                let words = value()?;
                let number = words.parse().ok();
                let number =
                    number.filter(|n: &usize| *n > 0 && *n <= 1 << 20 && n.is_multiple_of(32));
                options.requests = number.ok_or(format!(
                    "--requests {words:?}: must be a multiple of 32, at most 1048576"
                ))?;
            }
            _ => return Err(format!("--{name}: unknown option; see --help")),
        }
    }
    options.program = program.ok_or("--program is missing: name a build of pericarp-block")?;
    if !options.program.is_file() {
        let path = options.program.display();
        return Err(format!("--program {path}: is no file; build it first"));
    }
    Ok(Some(options))
}

fn run(options: &Options) -> Outcome<()> {
    disk::prepare_of(&options.file, DISK_BYTES)?;
    for case in CASES {
        if !options.cases.is_empty() && !options.cases.iter().any(|name| name == case.name) {
            continue;
        }
        let costs = load::measure(case, &options.program, &options.file, options.requests)
            .map_err(|error| format!("{}: {error}", case.name))?;
        let line = json!({
            "case": case.name,
            "instructions": costs.instructions,
            "syscalls": costs.syscalls,
            "kicks": costs.kicks,
            "calls": costs.calls,
            "us": costs.us,
        });
        println!("{line}");
    }
    Ok(())
}
