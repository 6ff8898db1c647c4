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

const LISTS_HELP: &str = "
  --profile P[,P..]    only these profiles (default: all)
  --targets T[,T..]    only these targets (default: all but those that serve a directory)
  --rounds N           how often each target has its turn (default 3)
  --seconds N          length of one turn, where the profile's work is not fixed (default 3)
  --quick              four profiles, two rounds of one second, unless said otherwise:
                       less than two minutes
  --plan               check the command line, say what would be run, and end
  --file PATH          the disk image (default target/bench/disk.img); made and filled with
                       1 GiB of data if missing. Profiles that write overwrite it
  --json PATH          where the raw numbers go (default target/bench/compare.json)
  --plot PATH          where the picture goes, as SVG (default target/bench/compare.svg)
  --pericarp-arg A     one more argument for pericarp-block; may be repeated
  --baseline PATH      another build of pericarp-block or pericarp-fs, which takes turns, too
";

/// The row of `--baseline`.
pub(crate) const BASELINE: &str = "baseline";

/// What a bench can be asked for.
#[derive(Debug, Clone, Copy)]
pub struct Bench<'a> {
    /// Its name, a colon, and what it is.
    pub about: &'a str,
    /// What it can measure.
    pub cases: &'a [&'a str],
    /// On what.
    pub targets: &'a [&'a str],
    /// Targets that only run when they are named.
    pub by_name: &'a [&'a str],
    /// The cases of `--quick`. A bench that has some takes lists of profiles and
    /// targets, and draws a picture.
    pub quick: Option<&'a [&'a str]>,
}

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
    /// Where the picture goes.
    pub plot: Option<PathBuf>,
    /// Measure nothing.
    pub plan: bool,
    cases: Vec<String>,
    targets: Vec<String>,
    by_name: Vec<String>,
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
        let what = Bench {
            about,
            cases,
            targets,
            by_name: &[],
            quick: None,
        };
        what.run(bench)
    }

    /// True unless only other cases are wanted.
    pub fn wants_case(&self, name: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|case| case == name)
    }

    /// True unless only other targets are wanted, or it has to be named.
    pub fn wants_target(&self, name: &str) -> bool {
        let is = |target: &String| target == name;
        match self.targets.is_empty() {
            true => !self.by_name.iter().any(is),
            false => self.targets.iter().any(is),
        }
    }
}

impl Bench<'_> {
    /// Reads our own command line, and runs `bench` unless that asks for help or
    /// has a mistake in it.
    pub fn run(&self, bench: fn(&Options) -> Outcome<()>) -> ExitCode {
        let program = self.about.split(':').next().unwrap_or(self.about);
        match self.parse(lexopt::Parser::from_env()) {
            Ok(Some(options)) => match bench(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{program}: {error}");
                    ExitCode::FAILURE
                }
            },
            Ok(None) => {
                let (help, cases) = match self.quick {
                    Some(_) => (LISTS_HELP, "Profiles"),
                    None => (HELP, "Cases"),
                };
                println!("{}\n{help}", self.about);
                println!(
                    "{cases}: {}\nTargets: {}",
                    self.cases.join(", "),
                    self.targets.join(", ")
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
    fn parse(&self, mut parser: lexopt::Parser) -> Result<Option<Options>, String> {
        let lists = self.quick.is_some();
        let mut options = Options {
            file: PathBuf::from("target/bench/disk.img"),
            rounds: 0,
            seconds: 0,
            extra: Vec::new(),
            baseline: None,
            json: lists.then(|| PathBuf::from("target/bench/compare.json")),
            plot: lists.then(|| PathBuf::from("target/bench/compare.svg")),
            plan: false,
            cases: Vec::new(),
            targets: Vec::new(),
            by_name: self.by_name.iter().map(|&name| name.to_owned()).collect(),
        };
        let (mut rounds, mut seconds, mut quick) = (None, None, false);
        let targets = [self.targets, &[BASELINE]].concat();
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
            match (name.as_str(), lists) {
                ("--file", _) => options.file = value()?.into(),
                ("--json", _) => options.json = Some(result(&name, &value()?)?),
                ("--rounds", _) => rounds = Some(number(&name, &value()?)?),
                ("--seconds", _) => seconds = Some(number(&name, &value()?)?),
                ("--case", false) => options.cases.push(known(&name, &value()?, self.cases)?),
                ("--target", false) => options.targets.push(known(&name, &value()?, &targets)?),
                ("--profile", true) => {
                    options.cases.extend(list(&name, &value()?, self.cases)?);
                }
                ("--targets", true) => options.targets.extend(list(&name, &value()?, &targets)?),
                ("--quick", true) => quick = true,
                ("--plan", true) => options.plan = true,
                ("--plot", true) => options.plot = Some(result(&name, &value()?)?),
                ("--baseline", _) => options.baseline = Some(program(&name, value()?)?),
                ("--pericarp-arg", _) => options.extra.push(value()?),
                _ => return Err(format!("{name}: unknown option; see --help")),
            }
        }
        if options.baseline.is_none() && options.targets.iter().any(|name| name == BASELINE) {
            return Err(format!(
                "target {BASELINE:?}: is another build of a program of ours; name it with --baseline"
            ));
        }
        if quick && options.cases.is_empty() {
            let cases = self.quick.unwrap_or_default();
            options.cases = cases.iter().map(|&case| case.to_owned()).collect();
        }
        options.rounds = rounds.unwrap_or(match (quick, lists) {
            (true, _) => 2,
            (_, true) => 3,
            _ => 5,
        });
        options.seconds = seconds.unwrap_or(if quick { 1 } else { 3 });
        Ok(Some(options))
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

/// A file to be written when all is measured, which would be a bad time to find
/// out that it cannot be.
fn result(name: &str, value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if value.is_empty() || path.is_dir() {
        return Err(format!("{name} {value:?}: is no file's name; name a file"));
    }
    let existing = path.ancestors().skip(1).find(|dir| dir.exists());
    if existing.is_some_and(|dir| !dir.is_dir()) {
        return Err(format!(
            "{name} {value:?}: lies below a file; name a directory that is one or can be made"
        ));
    }
    Ok(path)
}

fn number<T: TryFrom<u64>>(name: &str, value: &str) -> Result<T, String> {
    let number = value.parse::<u64>().ok().filter(|n| (1..=3600).contains(n));
    number
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| format!("{name} {value:?}: not a number from 1 to 3600"))
}

fn list(name: &str, value: &str, all: &[&str]) -> Result<Vec<String>, String> {
    value
        .split(',')
        .map(|word| known(name, word, all))
        .collect()
}

fn known(name: &str, value: &str, all: &[&str]) -> Result<String, String> {
    if all.contains(&value) {
        return Ok(value.to_owned());
    }
    Err(format!(
        "{name} {value:?}: unknown; use one of {}",
        all.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Bench<'_> = Bench {
        about: "old: a bench",
        cases: &["read", "write"],
        targets: &["host", "guest", "rare"],
        by_name: &["rare"],
        quick: None,
    };
    const LISTS: Bench<'_> = Bench {
        quick: Some(&["read"]),
        ..OLD
    };

    fn parse(bench: Bench<'_>, line: &str) -> Result<Options, String> {
        let words = ["program"].into_iter().chain(line.split_whitespace());
        let parsed = bench.parse(lexopt::Parser::from_iter(words));
        parsed.map(|options| options.expect("no help was asked for"))
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let options = parse(OLD, "").unwrap();
        assert_eq!((options.rounds, options.seconds), (5, 3));
        assert!(options.json.is_none() && options.plot.is_none());
        assert!(options.wants_case("write") && options.wants_target("guest"));
        let options = parse(LISTS, "").unwrap();
        assert_eq!((options.rounds, options.seconds), (3, 3));
        assert!(options.json.is_some() && options.plot.is_some());
        assert!(options.wants_case("write"));
    }

    #[test]
    fn lists_name_cases_and_targets() {
        let options = parse(LISTS, "--profile read,write --targets guest").unwrap();
        assert!(options.wants_case("read") && options.wants_case("write"));
        assert!(options.wants_target("guest") && !options.wants_target("host"));
        let options = parse(OLD, "--case read --target host").unwrap();
        assert!(options.wants_case("read") && !options.wants_case("write"));
        assert!(options.wants_target("host") && !options.wants_target("guest"));
    }

    #[test]
    fn some_targets_have_to_be_named() {
        let options = parse(LISTS, "").unwrap();
        assert!(options.wants_target("host") && !options.wants_target("rare"));
        let options = parse(LISTS, "--targets rare").unwrap();
        assert!(options.wants_target("rare") && !options.wants_target("host"));
    }

    #[test]
    fn quick_gives_way_to_what_is_said() {
        let options = parse(LISTS, "--quick").unwrap();
        assert_eq!((options.rounds, options.seconds), (2, 1));
        assert!(options.wants_case("read") && !options.wants_case("write"));
        let options = parse(LISTS, "--rounds 7 --profile write --quick --seconds 9").unwrap();
        assert_eq!((options.rounds, options.seconds), (7, 9));
        assert!(!options.wants_case("read") && options.wants_case("write"));
    }

    #[test]
    fn mistakes_are_one_line_with_option_value_and_cure() {
        for (bench, line, parts) in [
            (
                LISTS,
                "--profile reed",
                ["--profile", "reed", "read, write"],
            ),
            (
                LISTS,
                "--profile read,",
                ["--profile", "\"\"", "read, write"],
            ),
            (
                LISTS,
                "--targets vm",
                ["--targets", "vm", "host, guest, rare"],
            ),
            (LISTS, "--rounds 0", ["--rounds", "0", "1 to 3600"]),
            (LISTS, "--seconds x", ["--seconds", "x", "1 to 3600"]),
            (LISTS, "--case read", ["--case", "unknown", "--help"]),
            (
                LISTS,
                "--baseline /no/such",
                ["--baseline", "/no/such", "build it"],
            ),
            (
                LISTS,
                "--targets host,baseline",
                ["target", "baseline", "--baseline"],
            ),
            (LISTS, "--json /", ["--json", "\"/\"", "name a file"]),
            (
                LISTS,
                "--plot /proc/self/status/x",
                ["--plot", "/proc/self/status/x", "directory"],
            ),
            (LISTS, "surplus", ["surplus", "unexpected", "--help"]),
            (LISTS, "--json", ["--json", "missing", "--help"]),
            (OLD, "--quick", ["--quick", "unknown", "--help"]),
            (OLD, "--plot x", ["--plot", "unknown", "--help"]),
        ] {
            let mistake = parse(bench, line).unwrap_err();
            assert!(!mistake.contains('\n'), "{mistake}");
            for part in parts {
                assert!(mistake.contains(part), "{line}: {mistake}");
            }
        }
    }
}
