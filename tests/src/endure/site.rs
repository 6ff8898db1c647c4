//! The node on which pods endure, the program that they run and the other end of their network.
//! Called by `kills` and `soak`.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::tenant::Tenant;
use super::{Ledger, echo};
use crate::bounded::poll;
use crate::cri::config::GATEWAY;
use crate::cri::node::STEP;
use crate::cri::{Handler, Node};
use crate::guest;
use crate::parts::{Part, missing};

/// What it takes besides a containerd.
pub const PARTS: [Part; 9] = {
    let ours = Handler::PARTS;
    [
        ours[0],
        ours[1],
        ours[2],
        ours[3],
        ours[4],
        ours[5],
        ours[6],
        Part::Ours("pericarp"),
        Part::Ours("pericarp-writer"),
    ]
};

/// Where the other end of the network listens.
const PORT: u16 = 7000;
/// What starting and taking down may take beside the run itself.
const BESIDE: Duration = Duration::from_secs(1200);

/// A node with what writers need.
#[derive(Debug)]
pub struct Site {
    /// The node.
    pub node: Node,
    /// What pods run, in a directory that they are shown.
    pub(super) tools: PathBuf,
    begun: Instant,
}

impl Site {
    /// Starts a node that lives as long as a run of this length needs it.
    ///
    /// # Errors
    /// What is missing.
    pub fn start(name: &str, seconds: u64) -> Result<Self, String> {
        if let Some(why) = missing(&PARTS) {
            return Err(why);
        }
        let life = Duration::from_secs(seconds) + BESIDE;
        let handlers = [Handler::runc("runc"), Handler::pericarp()];
        let node = Node::start_for(name, &handlers, life).ok_or("no node can be had")?;
        let tools = node.scratch().path("tools");
        let failed = |error: std::io::Error| format!("the writer: {error}");
        fs::create_dir_all(tools.join("bin")).map_err(failed)?;
        let writer = Part::Ours("pericarp-writer").find().unwrap_or_default();
        guest::programs(&tools, &[&writer.to_string_lossy()]).map_err(failed)?;
        let listener = node.listen(PORT);
        echo::serve(listener.map_err(|error| format!("the network's other end: {error}"))?);
        Ok(Self {
            node,
            tools,
            begun: Instant::now(),
        })
    }

    /// How long it has been there, as `minutes:seconds`.
    pub(super) fn clock(&self) -> String {
        let seconds = self.begun.elapsed().as_secs();
        format!("{:3}:{:02}", seconds / 60, seconds % 60)
    }

    /// The command of a writer: the loader is its own, since the image has none.
    pub(super) fn writer(&self, tag: usize, pause: Duration) -> Vec<String> {
        let loader = "/tools/lib64/ld-linux-x86-64.so.2";
        let libraries = "/tools/lib/x86_64-linux-gnu:/tools/lib64";
        let mut words: Vec<String> = [
            loader,
            "--library-path",
            libraries,
            "/tools/bin/pericarp-writer",
        ]
        .map(str::to_owned)
        .to_vec();
        words.push(tag.to_string());
        words.push(pause.as_millis().to_string());
        words.extend(["disk=/dev/xvda", "file=/data/blocks", "tree=/data/tree"].map(str::to_owned));
        words.push(format!("net={GATEWAY}:{PORT}"));
        words
    }

    /// Makes so many pods, at once, each with volumes of its own.
    ///
    /// # Errors
    /// The first that does not come up.
    pub(super) fn tenants(&self, pods: usize, pause: Duration) -> Result<Vec<Tenant>, String> {
        let made = (0..pods).map(|number| Tenant::new(self, number, pause));
        let mut tenants = made.collect::<Result<Vec<_>, _>>()?;
        each(&mut tenants, |tenant| tenant.start(self))
            .into_iter()
            .collect::<Result<Vec<()>, _>>()?;
        Ok(tenants)
    }

    /// Takes all pods away; everything that is left, a line for each.
    pub(super) fn end(&self, tenants: &mut [Tenant]) -> Vec<String> {
        let ends = each(tenants, |tenant| tenant.remove(self));
        let mut left: Vec<String> = ends.into_iter().filter_map(Result::err).collect();
        if poll(STEP, || self.node.left().is_empty().then_some(())).is_none() {
            let all = self.node.left().into_iter();
            left.extend(all.map(|trace| format!("left on the node: {trace}")));
        }
        for tenant in tenants {
            if !tenant.is_free() {
                left.push(format!("pod {}: its disk is still open", tenant.number));
            }
        }
        left
    }
}

/// Does something with all of them at once; what came of it, in their order.
pub(super) fn each<T: Send>(
    tenants: &mut [Tenant],
    act: impl Fn(&mut Tenant) -> T + Sync,
) -> Vec<T> {
    let act = &act;
    std::thread::scope(|scope| {
        let threads: Vec<_> = tenants
            .iter_mut()
            .map(|tenant| scope.spawn(move || act(tenant)))
            .collect();
        let join = |one: std::thread::ScopedJoinHandle<'_, T>| match one.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

/// Steps that were told, blocks and files that were compared, and blocks found again, of all of them.
pub(super) fn sums(tenants: &[Tenant]) -> [u64; 3] {
    let of = |number: fn(&Ledger) -> u64| tenants.iter().map(|one| number(&one.ledger)).sum();
    [
        of(|one| one.steps),
        of(Ledger::compared),
        of(|one| one.checked),
    ]
}
