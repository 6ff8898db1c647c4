//! What holds the processes of a pod, as the kernel reports it, beside what
//! `SECURITY.md` promises of them: the table there is what is compared with, so that the
//! document and this check cannot differ. Called by `pericarp-audit`, which `cargo xtask
//! audit` starts, and by tests.
//!
//! Some of what holds a process cannot be read from outside: its Landlock rules, and what
//! its rings are restricted to. The suite `escape` tries what they forbid, and unit tests
//! of `pericarp-uring` what rings may do.

mod example;
mod facts;
mod pods;
mod print;
mod promise;

use std::io;

pub use example::{Example, PARTS};
pub use facts::{Facts, Root};
pub use pods::{Member, Pod, running};
pub use print::{json, table};
pub use promise::{BadTable, Promise, promises};

/// What is known of one process, and where it falls short.
#[derive(Debug)]
pub struct Finding {
    /// Who it is.
    pub member: Member,
    /// What the kernel says.
    pub facts: Facts,
    /// Each way in which it is looser than promised, in a few words.
    pub looser: Vec<String>,
}

/// The processes of one pod.
#[derive(Debug)]
pub struct Audit {
    /// Its first process: a shim, or `pericarp run`.
    pub pod: Pod,
    /// That one and all below it.
    pub findings: Vec<Finding>,
}

impl Audit {
    /// Looks at all processes of a pod. One that ends meanwhile is left out.
    ///
    /// # Errors
    /// The kernel does not say, or the table cannot be read.
    pub fn of(pod: Pod) -> io::Result<Self> {
        let promises = promises().map_err(io::Error::other)?;
        // The first process may be nobody's to look at: then ours are the host's.
        let hosts = facts::namespaces(1).ok();
        let own = facts::namespaces(std::process::id().cast_signed())?;
        let mut known: Vec<_> = hosts.into_iter().chain([own]).collect();
        known.push(facts::namespaces(pod.first.pid)?);
        let mut findings = Vec::new();
        for member in pod.members.clone() {
            let facts = match Facts::of(member.pid, &known) {
                Ok(facts) => facts,
                Err(error) if gone(&error) => continue,
                Err(error) => return Err(error),
            };
            let promise = promises.iter().find(|p| p.program == member.program);
            let looser = match promise {
                Some(promise) => promise.looser(&facts),
                None => vec!["is in no row of the table in SECURITY.md".to_owned()],
            };
            findings.push(Finding {
                member,
                facts,
                looser,
            });
        }
        Ok(Self { pod, findings })
    }

    /// All shortcomings, each with its process.
    pub fn looser(&self) -> Vec<String> {
        let all = self.findings.iter();
        all.flat_map(|finding| {
            let who = format!("{} {}", finding.member.program, finding.member.pid);
            finding
                .looser
                .iter()
                .map(move |why| format!("{who}: {why}"))
        })
        .collect()
    }
}

/// The process has ended.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
