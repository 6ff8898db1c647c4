//! `pericarp-uml BACKEND FILE COMMAND`: runs a shell command in User-mode Linux,
//! with FILE as its read-only disk `/dev/vda`, served by BACKEND with direct I/O.
//!
//! Linux's own virtio driver runs at the CPU's own speed there, without KVM,
//! which makes it the place to measure a backend in. `cargo xtask demo` calls
//! this; it prints what the command prints and ends with its exit code.
//!
//! The command sees this machine's own root directory and may write to it: it
//! is as trusted as a command typed at a prompt.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use pericarp_tests::parts::Part;
use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::process::{Process, command};
use pericarp_tests::scratch::Scratch;

/// More than any command here takes, the start of the kernel included.
const LIFETIME: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [backend, file, shell] = arguments.as_slice() else {
        eprintln!("usage: pericarp-uml pericarp-block|qemu-storage-daemon FILE COMMAND");
        return ExitCode::from(2);
    };
    let Some(kind) = Kind::ALL
        .into_iter()
        .find(|kind| kind.part().program() == backend)
    else {
        eprintln!("pericarp-uml: '{backend}' is no backend; use pericarp-block");
        return ExitCode::from(2);
    };
    match run(kind, Path::new(file), shell) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("pericarp-uml: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(kind: Kind, file: &Path, shell: &str) -> Result<u8, String> {
    let scratch = Scratch::new();
    let options = Options {
        read_only: true,
        cache: Cache::Direct,
        lifetime: LIFETIME,
        ..Options::default()
    };
    let mut backend =
        Backend::start(kind, &scratch, file, &options).map_err(|error| error.to_string())?;
    let kernel = Part::UserModeLinux
        .find()
        .ok_or("there is no linux.uml; cargo xtask setup installs it")?;
    let init = first_process(&scratch, shell);
    let mut kernel = command(&kernel);
    kernel
        // It keeps a directory of its own in the home directory.
        .env("HOME", scratch.dir())
        .args(["mem=512M", "rootfstype=hostfs", "rootflags=/", "rw"])
        .arg(format!("init={}", init.display()))
        .arg(format!(
            "virtio_uml.device={}:2",
            backend.socket().display()
        ))
        .args(["con=null", "con0=null,fd:1"]);
    let mut machine = Process::start(&mut kernel, LIFETIME)
        .map_err(|error| format!("linux.uml cannot be started: {error}"))?;
    machine.wait(LIFETIME);
    machine.kill();

    let code = fs::read_to_string(scratch.path("code"));
    let Some(code) = code.ok().and_then(|text| text.trim().parse().ok()) else {
        return Err(format!(
            "User-mode Linux {} before the command did; its last lines:\n{}\nthe backend {}",
            machine.epitaph(),
            machine.output().last(20),
            backend.epitaph(),
        ));
    };
    let text = |name| fs::read_to_string(scratch.path(name)).unwrap_or_default();
    print!("{}", text("stdout"));
    eprint!("{}", text("stderr"));
    Ok(code)
}

/// Writes the guest's first process, a script on this machine's own root. What
/// the command prints goes to files: the console would mix it with the kernel's
/// messages.
fn first_process(scratch: &Scratch, shell: &str) -> PathBuf {
    let out = scratch.dir().display();
    let job = scratch.file("command", shell.as_bytes());
    let script = format!(
        "#!/bin/sh\n\
         export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         insmod /usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/virtio_blk.ko\n\
         sh {job} </dev/null >{out}/stdout 2>{out}/stderr\n\
         echo $? >{out}/code\n\
         echo o >/proc/sysrq-trigger\n\
         sleep 10\n",
        job = job.display(),
    );
    let init = scratch.file("init", script.as_bytes());
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&init, executable).expect("the script was just made");
    init
}
