//! `containerd-shim-pericarp-v2`: containerd's runtime `io.containerd.pericarp.v2`, one virtual
//! machine for each pod.
//!
//! containerd starts it with an action. `start` leaves a copy of itself behind that serves the task
//! service of all containers of one pod (`service`), or finds the one that is there; `delete`
//! cleans up behind one that is dead. This file knows the actions and nothing else.

mod arguments;
mod audit;
mod blocks;
mod bootstrap;
mod bundle;
mod cgroup;
mod cleanup;
mod devices;
mod direct;
mod directory;
mod disks;
mod empty_dir;
mod error;
mod events;
mod guest;
mod keeper;
mod lanes;
mod lasting;
mod log;
mod machine;
mod mounts;
mod named;
mod oom;
mod pinned;
mod pod;
mod process;
mod profile;
mod rootfs;
mod serve;
mod service;
mod spec;
mod stamps;
mod stats;
mod stdio;
mod subpath;
mod task;
mod volumes;
mod watched;
mod why;

use std::io::Write;

use crate::arguments::{Action, Arguments};

/// The runtime type that containerd knows this program by.
const RUNTIME: &str = "io.containerd.pericarp.v2";

fn main() {
    let began = stamps::now();
    let outcome =
        Arguments::parse(std::env::args_os().skip(1)).and_then(|arguments| {
            match arguments.action {
                Action::Version => {
                    let version =
                        concat!("containerd-shim-pericarp-v2 ", env!("CARGO_PKG_VERSION"));
                    say(format!("{version}\n").as_bytes())
                }
                Action::Info => say(&bootstrap::info()?),
                Action::Start => say(&bootstrap::start(&arguments, began)?),
                Action::Delete => say(&cleanup::delete(&arguments)?),
                Action::Serve => serve::run(&arguments, began),
            }
        });
    if let Err(error) = outcome {
        eprintln!("containerd-shim-pericarp-v2: {error}");
        std::process::exit(1);
    }
}

fn say(answer: &[u8]) -> Result<(), error::ShimError> {
    let mut out = std::io::stdout().lock();
    out.write_all(answer)
        .and_then(|()| out.flush())
        .map_err(error::during("the answer"))
}
