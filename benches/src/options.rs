//! The options every macro bench has, and what it ends with.

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;

use crate::Outcome;

const HELP: &str = "
  --file PATH      the disk image; made and filled with 1 GiB of data if missing
  --rounds N       how often each target has its turn (default 5)
  --seconds N      length of one turn (default 3)
  --case NAME      only this case; may be repeated
  --target NAME    only this target; may be repeated
  --pericarp-arg A one more argument for pericarp-block; may be repeated
  --baseline PATH  another build of pericarp-block, which takes turns, too
  --json PATH      where the raw numbers go
";

/// The row of `--baseline`.
pub(crate) const BASELINE: &str = "baseline";

/// What one run is to do.
#[derive(Debug)]
pub struct Options {
    /// The disk image.
    pub file: PathBuf,
    /// How often each target has its turn.
    pub rounds: usize,
    /// Length of a turn.
    pub seconds: u64,
    /// More arguments for `pericarp-block`.
    pub extra: Vec<String>,
    /// Another build of `pericarp-block`, a target of its own.
    pub baseline: Option<PathBuf>,
    /// Where the raw numbers go.
    pub json: Option<PathBuf>,
    cases: Vec<String>,
    targets: Vec<String>,
}

impl Options {
    /// The whole of a bench called `about`: reads our own command line, and
    /// runs `bench` unless that asks for help or has a mistake in it.
    pub fn run(
        about: &str,
        cases: &[&str],
        targets: &[&str],
        bench: fn(&Self) -> Outcome<()>,
    ) -> ExitCode {
        let program = about.split(':').next().unwrap_or(about);
        match Self::parse(cases, targets) {
            Ok(Some(options)) => match bench(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{program}: {error}");
                    ExitCode::FAILURE
                }
            },
            Ok(None) => {
                println!("{about}\n{HELP}");
                println!(
                    "Cases: {}\nTargets: {}",
                    cases.join(", "),
                    targets.join(", ")
                );
                ExitCode::SUCCESS
            }
            Err(mistake) => {
                eprintln!("{program}: {mistake}");
                ExitCode::from(2)
            }
        }
    }

    /// `None` asks for help.
    fn parse(cases: &[&str], targets: &[&str]) -> Result<Option<Self>, String> {
        let mut options = Options {
            file: PathBuf::from("target/bench/disk.img"),
            rounds: 5,
            seconds: 3,
            extra: Vec::new(),
            baseline: None,
            json: None,
            cases: Vec::new(),
            targets: Vec::new(),
        };
        let targets = [targets, &[BASELINE]].concat();
        let mut parser = lexopt::Parser::from_env();
        let text = |e: lexopt::Error| format!("{e}; see --help");
        while let Some(argument) = parser.next().map_err(text)? {
            let Long(name) = argument else {
                if argument == Short('h') {
                    return Ok(None);
                }
                return Err(text(argument.unexpected()));
            };
            let name = format!("--{name}");
            if name == "--help" {
                return Ok(None);
            }
            let mut value = || parser.value().and_then(|v| v.string()).map_err(text);
            match name.as_str() {
                "--file" => options.file = value()?.into(),
                "--json" => options.json = Some(value()?.into()),
                "--rounds" => options.rounds = number(&name, &value()?)?,
                "--seconds" => options.seconds = number(&name, &value()?)?,
                "--case" => options.cases.push(known(&name, value()?, cases)?),
                "--target" => options.targets.push(known(&name, value()?, &targets)?),
                "--baseline" => options.baseline = Some(program(&name, value()?)?),
                "--pericarp-arg" => options.extra.push(value()?),
                _ => return Err(format!("{name}: unknown option; see --help")),
            }
        }
        Ok(Some(options))
    }

    /// True unless only other cases are wanted.
    pub fn wants_case(&self, name: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|case| case == name)
    }

    /// True unless only other targets are wanted.
    pub fn wants_target(&self, name: &str) -> bool {
        self.targets.is_empty() || self.targets.iter().any(|target| target == name)
    }
}

fn program(name: &str, value: String) -> Result<PathBuf, String> {
    let path = PathBuf::from(&value);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("{name} {value:?}: is no file; build it first"))
    }
}

fn number<T: TryFrom<u64>>(name: &str, value: &str) -> Result<T, String> {
    let number = value.parse::<u64>().ok().filter(|n| (1..=3600).contains(n));
    number
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| format!("{name} {value:?}: not a number from 1 to 3600"))
}

fn known(name: &str, value: String, all: &[&str]) -> Result<String, String> {
    if all.contains(&value.as_str()) {
        return Ok(value);
    }
    Err(format!(
        "{name} {value:?}: unknown; use one of {}",
        all.join(", ")
    ))
}
