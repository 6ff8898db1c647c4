//! The disks made of OCI images, kept for the next run.
//!
//! In `XDG_CACHE_HOME/pericarp` or `~/.cache/pericarp`, for root without either in
//! `/var/cache/pericarp`. Losing the directory costs time and nothing else.

use std::{cell::RefCell, path::PathBuf, process::Stdio};

use pericarp_oci::{
    disk::{Cache, DiskError, Found},
    image::Image,
    rootfs::{Limits, Rights, RootfsError},
};

use crate::{failure::Failure, helper, signals::Signals};

/// The disk of an image, made now if there is none yet.
pub(crate) fn disk(image: &Image, signals: &mut Signals) -> Result<PathBuf, Failure> {
    // Why the work was stopped: the signal that asked for it.
    let asked = RefCell::new(None);
    let waiting = RefCell::new(&mut *signals);
    let stop = || match waiting.borrow_mut().check() {
        Ok(()) => false,
        Err(failure) => {
            *asked.borrow_mut() = Some(failure);
            true
        }
    };
    let failed = |error: DiskError| match (asked.borrow_mut().take(), error) {
        (Some(failure), DiskError::Stopped | DiskError::Rootfs(RootfsError::Stopped)) => failure,
        (_, error) => Failure::Image(error.to_string()),
    };
    let cache = Cache::open(&directory(), Rights::of_this_process()).map_err(&failed)?;
    match cache.look_up(image, &stop).map_err(&failed)? {
        Found::Ready(path) => Ok(path),
        Found::Missing(mut making) => {
            making
                .unpack(image, &Limits::default(), &stop)
                .map_err(&failed)?;
            let mut command = making.command().map_err(&failed)?;
            command.stdout(Stdio::null());
            helper::run_to_end("mkfs.erofs", command, waiting.into_inner())?;
            making
                .finish()
                .map_err(|error| Failure::Image(error.to_string()))
        }
    }
}

fn directory() -> PathBuf {
    let variable = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| "/var/cache".into())
        .join("pericarp")
}
