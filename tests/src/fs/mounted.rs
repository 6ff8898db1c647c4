//! A guest of User-mode Linux that has a server's directory mounted, and runs
//! programs of the host there. Used by the suites whose clients are such
//! programs: `tests/tests/fs/{posix,exerciser,stress}.rs`.
//!
//! A peer on the `vhost` crate refuses the memory table of User-mode Linux, and
//! gets a [`Relay`].

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::server::{Server, TAG};
use crate::bounded::poll;
use crate::parts::Part;
use crate::relay::Relay;
use crate::uml::{Machine, Report, UmlError};

/// Mounts in the guest the server's directory at `share`, and what the script
/// is to see of the host. `settle` drops what the guest has cached, and waits
/// until the host has looked at the server.
const PRELUDE: &str = r#"
modules=/usr/lib/uml/modules/$(uname -r)/kernel/fs/fuse
insmod $modules/fuse.ko
insmod $modules/virtiofs.ko
mkdir share /mnt/rig
mount -t hostfs rig /mnt/rig -o "$rig"
mount -t virtiofs "$tag" share
settle() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    : >/mnt/rig/settled
    while [ ! -e /mnt/rig/seen ]; do sleep 0.1; done
    rm /mnt/rig/settled /mnt/rig/seen
}
"#;

/// Runs `script` in a guest with the server's directory at `share`; the programs
/// of `tools` are named by variables, and `/mnt/rig` is the server's scratch
/// directory. Whenever the script calls `settle`, so does `look`.
///
/// # Errors
/// As [`Machine::run`].
pub fn in_uml(
    server: &Server,
    tools: &[Part],
    script: &str,
    limit: Duration,
    mut look: impl FnMut(),
) -> Result<Report, UmlError> {
    let mut socket = server.socket();
    let relay = match server.is_ours() {
        true => None,
        false => Some(Relay::start(server.scratch.path("relay.sock"), &socket)?),
    };
    if let Some(relay) = &relay {
        socket = relay.socket().to_owned();
    }
    let rig = server.scratch.dir().display();
    let mut all = format!("tag={TAG} rig={rig}\n{PRELUDE}");
    for tool in tools {
        all += &seen(*tool);
    }
    all += script;
    let mut machine = Machine::new(&[], &all);
    machine.shares.push(socket);
    machine.limit = limit;
    let (settled, seen) = (server.scratch.path("settled"), server.scratch.path("seen"));
    // On a thread that also ends it: the guest goes with the thread it was
    // started on.
    thread::scope(|scope| {
        let run = scope.spawn(|| machine.run());
        while !run.is_finished() {
            poll(Duration::from_millis(200), || {
                (run.is_finished() || settled.exists()).then_some(())
            });
            // In the order in which the guest removes them: else it could be seen between the two.
            if !seen.exists() && settled.exists() {
                look();
                let _ = File::create(&seen);
            }
        }
        run.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives a machine of QEMU's the server's directory, to be mounted by its tag.
pub fn attach(qemu: &mut Command, server: &Server) {
    let socket = server.socket();
    qemu.arg("-chardev")
        .arg(format!("socket,id=fs,path={}", socket.display()))
        .arg("-device")
        .arg(format!(
            "vhost-user-fs-pci,chardev=fs,tag={TAG},queue-size=1024"
        ));
}

/// Lines that make a program of the host seen in the guest, which has its own
/// `/tmp`, and name it.
fn seen(tool: Part) -> String {
    let name = tool.program();
    let path = tool.find().unwrap_or_else(|| PathBuf::from(name));
    let path = fs::canonicalize(&path).unwrap_or(path);
    let dir = path.parent().unwrap_or(Path::new("/")).display();
    let variable = name.replace('-', "_");
    let mut lines = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(lines, "mkdir -p /mnt/tools/{name}");
    let _ = writeln!(lines, "mount -t hostfs tool /mnt/tools/{name} -o {dir}");
    let _ = writeln!(lines, "{variable}=/mnt/tools/{name}/{name}");
    lines
}
