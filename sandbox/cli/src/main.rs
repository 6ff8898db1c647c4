//! `pericarp`: runs commands in virtual machines of their own, or in plain containers.
//!
//! This file knows the subcommands and the exit codes: 2 for bad input, 125 for a failure of our
//! own, 126 and 127 as shells have them, else the command's own code or 128 plus its signal.
//! Everything else is in the modules; nothing below `main` may end the process, so that whatever
//! was created is removed on every path.

mod commands;
mod container;
mod detach;
mod failure;
mod guest;
mod helper;
mod images;
mod input;
mod log;
mod network;
mod observe;
mod registry;
mod report;
mod rootfs;
mod run;
mod runc;
mod rundir;
mod scratch;
mod signals;
mod sizing;
mod terminal;
mod vm;

use std::ffi::OsString;

use crate::{
    commands::{
        assets, check, config, exec, feature, list, logs, measure, metrics, node, remove, serve,
        stop, top, verify, why,
    },
    input::problem::{Problem, nearest},
};

const HELP: &str = "\
pericarp runs each workload in a virtual machine of its own.

Usage: pericarp COMMAND [OPTIONS]

Commands:
  run         run a command in a virtual machine, or in a plain container
  exec        run a further command in the container of a run
  ps          list runs
  logs        show what the command of a detached run has said
  stop        end runs
  rm          forget runs that have ended
  verify      show whether a pod is in a machine of its own
  why         say what went wrong in a pod
  top         show what machines do: I/O, latencies, CPU time, memory
  metrics     the same for Prometheus
  measure     measure what a pod takes of its host, for RuntimeClasses
  check       say whether this node has what pods need
  node        have containerd know our handlers, or forget them; serve pods to kubectl
  kubeconfig  how kubectl reaches `pericarp node serve`
  config      explain what can be configured of pods
  assets      keep versions of the guest's kernel and agent
  feature     show how far this node is with a feature, and prepare it
  help        show this text; `pericarp COMMAND --help` shows the options of a command

Options:
  --version  print the version
  --help     show this text
";

const COMMANDS: [&str; 18] = [
    "run",
    "exec",
    "ps",
    "logs",
    "stop",
    "rm",
    "verify",
    "why",
    "top",
    "metrics",
    "measure",
    "check",
    "node",
    "kubeconfig",
    "config",
    "assets",
    "feature",
    "help",
];

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    let rest = arguments.collect();
    let code = match first {
        None => {
            eprint!("{HELP}");
            2
        }
        Some(first) => match first.to_str() {
            Some("run") => run(rest),
            Some("exec") => commands::run("exec", exec::run, rest),
            Some("ps") => commands::run("ps", list::run, rest),
            Some("logs") => commands::run("logs", logs::run, rest),
            Some("stop") => commands::run("stop", stop::run, rest),
            Some("rm") => commands::run("rm", remove::run, rest),
            Some("verify") => commands::run("verify", verify::run, rest),
            Some("why") => commands::run("why", why::run, rest),
            Some("top") => commands::run("top", top::run, rest),
            Some("metrics") => commands::run("metrics", metrics::run, rest),
            Some("measure") => commands::run("measure", measure::run, rest),
            Some("check") => commands::run("check", check::run, rest),
            Some("node") => commands::run("node", node::run, rest),
            Some("kubeconfig") => commands::run("kubeconfig", serve::kubeconfig, rest),
            Some("config") => commands::run("config", config::run, rest),
            Some("assets") => commands::run("assets", assets::run, rest),
            Some("feature") => commands::run("feature", feature::run, rest),
            Some("help" | "--help" | "-h") => report::show(HELP),
            Some("--version" | "-V") => {
                report::show(concat!("pericarp ", env!("CARGO_PKG_VERSION"), "\n"))
            }
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

fn run(arguments: Vec<OsString>) -> i32 {
    let wants_json = arguments
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a == "--json");
    let request = match input::options::parse(arguments) {
        Ok(input::options::Parsed::Help) => return report::show(input::options::HELP),
        Ok(input::options::Parsed::Run(request)) => *request,
        Err(problems) => return report::refuse("run", &problems, wants_json),
    };
    let plan = match input::check::check(request) {
        Ok(plan) => plan,
        Err(problems) => return report::refuse("run", &problems, wants_json),
    };
    let mut timing = report::Timing::begin();
    let wants_timing = plan.timing;
    let outcome = run::run(plan, &mut timing);
    timing.mark("cleanup");
    if let Err(failure) = &outcome {
        report::failure(failure, wants_json);
    }
    let code = match &outcome {
        Ok(run::Ended::Here(code)) => *code,
        // The run itself says the rest.
        Ok(run::Ended::Elsewhere(code)) => return *code,
        Err(failure) => failure.exit_code(),
    };
    if wants_json {
        report::end_json(code, &timing);
    } else if wants_timing {
        report::end_text(&timing);
    }
    code
}
