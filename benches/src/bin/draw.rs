//! `draw`: a picture of what a bench has measured, from its raw file. A
//! developer starts it; the pictures of PERF.md that no bench drew are its.

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;
use pericarp_benches::plot::{Axis, Case, lines, svg};
use pericarp_benches::{Outcome, raw, turns};

const HELP: &str = "\
draw: a picture of a bench's raw numbers

  --raw FILE           what the bench wrote; may be repeated
  --out FILE           where the picture goes, as SVG
  --title TEXT         what is written above it
  --case NAME[=LABEL]  this case, under that label; may be repeated (default: all)
  --without TARGET     all but this one; may be repeated
  --base TARGET        the target that is 1, for bars (default: each case's first)
  --lines AXIS         a line for each target over the cases instead of bars, of
                       rate, cpu or latency
";

struct Options {
    raw: Vec<PathBuf>,
    out: PathBuf,
    title: String,
    /// Names and labels.
    cases: Vec<(String, String)>,
    without: Vec<String>,
    base: String,
    axis: Option<Axis>,
}

fn main() -> ExitCode {
    let (code, line) = match parse() {
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Ok(Some(options)) => match draw(&options) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (1, error.to_string()),
        },
        Err(mistake) => (2, mistake),
    };
    eprintln!("draw: {line}");
    ExitCode::from(code)
}

/// `None` asks for help.
fn parse() -> Result<Option<Options>, String> {
    let text = |e: lexopt::Error| format!("{e}; see --help");
    let (mut raw, mut cases, mut out) = (Vec::new(), Vec::new(), None);
    let mut without = Vec::new();
    let (mut title, mut base, mut axis) = (String::new(), String::new(), None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next().map_err(text)? {
        let name = match argument {
            Short('h') | Long("help") => return Ok(None),
            Long(name) => name.to_owned(),
            other => return Err(text(other.unexpected())),
        };
        let value = parser.value().and_then(|v| v.string()).map_err(text)?;
        match name.as_str() {
            "raw" => raw.push(value.into()),
            "out" => out = Some(value.into()),
            "title" => title = value,
            "base" => base = value,
            "without" => without.push(value),
            "case" => cases.push(match value.split_once('=') {
                Some((name, label)) => (name.to_owned(), label.to_owned()),
                None => (value.clone(), value),
            }),
            "lines" => {
                let named = Axis::named(&value);
                let mistake = format!("--lines {value:?}: must be rate, cpu or latency");
                axis = Some(named.ok_or(mistake)?);
            }
            _ => return Err(format!("--{name}: unknown option; see --help")),
        }
    }
    if raw.is_empty() {
        return Err("--raw is missing; name the raw file of a bench".to_owned());
    }
    Ok(Some(Options {
        raw,
        out: out.ok_or("--out is missing; name the picture")?,
        title,
        cases,
        without,
        base,
        axis,
    }))
}

fn draw(options: &Options) -> Outcome<()> {
    let mut all: Vec<Case> = Vec::new();
    for file in &options.raw {
        all.extend(raw::read(file)?);
    }
    let mut cases = Vec::new();
    for (name, label) in &options.cases {
        let at = all.iter().position(|case| case.0 == *name);
        let at = at.ok_or_else(|| format!("no case {name:?} in the raw files"))?;
        let (_, rows) = all.remove(at);
        cases.push((label.clone(), rows));
    }
    if options.cases.is_empty() {
        cases = all;
    }
    for (_, rows) in &mut cases {
        rows.retain(|row| !options.without.contains(&row.target));
    }
    let picture = match options.axis {
        Some(axis) => lines(&options.title, axis, &cases),
        None => svg(&options.title, &options.base, &cases),
    };
    turns::write(&options.out, &picture)
}
