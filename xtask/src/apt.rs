//! The few apt calls: install packages, list kernels, fetch one, name the
//! package sources.
//!
//! Called by `setup`, `kernel` and `demo`. The package lists are refreshed at
//! most once per run, and only when something has to be fetched.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Once;

use crate::command::{self, Failure, capture, find_program};
use crate::setup::is_root;

/// Packages that bring a service, and the service. We want the program alone.
const SERVICES: &[(&str, &str)] = &[("containerd", "containerd.service")];

/// Brings the package lists up to date, once. A source that does not answer
/// is not fatal here: the package may come from another one.
pub(crate) fn refresh() {
    static REFRESH: Once = Once::new();
    REFRESH.call_once(|| {
        println!("setup: apt-get update");
        if let Err(failure) = command::run(apt_get().args(["-qq", "update"])) {
            eprintln!("setup: goes on with the package lists there are: {failure}");
        }
    });
}

/// Installs `packages` without their recommendations and without questions.
pub(crate) fn install(packages: &[&str]) -> Result<(), Failure> {
    let names = packages.join(" ");
    if find_program("apt-get").is_none() {
        return Err(format!(
            "there is no apt-get on this machine; install what Debian 12 calls {names} by hand"
        )
        .into());
    }
    if !is_root() {
        return Err(format!(
            "packages are missing and only root can add them; run: \
             sudo apt-get install --no-install-recommends {names}"
        )
        .into());
    }
    refresh();
    for (package, service) in SERVICES {
        if packages.contains(package) {
            mask(Path::new("/"), service)?;
        }
    }
    println!("setup: apt-get install {names}");
    // What dpkg has to say fills hundreds of lines and matters when it fails.
    let output = apt_get()
        .args(["-qq", "--yes", "--no-install-recommends", "install"])
        .args(packages)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start apt-get: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let mut said = output.stdout;
    said.extend(output.stderr);
    let said = String::from_utf8_lossy(&said);
    let skipped = said.lines().count().saturating_sub(30);
    for line in said.lines().skip(skipped) {
        eprintln!("  | {line}");
    }
    Err("apt-get could not install the packages; its last lines are above".into())
}

/// Keeps a service that is not there yet from being started, by its package or by the
/// next boot. What somebody has made of it already is left alone.
fn mask(root: &Path, service: &str) -> Result<(), Failure> {
    let is_there = |dir: &str| fs::symlink_metadata(root.join(dir).join(service)).is_ok();
    if is_there("etc/systemd/system") || is_there("lib/systemd/system") {
        return Ok(());
    }
    println!("setup: masks {service}; systemctl unmask {service} would undo that");
    let dir = root.join("etc/systemd/system");
    fs::create_dir_all(&dir)
        .and_then(|()| symlink("/dev/null", dir.join(service)))
        .map_err(|error| format!("cannot mask {service}: {error}").into())
}

/// The names of all packages that start with `prefix`, from the package lists.
pub(crate) fn names_starting_with(prefix: &str) -> Result<Vec<String>, Failure> {
    let names = capture(Command::new("apt-cache").args(["pkgnames", prefix]))?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Fetches one package into `dir` without installing it.
pub(crate) fn download(package: &str, dir: &Path) -> Result<(), Failure> {
    command::run(
        apt_get()
            // The unprivileged download user cannot write into our directory.
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
            .current_dir(dir),
    )
}

/// The Debian sources this machine uses for `release`, as lines of a
/// `sources.list`. Other vendors' sources are left out.
pub(crate) fn debian_sources(release: &str) -> Result<String, Failure> {
    let targets = capture(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    let lines = source_lines(&targets, release);
    if lines.is_empty() {
        return Err(format!(
            "apt has no Debian source for {release}; add one, or run apt-get update"
        )
        .into());
    }
    Ok(lines)
}

fn source_lines(targets: &str, release: &str) -> String {
    let mut lines: Vec<String> = targets
        .lines()
        .filter_map(
            |line| match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["Debian", uri, suite, component]
                    if suite == release || suite.starts_with(&format!("{release}-")) =>
                {
                    Some(format!("deb {uri} {suite} {component}\n"))
                }
                _ => None,
            },
        )
        .collect();
    lines.sort();
    lines.dedup();
    lines.concat()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Without a terminal of its own dpkg prints plain lines; another apt
        // that holds the lock is waited for rather than failed on.
        .args(["-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_masked_once_and_only_where_it_is_new() {
        let root = std::env::temp_dir().join(format!("pericarp-mask-{}", std::process::id()));
        let link = root.join("etc/systemd/system/a.service");
        for _ in 0..2 {
            mask(&root, "a.service").expect("it can be made");
            assert_eq!(
                fs::read_link(&link).expect("a link"),
                Path::new("/dev/null")
            );
        }
        fs::create_dir_all(root.join("lib/systemd/system")).expect("a directory");
        fs::write(root.join("lib/systemd/system/b.service"), "").expect("a file");
        mask(&root, "b.service").expect("nothing is to be done");
        assert!(!root.join("etc/systemd/system/b.service").exists());
        fs::remove_dir_all(&root).expect("it is ours");
    }

    #[test]
    fn sources_are_those_of_the_release_and_of_debian() {
        let targets = "\
Debian http://mirror.example/debian/ bookworm main
Debian http://mirror.example/debian/ bookworm main
Debian http://mirror.example/debian-security/ bookworm-security main
Debian http://mirror.example/debian/ trixie main
vendor https://vendor.example/apt/ bookworm main
";
        assert_eq!(
            source_lines(targets, "bookworm"),
            "deb http://mirror.example/debian-security/ bookworm-security main\n\
             deb http://mirror.example/debian/ bookworm main\n"
        );
        assert_eq!(source_lines(targets, "sid"), "");
    }
}
