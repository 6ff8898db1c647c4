//! The disks the demo runs from: a small Debian root, made from packages, and
//! a file to read.
//!
//! Called by the demo. Both are kept in the build directory and made again only
//! when the way they are made has changed.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt;
use crate::command::{Failure, find_program};
use crate::janitor::Janitor;
use crate::setup::is_root;

const RELEASE: &str = "bookworm";
/// What the demo's commands call, beside Debian's essential packages.
const PACKAGES: &str = "bash,coreutils,fio,mount";
/// About twice what the files need, so that a guest can write, too.
const ROOT_SIZE: &str = "512M";
/// The size the fio job reads.
const DATA_SIZE: u64 = 256 << 20;

/// The root image, made now unless there is one already.
pub(crate) fn root(dir: &Path, scratch: &Path, janitor: &mut Janitor) -> Result<PathBuf, Failure> {
    let image = dir.join("root.ext4");
    let recipe = format!("1 {RELEASE} {PACKAGES} {ROOT_SIZE}\n");
    let label = dir.join("root.recipe");
    if image.exists() && fs::read_to_string(&label).is_ok_and(|text| text == recipe) {
        println!("      {} is there from an earlier run", image.display());
        return Ok(image);
    }
    if !is_root() {
        return Err(
            "the demo installs packages into a directory and starts containers; run it as root"
                .into(),
        );
    }
    let sources = apt::debian_sources(RELEASE).or_else(|_| {
        apt::refresh();
        apt::debian_sources(RELEASE)
    })?;
    println!("      Debian {RELEASE} with {PACKAGES}, from packages (about a minute, once)");
    let _ = fs::remove_file(&label);
    let list = scratch.join("sources.list");
    let tree = scratch.join("root");
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
            .arg(&tree)
            .arg(&list),
    )?;
    let unfinished = scratch.join("root.ext4");
    let mkfs = find_program("mkfs.ext4").ok_or("mkfs.ext4 is missing; run cargo xtask setup")?;
    janitor.run_well(
        Command::new(mkfs)
            .args(["-q", "-L", "demo-root", "-d"])
            .arg(&tree)
            .arg(&unfinished)
            .arg(ROOT_SIZE),
    )?;
    rename(&unfinished, &image)?;
    fs::remove_dir_all(&tree).map_err(|e| format!("cannot remove {}: {e}", tree.display()))?;
    write(&label, &recipe)?;
    Ok(image)
}

/// The file the fio job reads, full of random bytes: what was never written
/// would be answered without touching the disk.
pub(crate) fn data(dir: &Path, scratch: &Path) -> Result<PathBuf, Failure> {
    let file = dir.join("data.img");
    if file.metadata().is_ok_and(|meta| meta.len() == DATA_SIZE) {
        println!("      {} is there from an earlier run", file.display());
        return Ok(file);
    }
    println!(
        "      {} with {} MiB of random bytes",
        file.display(),
        DATA_SIZE >> 20
    );
    let unfinished = scratch.join("data.img");
    fill(&unfinished).map_err(|e| format!("cannot write {}: {e}", unfinished.display()))?;
    rename(&unfinished, &file)?;
    Ok(file)
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

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    fs::write(file, text).map_err(|e| format!("cannot write {}: {e}", file.display()).into())
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::rename(from, to).map_err(|e| format!("cannot move {} into place: {e}", to.display()).into())
}
