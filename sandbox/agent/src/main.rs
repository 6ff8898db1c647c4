//! First process of the guest: starts its containers, carries their streams, and answers the host.
//!
//! The kernel starts it from the initramfs that `pericarp` builds; it is linked statically and
//! needs nothing but what lies beside it there, crun among it. The host tells it what to do in the
//! protocol of `pericarp-api`. Containers are hostile: what they can reach of this process is
//! bounded, and no state of theirs may stop it. It must not exit, because a kernel without a first
//! process panics; it ends by switching the machine off, and says why on the connection on which
//! it greeted the host.

mod boot;
mod cgroup;
mod config;
mod container;
mod copies;
mod crun;
mod disks;
mod error;
mod facts;
mod greeting;
mod inside;
mod loopback;
mod memory;
mod network;
mod ownership;
mod pod;
mod process;
mod processes;
mod pump;
mod reaper;
mod root;
mod service;
mod shares;
mod signals;
mod stats;
mod streams;
mod sysctl;
mod terminal;
mod trash;
mod user;
mod volumes;
mod vsock;
mod want;

use std::sync::Arc;

use crate::{
    boot::uptime_ms,
    error::{AgentError, during},
    pod::Pod,
    reaper::Reaper,
};

fn main() {
    processes::play();
    let kernel_ms = uptime_ms();
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        eprintln!("pericarp-agent: runs as the first process of a virtual machine only");
        std::process::exit(2);
    }
    greeting::speak_at_panic();
    memory::settle();
    match prepare(kernel_ms) {
        // The main thread is the one that collects ended processes.
        Ok(reaper) => reaper.run(),
        Err(error) => greeting::die(&error.to_string()),
    }
}

/// Everything up to the point where the host can ask.
fn prepare(kernel_ms: u32) -> Result<Arc<Reaper>, AgentError> {
    boot::detach_root()?;
    boot::mount_kernel_file_systems()?;
    boot::load_modules()?;
    boot::raise_limits()?;
    cgroup::prepare()?;
    loopback::bring_up()?;
    let reaper = Arc::new(Reaper::new());
    let pod = Arc::new(Pod::new(Arc::clone(&reaper)));
    streams::serve(Arc::clone(&pod)).map_err(during("the port of the streams"))?;
    service::serve(pod)?;
    // Last: the host may ask as soon as it has been greeted.
    greeting::send(kernel_ms)?;
    Ok(reaper)
}
