//! `pericarp node manifests`: what Kubernetes is told of a node's handlers, and how a cluster's nodes
//! get them.

use std::{ffi::OsString, path::Path};

use pericarp_config::Config;
use pericarp_hypervisor::HostFacts;
use pericarp_node::{
    daemon_set::{Selector, UNIT, daemon_set, image_recipe, is_image, is_unit},
    manifest::{overhead, runtime_classes},
};

use crate::{
    commands::{
        Refusal, print,
        reader::{Given, Grammar},
        violations,
    },
    input::problem::Problem,
};

const HELP: &str = "\
Prints a RuntimeClass for each handler, for `kubectl apply -f -`. With --daemon-set also a DaemonSet
whose pods prepare the nodes that have a label: they copy programs and guest files from an image
to the node, have containerd know the handlers, and have it forget them at their end.

Usage: pericarp node manifests [OPTIONS]

Options:
      --daemon-set IMAGE         the DaemonSet, too, with this image; pods go to the same nodes
      --node-selector KEY=VALUE  the label of those nodes [io.pericarp/node=true]
      --restart UNIT             what runs containerd there [containerd]
      --image-recipe             print how such an image is built, and nothing else
      --config FILE              our configuration [/etc/pericarp/config.toml, if it is there]
  -h, --help                     show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp node manifests",
    help: HELP,
    flags: &[(' ', "image-recipe")],
    options: &[
        (' ', "daemon-set", false),
        (' ', "node-selector", false),
        (' ', "restart", false),
        (' ', "config", false),
    ],
    ends_at_operand: false,
};

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    if let Some(odd) = given.operands.first() {
        return Err(GRAMMAR.missing(odd, "is not an option"));
    }
    let wanted = check(&given)?;
    if given.flag("image-recipe") {
        print(&image_recipe())?;
        return Ok(0);
    }
    let config = Config::load(given.value("config").map(Path::new)).map_err(violations)?;
    let host = HostFacts::probe();
    let mut text = String::new();
    if let Some((image, selector, unit)) = &wanted {
        text += &daemon_set(image, selector, unit);
    }
    let nodes = wanted.as_ref().map(|(_, selector, _)| selector);
    text += &runtime_classes(&config, |_, settings| overhead(settings, &host), nodes);
    print(&text)?;
    Ok(0)
}

/// Image, label and unit of the DaemonSet, if there is to be one.
fn check(given: &Given) -> Result<Option<(String, Selector, String)>, Refusal> {
    let mut problems = Vec::new();
    let mut wrong = |option: &str, value: &str, rule: &str, cure: &str| {
        problems.push(Problem::new(option, value.to_owned(), rule, cure));
    };
    let selector = match given.value("node-selector") {
        None => Selector::default(),
        Some(text) => Selector::parse(text).unwrap_or_else(|| {
            let cure = "write KEY=VALUE, such as io.pericarp/node=true";
            wrong("--node-selector", text, "is no label", cure);
            Selector::default()
        }),
    };
    let unit = given.value("restart").unwrap_or(UNIT);
    if !is_unit(unit) {
        wrong("--restart", unit, "is no unit of systemd", "such as k3s");
    }
    let image = given.value("daemon-set");
    if let Some(image) = image.filter(|image| !is_image(image)) {
        let cure = "write it as a pod's 'image' has it";
        wrong("--daemon-set", image, "is no name of an image", cure);
    }
    for option in ["node-selector", "restart"] {
        if let (Some(value), None) = (given.value(option), image) {
            let rule = "is for the DaemonSet alone";
            wrong(
                &format!("--{option}"),
                value,
                rule,
                "give '--daemon-set', too",
            );
        }
    }
    if given.flag("image-recipe") {
        for option in ["daemon-set", "config"] {
            if let Some(value) = given.value(option) {
                let rule = "has nothing to do with '--image-recipe'";
                wrong(&format!("--{option}"), value, rule, "leave one out");
            }
        }
    }
    match problems.is_empty() {
        true => Ok(image.map(|image| (image.to_owned(), selector, unit.to_owned()))),
        false => Err(Refusal::Input(problems)),
    }
}
