//! The article's commands, on a node without a cluster: a containerd of its own, the node API,
//! and kubectl, which is not ours. Called by the demo.

use std::path::Path;
use std::process::Command;

use crate::command::{self, Failure};
use crate::project::Project;

/// Types them; each command and what it says goes to our own output. The image in the archive
/// is the one that the article names.
pub(crate) fn play(project: &Project, archive: &Path) -> Result<(), Failure> {
    let mut article = Command::new(project.release_program("pericarp-article"));
    article
        .arg(archive)
        .env("PERICARP_ASSETS", project.assets());
    command::run(&mut article)
}
