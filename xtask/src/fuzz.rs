//! `cargo xtask fuzz` and `cargo xtask asan`: hostile scripts, and tests under
//! the address sanitizer.
//!
//! Both need a nightly toolchain for the sanitizer; `fuzz` goes on without one,
//! with random scripts on the toolchain at hand, and says so. What is built
//! goes to a directory of its own below `target`, because the flags differ.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::command::{self, Failure, cargo};
use crate::project::Project;
use crate::test;

const HOST: &str = "x86_64-unknown-linux-gnu";
const TARGETS: [&str; 4] = ["rings", "requests", "frames", "sessions"];
/// What cargo-fuzz passes for libFuzzer.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing \
    -Cdebug-assertions -Coverflow-checks";
/// Crates with unsafe code on the data path, and those that drive it.
const UNSAFE_CRATES: [&str; 8] = [
    "pericarp-ring",
    "pericarp-uring",
    "pericarp-vhost",
    "pericarp-block",
    "pericarp-share",
    "pericarp-fs",
    "pericarp-net",
    "pericarp-fuzz",
];

/// The tests fault on purpose: a handler of ours answers SIGBUS.
const ASAN_OPTIONS: &str = "handle_sigbus=0:allow_user_segv_handler=1";

/// What `cargo xtask fuzz` was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    seconds: u64,
    targets: Vec<&'static str>,
    replay: Option<PathBuf>,
}

impl Options {
    /// Reads the words after `fuzz`; the error is the line for the operator.
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            seconds: 60,
            targets: TARGETS.to_vec(),
            replay: None,
        };
        for pair in words.chunks(2) {
            let [option, value] = *pair else {
                return Err(format!(
                    "'{}': needs a value; see cargo xtask --help",
                    pair[0]
                ));
            };
            match option {
                "--seconds" => {
                    options.seconds = value.parse().ok().filter(|&n| n > 0).ok_or(format!(
                        "--seconds '{value}': must be a number of seconds above 0; give one"
                    ))?;
                }
                "--target" => {
                    let known = TARGETS.into_iter().find(|t| *t == value);
                    options.targets = vec![known.ok_or(format!(
                        "--target '{value}': no such target; use rings, requests, frames or sessions"
                    ))?];
                }
                "--replay" => options.replay = Some(value.into()),
                other => {
                    return Err(format!(
                        "'{other}': no such option; use --seconds, --target or --replay"
                    ));
                }
            }
        }
        match &options.replay {
            Some(file) if !file.is_file() => Err(format!(
                "--replay '{}': is no file; give one that the fuzzer left",
                file.display()
            )),
            Some(_) if options.targets.len() > 1 => {
                let rule = "whose script is it? add --target rings, requests, frames or sessions";
                Err(format!("--replay: {rule}"))
            }
            _ => Ok(options),
        }
    }
}

/// Fuzzes every target for its share of the time, or replays one script.
pub(crate) fn run(project: &Project, options: &Options) -> Result<(), Failure> {
    let nightly = has_nightly();
    if !nightly {
        println!("fuzz: no nightly toolchain: random scripts, no coverage, no sanitizer");
    }
    let share = (options.seconds / options.targets.len() as u64).max(1);
    for target in &options.targets {
        let program = build(project, nightly, target)?;
        let mut command = Command::new(program);
        command.current_dir(&project.root);
        match (&options.replay, nightly) {
            (Some(file), true) => command.arg(absolute(file)?),
            (Some(file), false) => command.args([target, "--replay"]).arg(absolute(file)?),
            (None, false) => command.args([target, "--seconds", &share.to_string()]),
            (None, true) => {
                let found = project.target.join("fuzz").join(target);
                std::fs::create_dir_all(&found)
                    .map_err(|e| format!("cannot make {}: {e}", found.display()))?;
                command
                    .arg(format!("-max_total_time={share}"))
                    .arg(format!(
                        "-artifact_prefix={}/crash-in-{target}-",
                        project.target.join("fuzz").display()
                    ))
                    // Scripts are short, and the device has a SIGBUS handler of
                    // its own.
                    .args([
                        "-max_len=1024",
                        "-timeout=60",
                        "-handle_bus=0",
                        "-print_final_stats=1",
                    ])
                    .arg(&found)
                    .arg(project.root.join("backends/fuzz/corpus").join(target))
            }
        };
        command::run(&mut command)?;
    }
    Ok(())
}

fn build(project: &Project, nightly: bool, target: &str) -> Result<PathBuf, Failure> {
    let mut command = if nightly { nightly_cargo() } else { cargo() };
    command.current_dir(&project.root).args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "pericarp-fuzz",
    ]);
    if !nightly {
        command::run(&mut command)?;
        return Ok(project.release_program("pericarp-fuzz"));
    }
    let dir = project.target.join("fuzz").join("build");
    let bin = format!("fuzz-{target}");
    command
        .args(["--features", "libfuzzer", "--bin", &bin, "--target", HOST])
        .arg("--target-dir")
        .arg(&dir)
        .env("RUSTFLAGS", format!("{COVERAGE} -Zsanitizer=address"))
        // Across crates it would optimise the counters away.
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    command::run(&mut command)?;
    Ok(dir.join(HOST).join("release").join(bin))
}

/// `cargo xtask asan`: the last line is the sum. The sanitizer ends a program
/// at its first finding, whose tests then do not count as passed.
pub(crate) fn asan(project: &Project) -> Result<(), Failure> {
    if !has_nightly() {
        return Err("asan needs the nightly toolchain: rustup toolchain install nightly".into());
    }
    let mut command = nightly_cargo();
    command
        .current_dir(&project.root)
        .args(["test", "--no-fail-fast"])
        .args(UNSAFE_CRATES.iter().flat_map(|name| ["--package", name]))
        .args(["--lib", "--bins", "--tests", "--target", HOST])
        .arg("--target-dir")
        .arg(project.target.join("asan"))
        .env("RUSTFLAGS", "-Zsanitizer=address")
        // Scripts take several times as long.
        .env("PERICARP_FUZZ_SCRIPTS", "10000")
        .env("ASAN_OPTIONS", ASAN_OPTIONS);
    // loom runs its threads on stacks that the sanitizer does not know.
    command.args(["--", "--skip", "notification::"]);
    let started = Instant::now();
    let (total, passed) = test::count(&mut command)?;
    println!(
        "asan: {} passed, {} failed, in {} s",
        total.passed,
        total.failed,
        started.elapsed().as_secs()
    );
    if passed && total.passed > 0 {
        return Ok(());
    }
    Err("the address sanitizer or a test found something; see above".into())
}

fn has_nightly() -> bool {
    Command::new("rustc")
        .args(["+nightly", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The nightly cargo. Our own was started by rustup, whose choice for us must
/// not be that for it.
fn nightly_cargo() -> Command {
    let mut command = Command::new("cargo");
    command
        .arg("+nightly")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    command
}

fn absolute(file: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(file).map_err(|e| format!("cannot find {}: {e}", file.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_or_refused() {
        let options = Options::parse(&["--seconds", "9", "--target", "rings"]).unwrap();
        assert_eq!((options.seconds, options.targets), (9, vec!["rings"]));
        for bad in [
            &["--seconds"][..],
            &["--seconds", "0"],
            &["--target", "disk"],
            &["--replay", "/"],
            &["--quick", "1"],
        ] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }
}
