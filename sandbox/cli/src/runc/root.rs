//! The container's root, mounted where only this run and its children see it.
//!
//! A disk image is mounted as it is. An OCI image's disk and a directory stay untouched below a
//! writable layer, which lies on a disk without a name (see `scratch`), as in a virtual machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    failure::{Failure, during},
    helper, images,
    input::check::Root,
    runc::isolation,
    rundir::RunDir,
    scratch::Unnamed,
    signals::Signals,
};

/// The mounts, undone when dropped.
pub(super) struct Mounts {
    root: PathBuf,
    /// In the order of mounting.
    mounted: Vec<PathBuf>,
    /// Held for as long as it is mounted.
    writable: Option<Unnamed>,
}

impl Mounts {
    /// Where the container's root is.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn prepare(
        root: &Root,
        run_dir: &RunDir,
        signals: &mut Signals,
    ) -> Result<Self, Failure> {
        let target = make(run_dir, "rootfs")?;
        let mut mounts = Self {
            root: target.clone(),
            mounted: Vec::new(),
            writable: None,
        };
        match root {
            Root::Image(image) if image.read_only => {
                let lower = make(run_dir, "lower")?;
                mounts.disk("ext4", "ro", &image.path, lower.clone(), signals)?;
                // Mount points are made in it, although the container may change nothing.
                mounts.writable_layer(&lower, target, run_dir, signals)?;
            }
            Root::Image(image) => mounts.disk("ext4", "rw", &image.path, target, signals)?,
            Root::Directory(directory) => {
                // Bound first, because an overlay's options cannot hold every path.
                let lower = make(run_dir, "lower")?;
                rustix::mount::mount_bind(directory, &lower)
                    .map_err(during(format!("'{}'", directory.display())))?;
                mounts.mounted.push(lower.clone());
                mounts.writable_layer(&lower, target, run_dir, signals)?;
            }
            Root::Oci(image) => {
                let disk = images::disk(image, signals)?;
                let lower = make(run_dir, "lower")?;
                mounts.disk("erofs", "ro", &disk, lower.clone(), signals)?;
                mounts.writable_layer(&lower, target, run_dir, signals)?;
            }
        }
        Ok(mounts)
    }

    /// The loop device detaches itself when the last mount of it goes.
    fn disk(
        &mut self,
        fs_type: &str,
        access: &str,
        image: &Path,
        target: PathBuf,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let mut command = Command::new("mount");
        command
            .args(["-t", fs_type, "-o", &format!("loop,nodev,{access}")])
            .args([image, target.as_path()]);
        helper::run_to_end("mount", command, signals)?;
        self.mounted.push(target);
        Ok(())
    }

    fn writable_layer(
        &mut self,
        lower: &Path,
        target: PathBuf,
        run_dir: &RunDir,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let writable = Unnamed::writable(signals)?;
        let layer = make(run_dir, "layer")?;
        self.disk("ext4", "rw", &writable.path(), layer.clone(), signals)?;
        self.writable = Some(writable);
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        for directory in [&upper, &work] {
            fs::create_dir(directory).map_err(during("the container's writable layer"))?;
        }
        // The root directory's own mode and owner come from the upper side.
        let metadata = fs::metadata(lower).map_err(during("the container's root"))?;
        isolation::copy_owner_and_mode(&metadata, &upper)
            .and_then(|()| isolation::mount_overlay(lower, &upper, &work, &target))
            .map_err(during("the container's writable layer"))?;
        self.mounted.push(target);
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in self.mounted.iter().rev() {
            isolation::unmount_or_end(path);
        }
    }
}

fn make(run_dir: &RunDir, name: &str) -> Result<PathBuf, Failure> {
    let path = run_dir.join(name);
    fs::create_dir(&path).map_err(during(format!("'{}'", path.display())))?;
    Ok(path)
}
