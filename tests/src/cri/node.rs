//! A containerd in namespaces of its own: mounts, network and processes. Called by tests, one
//! node for each.
//!
//! `/run` and what containerd keeps in `/var/lib/cni` are memory that only the node sees;
//! everything else of its is in the test's scratch directory, and its cgroups have one parent. The
//! first process of the node ends when the test does, however that ends, and all others with it;
//! their mounts and network go with the last of them. When a test is killed, that directory stays,
//! as every scratch directory does, and empty cgroups, which the next node removes. `/var/lib/cni` is made where it
//! is not there, since plugins have no other place; where it cannot be, the node has an empty `/var/lib`.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::client::CallError;
use super::client::Client;
use super::config::{self, Handler};
use super::pod::Pod;
use super::proto::PodSandboxConfig;
use super::traces::{self, Traces};
use crate::bounded::poll;
use crate::oci;
use crate::parts::{Part, beside_us, have, skip};
use crate::process::{Process, command};
use crate::scratch::Scratch;

/// How long one step may take on a slow machine.
pub const STEP: Duration = Duration::from_secs(30);
/// How long a node may live.
const LIFETIME: Duration = Duration::from_secs(300);
/// Says another number of seconds, for tests that are asked to make many pods.
const SECONDS: &str = "PERICARP_NODE_SECONDS";
/// Lines of containerd's log that a failed test shows.
const SHOWN: usize = 60;
/// The magic number of overlayfs.
const OVERLAY: i64 = 0x794c_7630;

/// What a node is made of.
const PARTS: [Part; 8] = [
    Part::Containerd,
    Part::Ctr,
    Part::Runc,
    Part::Cni,
    Part::Ip,
    Part::Busybox,
    Part::Unshare,
    Part::Nsenter,
];

/// The first process. Its id is that of the host because `/proc` still is. Who is left to it when
/// it ends is forgotten at once: a signal that is ignored stays so in the next program.
const INIT: &str = r#"set -e
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs -o mode=755 run /run
mkdir -p /var/lib/cni 2>/dev/null || {
  mount -t tmpfs -o mode=755 lib /var/lib
  mkdir /var/lib/cni
}
mount -t tmpfs -o mode=755 cni /var/lib/cni
ip link set lo up
echo "node is $pid"
exec env --ignore-signal=CHLD sleep infinity
"#;

/// A node. What is started on it ends with it.
#[derive(Debug)]
pub struct Node {
    scratch: Scratch,
    keeper: Process,
    init: i32,
    containerd: Process,
    client: Client,
    path: std::ffi::OsString,
    life: Duration,
    before: Traces,
}

impl Node {
    /// Starts one, with these handlers for pods, and gives it its images. `None` is a skipped
    /// test, and says so.
    ///
    /// # Panics
    /// When a part is missing and nothing may be skipped; when containerd does not start.
    pub fn start(test: &str, handlers: &[Handler]) -> Option<Self> {
        Self::start_for(test, handlers, lifetime())
    }

    /// The same of one that may live as long as this.
    ///
    /// # Panics
    /// As [`Node::start`].
    pub fn start_for(test: &str, handlers: &[Handler], life: Duration) -> Option<Self> {
        if !have(test, &PARTS) {
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            skip(test, "takes root, for pods");
            return None;
        }
        remove_what_was_left();
        let scratch = Scratch::new();
        for directory in ["root", "cni", "logs"] {
            fs::create_dir(scratch.path(directory)).expect("a directory");
        }
        let snapshotter = snapshotter(scratch.dir());
        let config = config::containerd(scratch.dir(), snapshotter, handlers);
        scratch.file("config.toml", config.as_bytes());
        for handler in handlers {
            if let Some(text) = handler.config {
                let file = handler.config_file(scratch.dir());
                fs::write(&file, text).expect("a configuration");
                enable(&scratch.path("config.toml"), &file);
            }
        }
        let network = config::network(scratch.dir());
        scratch.file("cni/10-pods.conflist", network.as_bytes());
        let (keeper, init) = keeper(life);
        let path = program_path(handlers);
        let containerd = containerd(scratch.dir(), init, &path, life);
        let client = dial(&scratch, &containerd);
        let mut node = Self {
            scratch,
            keeper,
            init,
            containerd,
            client,
            path,
            life,
            before: Traces::new(),
        };
        node.import();
        node.before = node.traces();
        Some(node)
    }

    /// The calls of CRI.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Another connection, for a thread that is not to wait for others.
    ///
    /// # Errors
    /// When containerd does not listen.
    pub fn dial(&self) -> Result<Client, CallError> {
        Client::dial(&self.scratch.path("c.sock"))
    }

    /// The test's directory, which the node has at the same place.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Its root directory, as we reach it.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init))
    }

    /// A program in the node's namespaces.
    pub fn command(&self, program: &std::ffi::OsStr) -> Command {
        let nsenter = Part::Nsenter.find().unwrap_or_default();
        let mut command = Command::new(nsenter);
        command
            .args(["--target", &self.init.to_string()])
            .args(["--mount", "--net", "--pid", "--"])
            .arg(program)
            .env("PATH", &self.path)
            .current_dir("/");
        command
    }

    /// Runs one; what it wrote.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> Vec<u8> {
        let mut command = self.command(words[0].as_ref());
        let output = command.args(&words[1..]).output();
        let output = output.expect("nsenter can be started");
        assert!(output.status.success(), "{words:?}: {output:?}");
        output.stdout
    }

    /// The cgroup that all pods' are in, by its name in each hierarchy.
    pub fn parent(&self) -> String {
        let name = self.scratch.dir().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Runs a pod of this configuration, after where its logs and cgroups are was added to it.
    ///
    /// # Errors
    /// When containerd or the handler does not want it.
    pub fn run_pod(&self, config: PodSandboxConfig, handler: &str) -> Result<Pod<'_>, CallError> {
        let mut config = config;
        let logs = self.scratch.path("logs").join(&config.metadata.name);
        config.log_directory = logs.display().to_string();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = format!("/{}", self.parent());
        Pod::run(self, config, handler)
    }

    /// Connects to an address of the node's own network.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.there(move || TcpStream::connect_timeout(&to, STEP))
    }

    /// Listens at a port of the node's own network, at all of its addresses.
    ///
    /// # Errors
    /// When somebody else does.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        self.there(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
    }

    /// Makes a socket in the node's network.
    fn there<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let network = File::open(format!("/proc/{}/ns/net", self.init))?;
        // A socket stays in the network in which it was made; only a thread can go there.
        let thread = std::thread::spawn(move || {
            use std::os::fd::AsFd as _;
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
            make()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    }

    /// A program in the node's mounts, network and processes, beside containerd.
    pub fn inside(&self, program: &Path) -> Command {
        let mut command = inside(self.init, &self.path);
        command.arg(program);
        command
    }

    /// The same of processes that only need the node's network.
    pub fn on_its_network(&self, program: &Path) -> Command {
        let mut command = command(&Part::Nsenter.find().unwrap_or_default());
        command
            .args(["--target", &self.init.to_string(), "--net", "--"])
            .arg(program);
        command
    }

    /// Runs our command on the node, as its operator does: the code, the output and the errors.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn pericarp(&self, words: &[&str]) -> (Option<i32>, String, String) {
        self.program(&beside_us().join("pericarp"), words)
    }

    /// Runs a program on the node: the code, the output and the errors.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn program(&self, program: &Path, words: &[&str]) -> (Option<i32>, String, String) {
        let output = self
            .inside(program)
            .args(words)
            .output()
            .expect("nsenter can be started");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        (output.status.code(), said, errors)
    }

    /// Kills containerd, and only it, and starts it again.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.containerd.kill();
        self.containerd = containerd(self.scratch.dir(), self.init, &self.path, self.life);
        self.client = dial(&self.scratch, &self.containerd);
    }

    /// What containerd wrote.
    pub fn log(&self) -> String {
        self.containerd.output().last(SHOWN)
    }

    /// All that there is on the node.
    fn traces(&self) -> Traces {
        traces::of(self.init, self.scratch.dir(), &self.parent()).expect("the node is there")
    }

    /// What is more on the node than before the first pod. Containerd itself may be another.
    pub fn left(&self) -> Traces {
        let of_containerd = format!("config.toml --root {}", self.scratch.dir().display());
        let mut left = self.traces();
        left.retain(|trace| !self.before.contains(trace) && !trace.contains(&of_containerd));
        left
    }

    /// Nothing is left of pods. The kernel takes a moment for some of it.
    ///
    /// # Panics
    /// When something is, with a list.
    pub fn assert_clean(&self) {
        if poll(STEP, || self.left().is_empty().then_some(())).is_none() {
            let left: Vec<String> = self.left().into_iter().collect();
            panic!("left on the node:\n{}", left.join("\n"));
        }
    }

    fn images(&self, archive: &Path) {
        let output = Command::new(Part::Ctr.find().unwrap_or_default())
            .arg("--address")
            .arg(self.scratch.path("c.sock"))
            .args(["-n", "k8s.io", "images", "import", "--snapshotter"])
            .arg(snapshotter(self.scratch.dir()))
            .arg(archive)
            .output()
            .expect("ctr can be started");
        assert!(output.status.success(), "{output:?}\n{}", self.log());
    }

    /// Gives containerd the images of `config`.
    fn import(&self) {
        self.images(&images(&self.scratch));
        for image in [config::IMAGE, config::ARTICLES_IMAGE, config::PAUSE] {
            // The part of containerd that knows CRI hears of it a moment later.
            let known = poll(STEP, || self.client.image(image).ok().flatten());
            assert!(known.is_some(), "{image} is not there\n{}", self.log());
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the end of containerd's log:\n{}", self.log());
        }
        // The first process takes the others with it; it is not reaped before they are.
        self.keeper.kill();
        self.containerd.kill();
        let exe = format!("/proc/{}/exe", self.init);
        let gone = poll(STEP, || fs::read_link(&exe).is_err().then_some(()));
        if gone.is_none() {
            eprintln!("process {} does not end", self.init);
        }
        // The kernel takes a moment to see that they are empty.
        if poll(STEP, || {
            traces::remove_cgroups(&self.parent()).then_some(())
        })
        .is_none()
        {
            eprintln!("cgroups of {} stay", self.parent());
        }
    }
}

/// Starts the first process, and says which that is.
fn keeper(life: Duration) -> (Process, i32) {
    let unshare = Part::Unshare.find().unwrap_or_default();
    let mut command = command(&unshare);
    command
        .args(["--mount", "--net", "--pid", "--kill-child"])
        .args(["sh", "-c", INIT])
        .env("PATH", program_path(&[]));
    let mut keeper = Process::start(&mut command, life).expect("unshare can be started");
    let init = poll(STEP, || {
        let line = keeper.output().find("node is ")?;
        line.rsplit(' ').next()?.parse().ok()
    });
    let Some(init) = init else {
        let end = keeper.epitaph();
        panic!("no namespaces: it {end}\n{}", keeper.output().last(SHOWN));
    };
    (keeper, init)
}

fn containerd(dir: &Path, init: i32, path: &std::ffi::OsStr, life: Duration) -> Process {
    let mut command = inside(init, path);
    command
        .arg(Part::Containerd.find().unwrap_or_default())
        .arg("--config")
        .arg(dir.join("config.toml"))
        // The configuration says so, too; here it tells which process this is.
        .arg("--root")
        .arg(dir.join("root"));
    Process::start(&mut command, life).expect("nsenter can be started")
}

/// The beginning of a command that is to run on the node.
fn inside(init: i32, path: &std::ffi::OsStr) -> Command {
    let nsenter = Part::Nsenter.find().unwrap_or_default();
    let mut command = command(&nsenter);
    command
        .args(["--target", &init.to_string()])
        .args(["--mount", "--net", "--pid", "--"])
        .env("PATH", path)
        .current_dir("/");
    command
}

/// How long a process of the node may live.
pub fn lifetime() -> Duration {
    let said = std::env::var(SECONDS).ok();
    let seconds = said.and_then(|text| text.parse().ok());
    seconds.map_or(LIFETIME, Duration::from_secs)
}

/// Has containerd know our handlers, as an operator does.
fn enable(containerd: &Path, config: &Path) {
    let mut command = Command::new(beside_us().join("pericarp"));
    let options = ["node", "enable", "--containerd-config"];
    let output = command
        .args(options)
        .arg(containerd)
        .arg("--config")
        .arg(config)
        .output()
        .expect("pericarp can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Waits until containerd can run pods.
fn dial(scratch: &Scratch, containerd: &Process) -> Client {
    let socket = scratch.path("c.sock");
    assert!(
        socket.as_os_str().as_bytes().len() + ".ttrpc".len() < 108,
        "{} is too long for a socket; see PERICARP_TEST_DIR",
        socket.display()
    );
    let client = poll(STEP, || {
        let client = Client::dial(&socket).ok()?;
        let conditions = client.status().ok()?;
        (!conditions.is_empty() && conditions.iter().all(|one| one.status)).then_some(client)
    });
    match client {
        Some(client) => client,
        None => panic!("no containerd:\n{}", containerd.output().last(SHOWN)),
    }
}

/// Where programs are looked for: those of handlers first.
fn program_path(handlers: &[Handler]) -> std::ffi::OsString {
    let own = handlers.iter().filter_map(|one| one.programs.clone());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    let all: Vec<PathBuf> = own
        .chain(std::env::split_paths(&path))
        .chain(system)
        .collect();
    std::env::join_paths(all).expect("no colon in the name of a directory")
}

/// An overlay takes no overlay as its upper directory.
fn snapshotter(dir: &Path) -> &'static str {
    let kind = rustix::fs::statfs(dir).map(|fs| fs.f_type);
    if kind.is_ok_and(|kind| kind == OVERLAY) {
        "native"
    } else {
        "overlayfs"
    }
}

/// The images, in one archive.
fn images(scratch: &Scratch) -> PathBuf {
    let tree = scratch.path("tree");
    oci::busybox(&tree, oci::ALL_TOOLS);
    let write = |name: &str, text: &str| fs::write(tree.join(name), text).expect("a file");
    write(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nada:x:1234:1235::/home/ada:/bin/sh\n",
    );
    write("etc/group", "root:x:0:\nada:x:1235:\nmath:x:77:ada\n");
    write("bin/bash", "#!/bin/sh\nexec /bin/sh \"$@\"\n");
    let run = |program: &str, words: &[&str]| {
        let done = Command::new(program)
            .args(words)
            .current_dir(&tree)
            .status();
        assert!(
            done.is_ok_and(|status| status.success()),
            "{program} {words:?}"
        );
    };
    run("chmod", &["755", "bin/bash"]);
    run("mkdir", &["-p", "home/ada"]);
    run("chown", &["1234:1235", "home/ada"]);
    let tools = r#"{"Env":["PATH=/bin","GREETING=hello"],"WorkingDir":"/home/ada",
        "Entrypoint":["/bin/echo"],"Cmd":["of","the","image"]}"#;
    // While it waits it reaps what is left to it, as the first process of a shared namespace has to.
    let pause = r#"{"Entrypoint":["/bin/sh","-c","sleep 1000000 & wait"]}"#;
    let image = |name, config| oci::Image {
        name: Some(name),
        layers: vec![&tree],
        config,
    };
    let archive = scratch.path("images.tar");
    let images = [
        image(config::IMAGE, tools),
        image(config::ARTICLES_IMAGE, tools),
        image(config::PAUSE, pause),
    ];
    oci::archive(scratch, &images, &archive);
    archive
}

/// Cgroups of tests that were killed.
fn remove_what_was_left() {
    for hierarchy in traces::hierarchies().unwrap_or_default() {
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("pericarp-test-").unwrap_or_default();
            let pid = number.split('-').next().unwrap_or_default();
            if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
                traces::remove_cgroups(&name);
            }
        }
    }
}
