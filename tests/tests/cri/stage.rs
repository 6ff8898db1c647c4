//! Who runs the pods of a case, and what is the same for all cases.

use pericarp_tests::bounded::poll;
use pericarp_tests::cri::node::STEP;
use pericarp_tests::cri::{Container, Handler, Node, Pod, container, pod};
use pericarp_tests::parts::{Part, have};

/// A handler, and in what a case may differ under it.
pub(crate) struct Subject {
    /// Its name.
    pub(crate) name: &'static str,
    /// Whether its pods have a kernel that is not the host's.
    pub(crate) own_kernel: bool,
    /// Whether a container's cgroup is one of the host, below the pod's.
    pub(crate) cgroups_of_host: bool,
    /// Whether it may go unnoticed that the first process was killed for its memory: the shim of
    /// runc is told by a cgroup which is gone by then.
    pub(crate) may_lose_oom: bool,
    /// What it takes besides a node.
    parts: &'static [Part],
    handler: fn() -> Handler,
}

/// Debian's runc: the reference.
pub(crate) const RUNC: Subject = Subject {
    name: "runc",
    own_kernel: false,
    cgroups_of_host: true,
    may_lose_oom: true,
    parts: &[],
    handler: || Handler::runc("runc"),
};

/// Ours: a machine for each pod.
pub(crate) const PERICARP: Subject = Subject {
    name: "pericarp",
    own_kernel: true,
    cgroups_of_host: false,
    may_lose_oom: false,
    parts: &Handler::PARTS,
    handler: Handler::pericarp,
};

/// A node on which a case is played.
pub(crate) struct Stage {
    pub(crate) node: Node,
    pub(crate) subject: &'static Subject,
}

/// A command that does nothing, and ends when it is asked to.
pub(crate) const IDLE: [&str; 3] = ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"];

impl Stage {
    /// Plays a case, and sees to that nothing is left of it.
    pub(crate) fn play(case: &str, subject: &'static Subject, act: fn(&mut Stage)) {
        let mut handlers = vec![Handler::runc("runc")];
        if subject.name != "runc" {
            handlers.push((subject.handler)());
        }
        let test = format!("{}::{case}", subject.name);
        if !have(&test, subject.parts) {
            return;
        }
        let Some(node) = Node::start(&test, &handlers) else {
            return;
        };
        let mut stage = Stage { node, subject };
        act(&mut stage);
        let client = stage.node.client();
        for pod in client.pods(None).unwrap() {
            client.stop_pod(&pod.id).unwrap();
            client.remove_pod(&pod.id).unwrap();
        }
        assert!(client.pods(None).unwrap().is_empty());
        stage.node.assert_clean();
    }

    /// A pod of this name.
    pub(crate) fn pod(&self, name: &str) -> Pod<'_> {
        self.node.run_pod(pod(name), self.subject.name).unwrap()
    }

    /// A pod with a container in it that does nothing.
    pub(crate) fn idle(&self, name: &str) -> (Pod<'_>, Container<'_>) {
        let pod = self.pod(name);
        let container = pod.start(&container("idle", &IDLE)).unwrap();
        (pod, container)
    }
}

/// A command that is a script.
pub(crate) fn script(text: &str) -> [&str; 3] {
    ["/bin/sh", "-c", text]
}

/// Waits until this is true, and says what when it is not.
pub(crate) fn until(what: &str, mut seen: impl FnMut() -> bool) {
    assert!(poll(STEP, || seen().then_some(())).is_some(), "{what}");
}
