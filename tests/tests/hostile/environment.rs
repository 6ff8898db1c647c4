//! Machines that forbid things: io_uring is off in many containers and on
//! whole distributions (`io_uring_disabled=2`).

use pericarp_tests::conformance::Stage;
use pericarp_tests::forbidden::{IO_URING_SETUP, without};
use pericarp_tests::peer::{Backend, Kind, Options};
use pericarp_tests::scratch::Scratch;

const EPERM: i32 = 1;

#[test]
fn a_disk_is_served_where_io_uring_is_forbidden() {
    if !Kind::Pericarp.usable("a_disk_is_served_where_io_uring_is_forbidden") {
        return;
    }
    without(IO_URING_SETUP, EPERM, || {
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
    without(IO_URING_SETUP, EPERM, || {
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
