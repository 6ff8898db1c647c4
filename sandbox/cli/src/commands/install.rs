//! `pericarp node install` and `uninstall`: a node is prepared by what a pod of a DaemonSet brings
//! along (`node manifests --daemon-set`), or by hand.
//!
//! The node's own `pericarp`, once it is there, does the rest with the node's file system as its root:
//! paths in containerd's configuration and what `check` looks at are the node's.

use std::{
    ffi::OsString,
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use pericarp_node::{
    daemon_set::is_unit,
    install::{self, InstallError, PREFIX},
};
use pericarp_pod::assets::{place, program_directory};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    commands::{
        Refusal,
        reader::{Given, Grammar},
    },
    failure::{Failure, during},
    input::problem::Problem,
    signals::Signals,
};

const HELP: &str = "\
Copies the programs beside this one to /opt/pericarp/bin of a node and its guest files to the node's
store (`pericarp assets`), has new pods take those, and calls `pericarp node enable` there. `uninstall`
calls `pericarp node disable`; programs and guest files stay for the pods that run.

Usage: pericarp node install [OPTIONS]
       pericarp node uninstall [OPTIONS]

Options:
      --host DIR         the node's root directory [/]
      --config FILE      our configuration, on the node [/etc/pericarp/config.toml, if it is there]
      --restart UNIT     have systemd restart this unit, which runs containerd, if its
                         configuration has been changed
      --ready-file FILE  install: make this file once all is done
      --wait             install: do not end before SIGTERM or SIGINT
  -h, --help             show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp node install",
    help: HELP,
    flags: &[(' ', "wait")],
    options: &[
        (' ', "host", false),
        (' ', "config", false),
        (' ', "restart", false),
        (' ', "ready-file", false),
    ],
    ends_at_operand: false,
};
/// Where the node's own programs are looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let host = PathBuf::from(given.value("host").unwrap_or("/"));
    let mut problems = Vec::new();
    if !host.is_absolute() || !host.is_dir() {
        let value = host.display().to_string();
        let rule = "is no directory with an absolute path";
        problems.push(Problem::new("--host", value, rule, "give the node's root"));
    }
    if let Some(unit) = given.value("restart").filter(|unit| !is_unit(unit)) {
        let rule = "is no unit of systemd";
        problems.push(Problem::new(
            "--restart",
            unit.to_owned(),
            rule,
            "such as k3s",
        ));
    }
    let action = given.operands.iter().map(String::as_str);
    let installs = match action.collect::<Vec<_>>()[..] {
        ["install"] => true,
        ["uninstall"] => {
            let of_install = [
                ("wait", given.flag("wait")),
                ("ready-file", given.value("ready-file").is_some()),
            ];
            for (option, _) in of_install.into_iter().filter(|(_, used)| *used) {
                let rule = "is for 'node install' alone";
                let option = format!("--{option}");
                problems.push(Problem::new(&option, None, rule, "leave it out"));
            }
            false
        }
        _ => return Err(GRAMMAR.missing("ACTION", "is install or uninstall, and nothing else")),
    };
    if !problems.is_empty() {
        return Err(Refusal::Input(problems));
    }
    match installs {
        true => install(&given, &host),
        false => {
            enter(&host)?;
            node("disable", &given)?;
            Ok(0)
        }
    }
}

fn install(given: &Given, host: &Path) -> Result<i32, Refusal> {
    // Before the first thing is changed: who is told to end does so between two steps.
    let mut signals = Signals::block()?;
    let from = program_directory().unwrap_or_default();
    let changed = install::programs(&from, host).map_err(failed)?;
    match changed.is_empty() {
        true => eprintln!("{PREFIX}/bin: is as it should be"),
        false => eprintln!("{PREFIX}/bin: {}", changed.join(", ")),
    }
    // Not those of the store in which they are to be.
    let assets = std::env::var_os(place::VARIABLE).map(PathBuf::from);
    let assets = assets
        .or_else(place::beside_the_program)
        .unwrap_or_default();
    let (version, is_new) = install::guest(&assets, host).map_err(failed)?;
    let what = if is_new {
        "is taken by new pods"
    } else {
        "is as it should be"
    };
    eprintln!("guest files: {version} {what}");
    signals.check()?;
    // A place in our own file system.
    let ready = given.value("ready-file").map(Path::new);
    let ready = ready.map(|path| open_parent(path).map(|parent| (parent, path)));
    let ready = ready.transpose()?;
    enter(host)?;
    node("enable", given)?;
    if let Some((parent, path)) = ready {
        let name = path.file_name().unwrap_or_default();
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        rustix::fs::openat(parent, name, flags, mode).map_err(during(path.display()))?;
    }
    if given.flag("wait") {
        wait(&mut signals)?;
    }
    Ok(0)
}

fn open_parent(path: &Path) -> Result<fs::File, Refusal> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let opened = fs::File::open(parent).map_err(during(parent.display()))?;
    Ok(opened)
}

/// The node's file system is ours from now on.
fn enter(host: &Path) -> Result<(), Refusal> {
    if host == Path::new("/") {
        return Ok(());
    }
    rustix::process::chroot(host)
        .map_err(std::io::Error::from)
        .and_then(|()| std::env::set_current_dir("/"))
        .map_err(during(format!("'{}' as the root", host.display())))?;
    Ok(())
}

/// Has the node's own program do this.
fn node(action: &str, given: &Given) -> Result<(), Refusal> {
    let program = format!("{PREFIX}/bin/pericarp");
    let mut command = Command::new(&program);
    command
        .args(["node", action])
        .env("PATH", PATH)
        .env_remove(place::VARIABLE);
    for option in ["config", "restart"] {
        // `disable` needs no configuration of ours.
        if let Some(value) = given.value(option)
            && (action == "enable" || option != "config")
        {
            command.arg(format!("--{option}")).arg(value);
        }
    }
    let status = command.status().map_err(during(&program))?;
    if status.success() {
        return Ok(());
    }
    let end = format!("`pericarp node {action}` on the node: {status}");
    Err(Failure::Node(end).into())
}

fn wait(signals: &mut Signals) -> Result<(), Refusal> {
    loop {
        while let Some(signal) = signals.next() {
            if [libc::SIGTERM, libc::SIGINT].contains(&i32::from(signal)) {
                return Ok(());
            }
        }
        let fd = signals.as_fd();
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(during("signals")(error).into()),
        }
    }
}

fn failed(error: InstallError) -> Refusal {
    Failure::Node(error.to_string()).into()
}
