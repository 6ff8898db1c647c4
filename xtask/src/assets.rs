//! The assets directory: what the programs need beside themselves at run time.
//!
//! Called by `setup`, and by `test` for what tests alone need. The layout is read
//! by `pericarp run` and by the tests:
//!
//! ```text
//! assets/kernel/vmlinuz        the kernel image as Debian ships it
//! assets/kernel/release        its release, one line
//! assets/kernel/modules/*.ko   modules, flat
//! assets/kernel/modules/order  those to load at boot, one per line, in order
//! assets/kernel/modules/order-shares   those to load after them where there are shares
//! assets/kernel/modules/order-net      those where there are network cards
//! assets/kernel/modules/order-xfs      those when a disk with XFS comes
//! assets/kernel/modules/order-lab      those of the laboratory, where KVM is tested
//! assets/pericarp-agent        the guest's first process, static
//! assets/guest/                a tree for the initramfs, as it is: bin/crun and
//!                              what it loads
//! assets/older/kernel/         as above, the kernel of Debian 12's release: for tests
//! ```

use std::fs;
use std::path::Path;

use crate::command::{self, Failure, cargo};
use crate::guest;
use crate::kernel;
use crate::project::Project;

/// Changes whenever the way the kernel directory is made changes, so that a
/// directory made the old way is made again.
const KERNEL_RECIPE: &str = "8\n";

/// Our own program that runs in the guest, by package.
const AGENT: &str = "pericarp-agent";

/// The agent is a static program of the target the tool chain always has.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Brings the assets directory up to date.
pub(crate) fn prepare(project: &Project) -> Result<(), Failure> {
    let assets = project.assets();
    fs::create_dir_all(&assets).map_err(|e| format!("cannot create {}: {e}", assets.display()))?;
    prepare_kernel(&assets, kernel::SERIES)?;
    let bytes = guest::prepare(&assets)?;
    build_agent(project, &assets)?;
    let release = fs::read_to_string(assets.join("kernel/release"))
        .map_err(|e| format!("cannot read the guest kernel's release: {e}"))?;
    println!(
        "setup: guest kernel {}, crun ({} KiB with its libraries) and {AGENT} are ready",
        release.trim(),
        bytes >> 10,
    );
    Ok(())
}

/// Brings the older kernel up to date, which tests boot beside the other.
pub(crate) fn prepare_older(project: &Project) -> Result<(), Failure> {
    let older = project.assets().join("older");
    fs::create_dir_all(&older).map_err(|e| format!("cannot create {}: {e}", older.display()))?;
    prepare_kernel(&older, &[kernel::RELEASE_SERIES])
}

fn prepare_kernel(assets: &Path, series: &[&str]) -> Result<(), Failure> {
    let kernel = assets.join("kernel");
    let recipe = kernel.join("recipe");
    let complete = fs::read_to_string(&recipe).is_ok_and(|text| text == KERNEL_RECIPE)
        && kernel.join("release").exists();
    if complete {
        return Ok(());
    }
    // Made beside its place and moved there whole: an interrupted run leaves
    // no half of a kernel that looks like one.
    let unfinished = assets.join(format!("kernel.{}", std::process::id()));
    fs::create_dir_all(&unfinished)
        .map_err(|e| format!("cannot create {}: {e}", unfinished.display()))?;
    let made = kernel::fetch_into(&unfinished, series).and_then(|()| {
        fs::write(unfinished.join("recipe"), KERNEL_RECIPE)
            .map_err(|e| format!("cannot write the kernel's recipe: {e}"))?;
        if kernel.exists() {
            fs::remove_dir_all(&kernel)
                .map_err(|e| format!("cannot remove {}: {e}", kernel.display()))?;
        }
        fs::rename(&unfinished, &kernel)
            .map_err(|e| format!("cannot move the guest kernel into place: {e}").into())
    });
    if made.is_err() {
        let _ = fs::remove_dir_all(&unfinished);
    }
    made
}

/// Builds the static first process.
fn build_agent(project: &Project, assets: &Path) -> Result<(), Failure> {
    // A build directory of its own: other flags in the common one would make
    // cargo build everything again and again.
    let target = project.target.join("agent");
    command::run(
        cargo()
            .current_dir(&project.root)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            // A guest holds it in memory, and nothing there reads symbols.
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .args(["build", "--quiet", "--release", "--package", AGENT])
            .args(["--target", GUEST_TARGET, "--target-dir"])
            .arg(&target),
    )?;
    let built = target.join(GUEST_TARGET).join("release").join(AGENT);
    replace_if_different(&built, &assets.join(AGENT))
}

fn replace_if_different(from: &Path, to: &Path) -> Result<(), Failure> {
    let new = fs::read(from).map_err(|e| format!("cannot read {}: {e}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    // Renamed over the old one, which a running guest builder may be reading.
    let beside = to.with_extension(std::process::id().to_string());
    fs::copy(from, &beside)
        .and_then(|_| fs::rename(&beside, to))
        .map_err(|e| format!("cannot write {}: {e}", to.display()).into())
}
