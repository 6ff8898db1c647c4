//! The article's commands, on a node without a cluster: a containerd of its own, the node API,
//! and kubectl, which is not ours. Called by the demo.

use std::process::Command;

use crate::command::{self, Failure};
use crate::project::Project;

/// Types them; each command and what it says goes to our own output.
pub(crate) fn play(project: &Project) -> Result<(), Failure> {
    let mut article = Command::new(project.release_program("pericarp-article"));
    article.env("PERICARP_ASSETS", project.assets());
    command::run(&mut article)
}
