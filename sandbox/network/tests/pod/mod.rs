//! A pod and its node, for the tests of this crate: namespaces that are there for one test.

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use pericarp_network::Namespace;
use pericarp_tests::{
    bounded::poll,
    parts::{Part, have, search_path, skip},
};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Whether these tests can be run here. Otherwise says why not.
pub(crate) fn possible(test: &str) -> bool {
    if !have(test, &[Part::Ip]) {
        return false;
    }
    if search_path("tc").is_none() {
        return skip(test, "tc missing (install: apt package iproute2)");
    }
    if !rustix::process::geteuid().is_root() {
        return skip(test, "takes root, for namespaces of its own");
    }
    true
}

/// A namespace that is removed with this.
pub(crate) struct Space {
    pub(crate) namespace: Namespace,
    path: PathBuf,
}

impl Space {
    pub(crate) fn new(test: &str) -> Option<Self> {
        if !possible(test) {
            return None;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-space-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let namespace = Namespace::create(&path).expect("a namespace");
        Some(Self { namespace, path })
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(work).expect("a thread in it")
    }

    pub(crate) fn ip(&self, words: &str) -> String {
        self.tool("ip", words)
    }

    pub(crate) fn tc(&self, words: &str) -> String {
        self.tool("tc", words)
    }

    fn tool(&self, tool: &str, words: &str) -> String {
        let mut command = Command::new(search_path(tool).expect("a tool that was there"));
        command.args(words.split_whitespace());
        let output = self.run(|| command.output()).expect("a tool that starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{tool} {words}: {said}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Everything about links, qdiscs and filters that an attach could leave behind.
    pub(crate) fn snapshot(&self) -> String {
        let mut all = self.ip("-d link") + &self.ip("addr") + &self.tc("qdisc");
        // Time passes for a bridge, and for addresses that are new.
        all = all.replace(" tentative", "");
        let still = |line: &&str| !line.starts_with("    bridge");
        all = all.lines().filter(still).collect::<Vec<_>>().join("\n");
        let links = self.ip("-o link");
        for link in links.lines() {
            let name = link.split([':', '@']).nth(1).expect("a name").trim();
            all += &format!("{name}\n");
            if self.tc(&format!("qdisc show dev {name}")).contains("ffff:") {
                all += &self.tc(&format!("filter show dev {name} ingress"));
            }
        }
        all
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Ok(namespace) = Namespace::open(&self.path) {
            let _ = namespace.remove();
        }
    }
}

/// A pod with `eth0`, whose other end `node0` is in the node's namespace and answers as
/// 10.9.0.1.
pub(crate) struct Pod {
    pub(crate) inside: Space,
    pub(crate) node: Space,
}

impl Pod {
    pub(crate) fn new(test: &str) -> Option<Self> {
        let inside = Space::new(test)?;
        let node = Space::new(test)?;
        inside.ip("link add eth0 address 02:00:00:00:09:02 type veth peer name node0 address 02:00:00:00:09:01");
        inside.ip(&format!("link set node0 netns {}", node.path.display()));
        inside.ip("link set lo up");
        inside.ip("link set eth0 up");
        node.ip("link set node0 addrgenmode none up");
        node.ip("addr add 10.9.0.1/24 dev node0");
        // The kernel sees to both a moment later.
        let ready = poll(Duration::from_secs(5), || {
            let shown = inside.ip("addr show eth0");
            (shown.contains("state UP") && shown.contains("inet6 fe80")).then_some(())
        });
        assert!(ready.is_some(), "eth0 does not come up");
        Some(Self { inside, node })
    }
}

/// As `ip` has it.
pub(crate) fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
