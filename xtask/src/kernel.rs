//! The guest kernel: Debian's own package, fetched and unpacked into the build
//! directory.
//!
//! Called by `assets`. Nothing is installed on the host; its `/boot` and
//! `/lib/modules` are never touched.

use std::cmp::Ordering;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::apt;
use crate::command::{self, Failure, capture, find_program};
use crate::modules::Tree;

/// Kernel series by preference. 6.12 is in Debian 12's security archive; 6.1
/// is the release's own and always served.
pub(crate) const SERIES: &[&str] = &["linux-image-6.12.", RELEASE_SERIES];
/// The release's own.
pub(crate) const RELEASE_SERIES: &str = "linux-image-6.1.";

/// What the first process loads: to reach its disks and the host, and to make
/// a container's root of an image that is not changed and a layer that is.
const BOOT_MODULES: &[&str] = &[
    // Built into 6.12.
    "virtio_pci",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
];
/// What the first process of a machine with shares loads after these.
const SHARE_MODULES: &[&str] = &["virtiofs"];
/// What makes a virtual machine of the laboratory a host of others. The CPU that QEMU emulates is one
/// of AMD's; taps are for their cards. The rest is what containerd's pods have on any host: roots in
/// layers, pairs of interfaces, and what joins these to taps.
const LAB_MODULES: &[&str] = &[
    "virtiofs",
    "kvm_amd",
    "tun",
    "overlay",
    "veth",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
];
/// What the first process of a machine with network cards loads after those at boot.
const NET_MODULES: &[&str] = &["virtio_net"];
/// What is loaded when a disk with such a file system comes.
const XFS_MODULES: &[&str] = &["xfs"];

/// Fetches the newest cloud kernel of the first of these series that there is,
/// and lays it out in `dir`, a directory of its own that is still empty.
pub(crate) fn fetch_into(dir: &Path, series: &[&str]) -> Result<(), Failure> {
    if find_program("apt-get").is_none() {
        return Err("there is no apt-get on this machine to fetch Debian's kernel with".into());
    }
    let mut candidates = candidates(series)?;
    if candidates.is_empty() {
        apt::refresh();
        candidates = self::candidates(series)?;
    }
    let unpacked = dir.join("unpacked");
    create(&unpacked)?;
    download_first(&candidates, &unpacked, series)?;
    let release = release_of(&unpacked)?;
    println!("setup: unpacks guest kernel {release}");

    copy(
        &unpacked.join("boot").join(format!("vmlinuz-{release}")),
        &dir.join("vmlinuz"),
    )?;
    copy_modules(&unpacked, &release, &dir.join("modules"))?;
    fs::remove_dir_all(&unpacked).map_err(|e| format!("cannot clean up the package: {e}"))?;
    // Last: its presence says that the rest is complete.
    write(&dir.join("release"), &format!("{release}\n"))
}

/// All kernels of these series that apt offers, in their order, the newest of each first.
fn candidates(series: &[&str]) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for series in series {
        let mut names = apt::names_starting_with(series)?;
        names.retain(|name| is_signed_cloud_kernel(name));
        names.sort_by(|one, other| compare_versions(other, one));
        all.append(&mut names);
    }
    Ok(all)
}

fn is_signed_cloud_kernel(name: &str) -> bool {
    // A package without three numbers only points to another one.
    version(name).matches('.').count() >= 2
}

/// The version inside a package's name; empty when it is no cloud kernel. Debug
/// symbols and unsigned kernels have a word more at the end.
fn version(name: &str) -> &str {
    name.strip_prefix("linux-image-")
        .and_then(|rest| rest.strip_suffix("-cloud-amd64"))
        .filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or("")
}

/// Debian's own order of the versions in two package names.
fn compare_versions(one: &str, other: &str) -> Ordering {
    let (one, other) = (version(one), version(other));
    let holds = |relation: &str| {
        Command::new("dpkg")
            .args(["--compare-versions", one, relation, other])
            .status()
            .is_ok_and(|status| status.success())
    };
    if holds("lt") {
        Ordering::Less
    } else if holds("gt") {
        Ordering::Greater
    } else {
        Ordering::Equal
    }
}

/// Unpacks the first candidate the archive really has. Package lists may be
/// older than the archive, so they are refreshed before giving up.
fn download_first(candidates: &[String], unpacked: &Path, series: &[&str]) -> Result<(), Failure> {
    const TRIED: usize = 3;
    for name in candidates.iter().take(TRIED) {
        println!("setup: fetches {name} (the guest kernel; not installed on this machine)");
        if download_and_unpack(name, unpacked).is_ok() {
            return Ok(());
        }
    }
    apt::refresh();
    let fresh = self::candidates(series)?;
    let name = fresh.first().ok_or_else(|| {
        let series = series.join("* or ");
        format!("apt offers no {series}*-cloud-amd64 package; Debian 12 does")
    })?;
    download_and_unpack(name, unpacked)
}

fn download_and_unpack(name: &str, unpacked: &Path) -> Result<(), Failure> {
    apt::download(name, unpacked)?;
    let package = files_in(unpacked)?
        .into_iter()
        .find(|file| file.ends_with(".deb"))
        .ok_or_else(|| format!("apt-get download {name} left no package file"))?;
    let file = unpacked.join(package);
    command::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(unpacked))?;
    fs::remove_file(&file).map_err(|e| format!("cannot remove {}: {e}", file.display()).into())
}

fn release_of(unpacked: &Path) -> Result<String, Failure> {
    files_in(&unpacked.join("lib/modules"))?
        .into_iter()
        .next()
        .ok_or_else(|| "the kernel package has no lib/modules directory".into())
}

fn copy_modules(unpacked: &Path, release: &str, to: &Path) -> Result<(), Failure> {
    // The package comes without modules.dep: Debian makes it at install time.
    let depmod = find_program("depmod").ok_or("depmod is missing; run cargo xtask setup")?;
    capture(Command::new(depmod).arg("-b").arg(unpacked).arg(release))?;
    let from = unpacked.join("lib/modules").join(release);
    let tree = Tree::parse(
        &read(&from.join("modules.dep"))?,
        &read(&from.join("modules.builtin"))?,
    );
    create(to)?;
    let wanted: Vec<&str> = [
        BOOT_MODULES,
        SHARE_MODULES,
        LAB_MODULES,
        NET_MODULES,
        XFS_MODULES,
    ]
    .concat();
    for path in tree.load_order(&wanted)? {
        let file = to.join(file_name(&path));
        copy(&from.join(&path), &file)?;
        if plain_name(&path) != file_name(&path) {
            // Unpacked once here rather than at each boot, where the CPU may
            // be an emulated one.
            command::run(Command::new("xz").arg("--decompress").arg(&file))?;
        }
    }
    let at_boot = tree.load_order(BOOT_MODULES)?;
    let mut for_shares = tree.load_order(&[BOOT_MODULES, SHARE_MODULES].concat())?;
    for_shares.retain(|path| !at_boot.contains(path));
    let mut for_xfs = tree.load_order(&[BOOT_MODULES, XFS_MODULES].concat())?;
    for_xfs.retain(|path| !at_boot.contains(path));
    write(&to.join("order"), &lines(&at_boot))?;
    write(&to.join("order-xfs"), &lines(&for_xfs))?;
    write(&to.join("order-shares"), &lines(&for_shares))?;
    write(
        &to.join("order-net"),
        &lines(&tree.load_order(NET_MODULES)?),
    )?;
    write(
        &to.join("order-lab"),
        &lines(&tree.load_order(LAB_MODULES)?),
    )
}

/// The files' plain names, one a line.
fn lines(paths: &[String]) -> String {
    let names = paths.iter().map(|path| format!("{}\n", plain_name(path)));
    names.collect()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The file's name once it is unpacked. Debian packs the modules of 6.12, those
/// of 6.1 not.
fn plain_name(path: &str) -> &str {
    file_name(path).trim_end_matches(".xz")
}

/// Names of the entries of `dir`, sorted.
fn files_in(dir: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(dir).map_err(|e| format!("cannot list {}: {e}", dir.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

fn create(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|e| format!("cannot create {}: {e}", dir.display()).into())
}

fn read(file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()).into())
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    fs::write(file, text).map_err(|e| format!("cannot write {}: {e}", file.display()).into())
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::copy(from, to)
        .map(|_| ())
        .map_err(|e| format!("cannot copy {} to {}: {e}", from.display(), to.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signed_cloud_kernels_are_candidates() {
        assert!(is_signed_cloud_kernel(
            "linux-image-6.12.117+deb12-cloud-amd64"
        ));
        assert!(is_signed_cloud_kernel("linux-image-6.1.0-56-cloud-amd64"));
        for other in [
            "linux-image-6.12.117+deb12-cloud-amd64-dbg",
            "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-cloud-amd64",
            "linux-headers-6.12.117+deb12-cloud-amd64",
        ] {
            assert!(!is_signed_cloud_kernel(other), "{other}");
        }
    }

    #[test]
    fn modules_are_unpacked_under_their_plain_names() {
        assert_eq!(plain_name("kernel/fs/erofs/erofs.ko.xz"), "erofs.ko");
        assert_eq!(plain_name("kernel/fs/erofs/erofs.ko"), "erofs.ko");
    }

    #[test]
    fn versions_are_numbers_not_letters() {
        let mut names = vec![
            "linux-image-6.12.101+deb12-cloud-amd64",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
        ];
        names.sort_by(|one, other| compare_versions(other, one));
        assert_eq!(
            names,
            [
                "linux-image-6.12.117+deb12-cloud-amd64",
                "linux-image-6.12.101+deb12-cloud-amd64",
                "linux-image-6.12.99+deb12-cloud-amd64",
            ]
        );
    }
}
