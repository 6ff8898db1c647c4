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

/// A package that brings a service. We want the program alone.
struct Service {
    package: &'static str,
    unit: &'static str,
    /// Where it answers, or what is built upon it.
    sockets: &'static [&'static str],
}

const SERVICES: &[Service] = &[Service {
    package: "containerd",
    unit: "containerd.service",
    sockets: &["run/containerd/containerd.sock", "run/docker.sock"],
}];

/// Where systemd looks for units, below the root.
const UNITS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

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
    let root = Path::new("/");
    let (services, plain) = apart(packages);
    for service in &services {
        service.is_nowhere(root)?;
    }
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
    if !plain.is_empty() {
        add(&plain, &[])?;
    }
    for service in services {
        // What stands in its way is somebody's who is at work with it.
        service.masked(root, || add(&[service.package], &["--no-remove"]))?;
    }
    Ok(())
}

/// Those that bring a service, and those that do not.
fn apart<'a>(packages: &[&'a str]) -> (Vec<&'static Service>, Vec<&'a str>) {
    let brings = |package: &str| SERVICES.iter().find(|known| known.package == package);
    let services = packages.iter().filter_map(|package| brings(package));
    let plain = packages.iter().filter(|package| brings(package).is_none());
    (services.collect(), plain.copied().collect())
}

fn add(packages: &[&str], options: &[&str]) -> Result<(), Failure> {
    println!("setup: apt-get install {}", packages.join(" "));
    // What dpkg has to say fills hundreds of lines and matters when it fails.
    let output = apt_get()
        .args(["-qq", "--yes", "--no-install-recommends"])
        .args(options)
        .arg("install")
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

impl Service {
    /// Refuses a machine that has the service although its program was not found: the package would
    /// take the place of one that somebody uses.
    fn is_nowhere(&self, root: &Path) -> Result<(), Failure> {
        let units = UNITS.map(|dir| root.join(dir).join(self.unit));
        let sockets = self.sockets.iter().map(|socket| root.join(socket));
        let mut places = units
            .into_iter()
            .filter(|unit| !is_mask(unit))
            .chain(sockets);
        match places.find(|place| fs::symlink_metadata(place).is_ok()) {
            None => Ok(()),
            Some(place) => Err(format!(
                "{} is not in the search path, and yet {} is there; nothing was installed: add the \
                 directory of that {0} to PATH, or remove it",
                self.package,
                place.display()
            )
            .into()),
        }
    }

    /// Installs while the service is kept from being started, by its package or by the next boot.
    /// One that is masked already stays so; a mask of ours goes where nothing was installed.
    fn masked(
        &self,
        root: &Path,
        install: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let unit = self.unit;
        let dir = root.join(UNITS[0]);
        let mask = dir.join(unit);
        let ours = !is_mask(&mask);
        if ours {
            println!("setup: masks {unit}; systemctl unmask {unit} would undo that");
            fs::create_dir_all(&dir)
                .and_then(|()| symlink(NOTHING, &mask))
                .map_err(|error| format!("cannot mask {unit}: {error}"))?;
        }
        install().inspect_err(|_| {
            if ours && let Err(error) = fs::remove_file(&mask) {
                eprintln!("setup: {unit} stays masked: {error}");
            }
        })
    }
}

/// What a masked unit is.
const NOTHING: &str = "/dev/null";

fn is_mask(unit: &Path) -> bool {
    fs::read_link(unit).is_ok_and(|target| target == Path::new(NOTHING))
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
    use std::path::PathBuf;

    use super::*;

    /// A root of its own, removed with its value.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let name = format!("pericarp-apt-{name}-{}", std::process::id());
            let root = std::env::temp_dir().join(name);
            fs::create_dir_all(&root).expect("a directory");
            Self(root)
        }

        fn put(&self, place: &str) {
            let place = self.0.join(place);
            let dir = place.parent().expect("it has a directory");
            fs::create_dir_all(dir).expect("a directory");
            fs::write(place, "").expect("a file");
        }

        fn mask(&self) -> PathBuf {
            self.0.join("etc/systemd/system/containerd.service")
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_service_of_somebody_elses_is_left_alone() {
        let service = &SERVICES[0];
        for place in [
            "etc/systemd/system/containerd.service",
            "run/systemd/system/containerd.service",
            "usr/local/lib/systemd/system/containerd.service",
            "usr/lib/systemd/system/containerd.service",
            "lib/systemd/system/containerd.service",
            "run/containerd/containerd.sock",
            "run/docker.sock",
        ] {
            let root = Root::new("theirs");
            service.is_nowhere(&root.0).expect("nothing is there");
            root.put(place);
            let refused = service.is_nowhere(&root.0).expect_err(place).to_string();
            assert!(refused.contains(place), "{refused}");
            assert!(refused.starts_with("containerd is not in the search path"));
            assert_eq!(refused.lines().count(), 1);
        }
    }

    #[test]
    fn a_service_is_masked_while_its_package_comes() {
        let (service, root) = (&SERVICES[0], Root::new("mask"));
        for _ in 0..2 {
            let installed = service.masked(&root.0, || {
                assert!(is_mask(&root.mask()));
                Ok(())
            });
            installed.expect("all is well");
            assert!(is_mask(&root.mask()));
            // What we made of it is nobody else's.
            service.is_nowhere(&root.0).expect("a mask alone");
        }
        // One that was there stays when nothing comes.
        service
            .masked(&root.0, || Err("no".into()))
            .expect_err("no");
        assert!(is_mask(&root.mask()));
    }

    #[test]
    fn a_mask_goes_again_when_nothing_was_installed() {
        let (service, root) = (&SERVICES[0], Root::new("unmask"));
        let failed = service.masked(&root.0, || {
            assert!(is_mask(&root.mask()));
            Err("no network".into())
        });
        assert_eq!(failed.expect_err("it failed").to_string(), "no network");
        assert!(fs::symlink_metadata(root.mask()).is_err());
    }

    #[test]
    fn packages_with_services_come_apart() {
        let (services, plain) = apart(&["git", "containerd", "fio"]);
        assert_eq!(plain, ["git", "fio"]);
        assert!(services.iter().map(|one| one.package).eq(["containerd"]));
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
