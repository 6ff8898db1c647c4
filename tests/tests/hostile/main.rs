//! Front ends that lie, against every backend. Each table entry is one act;
//! what must hold is written in the act, what a peer is known to do otherwise
//! beside it. See [`pericarp_tests::conformance`] for what is checked after
//! every act.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod chains;
mod descriptors;
mod environment;
mod lifecycle;
mod messages;
mod notifications;
mod ranges;

use pericarp_tests::conformance::{Case, Outcome, Stage};
use pericarp_tests::frontend::{Chain, Driver, STATUS, UNTOUCHED};
use pericarp_tests::peer::{Kind, Options};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// One test per backend and table.
macro_rules! suites {
    ($($name:ident: $cases:path, $options:expr;)*) => {
        mod qemu_storage_daemon {
            $(#[test] fn $name() { super::run(super::Kind::QemuStorageDaemon, stringify!($name), $cases(), $options) })*
        }
        mod reference {
            $(#[test] fn $name() { super::run(super::Kind::Reference, stringify!($name), $cases(), $options) })*
        }
        mod pericarp {
            $(#[test] fn $name() { super::run(super::Kind::Pericarp, stringify!($name), $cases(), $options) })*
        }
    };
}

fn run(kind: Kind, name: &str, cases: Vec<Case>, options: Options) {
    if kind.usable(name) {
        Stage::new(kind, options).run(cases);
    }
}

fn two_queues() -> Options {
    Options {
        num_queues: 2,
        ..Options::default()
    }
}

fn read_only() -> Options {
    Options {
        read_only: true,
        ..Options::default()
    }
}

/// Our own other ways to do I/O meet the same acts.
mod pericarp_variants {
    use pericarp_tests::peer::{Cache, Kind, Options};

    fn sync() -> Options {
        Options {
            extra: vec!["--io-engine=sync".into()],
            ..super::two_queues()
        }
    }

    fn direct() -> Options {
        Options {
            cache: Cache::Direct,
            ..super::two_queues()
        }
    }

    fn registered() -> Options {
        Options {
            extra: vec!["--register-memory".into(), "--workers=2".into()],
            ..direct()
        }
    }

    #[test]
    fn chain_shapes_with_registered_memory() {
        super::run(
            Kind::Pericarp,
            "chain_shapes",
            crate::chains::cases(),
            registered(),
        );
    }

    #[test]
    fn lifecycle_with_registered_memory() {
        super::run(
            Kind::Pericarp,
            "lifecycle",
            crate::lifecycle::with_pinned_memory(),
            registered(),
        );
    }

    #[test]
    fn messages_with_registered_memory() {
        super::run(
            Kind::Pericarp,
            "messages",
            crate::messages::cases(),
            registered(),
        );
    }

    #[test]
    fn chain_shapes_with_the_sync_engine() {
        super::run(
            Kind::Pericarp,
            "chain_shapes",
            crate::chains::cases(),
            sync(),
        );
    }

    #[test]
    fn lifecycle_with_the_sync_engine() {
        super::run(
            Kind::Pericarp,
            "lifecycle",
            crate::lifecycle::cases(),
            sync(),
        );
    }

    #[test]
    fn descriptors() {
        super::run(
            Kind::Pericarp,
            "descriptors",
            crate::descriptors::cases(),
            super::two_queues(),
        );
    }

    #[test]
    fn descriptors_with_the_sync_engine() {
        super::run(
            Kind::Pericarp,
            "descriptors",
            crate::descriptors::cases(),
            sync(),
        );
    }

    #[test]
    fn chain_shapes_with_direct_io() {
        super::run(
            Kind::Pericarp,
            "chain_shapes",
            crate::chains::cases(),
            direct(),
        );
    }

    #[test]
    fn ranges_with_direct_io() {
        super::run(Kind::Pericarp, "ranges", crate::ranges::cases(), direct());
    }

    #[test]
    fn lifecycle_with_direct_io() {
        super::run(
            Kind::Pericarp,
            "lifecycle",
            crate::lifecycle::cases(),
            direct(),
        );
    }
}

suites! {
    chain_shapes: crate::chains::cases, crate::two_queues();
    ranges: crate::ranges::cases, crate::two_queues();
    read_only: crate::ranges::read_only, crate::read_only();
    notifications: crate::notifications::cases, crate::two_queues();
    lifecycle: crate::lifecycle::cases, crate::two_queues();
    messages: crate::messages::cases, crate::two_queues();
}

/// The chain must be completed and signalled, and slot 0's status byte must be
/// one of `allowed`.
fn answered(
    driver: &mut Driver,
    chain: &Chain,
    allowed: &[u8],
) -> Result<u8, Box<dyn std::error::Error>> {
    driver.play(0, chain)?;
    judged(driver, STATUS(0), allowed)
}

/// The status byte at `at` must be one of `allowed`.
fn judged(driver: &Driver, at: u64, allowed: &[u8]) -> Result<u8, Box<dyn std::error::Error>> {
    match driver.peek(at, 1)?[0] {
        status if allowed.contains(&status) => Ok(status),
        UNTOUCHED => Err("completed without a status byte".into()),
        status => Err(format!("status {status}, allowed {allowed:?}").into()),
    }
}

/// Turns a claim into an outcome.
fn must(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(what.into()) }
}
