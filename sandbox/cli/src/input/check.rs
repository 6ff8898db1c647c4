//! Compares a request with the host and makes a plan of it.
//!
//! The last place where input is refused. Everything a run needs to know is in the [`Plan`]; images
//! are open and locked when it exists, and nothing else has been done.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use pericarp_hypervisor::{Choice, HostFacts, select};

use pericarp_oci::{
    config::{Process, Wishes},
    image::{Image as OciImage, Location},
};
use pericarp_pod::{
    Assets,
    assets::{CARD_ORDER, CURE, SHARE_ORDER, place},
    process::Wiring,
};

use crate::{
    container,
    input::{
        image::{FileId, Image, check_root_directory},
        network::{self, NONE, NetworkPlan, Places},
        options::{Request, Runtime},
        problem::Problem,
        values::{self, size},
        volume::{self, Volume},
    },
    registry::new_id,
    sizing::{self, BASE_MEMORY, Limits, Size},
};

/// Most disks besides the root: what QEMU's bus has slots for, with room for later.
const MAX_DISKS: usize = 20;

/// A run, ready to be carried out.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) root: Root,
    /// What was named as such, for `ps`.
    pub(crate) root_name: String,
    pub(crate) limits: Limits,
    /// What the command sees of this host.
    pub(crate) volumes: Vec<Volume>,
    /// What it reaches.
    pub(crate) network: NetworkPlan,
    /// What the container runs.
    pub(crate) process: Process,
    pub(crate) wiring: Wiring,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) detach: bool,
    pub(crate) runtime: RuntimePlan,
    pub(crate) timing: bool,
}

/// Where the root file system comes from.
#[derive(Debug)]
pub(crate) enum Root {
    Oci(Box<OciImage>),
    Image(Image),
    Directory(PathBuf),
}

#[derive(Debug)]
pub(crate) enum RuntimePlan {
    Vm(Box<VmPlan>),
    Runc,
}

/// What only a virtual machine needs.
#[derive(Debug)]
pub(crate) struct VmPlan {
    pub(crate) disks: Vec<Image>,
    pub(crate) size: Size,
    pub(crate) choice: Choice,
    pub(crate) boot_timeout: Option<Duration>,
    pub(crate) console_log: Option<PathBuf>,
    pub(crate) assets: Assets,
}

/// Checks everything, and reports everything that is wrong.
pub(crate) fn check(mut request: Request) -> Result<Plan, Vec<Problem>> {
    let mut problems = std::mem::take(&mut request.problems);
    let limits = limits(&request, &mut problems);
    let root = root(&request, &mut problems);
    let volumes = volume::check(&request.volumes, &mut problems);
    let network = network::check(
        request.network.as_deref(),
        &request.publish,
        request.runtime,
        &Places::of_this_host(),
        &mut problems,
    );
    let runtime = match request.runtime {
        Runtime::Vm => vm(&request, limits, root.as_ref(), &mut problems),
        Runtime::Runc => runc(&mut problems),
    };
    let id = new_id()
        .map_err(|error| {
            problems.push(Problem::new("--name", None, error.to_string(), "try again"))
        })
        .unwrap_or_default();
    let name = name(&request, &id, &mut problems);
    check_wishes(&request, &mut problems);
    let wishes = Wishes {
        entrypoint: request.entrypoint.take().map(|program| vec![program]),
        command: std::mem::take(&mut request.command),
        env: std::mem::take(&mut request.env),
        caller: None,
        working_dir: request.workdir.take(),
        user: request.user.take(),
        terminal: request.tty,
        hostname: container::HOSTNAME.to_owned(),
    };
    let process = root
        .as_ref()
        .filter(|_| problems.is_empty())
        .and_then(|root| {
            container::process(root, wishes)
                .map_err(|error| problems.push(Problem::whole("--image", &error.to_string())))
                .ok()
        });
    match (root, runtime, process) {
        (Some(root), Some(runtime), Some(process)) if problems.is_empty() => Ok(Plan {
            root,
            process,
            root_name: request
                .image
                .or(request
                    .rootfs_image
                    .map(|name| name.path.display().to_string()))
                .or(request.rootfs.map(|path| path.display().to_string()))
                .unwrap_or_default(),
            limits,
            volumes,
            network,
            wiring: Wiring {
                stdin: request.interactive || !(request.tty || request.detach),
                terminal: request.tty,
            },
            id,
            name,
            detach: request.detach,
            runtime,
            timing: request.timing,
        }),
        _ => Err(problems),
    }
}

/// The run's name: as asked for, else its id.
fn name(request: &Request, id: &str, problems: &mut Vec<Problem>) -> String {
    let Some(name) = &request.name else {
        return id.to_owned();
    };
    if !pericarp_api::is_id(name) {
        let rule = "is no usable name";
        let cure = "use letters, digits, '-', '_' and '.', at most 64, a letter or digit first";
        problems.push(Problem::new("--name", name.clone(), rule, cure));
    }
    name.clone()
}

/// What can be wrong with the command's surroundings without looking into the image's files.
fn check_wishes(request: &Request, problems: &mut Vec<Problem>) {
    for variable in &request.env {
        let key = variable.split('=').next().unwrap_or_default();
        if key.is_empty() || variable.contains('\0') {
            let cure = "write NAME=VALUE, or NAME to pass our own on";
            problems.push(Problem::new("--env", variable.clone(), "has no name", cure));
        }
    }
    if let Some(directory) = &request.workdir
        && !directory.starts_with('/')
    {
        let rule = "is not an absolute path";
        let cure = "begin it with '/'";
        problems.push(Problem::new("--workdir", directory.clone(), rule, cure));
    }
    if let Some(user) = &request.user
        && (user.is_empty() || user.starts_with(':') || user.ends_with(':'))
    {
        let cure = "write USER or USER:GROUP, by name or number";
        problems.push(Problem::new("--user", user.clone(), "is no user", cure));
    }
}

/// Keeps a value, or the rule it breaks.
fn keep<T>(
    problems: &mut Vec<Problem>,
    option: &str,
    text: &str,
    read: Result<T, values::Broken>,
) -> Option<T> {
    read.map_err(|(rule, cure)| problems.push(Problem::new(option, text.to_owned(), rule, cure)))
        .ok()
}

fn limits(request: &Request, problems: &mut Vec<Problem>) -> Limits {
    let host_cpus = host_cpus();
    let milli_cpus = request.cpus.as_ref().and_then(|text| {
        keep(
            problems,
            "--cpus",
            text,
            values::milli_cpus(text, host_cpus),
        )
    });
    let memory = request
        .memory
        .as_ref()
        .and_then(|text| keep(problems, "--memory", text, values::memory(text)));
    let host = host_memory();
    let needs = match request.runtime {
        Runtime::Vm => sizing::machine(Limits { milli_cpus, memory }).memory,
        Runtime::Runc => memory.unwrap_or(0),
    };
    if needs > host {
        problems.push(match (&request.memory, memory, request.runtime) {
            (Some(text), Some(bytes), Runtime::Vm) if host >= BASE_MEMORY => Problem::new(
                "--memory",
                text.clone(),
                format!(
                    "the machine would have 2 GiB + {}, and this host has {}",
                    size(bytes),
                    size(host)
                ),
                format!("ask for at most {}", size((host - BASE_MEMORY) >> 20 << 20)),
            ),
            (Some(text), _, Runtime::Runc) => Problem::new(
                "--memory",
                text.clone(),
                format!("is more than the {} of this host", size(host)),
                "ask for less",
            ),
            _ => Problem::new(
                "--runtime",
                "vm".to_owned(),
                format!(
                    "a machine has at least 2 GiB, and this host has {}",
                    size(host)
                ),
                "use '--runtime runc', or a larger host",
            ),
        });
    }
    Limits { milli_cpus, memory }
}

fn root(request: &Request, problems: &mut Vec<Problem>) -> Option<Root> {
    let root = match (&request.image, &request.rootfs_image, &request.rootfs) {
        (Some(text), None, None) => OciImage::open(&Location::parse(text))
            .map(|image| Root::Oci(Box::new(image)))
            .map_err(|error| Problem::whole("--image", &error.to_string())),
        (None, Some(name), None) => Image::open("--rootfs-image", name).map(Root::Image),
        (None, None, Some(path)) => check_root_directory(path).map(Root::Directory),
        // Already reported.
        _ => return None,
    };
    root.map_err(|problem| problems.push(problem)).ok()
}

fn vm(
    request: &Request,
    limits: Limits,
    root: Option<&Root>,
    problems: &mut Vec<Problem>,
) -> Option<RuntimePlan> {
    let disks = disks(request, root, problems);
    let boot_timeout = request
        .boot_timeout
        .as_ref()
        .and_then(|text| keep(problems, "--boot-timeout", text, values::seconds(text)))
        .map(Duration::from_secs_f64);
    if let Some(path) = &request.console_log {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => ".".into(),
        };
        let shown = Some(path.display().to_string());
        if path.exists() && !path.is_file() {
            let cure = "name a file; it is overwritten";
            problems.push(Problem::new(
                "--console-log",
                shown,
                "is not a regular file",
                cure,
            ));
        } else if !directory.is_dir() {
            let rule = "its directory does not exist";
            problems.push(Problem::new(
                "--console-log",
                shown,
                rule,
                "make the directory",
            ));
        }
    }
    let assets = assets(request.assets.as_deref())
        .map_err(|problem| problems.push(problem))
        .ok()?;
    let wants_cards = request.network.as_deref().is_some_and(|name| name != NONE);
    if let (true, None) = (wants_cards, &assets.card_order) {
        let rule = format!("the guest's files have no '{}'", CARD_ORDER);
        problems.push(Problem::new(network::OPTION, None, rule, CURE));
    }
    let option = match root {
        _ if !request.volumes.is_empty() => Some("--volume"),
        Some(Root::Directory(_)) => Some("--rootfs"),
        _ => None,
    };
    if let (Some(option), None) = (option, &assets.share_order) {
        let rule = format!("the guest's files have no '{}'", SHARE_ORDER);
        problems.push(Problem::new(option, None, rule, CURE));
    }
    Some(RuntimePlan::Vm(Box::new(VmPlan {
        disks,
        size: sizing::machine(limits),
        choice: select(request.hypervisor.unwrap_or_default(), &HostFacts::probe()),
        boot_timeout,
        console_log: request.console_log.clone(),
        assets,
    })))
}

/// The guest's files: where the user says, else where a node has them.
fn assets(given: Option<&Path>) -> Result<Assets, Problem> {
    let Some((directory, said)) = place::find(given) else {
        let rule = "this program's own place is unknown";
        return Err(Problem::new("--assets", None, rule, CURE));
    };
    Assets::open(&directory).map_err(|error| {
        let directory = error.directory.display().to_string();
        Problem::new(said.unwrap_or("--assets"), directory, error.rule, CURE)
    })
}

fn disks(request: &Request, root: Option<&Root>, problems: &mut Vec<Problem>) -> Vec<Image> {
    if request.disks.len() > MAX_DISKS {
        problems.push(Problem::new(
            "--disk",
            None,
            format!(
                "there are {} disks, and a machine takes {MAX_DISKS}",
                request.disks.len()
            ),
            "use fewer",
        ));
        return Vec::new();
    }
    let twice = |name: String| {
        Problem::new(
            "--disk",
            name,
            "is used twice in this run",
            "leave one out, or use ':ro' for both",
        )
    };
    let mut disks: Vec<Image> = Vec::new();
    // Images this run already holds would otherwise be reported as used by another run.
    let mut held: Vec<(FileId, bool)> = match root {
        Some(Root::Image(image)) => vec![(image.id, image.read_only)],
        _ => Vec::new(),
    };
    for name in &request.disks {
        if let Ok(metadata) = std::fs::metadata(&name.path)
            && held.iter().any(|(id, read_only)| {
                *id == FileId::of(&metadata) && !(*read_only && name.read_only)
            })
        {
            problems.push(twice(name.path.display().to_string()));
            continue;
        }
        match Image::open("--disk", name) {
            Ok(image) => {
                held.push((image.id, image.read_only));
                disks.push(image);
            }
            Err(problem) => problems.push(problem),
        }
    }
    disks
}

fn runc(problems: &mut Vec<Problem>) -> Option<RuntimePlan> {
    if rustix::process::geteuid().is_root() {
        return Some(RuntimePlan::Runc);
    }
    problems.push(Problem::new(
        "--runtime",
        "runc".to_owned(),
        "needs root, for its namespaces and mounts",
        "run as root, or use '--runtime vm'",
    ));
    None
}

fn host_cpus() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cpus).unwrap_or(u32::MAX)
}

fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    // Unsigned in the kernel's interface; `as` only names its type on this platform.
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::options::{Parsed, parse};

    fn problems(line: &[&str]) -> Vec<String> {
        let Ok(Parsed::Run(request)) = parse(line.iter().map(Into::into).collect()) else {
            panic!("{line:?}");
        };
        check(*request)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn all_that_the_host_refuses_is_reported_at_once() {
        let all = problems(&[
            "--rootfs-image",
            "/nonexistent/root",
            "--cpus",
            "NaN",
            "--memory",
            "1X",
            "--disk",
            "/nonexistent/disk",
            "--boot-timeout",
            "0",
            "--console-log",
            "/nonexistent/log",
            "--assets",
            "/nonexistent/assets",
            "--",
            "true",
        ]);
        let starts = [
            "--cpus 'NaN': is not a number; write a number from 0.01 to",
            "--memory '1X': has the unknown unit 'X'; write a number and a unit",
            "--rootfs-image '/nonexistent/root': no such file; check the path",
            "--disk '/nonexistent/disk': no such file; check the path",
            "--boot-timeout '0': is out of range; write seconds from 0.1 to 3600",
            "--console-log '/nonexistent/log': its directory does not exist; make the directory",
            "--assets '/nonexistent/assets': no such directory;",
        ];
        assert_eq!(all.len(), starts.len(), "{all:#?}");
        for (problem, start) in all.iter().zip(starts) {
            assert!(problem.starts_with(start), "{problem}");
        }
    }

    #[test]
    fn a_machine_larger_than_the_host_is_refused_with_the_number() {
        let all = problems(&["--rootfs", "/nonexistent", "--memory", "900T", "--", "true"]);
        assert!(
            all[0].starts_with("--memory '900T': the machine would have 2 GiB + 921600 GiB, and"),
            "{all:#?}"
        );
    }

    #[test]
    fn the_same_disk_twice_is_named_as_such() {
        let file = std::env::temp_dir().join(format!("pericarp-twice-{}", std::process::id()));
        std::fs::write(&file, [0; 512]).unwrap();
        let path = file.to_str().unwrap();
        let all = problems(&["--rootfs-image", path, "--disk", path, "--", "true"]);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(
            all[0],
            format!(
                "--disk '{path}': is used twice in this run; leave one out, or use ':ro' for both"
            )
        );
    }

    #[test]
    fn a_file_is_no_root_directory() {
        let all = problems(&["--runtime", "runc", "--rootfs", "/etc/passwd", "--", "true"]);
        assert!(
            all[0].contains("not a directory; use '--rootfs-image' for a disk image"),
            "{all:#?}"
        );
        let all = problems(&["--runtime", "runc", "--rootfs", "/", "--", "true"]);
        assert!(all[0].contains("is this host's own root"), "{all:#?}");
    }
}
