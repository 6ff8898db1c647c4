//! The options of `pericarp run`, as written.
//!
//! Reads the whole command line and collects every problem that can be seen in it alone. Values are
//! only read here as far as that needs no knowledge of the host; `check` does the rest.

use std::{ffi::OsString, path::PathBuf};

use lexopt::Arg;
use pericarp_hypervisor::Wanted;

use crate::input::{
    image::ImageName,
    problem::{Problem, nearest},
};

/// What `pericarp run --help` prints.
pub(crate) const HELP: &str = "\
Runs a command in a virtual machine of its own, or in a plain container.

Usage: pericarp run [OPTIONS] --image IMAGE [[--] COMMAND [ARG]...]
       pericarp run [OPTIONS] (--rootfs-image FILE[:ro] | --rootfs DIR) [--] COMMAND [ARG]...

What it runs on (one of the three):
  --image IMAGE             an OCI image: a tar archive or a directory with an OCI layout,
                            as `skopeo copy`, `podman save` and `docker buildx` write them;
                            what the command writes is discarded at the end
  --rootfs-image FILE[:ro]  a disk image with an ext4 file system, used in place;
                            with ':ro' it is not changed, and runs may share it
  --rootfs DIR              a directory, without what is mounted below it; it is not
                            changed, and must not change meanwhile: what the command
                            writes is discarded at the end

The command:
  -e, --env NAME[=VALUE]    set a variable; without a value it is taken from here
  -w, --workdir DIR         working directory (default: the image's, else /)
  -u, --user USER[:GROUP]   by name or number (default: the image's, else root)
      --entrypoint PROGRAM  in place of the image's entrypoint
  -i, --interactive         pass standard input on; the default unless -t or -d is given
  -t, --tty                 give the command a terminal; with -i ours is joined to it

What it sees of this host:
  -v, --volume HOST:GUEST[:ro]  the directory HOST, at GUEST; with ':ro' nothing in it can be
                            changed; may be repeated; owners and modes are the same on
                            both sides

Its network:
      --network NETWORK     none (default): loopback alone;
                            cni:NAME: the network of this name in /etc/cni/net.d, made by
                            its plugins; netns:PATH: that of a network namespace, such as
                            /run/netns/pod1, which keeps it afterwards; as root only
  -p, --publish [IP:]PORT:PORT[/tcp|/udp|/sctp]  pass what comes to this host's first port on to
                            the command's second one; needs a network of cni: with the
                            portmap plugin; may be repeated

How it runs:
  --runtime vm|runc         vm (default): a virtual machine of its own;
                            runc: a container on this host's kernel, as root only
  --cpus N                  CPUs the command may use, such as 2 or 0.5
  -m, --memory SIZE         memory the command may use, such as 512M or 1.5G

Virtual machines only:
  -d, --detach              go on in the background and print the run's id; see also
                            `pericarp ps`, `logs`, `stop` and `rm`
      --name NAME           name for those commands and `exec` (default: the id)
      --disk FILE[:ro]      a further disk, seen as /dev/pericarp/disk1, disk2, ...
                            in the order given; may be repeated
      --vmm NAME            auto (default): pericarp where KVM is backed by hardware, else qemu;
                            pericarp, qemu, qemu-kvm or qemu-tcg (also: --hypervisor)
      --boot-timeout SECONDS  how long the machine may take to start the command
                            (default: 20 with KVM, 60 without)
      --console-log FILE    keep the guest's console here; the last 64 to 128 KiB
      --assets DIR          guest kernel and agent, as `cargo xtask setup` makes them, or
                            versions of them (`pericarp assets`); default: PERICARP_ASSETS,
                            else /var/lib/pericarp/assets, else beside this program

Output:
  --timing                  say on the error output how long each phase took
  --json                    messages of pericarp itself as JSON, one object a line
  -h, --help                show this text

The machine has 1 CPU and 2 GiB; with limits of N CPUs and SIZE memory it has 1+N CPUs,
rounded up, and 2 GiB + SIZE, and the command is held to N and SIZE inside it.

Standard input is passed on until its end; output and error output stay apart. SIGINT,
SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the command; the third SIGINT
or SIGTERM ends the run. The command is the first process of its container, which ignores
signals it has no handler for.

Exit codes: 2 bad input, 125 pericarp itself failed, 126 the command cannot be executed,
127 there is no such command, 128+N signal N ended it, else the command's own.
";

/// Every option: letter (blank for none), name, whether it takes a value, whether it may be
/// repeated.
const OPTIONS: [(char, &str, bool, bool); 26] = [
    (' ', "--image", true, false),
    (' ', "--rootfs-image", true, false),
    (' ', "--rootfs", true, false),
    ('e', "--env", true, true),
    ('w', "--workdir", true, false),
    ('u', "--user", true, false),
    (' ', "--entrypoint", true, false),
    ('i', "--interactive", false, false),
    ('t', "--tty", false, false),
    ('v', "--volume", true, true),
    (' ', "--network", true, false),
    ('p', "--publish", true, true),
    (' ', "--runtime", true, false),
    (' ', "--cpus", true, false),
    ('m', "--memory", true, false),
    ('d', "--detach", false, false),
    (' ', "--name", true, false),
    (' ', "--disk", true, true),
    (' ', "--hypervisor", true, false),
    (' ', "--vmm", true, false),
    (' ', "--boot-timeout", true, false),
    (' ', "--console-log", true, false),
    (' ', "--assets", true, false),
    (' ', "--timing", false, false),
    (' ', "--json", false, false),
    ('h', "--help", false, false),
];

/// Where the command runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Runtime {
    #[default]
    Vm,
    Runc,
}

const RUNTIMES: [&str; 2] = ["vm", "runc"];

/// The command line, read and not yet compared with the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) runtime: Runtime,
    pub(crate) image: Option<String>,
    pub(crate) rootfs_image: Option<ImageName>,
    pub(crate) rootfs: Option<PathBuf>,
    pub(crate) env: Vec<String>,
    pub(crate) workdir: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) entrypoint: Option<String>,
    pub(crate) interactive: bool,
    pub(crate) tty: bool,
    pub(crate) detach: bool,
    pub(crate) name: Option<String>,
    pub(crate) volumes: Vec<String>,
    pub(crate) network: Option<String>,
    pub(crate) publish: Vec<String>,
    pub(crate) cpus: Option<String>,
    pub(crate) memory: Option<String>,
    pub(crate) disks: Vec<ImageName>,
    pub(crate) hypervisor: Option<Wanted>,
    pub(crate) boot_timeout: Option<String>,
    pub(crate) console_log: Option<PathBuf>,
    pub(crate) assets: Option<PathBuf>,
    pub(crate) timing: bool,
    pub(crate) json: bool,
    pub(crate) command: Vec<String>,
    /// What is already known to be wrong.
    pub(crate) problems: Vec<Problem>,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Parsed {
    Help,
    Run(Box<Request>),
}

/// Reads the arguments that follow `run`. The problems of a line that could be read as far as
/// possible stay in the request, so that `check` can report the others with them.
pub(crate) fn parse(arguments: Vec<OsString>) -> Result<Parsed, Vec<Problem>> {
    let mut options = arguments;
    let marked = options.iter().position(|argument| argument == "--");
    let mut command = match marked {
        Some(at) => options.split_off(at).split_off(1),
        None => Vec::new(),
    };
    let mut reader = Reader::default();
    let mut parser = lexopt::Parser::from_args(options);
    loop {
        let (name, is_long) = match parser.next() {
            Ok(None) => break,
            Ok(Some(Arg::Long(name))) => (format!("--{name}"), true),
            Ok(Some(Arg::Short(letter))) => {
                let known = OPTIONS
                    .iter()
                    .find(|(known, ..)| *known == letter && letter != ' ');
                let name =
                    known.map_or_else(|| format!("-{letter}"), |(_, name, ..)| (*name).to_owned());
                (name, false)
            }
            // Without a mark the command begins at the first word, as it does with podman.
            Ok(Some(Arg::Value(value))) if marked.is_none() && !reader.after_unknown => {
                command.push(value);
                command.extend(parser.raw_args().into_iter().flatten());
                break;
            }
            Ok(Some(Arg::Value(value))) => {
                reader.stray(&value);
                continue;
            }
            Err(error) => {
                reader.problem(Problem::new(
                    "pericarp run",
                    None,
                    error.to_string(),
                    SEE_HELP,
                ));
                break;
            }
        };
        if name == "--help" {
            return Ok(Parsed::Help);
        }
        reader.option(&name, is_long, &mut parser);
    }
    let mut request = reader.finish();
    for argument in command {
        match argument.into_string() {
            Ok(argument) if !argument.contains('\0') => request.command.push(argument),
            Ok(argument) => request.problems.push(not_text(&argument)),
            Err(argument) => request.problems.push(not_text(&argument.to_string_lossy())),
        }
    }
    let image_may_say = request.command.is_empty() && request.image.is_some();
    if !image_may_say && request.command.first().is_none_or(String::is_empty) {
        request.problems.push(Problem::new(
            "COMMAND",
            None,
            "there is no command to run",
            "put it after '--', such as: -- /bin/sh -c 'uname -r'",
        ));
    }
    Ok(Parsed::Run(Box::new(request)))
}

const SEE_HELP: &str = "see `pericarp run --help`";

fn not_text(argument: &str) -> Problem {
    Problem::new(
        "COMMAND",
        argument.to_owned(),
        "is not valid UTF-8",
        "rename what it refers to",
    )
}

#[derive(Default)]
struct Reader {
    request: Request,
    seen: Vec<String>,
    /// The word after an unknown option may have been meant as its value.
    after_unknown: bool,
}

impl Reader {
    fn problem(&mut self, problem: Problem) {
        self.request.problems.push(problem);
    }

    fn stray(&mut self, value: &std::ffi::OsStr) {
        if !std::mem::take(&mut self.after_unknown) {
            let value = value.to_string_lossy().into_owned();
            let cure = "put the command after '--'";
            self.problem(Problem::new(
                "pericarp run",
                value,
                "is not an option",
                cure,
            ));
        }
    }

    fn option(&mut self, name: &str, is_long: bool, parser: &mut lexopt::Parser) {
        self.after_unknown = false;
        let Some((.., takes_value, repeats)) = OPTIONS.iter().find(|(_, known, ..)| *known == name)
        else {
            let near = nearest(name, OPTIONS.map(|(_, known, ..)| known));
            self.problem(Problem::unknown(
                "option",
                name,
                near,
                "pericarp run --help",
            ));
            self.after_unknown = parser.optional_value().is_none();
            return;
        };
        let twice = self.seen(name);
        self.seen.push(name.to_owned());
        if !takes_value {
            // After a letter come further letters.
            let value = is_long.then(|| parser.optional_value()).flatten();
            match value {
                Some(value) => {
                    let value = value.to_string_lossy().into_owned();
                    self.problem(Problem::new(name, value, "takes no value", "leave it out"));
                }
                None if twice => {
                    self.problem(Problem::new(name, None, "is given twice", "leave one out"));
                }
                None => self.flag(name),
            }
            return;
        }
        let Ok(value) = parser.value() else {
            self.problem(Problem::new(name, None, "needs a value", SEE_HELP));
            return;
        };
        let Some(text) = value.to_str().map(str::to_owned) else {
            let value = value.to_string_lossy().into_owned();
            self.problem(Problem::new(
                name,
                value,
                "is not valid UTF-8",
                "rename the file",
            ));
            return;
        };
        if twice && !repeats {
            self.problem(Problem::new(name, text, "is given twice", "leave one out"));
        } else if text.is_empty() {
            self.problem(Problem::new(name, text, "is empty", SEE_HELP));
        } else {
            self.value(name, text);
        }
    }

    fn flag(&mut self, name: &str) {
        let request = &mut self.request;
        *match name {
            "--interactive" => &mut request.interactive,
            "--tty" => &mut request.tty,
            "--detach" => &mut request.detach,
            "--timing" => &mut request.timing,
            // The only one left.
            _ => &mut request.json,
        } = true;
    }

    fn value(&mut self, name: &str, text: String) {
        let request = &mut self.request;
        match name {
            "--image" => request.image = Some(text),
            "--env" => request.env.push(text),
            "--workdir" => request.workdir = Some(text),
            "--user" => request.user = Some(text),
            "--entrypoint" => request.entrypoint = Some(text),
            "--name" => request.name = Some(text),
            "--rootfs-image" => request.rootfs_image = Some(ImageName::parse(&text)),
            "--rootfs" => request.rootfs = Some(text.into()),
            "--volume" => request.volumes.push(text),
            "--network" => request.network = Some(text),
            "--publish" => request.publish.push(text),
            "--cpus" => request.cpus = Some(text),
            "--memory" => request.memory = Some(text),
            "--disk" => request.disks.push(ImageName::parse(&text)),
            "--boot-timeout" => request.boot_timeout = Some(text),
            "--console-log" => request.console_log = Some(text.into()),
            "--assets" => request.assets = Some(text.into()),
            "--runtime" => match text.as_str() {
                "vm" => request.runtime = Runtime::Vm,
                "runc" => request.runtime = Runtime::Runc,
                _ => {
                    let cure = suggestion(&text, RUNTIMES, "use vm or runc");
                    self.problem(Problem::new(name, text, "no such runtime", cure));
                }
            },
            _ => match Wanted::parse(&text) {
                Some(wanted) => request.hypervisor = Some(wanted),
                None => {
                    let cure = suggestion(
                        &text,
                        Wanted::NAMES,
                        "use auto, pericarp, qemu, qemu-kvm or qemu-tcg",
                    );
                    self.problem(Problem::new(name, text, "no such hypervisor", cure));
                }
            },
        }
    }

    fn finish(mut self) -> Request {
        let roots = ["--image", "--rootfs-image", "--rootfs"];
        let given: Vec<&str> = roots.into_iter().filter(|root| self.seen(root)).collect();
        match given.as_slice() {
            [] => self.problem(Problem::new(
                "--image",
                None,
                "there is nothing to run on",
                "name an OCI image with it, a disk image with '--rootfs-image' or a directory \
                 with '--rootfs'",
            )),
            [_] => {}
            [first, .., last] => {
                let rule = format!("cannot be combined with '{first}'");
                self.problem(Problem::new(last, None, rule, "leave one out"));
            }
        }
        if self.seen("--entrypoint") && !self.seen("--image") {
            let rule = "has no meaning without an image, which has one";
            let cure = "put the program first after '--'";
            self.problem(Problem::new("--entrypoint", None, rule, cure));
        }
        if self.seen("--detach") {
            for option in ["--interactive", "--tty"] {
                if self.seen(option) {
                    let rule = "cannot be combined with '--detach'";
                    let cure = "leave one out; `pericarp exec -it` opens a terminal later";
                    self.problem(Problem::new(option, None, rule, cure));
                }
            }
        }
        if self.seen("--vmm") && self.seen("--hypervisor") {
            let rule = "cannot be combined with '--hypervisor', which is the same";
            self.problem(Problem::new("--vmm", None, rule, "leave one out"));
        }
        if self.request.runtime == Runtime::Runc {
            for option in [
                "--detach",
                "--name",
                "--disk",
                "--hypervisor",
                "--vmm",
                "--boot-timeout",
                "--console-log",
                "--assets",
            ] {
                if self.seen(option) {
                    let rule = "has no meaning for a container";
                    let cure = "leave it out, or use '--runtime vm'";
                    self.problem(Problem::new(option, None, rule, cure));
                }
            }
        }
        self.request
    }

    fn seen(&self, option: &str) -> bool {
        self.seen.iter().any(|seen| seen == option)
    }
}

fn suggestion<const N: usize>(text: &str, known: [&str; N], otherwise: &str) -> String {
    match nearest(text, known) {
        Some(near) => format!("did you mean '{near}'?"),
        None => otherwise.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &[&str]) -> Request {
        match parse(line.iter().map(OsString::from).collect()).unwrap() {
            Parsed::Run(request) => *request,
            Parsed::Help => panic!("help"),
        }
    }

    fn problems(line: &[&str]) -> Vec<String> {
        read(line)
            .problems
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn a_full_line_is_read() {
        let request = read(&[
            "--runtime=vm",
            "--rootfs-image",
            "root.img:ro",
            "--cpus=0.5",
            "--memory",
            "512M",
            "--disk",
            "a",
            "--disk",
            "b:ro",
            "--boot-timeout",
            "5",
            "--hypervisor",
            "qemu-tcg",
            "--assets",
            "x",
            "--timing",
            "--json",
            "-it",
            "-e",
            "A=1",
            "-eB",
            "-v/a:/b",
            "--volume=/c:/d:ro",
            "-u=0:0",
            "--",
            "sh",
            "-c",
            "--",
        ]);
        assert_eq!(request.problems, []);
        assert_eq!(request.command, ["sh", "-c", "--"]);
        assert_eq!(
            request.rootfs_image,
            Some(ImageName {
                path: "root.img".into(),
                read_only: true
            })
        );
        assert_eq!(request.env, ["A=1", "B"]);
        assert!(request.interactive && request.tty && !request.detach);
        assert_eq!(request.user.as_deref(), Some("0:0"));
        assert_eq!(request.disks.len(), 2);
        assert_eq!(request.volumes, ["/a:/b", "/c:/d:ro"]);
        assert_eq!(request.hypervisor, Some(Wanted::QemuTcg));
        assert!(request.timing && request.json);
    }

    #[test]
    fn each_bad_line_has_its_message() {
        let cases: [(&[&str], &str); 22] = [
            (
                &["--rootfs", "d"],
                "COMMAND: there is no command to run; put it after '--', such as: -- /bin/sh -c \
                 'uname -r'",
            ),
            (
                &["--", "true"],
                "--image: there is nothing to run on; name an OCI image with it, a disk image \
                 with '--rootfs-image' or a directory with '--rootfs'",
            ),
            (
                &["--rootfs", "d", "--rootfs-image", "i", "--", "true"],
                "--rootfs: cannot be combined with '--rootfs-image'; leave one out",
            ),
            (
                &["--rootfs", "d", "--entrypoint", "x", "--", "true"],
                "--entrypoint: has no meaning without an image, which has one; put the program \
                 first after '--'",
            ),
            (
                &["--image", "i", "-dt"],
                "--tty: cannot be combined with '--detach'; leave one out; `pericarp exec -it` \
                 opens a terminal later",
            ),
            (
                &["--image", "i", "-e"],
                "--env: needs a value; see `pericarp run --help`",
            ),
            (
                &["--image", "i", "--runtime", "runc", "-d"],
                "--detach: has no meaning for a container; leave it out, or use '--runtime vm'",
            ),
            (
                &["--rootfs", "d", "--cpu", "2", "--", "true"],
                "'--cpu': unknown option; did you mean '--cpus'?",
            ),
            (
                &["--rootfs", "d", "--expose", "80", "--", "true"],
                "'--expose': unknown option; see `pericarp run --help`",
            ),
            (
                &["--rootfs", "d", "-x", "--", "true"],
                "'-x': unknown option; see `pericarp run --help`",
            ),
            (
                &["--rootfs", "d", "--cpus", "1", "--cpus", "2", "--", "true"],
                "--cpus '2': is given twice; leave one out",
            ),
            (
                &["--rootfs", "d", "--json", "--json", "--", "true"],
                "--json: is given twice; leave one out",
            ),
            (
                &["--rootfs", "d", "--timing=yes", "--", "true"],
                "--timing 'yes': takes no value; leave it out",
            ),
            (
                &["--rootfs", "d", "--memory", "--", "true"],
                "--memory: needs a value; see `pericarp run --help`",
            ),
            (
                &["--rootfs", "", "--", "true"],
                "--rootfs '': is empty; see `pericarp run --help`",
            ),
            (
                &["--rootfs", "d", "--runtime", "docker", "--", "true"],
                "--runtime 'docker': no such runtime; use vm or runc",
            ),
            (
                &["--rootfs", "d", "--runtime", "run", "--", "true"],
                "--runtime 'run': no such runtime; did you mean 'runc'?",
            ),
            (
                &[
                    "--rootfs",
                    "d",
                    "--vmm",
                    "qemu",
                    "--hypervisor",
                    "qemu",
                    "--",
                    "true",
                ],
                "--vmm: cannot be combined with '--hypervisor', which is the same; leave one out",
            ),
            (
                &["--rootfs", "d", "--hypervisor", "qemu-kmv", "--", "true"],
                "--hypervisor 'qemu-kmv': no such hypervisor; did you mean 'qemu-kvm'?",
            ),
            (
                &["--rootfs", "d", "echo", "--", "true"],
                "pericarp run 'echo': is not an option; put the command after '--'",
            ),
            (
                &[
                    "--rootfs",
                    "d",
                    "--runtime",
                    "runc",
                    "--disk",
                    "a",
                    "--",
                    "true",
                ],
                "--disk: has no meaning for a container; leave it out, or use '--runtime vm'",
            ),
            (
                &["--rootfs", "d", "--", ""],
                "COMMAND: there is no command to run; put it after '--', such as: -- /bin/sh -c \
                 'uname -r'",
            ),
        ];
        for (line, message) in cases {
            assert_eq!(problems(line), [message], "{line:?}");
        }
    }

    #[test]
    fn all_problems_of_a_line_are_reported() {
        let all = problems(&["--cpu", "2", "--runtime", "docker", "stray", "--"]);
        assert_eq!(all.len(), 5, "{all:#?}");
    }

    #[test]
    fn a_command_needs_no_mark_before_it() {
        let request = read(&["--image", "i", "-t", "sh", "-c", "a", "-i"]);
        assert_eq!(request.problems, []);
        assert_eq!(request.command, ["sh", "-c", "a", "-i"]);
        assert!(request.tty && !request.interactive);
    }

    #[test]
    fn the_help_names_every_option() {
        for (_, option, ..) in OPTIONS {
            assert!(HELP.contains(option), "{option}");
        }
        let asked = parse(vec!["--bogus".into(), "--help".into()]);
        assert!(matches!(asked, Ok(Parsed::Help)));
    }
}
