//! First process of the guest: sets the machine up, runs one command, hands its output and exit
//! code to the host, flushes the disks and switches the machine off.
//!
//! The kernel starts it from the initramfs that `pericarp run` builds; it is linked statically and
//! needs nothing but what lies beside it there. It is told what to do over the control channel
//! (`pericarp-protocol`), never by the kernel's command line. Everything it runs is as privileged
//! as itself: the wall is the virtual machine, not this process. It must not exit, because a
//! kernel without a first process panics; it ends by switching the machine off.

mod boot;
mod channel;
mod command;
mod disks;
mod error;
mod limits;
mod loopback;
mod pump;
mod root;

use pericarp_protocol::{ExitReport, Failure, Frame};

use crate::{boot::uptime_ms, channel::Channel, error::InitError};

fn main() {
    let init_ms = uptime_ms();
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        eprintln!("pericarp-init: runs as the first process of a virtual machine only");
        std::process::exit(2);
    }
    if let Err(error) = live(init_ms) {
        // The host could not be told, so the console is all there is.
        eprintln!("pericarp-init: {error}");
    }
    boot::power_off();
}

/// The whole life of the guest. An error means that the channel itself failed.
fn live(init_ms: u32) -> Result<(), InitError> {
    boot::mount_kernel_file_systems()?;
    let mut channel = Channel::open()?;
    channel.send(&Frame::Hello(pericarp_protocol::VERSION));
    let last = match work(&mut channel, init_ms) {
        Ok(report) => Frame::Exit(report),
        Err(error) => {
            eprintln!("pericarp-init: {error}");
            let failure = match error {
                InitError::NotFound(_) => Failure::NotFound,
                InitError::NotExecutable { .. } => Failure::NotExecutable,
                _ => Failure::Setup,
            };
            Frame::Error(failure, error.to_string())
        }
    };
    channel.send(&last);
    channel.flush()
}

fn work(channel: &mut Channel, init_ms: u32) -> Result<ExitReport, InitError> {
    let spec = channel.receive_spec()?;
    boot::load_modules()?;
    let disks = disks::find(&spec)?;
    root::enter(&spec, &disks)?;
    loopback::bring_up()?;
    boot::set_hostname(&spec.hostname)?;
    let limits = limits::Group::create(spec.limits)?;
    let outcome = command::start(&spec, &limits).and_then(|command| {
        channel.send(&Frame::Started {
            init_ms,
            command_ms: uptime_ms(),
        });
        pump::run(channel, command)
    });
    // Whatever became of the command: what it wrote is on the disks before the host hears of it.
    command::end_everything();
    root::flush(&spec)?;
    Ok(match outcome? {
        ExitReport::Signal { signal, .. } => ExitReport::Signal {
            signal,
            out_of_memory: signal == libc::SIGKILL as u8 && limits.ran_out_of_memory(),
        },
        code => code,
    })
}
