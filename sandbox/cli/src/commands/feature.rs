//! `pericarp feature`: what a node is prepared for beyond what is stable.

use std::{ffi::OsString, path::Path};

use pericarp_config::{
    Config,
    feature::{Feature, FeatureFile, State},
};

use crate::{
    commands::{Refusal, print, reader::Grammar, violations},
    failure::Failure,
    input::problem::{Problem, nearest},
};

const HELP: &str = "\
Shows how far this node is with a feature, and prepares it. A pod that needs one is refused until
it is Ready; the configuration has to name it, too (features = [...]).

Usage: pericarp feature show [NAME]
       pericarp feature enable NAME
       pericarp feature disable NAME

Options:
      --config FILE  our configuration [/etc/pericarp/config.toml, if it is there]
  -h, --help         show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp feature",
    help: HELP,
    flags: &[],
    options: &[(' ', "config", false)],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let feature = |name: &str| {
        Feature::parse(name).ok_or_else(|| {
            let known = Feature::ALL.map(Feature::name);
            let help = "pericarp feature show";
            Refusal::from(Problem::unknown(
                "feature",
                name,
                nearest(name, known),
                help,
            ))
        })
    };
    let config = Config::load(given.value("config").map(Path::new)).map_err(violations)?;
    let file = FeatureFile::in_directory(config.state_directory());
    match given
        .operands
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()[..]
    {
        ["show"] => show(&file, &Feature::ALL)?,
        ["show", name] => show(&file, &[feature(name)?])?,
        ["enable", name] => {
            let feature = feature(name)?;
            file.set(feature, State::Preparing)
                .map_err(Failure::Feature)?;
            let state = match prepare(feature) {
                Ok(()) => State::Ready,
                Err(reason) => State::Failed(reason),
            };
            let failed = matches!(state, State::Failed(_));
            file.set(feature, state).map_err(Failure::Feature)?;
            show(&file, &[feature])?;
            return Ok(i32::from(failed));
        }
        ["disable", name] => {
            let feature = feature(name)?;
            file.set(feature, State::Off).map_err(Failure::Feature)?;
            show(&file, &[feature])?;
        }
        _ => {
            let rule = "is missing: show, enable NAME or disable NAME";
            return Err(GRAMMAR.missing("ACTION", rule));
        }
    }
    Ok(0)
}

fn show(file: &FeatureFile, features: &[Feature]) -> Result<(), Refusal> {
    let mut text = String::new();
    for feature in features {
        let state = file.state(*feature).map_err(Failure::Feature)?;
        text += &format!("{feature}: {state}\n");
    }
    print(&text)
}

/// Looks whether this node can have it.
fn prepare(feature: Feature) -> Result<(), String> {
    match feature {
        Feature::CpuPinning => {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            match cpus {
                0 | 1 => Err("this node has one CPU".to_owned()),
                _ => Ok(()),
            }
        }
        // Of the guest's kernel, which the assets bring along.
        Feature::KernelParameters => Ok(()),
    }
}
