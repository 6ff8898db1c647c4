//! A pod to look at: one container in a machine with a disk, two shared directories, and,
//! where this host has CNI plugins, a network card. It lives in a network of its own, with
//! files of its own, and is gone when it is dropped.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::bounded::poll;
use crate::network::Network;
use crate::oci;
use crate::parts::{Part, beside_us, missing};
use crate::process::{Process, command};
use crate::scratch::Scratch;

use super::pods::{Pod, running};

/// An emulated CPU boots in some seconds; one that is emulated twice takes longer.
const BOOT: Duration = Duration::from_secs(300);
const END: Duration = Duration::from_secs(60);
/// Longer than anybody looks.
const LIFE: Duration = Duration::from_secs(3600);
const READY: &str = "the container runs";

/// What it is made of.
pub const PARTS: [Part; 6] = [
    Part::Ours("pericarp"),
    Part::PERICARP_BLOCK,
    Part::PERICARP_FS,
    Part::PERICARP_VSOCK,
    Part::MkfsExt4,
    Part::Busybox,
];

/// A running pod.
#[derive(Debug)]
pub struct Example {
    run: Process,
    /// In the order in which they go.
    _scratch: Scratch,
    /// Why it has no network card, if it has none.
    pub without_card: Option<String>,
}

impl Example {
    /// Starts it and waits until its container runs. The calling thread is in a network of
    /// its own from then on, and the pod ends with it.
    ///
    /// # Errors
    /// It does not start; the last lines that it wrote are in the message.
    pub fn start(assets: &Path) -> io::Result<Self> {
        let scratch = Scratch::new();
        let (tree, volume) = (scratch.path("tree"), scratch.path("volume"));
        oci::busybox(&tree, oci::ALL_TOOLS);
        fs::create_dir(&volume)?;
        let mut without_card = missing(&[Part::PERICARP_NET, Part::Ip, Part::Cni]);
        let network = match without_card {
            Some(_) => None,
            None => Network::empty("an example", &[]),
        };
        if network.is_none() {
            without_card.get_or_insert_with(|| "no network of its own".to_owned());
        }
        let mut run = command(&beside_us().join("pericarp"));
        run.args([
            "run",
            "--memory",
            "128M",
            "--boot-timeout",
            "300",
            "--rootfs",
        ])
        .arg(&tree)
        .arg("--volume")
        .arg(format!("{}:/data", volume.display()));
        if network.is_some() {
            let networks = scratch.path("networks");
            fs::create_dir(&networks)?;
            let addresses = json!({
                "type": "host-local",
                "dataDir": scratch.path("addresses"),
                "ranges": [[{"subnet": "10.97.0.0/24"}]],
            });
            let plugins = json!([{"type": "ptp", "ipam": addresses}]);
            let list = json!({"cniVersion": "0.4.0", "name": "example", "plugins": plugins});
            fs::write(networks.join("10-example.conflist"), list.to_string())?;
            run.args(["--network", "cni:example"])
                .env("NETCONFPATH", networks)
                .env("CNI_PATH", "/usr/lib/cni");
        }
        let script = format!("trap 'exit 0' TERM; echo {READY}; while :; do sleep 1; done");
        run.args(["--", "sh", "-c", &script])
            .env("XDG_RUNTIME_DIR", scratch.dir())
            .env("XDG_CACHE_HOME", scratch.path("cache"))
            .env("TMPDIR", scratch.dir())
            .env("PERICARP_ASSETS", assets);
        let mut run = Process::start(&mut run, LIFE)?;
        let ready = poll(BOOT, || {
            let ready = run.output().find(READY).is_some();
            (ready || run.ended().is_some()).then_some(ready)
        });
        if ready != Some(true) {
            let said = run.output().last(20);
            return Err(io::Error::other(format!(
                "no pod: it {}: {said}",
                run.epitaph()
            )));
        }
        Ok(Self {
            run,
            _scratch: scratch,
            without_card,
        })
    }

    /// Its processes.
    ///
    /// # Errors
    /// It has ended.
    pub fn pod(&self) -> io::Result<Pod> {
        let first = self.run.pid();
        let mut pods = running()?.into_iter();
        pods.find(|pod| pod.members.iter().any(|member| member.pid == first))
            .ok_or_else(|| io::Error::other("the pod has ended"))
    }
}

impl Drop for Example {
    /// In an orderly way, so that its network is taken apart.
    fn drop(&mut self) {
        self.run.signal(Signal::TERM);
        self.run.wait(END);
    }
}
