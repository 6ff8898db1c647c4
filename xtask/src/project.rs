//! Where things are: the source tree and the build directory.
//!
//! Every command takes a [`Project`]; no other module reads the environment to
//! find a directory.

use std::env;
use std::path::{Path, PathBuf};

use crate::command::Failure;

/// The directories all commands work in.
pub(crate) struct Project {
    /// The root of the source tree.
    pub(crate) root: PathBuf,
    /// Cargo's build directory, `CARGO_TARGET_DIR` where that is set.
    pub(crate) target: PathBuf,
}

impl Project {
    /// Finds the source tree from what `cargo run` tells its program, and the
    /// build directory from where this program itself was built.
    pub(crate) fn locate() -> Result<Self, Failure> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .ok_or("run this as `cargo xtask`, inside the source tree")?;
        let root = Path::new(&manifest)
            .parent()
            .ok_or("the directory of xtask has no parent")?
            .to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => env::current_dir()
                .map_err(|error| format!("cannot tell the current directory: {error}"))?
                .join(dir),
            None => env::current_exe()
                .ok()
                .and_then(|exe| exe.ancestors().nth(2).map(Path::to_path_buf))
                .ok_or("cannot tell where this program was built")?,
        };
        Ok(Self { root, target })
    }

    /// What the programs need at run time: guest kernel, modules, first process.
    pub(crate) fn assets(&self) -> PathBuf {
        self.target.join("assets")
    }

    /// A program of the release build.
    pub(crate) fn release_program(&self, name: &str) -> PathBuf {
        self.target.join("release").join(name)
    }
}
