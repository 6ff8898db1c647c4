//! Containers and processes as the host drives them: create, attach, start, and the end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use pericarp_api::agent::{
    ContainerRequest, CreateContainerRequest, CreateProcessRequest, Device, ProcessRequest,
    ResizeRequest, RootFs, SignalRequest, StatsRequest, StatsResponse, Streams,
};
use pericarp_api::{ExitReport, StreamKind, StreamTarget};
use serde_json::{Value, json};

use crate::rig::{LIMIT, Machine, limited};

/// What a test wants of a container.
pub(crate) struct Wish<'a> {
    pub(crate) args: Vec<&'a str>,
    pub(crate) user: &'a str,
    pub(crate) cwd: &'a str,
    pub(crate) terminal: bool,
    pub(crate) memory: Option<u64>,
    /// The disk with the root.
    pub(crate) disk: &'a str,
    pub(crate) writable_layer: bool,
    /// Shown as `/dev/data`.
    pub(crate) device: Option<&'a str>,
    /// In the process namespace of the pod.
    pub(crate) shared_processes: bool,
}

impl<'a> Wish<'a> {
    /// This command in a container of its own, with a writable layer.
    pub(crate) fn run(args: &[&'a str]) -> Self {
        Wish {
            args: args.to_vec(),
            user: "",
            cwd: "/",
            terminal: false,
            memory: None,
            disk: "root",
            writable_layer: true,
            device: None,
            shared_processes: false,
        }
    }

    /// The same with a terminal.
    pub(crate) fn terminal(args: &[&'a str]) -> Self {
        Wish {
            terminal: true,
            ..Wish::run(args)
        }
    }

    fn process(&self) -> Value {
        let capabilities = [
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_KILL",
            "CAP_SETGID",
            "CAP_SETUID",
        ];
        json!({
            "terminal": self.terminal,
            "args": self.args,
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": self.cwd,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
        })
    }

    fn config(&self) -> Value {
        let mount = |at: &str, kind: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
        let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
        if let Some(limit) = self.memory {
            resources["memory"] = json!({"limit": limit, "swap": limit});
        }
        let namespaces: Vec<Value> = ["pid", "ipc", "uts", "mount", "cgroup"]
            .iter()
            .filter(|kind| !(self.shared_processes && **kind == "pid"))
            .map(|kind| json!({"type": kind}))
            .collect();
        json!({
            "ociVersion": "1.0.2",
            "root": {},
            "process": self.process(),
            "mounts": [
                mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666",
                      "mode=0620", "gid=5"]),
                mount("/dev/shm", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
                mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
                mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            "linux": {"namespaces": namespaces, "resources": resources},
        })
    }

    fn streams(&self) -> Option<Streams> {
        Some(Streams {
            stdin: true,
            stdout: true,
            stderr: !self.terminal,
            ..Streams::default()
        })
    }
}

/// A registered process with all its streams attached.
pub(crate) struct Attached<'m> {
    machine: &'m Machine,
    container: String,
    process: String,
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
    pub(crate) exit: UnixStream,
}

/// All a process said, and its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) report: ExitReport,
}

impl Ended {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

impl Machine {
    /// Creates a container, and attaches to all its streams.
    pub(crate) fn create(&self, id: &str, wish: &Wish<'_>) -> ttrpc::Result<Attached<'_>> {
        let devices = wish.device.iter().map(|disk| Device {
            disk: (*disk).to_owned(),
            path: "/dev/data".into(),
            ..Device::default()
        });
        let request = CreateContainerRequest {
            container: id.into(),
            root: Some(RootFs {
                source: wish.disk.into(),
                fs_type: if wish.disk == "root" { "erofs" } else { "ext4" }.into(),
                read_only: wish.writable_layer,
                writable_layer: wish.writable_layer,
                ..RootFs::default()
            })
            .into(),
            spec: wish.config().to_string().into_bytes(),
            user: wish.user.into(),
            devices: devices.collect(),
            streams: wish.streams().into(),
            shared_processes: wish.shared_processes,
            ..CreateContainerRequest::default()
        };
        self.client().create_container(limited(), &request)?;
        Ok(self.attach_all(id, "", wish.terminal))
    }

    /// Registers a further process, and attaches to all its streams.
    pub(crate) fn exec(
        &self,
        container: &str,
        process: &str,
        wish: &Wish<'_>,
    ) -> ttrpc::Result<Attached<'_>> {
        let request = CreateProcessRequest {
            container: container.into(),
            process: process.into(),
            spec: wish.process().to_string().into_bytes(),
            user: wish.user.into(),
            streams: wish.streams().into(),
            ..CreateProcessRequest::default()
        };
        self.client().create_process(limited(), &request)?;
        Ok(self.attach_all(container, process, wish.terminal))
    }

    pub(crate) fn attach(&self, kind: StreamKind, container: &str, process: &str) -> UnixStream {
        let target = StreamTarget {
            kind,
            container: container.into(),
            process: process.into(),
        };
        let stream = self
            .guest
            .attach(&target)
            .unwrap_or_else(|error| panic!("{target:?}: {error}\n{}", self.console()));
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn attach_all(&self, container: &str, process: &str, terminal: bool) -> Attached<'_> {
        let attach = |kind| self.attach(kind, container, process);
        Attached {
            machine: self,
            container: container.into(),
            process: process.into(),
            stdin: Some(attach(StreamKind::Stdin)),
            stdout: Some(attach(StreamKind::Stdout)),
            stderr: (!terminal).then(|| attach(StreamKind::Stderr)),
            exit: attach(StreamKind::Exit),
        }
    }

    /// A whole run in a container of its own, which is removed.
    pub(crate) fn run(&self, id: &str, wish: &Wish<'_>) -> Ended {
        let process = self.create(id, wish).unwrap();
        process.start().unwrap();
        let ended = process.finish(b"");
        self.remove(id);
        ended
    }

    /// A whole further process.
    pub(crate) fn run_in(&self, container: &str, process: &str, wish: &Wish<'_>) -> Ended {
        let process = self.exec(container, process, wish).unwrap();
        process.start().unwrap();
        process.finish(b"")
    }

    pub(crate) fn remove(&self, container: &str) {
        let request = ContainerRequest {
            container: container.into(),
            ..ContainerRequest::default()
        };
        let removed = self.client().remove_container(limited(), &request);
        removed.unwrap_or_else(|error| panic!("{error}\n{}", self.console()));
    }

    pub(crate) fn stats(&self, container: &str) -> StatsResponse {
        let request = StatsRequest {
            container: container.into(),
            ..StatsRequest::default()
        };
        self.client().get_stats(limited(), &request).unwrap()
    }
}

impl Attached<'_> {
    pub(crate) fn start(&self) -> ttrpc::Result<u32> {
        let request = ProcessRequest {
            container: self.container.clone(),
            process: self.process.clone(),
            ..ProcessRequest::default()
        };
        let started = self.machine.client().start_process(limited(), &request);
        started.map(|response| response.pid)
    }

    pub(crate) fn signal(&self, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container: self.container.clone(),
            process: self.process.clone(),
            signal,
            all,
            ..SignalRequest::default()
        };
        let sent = self.machine.client().signal_process(limited(), &request);
        sent.map(|_| ())
    }

    pub(crate) fn resize(&self, columns: u32, rows: u32) -> ttrpc::Result<()> {
        let request = ResizeRequest {
            container: self.container.clone(),
            process: self.process.clone(),
            columns,
            rows,
            ..ResizeRequest::default()
        };
        let resized = self.machine.client().resize_terminal(limited(), &request);
        resized.map(|_| ())
    }

    /// Reads from its output until `text` has come. Gives all that was read.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let stdout = self.stdout.as_mut().unwrap();
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut byte = [0; 256];
            match stdout.read(&mut byte) {
                Ok(count @ 1..) => seen.extend_from_slice(&byte[..count]),
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        String::from_utf8(seen).unwrap()
    }

    /// Writes `input` and its end, reads everything, and waits for the report.
    pub(crate) fn finish(mut self, input: &[u8]) -> Ended {
        let (stdin, stdout, stderr) = (self.stdin.take(), self.stdout.take(), self.stderr.take());
        thread::scope(|scope| {
            scope.spawn(move || {
                // A process need not read its input.
                if let Some(mut stdin) = stdin {
                    let _ = stdin.write_all(input);
                    let _ = stdin.shutdown(Shutdown::Write);
                }
            });
            let read = |stream: Option<UnixStream>| {
                scope.spawn(move || {
                    let mut bytes = Vec::new();
                    if let Some(mut stream) = stream {
                        stream.read_to_end(&mut bytes).unwrap();
                    }
                    bytes
                })
            };
            let (stdout, stderr) = (read(stdout), read(stderr));
            let report = self.report();
            Ended {
                stdout: stdout.join().unwrap(),
                stderr: stderr.join().unwrap(),
                report,
            }
        })
    }

    /// Waits for the report.
    pub(crate) fn report(&mut self) -> ExitReport {
        let report = ExitReport::read(&mut self.exit);
        report.unwrap_or_else(|error| panic!("no report: {error}\n{}", self.machine.console()))
    }
}
