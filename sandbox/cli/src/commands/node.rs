//! `pericarp node`: containerd on this node learns of our handlers, or forgets them.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use pericarp_config::Config;
use pericarp_node::{
    check::{Places, State, all},
    containerd::{self, ContainerdError, Plan, Runtimes},
    daemon_set::is_unit,
};
use pericarp_pod::assets::program_directory;

use crate::{
    commands::{
        Refusal, install, manifests, print,
        reader::{Given, Grammar},
        serve, violations,
    },
    failure::Failure,
    input::problem::Problem,
};

const HELP: &str = "\
Tells containerd of this node's handlers, one for each profile and each of its other names, or has it
forget them. Its configuration gets a block at its end, which is taken out again to the byte.
containerd reads it when it is started anew: `systemctl restart containerd`. Pods go on meanwhile.

Usage: pericarp node enable [OPTIONS]
       pericarp node disable [OPTIONS]
       pericarp node manifests [OPTIONS]   the RuntimeClasses, and how a cluster's nodes get all this
       pericarp node install [OPTIONS]     copy programs and guest files to a node, and enable it
       pericarp node serve [OPTIONS]       pods for kubectl without a cluster

manifests, install and serve have options of their own: `pericarp node serve --help`.

Options:
      --dry-run                 only show what would be changed
      --restart UNIT            have systemd restart this unit if anything was changed
      --config FILE             our configuration [/etc/pericarp/config.toml, if it is there]
      --containerd-config FILE  that of containerd [/etc/containerd/config.toml]
      --workload-runtime NAME   as `az aks` has it: KataMshvVmIsolation, and no other
      --os-sku NAME             likewise: AzureLinux, CBLMariner or Debian
  -h, --help                    show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp node",
    help: HELP,
    flags: &[(' ', "dry-run")],
    options: &[
        (' ', "config", false),
        (' ', "containerd-config", false),
        (' ', "restart", false),
        (' ', "workload-runtime", false),
        (' ', "os-sku", false),
    ],
    ends_at_operand: false,
};

const SHIM: &str = "containerd-shim-pericarp-v2";
/// What the options of AKS may be. They choose nothing here, and so must not choose otherwise.
const OF_AKS: [(&str, &[&str]); 2] = [
    ("workload-runtime", &["KataMshvVmIsolation"]),
    ("os-sku", &["AzureLinux", "CBLMariner", "Debian"]),
];

pub(crate) fn run(mut arguments: Vec<OsString>) -> Result<i32, Refusal> {
    match arguments.first().and_then(|action| action.to_str()) {
        Some("manifests") => return manifests::run(arguments.split_off(1)),
        Some("serve") => return serve::serve(arguments.split_off(1)),
        Some("install" | "uninstall") => return install::run(arguments),
        _ => {}
    }
    let given = GRAMMAR.read(arguments)?;
    match given
        .operands
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()[..]
    {
        ["enable"] => enable(&given),
        ["disable"] => disable(&given),
        _ => Err(GRAMMAR.missing(
            "ACTION",
            "is missing: enable, disable, manifests, install, uninstall or serve",
        )),
    }
}

fn load(given: &Given) -> Result<Config, Refusal> {
    Config::load(given.value("config").map(Path::new)).map_err(violations)
}

fn containerd_config(given: &Given) -> &Path {
    Path::new(
        given
            .value("containerd-config")
            .unwrap_or(containerd::DEFAULT_PATH),
    )
}

/// Everything that is wrong with the parameters, and everything that is missing here, before
/// anything is changed.
fn enable(given: &Given) -> Result<i32, Refusal> {
    let mut problems: Vec<Problem> = OF_AKS
        .iter()
        .filter_map(|(option, known)| {
            let value = given.value(option)?;
            let rule = format!("is none of {}", known.join(", "));
            let cure = "leave the option out, or give one of them";
            let wrong = !known.contains(&value);
            wrong.then(|| Problem::new(&format!("--{option}"), value.to_owned(), rule, cure))
        })
        .collect();
    problems.extend(bad_unit(given));
    // containerd's working directory is not ours.
    let path = given.value("config").map(PathBuf::from);
    if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
        let value = path.display().to_string();
        let rule = "is no absolute path, which containerd's shims need";
        problems.push(Problem::new("--config", value, rule, "begin it with '/'"));
    }
    let config = match load(given) {
        Ok(config) => Some(config),
        Err(Refusal::Input(more)) => {
            problems.extend(more);
            None
        }
        Err(other) => return Err(other),
    };
    let Some(config) = config.filter(|_| problems.is_empty()) else {
        return Err(Refusal::Input(problems));
    };
    let places = Places {
        config: path.clone(),
        containerd: containerd_config(given).to_owned(),
    };
    let findings = all(&places);
    let mut missing = false;
    for finding in findings
        .iter()
        .filter(|finding| finding.state > State::Unknown)
    {
        // That it is not enabled is why we are here.
        if finding.state == State::Missing || !finding.cure.starts_with("pericarp node") {
            eprintln!("{finding}");
        }
        missing |= finding.state == State::Missing;
    }
    if missing && !given.flag("dry-run") {
        return Err(Failure::Node("nothing was changed: something is missing".to_owned()).into());
    }
    let shim = program_directory().unwrap_or_default().join(SHIM);
    let runtimes = Runtimes::of(&config, &shim, path.as_deref());
    let plan = Plan::enable(&places.containerd, &runtimes).map_err(refusal)?;
    carry_out(given, &plan)
}

fn bad_unit(given: &Given) -> Option<Problem> {
    let unit = given.value("restart").filter(|unit| !is_unit(unit))?;
    let (rule, cure) = ("is no unit of systemd", "such as containerd.service");
    Some(Problem::new("--restart", unit.to_owned(), rule, cure))
}

fn disable(given: &Given) -> Result<i32, Refusal> {
    if let Some(problem) = bad_unit(given) {
        return Err(problem.into());
    }
    let plan = Plan::disable(containerd_config(given)).map_err(refusal)?;
    carry_out(given, &plan)
}

fn carry_out(given: &Given, plan: &Plan) -> Result<i32, Refusal> {
    print(&plan.difference())?;
    if !plan.changes() {
        eprintln!("{}: is as it should be", plan.path().display());
    } else if given.flag("dry-run") {
        eprintln!("nothing was changed: --dry-run");
    } else {
        plan.apply().map_err(refusal)?;
        match given.value("restart") {
            Some(unit) => restart(unit).map_err(|end| {
                // Whoever tries again finds something to do then.
                let as_before = match plan.reversed().apply() {
                    Ok(()) => "the configuration is as it was before".to_owned(),
                    Err(error) => format!("the configuration stays changed: {error}"),
                };
                Failure::Node(format!("'systemctl restart {unit}' {end}; {as_before}"))
            })?,
            None => {
                eprintln!(
                    "containerd reads it when it is started anew: systemctl restart containerd"
                );
            }
        }
    }
    Ok(0)
}

/// containerd reads its configuration when it starts. Pods go on meanwhile.
fn restart(unit: &str) -> Result<(), String> {
    let status = Command::new("systemctl").args(["restart", unit]).status();
    let status = status.map_err(|error| format!("cannot be started ({error})"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("failed ({status})")),
    }
}

/// A file that is not as it has to be is bad input, all else is a failure.
fn refusal(error: ContainerdError) -> Refusal {
    match error {
        ContainerdError::Refused { .. } => {
            Problem::whole("--containerd-config", &error.to_string()).into()
        }
        _ => Failure::Node(error.to_string()).into(),
    }
}
