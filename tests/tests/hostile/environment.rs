//! Machines that forbid things: io_uring is off in many containers and on
//! whole distributions (`io_uring_disabled=2`).

use std::thread;

use pericarp_tests::conformance::Stage;
use pericarp_tests::peer::{Backend, Kind, Options};
use pericarp_tests::scratch::Scratch;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// The same number on every architecture.
const IO_URING_SETUP: i64 = 425;
const EPERM: u32 = 1;

/// Runs `act` on a thread that may not make an io_uring, nor may what it starts.
fn without_io_uring(act: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(
            [(IO_URING_SETUP, Vec::new())].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(EPERM),
            arch,
        );
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        apply_filter(&program).unwrap();
        act();
    });
    thread.join().unwrap();
}

#[test]
fn a_disk_is_served_where_io_uring_is_forbidden() {
    if !Kind::Pericarp.usable("a_disk_is_served_where_io_uring_is_forbidden") {
        return;
    }
    without_io_uring(|| {
        let mut stage = Stage::new(Kind::Pericarp, crate::two_queues());
        stage.run(crate::ranges::cases());
        let said = stage.backend().stderr();
        assert!(said.contains("io_uring is not available here"), "{said}");
    });
}

#[test]
fn asking_for_io_uring_where_it_is_forbidden_is_an_error() {
    if !Kind::Pericarp.usable("asking_for_io_uring_where_it_is_forbidden_is_an_error") {
        return;
    }
    without_io_uring(|| {
        let scratch = Scratch::new();
        let disk = scratch.file("disk", &[0; 4096]);
        let extra = vec!["--io-engine=uring".into()];
        let options = Options {
            extra,
            ..Options::default()
        };
        let error = Backend::start(Kind::Pericarp, &scratch, &disk, &options).unwrap_err();
        assert!(error.to_string().contains("io_uring"), "{error}");
    });
}
