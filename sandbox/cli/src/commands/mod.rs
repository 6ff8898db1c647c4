//! The commands beside `run`: they look at runs that are already there, or at the node.
//!
//! Each has a file with its help text, its options and what it does. They share one reader of
//! options, which collects every problem of a command line before anything is done.

pub(crate) mod assets;
pub(crate) mod check;
pub(crate) mod config;
pub(crate) mod exec;
pub(crate) mod feature;
mod install;
pub(crate) mod list;
pub(crate) mod logs;
mod manifests;
pub(crate) mod measure;
pub(crate) mod metrics;
pub(crate) mod node;
mod notes;
mod pods;
mod reader;
pub(crate) mod remove;
pub(crate) mod serve;
pub(crate) mod stop;
pub(crate) mod top;
pub(crate) mod verify;
pub(crate) mod why;
mod words;

use std::{ffi::OsString, io::Write as _};

use pericarp_config::Violations;

use crate::{
    failure::Failure,
    input::problem::Problem,
    registry::{self, Entry},
    report,
};

/// How a command ends early.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Bad input: exit code 2.
    Input(Vec<Problem>),
    /// Its help text was asked for.
    Help(&'static str),
    Failure(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self::Input(vec![problem])
    }
}

/// Runs one of the commands; returns the exit code.
pub(crate) fn run(
    name: &str,
    command: fn(Vec<OsString>) -> Result<i32, Refusal>,
    arguments: Vec<OsString>,
) -> i32 {
    match command(arguments) {
        Ok(code) => code,
        Err(Refusal::Help(text)) => report::show(text),
        Err(Refusal::Input(problems)) => report::refuse(name, &problems, false),
        Err(Refusal::Failure(failure)) => {
            report::failure(&failure, false);
            failure.exit_code()
        }
    }
}

/// What a command was asked for.
fn print(text: &str) -> Result<(), Refusal> {
    let written = std::io::stdout().write_all(text.as_bytes());
    Ok(written.map_err(|source| Failure::Output {
        stream: "standard output",
        source,
    })?)
}

/// Rows of cells, each column as wide as its widest.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// What is wrong with the configuration, each mistake by itself.
fn violations(all: Violations) -> Refusal {
    let problem = |one: &pericarp_config::Violation| Problem::whole("config", &one.to_string());
    Refusal::Input(all.0.iter().map(problem).collect())
}

/// The run of that name.
fn find(name: &str) -> Result<Entry, Refusal> {
    Ok(registry::find(name)??)
}

/// The run of that name, which has to be running in a machine.
fn find_running(name: &str) -> Result<Entry, Refusal> {
    let entry = find(name)?;
    let problem =
        |rule: String, cure| Refusal::from(Problem::new("NAME", name.to_owned(), rule, cure));
    if !entry.is_running() {
        let rule = format!("is not running: it is {}", entry.state());
        return Err(problem(rule, "`pericarp ps` lists what is running"));
    }
    if entry.record.runtime != "vm" {
        let rule = "is a plain container, and not in a machine of its own".to_owned();
        return Err(problem(rule, "start it with '--runtime vm'"));
    }
    Ok(entry)
}
