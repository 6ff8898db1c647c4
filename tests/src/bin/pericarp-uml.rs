//! `pericarp-uml BACKEND FILE COMMAND`: runs a shell command in User-mode Linux,
//! with FILE as its read-only disk `/dev/vda`, served by BACKEND with direct I/O.
//!
//! `cargo xtask demo` calls this to measure a backend with Linux's own virtio
//! driver. It prints what the command prints and ends with its exit code. The
//! command sees this machine's root directory: it is as trusted as one typed at
//! a prompt.

use std::path::Path;
use std::process::ExitCode;

use pericarp_tests::peer::{Backend, Cache, Kind, Options};
use pericarp_tests::scratch::Scratch;
use pericarp_tests::uml::{Machine, Report};

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
        eprintln!("pericarp-uml: '{backend}' is no backend: use pericarp-block");
        return ExitCode::from(2);
    };
    match run(kind, Path::new(file), shell) {
        Ok(report) => {
            print!("{}", report.output);
            ExitCode::from(u8::try_from(report.code).unwrap_or(u8::MAX))
        }
        Err(error) => {
            eprintln!("pericarp-uml: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(kind: Kind, file: &Path, shell: &str) -> Result<Report, Box<dyn std::error::Error>> {
    let scratch = Scratch::new();
    let options = Options {
        read_only: true,
        cache: Cache::Direct,
        ..Options::default()
    };
    let backend = Backend::start(kind, &scratch, file, &options)?;
    Ok(Machine::new(&[backend.socket()], shell).run()?)
}
