//! `pericarp-audit [--pod NAME | --running] [--json]`: what holds the processes of pods, as
//! the kernel reports it, beside what `SECURITY.md` promises. It starts a pod of its own
//! unless it is told which to look at. `cargo xtask audit` builds and starts this.
//!
//! Exit codes: 0 where every process is held as promised, 1 where one is looser, or where
//! that cannot be found out, 2 for bad input.

use std::io::Write;
use std::process::ExitCode;

use pericarp_tests::audit::{Audit, Example, PARTS, Pod, json, running, table};
use pericarp_tests::guest::Assets;
use pericarp_tests::parts::missing;

const PROGRAM: &str = "pericarp-audit";
const USAGE: &str = "use --pod NAME, --running or neither, and --json";

/// Which pods are looked at.
#[derive(Debug, PartialEq, Eq)]
enum Which {
    /// One that is started for it.
    Example,
    /// The one with this id or name.
    Named(String),
    Running,
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    which: Which,
    json: bool,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match parse(&words) {
        Ok(options) => run(&options),
        Err(line) => Err((2, line)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err((code, line)) => {
            eprintln!("{PROGRAM}: {line}");
            ExitCode::from(code)
        }
    }
}

fn parse(words: &[String]) -> Result<Options, String> {
    let mut options = Options {
        which: Which::Example,
        json: false,
    };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let which = match word.as_str() {
            "--json" => {
                options.json = true;
                continue;
            }
            "--running" => Which::Running,
            "--pod" => match words.next() {
                Some(name) if !name.is_empty() => Which::Named(name.clone()),
                _ => return Err("--pod: names no pod; give its id or name".to_owned()),
            },
            other => return Err(format!("'{other}': no such option; {USAGE}")),
        };
        if options.which != Which::Example {
            return Err(format!("'{word}': the pods are named twice; {USAGE}"));
        }
        options.which = which;
    }
    Ok(options)
}

/// Whether all is as promised.
fn run(options: &Options) -> Result<bool, (u8, String)> {
    let failed = |error: std::io::Error| (1, error.to_string());
    if !rustix::process::geteuid().is_root() {
        let rule = "root alone sees what confined processes have open; run it as root";
        return Err((2, rule.to_owned()));
    }
    let mut example = None;
    let pods: Vec<Pod> = match &options.which {
        Which::Running => running().map_err(failed)?,
        Which::Named(name) => {
            let mut pods = running().map_err(failed)?;
            pods.retain(|pod| pod.is_called(name));
            if pods.is_empty() {
                let cure = "name one that runs here, or use --running";
                return Err((
                    2,
                    format!("--pod '{name}': no pod has this id or name; {cure}"),
                ));
            }
            pods
        }
        Which::Example => {
            if let Some(why) = missing(&PARTS) {
                return Err((1, why));
            }
            let assets = Assets::find().ok_or_else(|| {
                let cure = "make it: cargo xtask setup";
                (1, format!("the guest's kernel is missing ({cure})"))
            })?;
            let pod = example.insert(Example::start(assets.dir()).map_err(failed)?);
            if let Some(why) = &pod.without_card {
                eprintln!("{PROGRAM}: the pod has no network card: {why}");
            }
            vec![pod.pod().map_err(failed)?]
        }
    };
    if pods.is_empty() {
        return Err((
            1,
            "no pod runs here; leave --running out to start one".to_owned(),
        ));
    }
    let audits: Result<Vec<Audit>, _> = pods.into_iter().map(Audit::of).collect();
    let audits = audits.map_err(failed)?;
    let text = match options.json {
        true => format!("{:#}\n", json(&audits)),
        false => table(&audits),
    };
    // Nobody may be reading any more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    let looser: usize = audits.iter().map(|audit| audit.looser().len()).sum();
    if looser > 0 {
        eprintln!("{PROGRAM}: {looser} times looser than SECURITY.md promises");
    }
    Ok(looser == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_named_once() {
        let of = |line: &str| parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let named = of("--pod web --json").unwrap();
        assert_eq!(
            (named.which, named.json),
            (Which::Named("web".into()), true)
        );
        assert_eq!(parse(&[]).unwrap().which, Which::Example);
        for (line, said) in [
            ("--pod", "--pod: names no pod"),
            ("--running --pod web", "'--pod': the pods are named twice"),
            ("web", "'web': no such option"),
        ] {
            let error = of(line).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
