//! The developer's commands, called as `cargo xtask <command>` through the
//! alias in `.cargo/config.toml`.
//!
//! This program is built before anything else on a fresh machine, so it may
//! use nothing but `std` and `serde_json`, and it must not depend on any other
//! crate of the workspace.

mod apt;
mod assets;
mod audit;
mod bench;
mod check;
mod command;
mod demo;
mod deny;
mod fio;
mod fuzz;
mod guest;
mod harness;
mod house;
mod janitor;
mod kernel;
mod lab;
mod modules;
mod named;
mod project;
mod setup;
mod test;
mod tools;

use std::process::ExitCode;

use command::Failure;
use project::Project;

const HELP: &str = "\
cargo xtask <command>

  demo     run one command under runc and in a virtual machine of its own, then
           the same fio job in each, and print both tables
  test     check, build and run every test; the last line is the total
  check    formatting, clippy, documentation, the house rules, whether the tests
           that documents name exist, and the licences and duplicates of dependencies
  fuzz     [--seconds N] [--target rings|requests|frames|sessions] [--replay FILE]:
           hostile guests and front ends made by libFuzzer under the address
           sanitizer, 60 seconds in all; random ones without a nightly toolchain
  asan     the data plane's tests under the address sanitizer (nightly)
  bench    compare [--profile P,..] [--targets T,..] [--rounds N] [--quick] ...:
           fio on the host, under runc, and in guests on our block backend and on
           QEMU's; bench compare --help says more
           regress [--base REV] [--seconds-budget N] [--json FILE]: is the data
           plane slower than that of the parent commit? --help says more
  lab      [-- COMMAND ...]: run a command, or /dev/kvm's own test, where KVM is
           backed by hardware: here, or in a virtual machine whose emulated CPU
           has it and that sees this machine's files, read-only
  audit    [--pod NAME | --running] [--json]: what holds the processes of a pod that is
           started for this, or of those that run, as the kernel reports it; fails
           where that is looser than SECURITY.md promises
  setup    install the Debian packages the others need, build what tests run of
           crates.io, and prepare the guest kernel and its programs; demo and test
           do what they need of this themselves
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["bench", "regress", rest @ ..] = words.as_slice() {
        return bench::regress::run(rest);
    }
    if let ["fuzz", rest @ ..] = words.as_slice() {
        return match fuzz::Options::parse(rest) {
            Ok(options) => finish(|project| fuzz::run(project, &options)),
            Err(line) => {
                eprintln!("xtask: fuzz: {line}");
                ExitCode::from(2)
            }
        };
    }
    if let ["lab", rest @ ..] = words.as_slice() {
        return match rest {
            [] => lab::run(&[]),
            ["--", command @ ..] if !command.is_empty() => lab::run(command),
            _ => {
                eprintln!("xtask: lab: takes a command after '--', as in: lab -- ls /dev/kvm");
                ExitCode::from(2)
            }
        };
    }
    if let ["audit", rest @ ..] = words.as_slice() {
        return audit::run(rest);
    }
    if let ["bench", "compare", rest @ ..] = words.as_slice() {
        return bench::compare::run(rest);
    }
    let command: fn(&Project) -> Result<(), Failure> = match words.as_slice() {
        ["setup"] => |project| setup::run(project).and_then(|()| test::prepare(project)),
        ["check"] => check::run,
        ["test"] => test::run,
        ["demo"] => demo::run,
        ["asan"] => fuzz::asan,
        // The demo starts this one beside itself; see `janitor`.
        ["janitor"] => |_| janitor::serve(std::io::stdin().lock()),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        [
            name @ ("setup" | "check" | "test" | "demo" | "asan"),
            extra,
            ..,
        ] => {
            eprintln!("xtask: '{extra}': {name} takes no arguments; leave it out");
            return ExitCode::from(2);
        }
        ["bench", ..] => {
            eprintln!(
                "xtask: bench: measures nothing by itself; use bench compare or bench regress"
            );
            return ExitCode::from(2);
        }
        [unknown, ..] => {
            eprintln!(
                "xtask: '{unknown}': no such command; use demo, test, check, fuzz, asan, bench, lab, audit or setup, \
                 see cargo xtask --help"
            );
            return ExitCode::from(2);
        }
    };
    finish(command)
}

/// Runs a command in the source tree.
fn finish(command: impl FnOnce(&Project) -> Result<(), Failure>) -> ExitCode {
    match Project::locate().and_then(|project| command(&project)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}
