//! The job on this machine's own kernel: on the host, and in a container.
//!
//! The container is described as that of `pericarp run --runtime runc`, which the
//! demo compares with: podman's namespaces, capabilities and cgroup, no system
//! call filter. Its programs are the host's own, read-only, so that fio is the
//! same everywhere; the image or directory is bound into it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_benches::fio::{self, Report, SLACK};
use pericarp_oci::config::Process;
use pericarp_oci::runtime::{self, Cgroups, Container, Limits, Network, RunAs};
use pericarp_oci::user::User;
use pericarp_tests::parts::{Part, search_path};
use pericarp_tests::process::command;
use pericarp_tests::scratch::Scratch;
use serde_json::{Value, json};

use crate::profiles::{Profile, Rig};

/// Directories of the host that a container's programs are in. Where they are
/// merged, all but the first are links into it.
const PROGRAMS: [&str; 5] = ["usr", "bin", "sbin", "lib", "lib64"];
/// How containers and their control groups are called; our process's number
/// follows. `xtask` removes
/// the groups of those that were killed: runc does it for those that ended.
const NAME: &str = "pericarp-bench-";
/// Where the container finds the image or the directory.
const INSIDE: &str = "/srv/ground";

/// Runs the job on `place`, which is the image or a directory.
pub(crate) fn on_host(
    profile: &Profile,
    place: &Path,
    seconds: u64,
    scratch: &Scratch,
) -> Outcome<Report> {
    let program = Part::Fio.find().ok_or("no fio")?;
    let place = place.to_str().ok_or("a file name is not text")?;
    let mut command = command(&program);
    command
        .envs(profile.environment(place, seconds, Rig::Native))
        .current_dir(scratch.dir())
        .arg(scratch.file("job.fio", profile.job.as_bytes()));
    fio::run(&mut command, scratch, limit(seconds))
}

/// Runs the job in a container that has `place` bound into it.
pub(crate) fn in_container(
    profile: &Profile,
    place: &Path,
    seconds: u64,
    scratch: &Scratch,
) -> Outcome<Report> {
    let bundle = Bundle::make(profile, place, seconds, scratch)?;
    let report = bundle.job.join("report.json");
    fio::finish(&mut bundle.command()?, &report, limit(seconds))
}

fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds) + SLACK
}

/// A container's files; they go away with the turn.
struct Bundle {
    dir: PathBuf,
    job: PathBuf,
}

impl Bundle {
    fn make(profile: &Profile, place: &Path, seconds: u64, scratch: &Scratch) -> Outcome<Self> {
        let dir = scratch.path("container");
        let bundle = Bundle {
            job: dir.join("job"),
            dir,
        };
        let root = bundle.dir.join("root");
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&bundle.job)?;
        fs::write(bundle.job.join("job.fio"), profile.job)?;
        let mut mounts = vec![bind(&bundle.job, "/job", &[]), bind(place, INSIDE, &[])];
        for name in PROGRAMS {
            let host = Path::new("/").join(name);
            match fs::read_link(&host) {
                Ok(link) => symlink(link, root.join(name))?,
                Err(_) if host.is_dir() => {
                    mounts.push(bind(&host, host.to_str().unwrap_or(""), &["ro"]))
                }
                Err(_) => {}
            }
        }
        // Programs whose libraries lie in unusual places find them by this.
        let libraries = Path::new("/etc/ld.so.cache");
        if libraries.exists() {
            mounts.push(bind(libraries, "/etc/ld.so.cache", &["ro"]));
        }
        let mut env = vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        let variables = profile.environment(INSIDE, seconds, Rig::Native);
        env.extend(
            variables
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        let config = describe(&root, env, mounts);
        fs::write(bundle.dir.join("config.json"), config.to_string())?;
        Ok(bundle)
    }

    /// Started in a process namespace of its own, so that the kernel ends the
    /// container if we are killed.
    fn command(&self) -> Outcome<Command> {
        let runc = Part::Runc.find().ok_or("no runc")?;
        let unshare = search_path("unshare").ok_or("no unshare; apt package util-linux has it")?;
        let mut command = command(&unshare);
        command
            .args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
            .arg(runc)
            .arg("--root")
            .arg(self.dir.join("state"))
            .args(["run", "--bundle"])
            .arg(&self.dir)
            .arg(own_name());
        Ok(command)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn own_name() -> String {
    format!("{NAME}{}", std::process::id())
}

fn bind(from: &Path, to: &str, more: &[&str]) -> Value {
    let options = [&["rbind", "rprivate"], more].concat();
    json!({"destination": to, "source": from, "type": "bind", "options": options})
}

/// The OCI runtime's configuration: that of `pericarp run`, and `mounts`.
fn describe(root: &Path, env: Vec<String>, mounts: Vec<Value>) -> Value {
    let words = "fio --output-format=json --output=/job/report.json /job/job.fio";
    let process = Process {
        args: words.split(' ').map(str::to_owned).collect(),
        env,
        cwd: "/job".to_owned(),
        user: "0".to_owned(),
        terminal: false,
        stop_signal: 15,
    };
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let user = User::default();
    let mut config = runtime::config(&Container {
        process: &process,
        run_as: RunAs::Numbers(&user),
        root: Some(root),
        read_only: false,
        hostname: "bench",
        limits: Limits::default(),
        cgroups: if unified { Cgroups::V2 } else { Cgroups::V1 },
        cgroups_path: Some(&format!("/{}", own_name())),
        network: Network::Own,
        binds: &[],
    });
    if let Some(all) = config["mounts"].as_array_mut() {
        all.extend(mounts);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profiles::PROFILES;

    #[test]
    fn a_container_has_the_job_the_programs_and_the_place() {
        let scratch = Scratch::new();
        let bundle = Bundle::make(&PROFILES[0], Path::new("/some/disk"), 2, &scratch).unwrap();
        let config = fs::read_to_string(bundle.dir.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        let mounts = config["mounts"].as_array().unwrap();
        let find = |to: &str| mounts.iter().find(|mount| mount["destination"] == to);
        assert_eq!(find(INSIDE).unwrap()["source"], "/some/disk");
        let programs = find("/usr").unwrap()["options"].as_array().unwrap();
        assert!(programs.contains(&json!("ro")));
        let env = config["process"]["env"].as_array().unwrap();
        assert!(env.contains(&json!(format!("FIO_FILE={INSIDE}"))));
        assert!(env.contains(&json!("FIO_SECONDS=2")));
        assert!(!config["linux"]["namespaces"].as_array().unwrap().is_empty());
        let dir = bundle.dir.clone();
        drop(bundle);
        assert!(!dir.exists());
    }
}
