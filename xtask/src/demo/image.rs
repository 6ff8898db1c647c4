//! What the demo runs from: a small Debian root, made from packages, and a
//! file to read.
//!
//! Called by the demo. All of it is kept in the build directory and made again
//! only when the way it is made has changed.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::oci;
use crate::apt;
use crate::command::Failure;
use crate::janitor::Janitor;
use crate::setup::is_root;

const RELEASE: &str = "bookworm";
/// What the demo's commands call, beside Debian's essential packages.
const PACKAGES: &str = "bash,coreutils,fio";
/// As much as the fio job reads.
const DATA_SIZE: u64 = 256 << 20;
/// Where the container finds the data file; see [`Disks::tree`].
pub(crate) const DATA_IN_TREE: &str = "/srv/data.img";

/// The finished files, all on one file system.
pub(crate) struct Disks {
    /// The Debian root as a directory, with the data file in it by a second
    /// name: a container reads the very file that is a virtual machine's disk.
    pub(crate) tree: PathBuf,
    /// The same root as an OCI archive, without the data file.
    pub(crate) archive: PathBuf,
    /// Random bytes, as a disk or a file.
    pub(crate) data: PathBuf,
}

impl Disks {
    /// The files in `dir`, made now unless they are there. Whatever is
    /// unfinished is in `scratch`, on the same file system.
    pub(crate) fn prepare(
        dir: &Path,
        scratch: &Path,
        janitor: &mut Janitor,
    ) -> Result<Self, Failure> {
        let finished = dir.join("disks");
        let recipe = format!("2 {RELEASE} {PACKAGES} {DATA_SIZE}\n");
        Self::make(&finished, &recipe, scratch, janitor)?;
        let tree = finished.join("root");
        Ok(Self {
            archive: oci::prepare(dir, scratch, &tree, &recipe, janitor)?,
            tree,
            data: finished.join("data.img"),
        })
    }

    /// Makes the disks, unless those that are there were made the same way.
    fn make(
        finished: &Path,
        recipe: &str,
        scratch: &Path,
        janitor: &mut Janitor,
    ) -> Result<(), Failure> {
        let label = finished.join("recipe");
        if fs::read_to_string(&label).is_ok_and(|text| text == recipe) {
            println!("      {} is there from an earlier run", finished.display());
            return Ok(());
        }
        if !is_root() {
            return Err(
                "the demo installs packages into a directory and starts containers: run it as root"
                    .into(),
            );
        }
        let unfinished = scratch.join("disks");
        create(&unfinished)?;
        install(&unfinished.join("root"), scratch, janitor)?;
        make_data(&unfinished)?;
        write(&unfinished.join("recipe"), recipe)?;
        if finished.exists() {
            fs::remove_dir_all(finished)
                .map_err(|e| format!("cannot remove {}: {e}", finished.display()))?;
        }
        fs::rename(&unfinished, finished)
            .map_err(|e| format!("cannot move the disks into place: {e}"))?;
        Ok(())
    }
}

fn install(tree: &Path, scratch: &Path, janitor: &mut Janitor) -> Result<(), Failure> {
    println!("      Debian {RELEASE} with {PACKAGES}, from packages (about a minute, once)");
    let sources = apt::debian_sources(RELEASE).or_else(|_| {
        apt::refresh();
        apt::debian_sources(RELEASE)
    })?;
    let list = scratch.join("sources.list");
    write(&list, &sources)?;
    janitor.run_well(
        // What it mounts inside the tree must never be seen by whoever
        // removes the tree, so it gets a mount namespace of its own.
        Command::new("unshare")
            .args(["--mount", "--propagation=private", "--", "mmdebstrap"])
            .args(["--quiet", "--mode=root", "--variant=essential"])
            .arg(format!("--include={PACKAGES}"))
            .arg("--dpkgopt=force-unsafe-io")
            .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
            .arg("--dpkgopt=path-exclude=/usr/share/man/*")
            .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
            .arg(RELEASE)
            .arg(tree)
            .arg(&list),
    )?;
    Ok(())
}

/// Random bytes: what was never written would be answered without the disk.
fn make_data(dir: &Path) -> Result<(), Failure> {
    println!("      a data disk of {} MiB", DATA_SIZE >> 20);
    let data = dir.join("data.img");
    let in_tree = dir.join("root").join(DATA_IN_TREE.trim_start_matches('/'));
    fill(&data)
        .and_then(|()| fs::hard_link(&data, in_tree))
        .map_err(|e| format!("cannot write {}: {e}", data.display()).into())
}

fn fill(file: &Path) -> std::io::Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut out = File::create(file)?;
    let mut block = vec![0; 1 << 20];
    for _ in 0..DATA_SIZE >> 20 {
        random.read_exact(&mut block)?;
        out.write_all(&block)?;
    }
    out.sync_all()
}

pub(super) fn create(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|e| format!("cannot create {}: {e}", dir.display()).into())
}

pub(super) fn write(file: &Path, text: &str) -> Result<(), Failure> {
    fs::write(file, text).map_err(|e| format!("cannot write {}: {e}", file.display()).into())
}
