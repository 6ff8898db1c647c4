//! `pericarp exec`: a further command in the container of a running machine.

use std::{ffi::OsString, io::IsTerminal};

use pericarp_api::{ExitReport, agent, host::Guest};
use pericarp_oci::{
    config,
    runtime::{self, Exec, RunAs},
};
use pericarp_pod::process::{
    Attached, CallError, Name, Wiring, attach_and_start, context, refused, unreachable,
};

use crate::{
    commands::{Refusal, find_running, reader::Grammar},
    container,
    failure::{Failure, during},
    guest::session::{Elsewhere, Ending, Ends, Session},
    input::problem::Problem,
    registry::{CONTAINER, new_id},
    report,
    signals::Signals,
    terminal,
};

const HELP: &str = "\
Runs a further command in the container of a run.

Usage: pericarp exec [OPTIONS] NAME COMMAND [ARG]...

Options:
  -i, --interactive   pass standard input on; the default unless -t is given
  -t, --tty           give the command a terminal; with -i ours is joined to it
  -e, --env NAME[=V]  set a variable; without a value it is taken from here
  -w, --workdir DIR   working directory (default: that of the container)
  -u, --user USER[:GROUP]
                      by name or number (default: that of the container)
  -h, --help          show this text

The exit code is the command's own, 128+N when signal N ended it, 126 when it cannot be
executed, 127 when there is no such command, 125 when pericarp itself failed.
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp exec",
    help: HELP,
    flags: &[('i', "interactive"), ('t', "tty")],
    options: &[
        ('e', "env", true),
        ('w', "workdir", false),
        ('u', "user", false),
    ],
    ends_at_operand: true,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let Some((name, command)) = given.operands.split_first() else {
        return Err(GRAMMAR.missing("NAME", "the run has to be named"));
    };
    if command.is_empty() {
        return Err(GRAMMAR.missing("COMMAND", "there is no command to run"));
    }
    let entry = find_running(name)?;
    let terminal = given.flag("tty");
    let wiring = Wiring {
        stdin: given.flag("interactive") || !terminal,
        terminal,
    };
    let env: Vec<String> = given.values("env").map(str::to_owned).collect();
    let env = config::extra_env(&env, &container::own_environment())
        .map_err(|error| Problem::whole("--env", &error.to_string()))?;
    if let Some(directory) = given.value("workdir")
        && !directory.starts_with('/')
    {
        let rule = "is not an absolute path";
        let directory = directory.to_owned();
        return Err(Problem::new("--workdir", directory, rule, "begin it with '/'").into());
    }
    let process = runtime::exec_process(
        &entry.record.process,
        &Exec {
            args: command,
            env: &env,
            cwd: given.value("workdir"),
            user: given.value("user").map(RunAs::Later),
            terminal,
        },
    )
    .map_err(|error| Failure::Setup(error.to_string()))?;
    let request = agent::CreateProcessRequest {
        container: CONTAINER.into(),
        process: format!("exec-{}", new_id().map_err(during("a new id"))?),
        spec: process.to_string().into_bytes(),
        user: given.value("user").unwrap_or_default().to_owned(),
        streams: Some(wiring.streams()).into(),
        ..Default::default()
    };
    Ok(session(Guest::new(entry.guest_socket()), request, wiring)?)
}

fn session(
    guest: Guest,
    request: agent::CreateProcessRequest,
    wiring: Wiring,
) -> Result<i32, Failure> {
    let mut signals = Signals::block()?;
    if wiring.terminal && wiring.stdin && !std::io::stdin().is_terminal() {
        report::warn("standard input is no terminal, so '-t' shows what comes back and no more");
    }
    let name = Name {
        container: request.container.clone(),
        process: request.process.clone(),
    };
    let mut raw = None;
    let session = Session {
        guest: guest.clone(),
        name: name.clone(),
        signals: &mut signals,
        surroundings: &mut Elsewhere,
        ends: Some(Ends::ours(wiring.stdin).map_err(during("the standard streams"))?),
        terminal: wiring.terminal,
        boot: None,
        started: &mut || {
            if wiring.terminal && wiring.stdin {
                raw = terminal::Raw::enter().map_err(during("the terminal"))?;
            }
            Ok(())
        },
    };
    let size = wiring.terminal.then(terminal::size).flatten();
    let outcome =
        session.run(move || start(&guest, &request, &name, wiring, size).map_err(Ending::from));
    drop(raw);
    if let Ok(ExitReport::Signal {
        out_of_memory: true,
        ..
    }) = outcome
    {
        report::warn(report::OUT_OF_MEMORY);
    }
    outcome
        .map(ExitReport::code)
        .map_err(|ending| match ending {
            Ending::Failure(failure) => failure,
            Ending::Guest(what) => Failure::Guest {
                what,
                console: Vec::new(),
            },
            Ending::Machine(_) | Ending::Agent(_) | Ending::BootTimeout(_) => {
                Failure::Setup("it ended".into())
            }
        })
}

fn start(
    guest: &Guest,
    request: &agent::CreateProcessRequest,
    name: &Name,
    wiring: Wiring,
    size: Option<(u16, u16)>,
) -> Result<Attached, CallError> {
    let client = guest.client().map_err(unreachable)?;
    client.create_process(context(), request).map_err(refused)?;
    attach_and_start(guest, &client, name, wiring, size)
}
