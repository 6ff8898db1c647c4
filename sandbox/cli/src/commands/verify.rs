//! `pericarp verify`: whether a pod is in a machine of its own, shown by what the host sees of it and by
//! what the guest sees of itself.
//!
//! The host's side counts: a guest says what it likes. What it says of itself is compared with the
//! host's own, so that a container that is not in a machine cannot look as if it were.

use std::{collections::HashMap, ffi::OsString, fs, path::Path, time::Duration};

use pericarp_api::{
    agent::{Empty, FactsResponse},
    hello::printable,
    host::Guest,
};
use pericarp_pod::process::{context_within, refused, unreachable};
use serde_json::json;

use crate::commands::{
    Refusal, columns,
    pods::{self, Plain, Pod},
    print,
    reader::Grammar,
};

const HELP: &str = "\
Shows whether a pod of containerd's is in a machine of its own: kernel, boot and hypervisor as the pod
and as this host see them, and what runs on the host for it. Ends with 0 if it is, with 1 if it
is not or if that cannot be shown. As root.

Usage: pericarp verify [OPTIONS] POD

POD is NAMESPACE/NAME, NAME, or an id or its beginning.

Options:
      --json  one JSON object
  -h, --help  show this text
";

const GRAMMAR: Grammar = Grammar {
    command: "pericarp verify",
    help: HELP,
    flags: &[(' ', "json")],
    options: &[],
    ends_at_operand: false,
};
/// How long a guest may take to say what it sees.
const LIMIT: Duration = Duration::from_secs(10);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What a pod's shim may have started.
const PROGRAMS: [&str; 2] = ["pericarp-", "qemu-system-"];
/// Names of processes that are shown.
const SHOWN: usize = 8;
const LONGEST: usize = 60;

/// One thing that is looked at.
#[derive(Debug, PartialEq, Eq)]
struct Check {
    name: &'static str,
    good: bool,
    host: String,
    pod: String,
}

/// What came of it.
#[derive(Debug)]
struct Report {
    name: String,
    id: String,
    /// The machine's CPU is the host's, by KVM.
    hardware: bool,
    checks: Vec<Check>,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Result<i32, Refusal> {
    let given = GRAMMAR.read(arguments)?;
    let [wanted] = &given.operands[..] else {
        return Err(GRAMMAR.missing("POD", "is to be named, and one only"));
    };
    let report = match pods::in_a_machine(wanted)? {
        Some(pod) => in_a_machine(&pod),
        None => without(&pods::plain(wanted)?.ok_or_else(|| pods::unknown(wanted))?),
    };
    print(&match given.flag("json") {
        true => report.json() + "\n",
        false => report.text(),
    })?;
    Ok(i32::from(!report.is_isolated()))
}

impl Report {
    fn is_isolated(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.good)
    }

    fn json(&self) -> String {
        let checks: Vec<_> = self
            .checks
            .iter()
            .map(
                |one| json!({"name": one.name, "good": one.good, "host": one.host, "pod": one.pod}),
            )
            .collect();
        json!({
            "pod": self.name,
            "id": self.id,
            "isolated": self.is_isolated(),
            "hardware": self.hardware,
            "checks": checks,
        })
        .to_string()
    }

    fn text(&self) -> String {
        let head = ["", "", "THIS HOST", "THE POD"].map(str::to_owned);
        let rows = self.checks.iter().map(|one| {
            let state = if one.good { "good" } else { "NOT SO" };
            [state, one.name, one.host.as_str(), one.pod.as_str()].map(str::to_owned)
        });
        let rows: Vec<[String; 4]> = std::iter::once(head).chain(rows).collect();
        let name = &self.name;
        let said = match (self.is_isolated(), self.hardware) {
            (true, true) => format!("{name} is in a machine of its own."),
            (true, false) => format!(
                "{name} is in a machine of its own, whose CPU is emulated: that is no wall \
                 (SECURITY.md)."
            ),
            (false, _) => format!("{name} is NOT SHOWN to be in a machine of its own."),
        };
        columns(&rows) + &said + "\n"
    }
}

/// The processes of this host: parent and program of each.
fn processes() -> HashMap<u32, (u32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let one = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let rest = stat.get(stat.rfind(')')? + 1..)?;
        let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, (parent, program(pid))))
    };
    entries.filter_map(one).collect()
}

fn program(pid: u32) -> String {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    // Of one that was replaced meanwhile.
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    name.trim_end_matches(" (deleted)").to_owned()
}

fn has_kvm(pid: u32) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    open.flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|link| link == Path::new("anon_inode:kvm-vm"))
}

/// All that a process has started, directly or not.
fn below(top: u32, all: &HashMap<u32, (u32, String)>) -> Vec<(u32, String)> {
    let mut found: Vec<(u32, String)> = Vec::new();
    let mut parents = vec![top];
    while let Some(parent) = parents.pop() {
        for (pid, (of, program)) in all {
            if *of == parent && *pid != top && !found.iter().any(|(known, _)| known == pid) {
                found.push((*pid, program.clone()));
                parents.push(*pid);
            }
        }
    }
    found.sort();
    found
}

fn is_ours(program: &str) -> bool {
    PROGRAMS.iter().any(|ours| program.starts_with(ours))
}

fn own(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

fn in_a_machine(pod: &Pod) -> Report {
    let record = &pod.record;
    let machine = record.machine().unwrap_or(0);
    let hardware = has_kvm(machine);
    let name = program(machine);
    let kind = if hardware { "KVM" } else { "an emulated CPU" };
    let mut checks = vec![Check {
        name: "machine",
        good: is_ours(&name) && (name == "pericarp-vmm" || name.starts_with("qemu-")),
        host: format!("process {machine}, {name}, {kind}"),
        pod: format!("{} CPUs, {} MiB", record.vcpus, record.memory >> 20),
    }];
    let started = below(record.shim, &processes());
    let facts = ask(pod);
    let seen = match &facts {
        Ok(facts) => guests(facts),
        Err(error) => error.clone(),
    };
    checks.push(on_the_host(&started, seen));
    checks.extend(compare(facts, &release(), &own(BOOT_ID)));
    Report {
        name: record.name.clone(),
        id: record.id.clone(),
        hardware,
        checks,
    }
}

/// Nothing runs on the host for the pod but what machines are made of.
fn on_the_host(started: &[(u32, String)], seen: String) -> Check {
    let odd: Vec<String> = started
        .iter()
        .filter(|(_, program)| !is_ours(program))
        .map(|(pid, program)| format!("{program} (process {pid})"))
        .collect();
    let ours: Vec<&str> = started
        .iter()
        .map(|(_, program)| program.as_str())
        .collect();
    Check {
        name: "processes",
        good: odd.is_empty() && !ours.is_empty(),
        host: match odd.is_empty() {
            true => ours.join(", "),
            false => format!("also {}", odd.join(", ")),
        },
        pod: seen,
    }
}

/// What the guest says, safe to print.
fn said(text: &str) -> String {
    printable(text).chars().take(LONGEST).collect()
}

fn guests(facts: &FactsResponse) -> String {
    let names = facts.processes.iter().take(SHOWN);
    let names: Vec<String> = names.map(|one| said(&one.name)).collect();
    let all = facts.processes.len();
    let more = if all > names.len() { ", ..." } else { "" };
    format!("{all}: {}{more}", names.join(", "))
}

fn ask(pod: &Pod) -> Result<FactsResponse, String> {
    let guest = Guest::new(pod.directory.join("vsock").join("guest"));
    let client = guest.client_within(LIMIT).map_err(unreachable);
    let client = client.map_err(|error| error.to_string())?;
    let facts = client.get_facts(context_within(LIMIT), &Empty::default());
    facts.map_err(|error| refused(error).to_string())
}

/// What the guest sees must not be what the host is.
fn compare(facts: Result<FactsResponse, String>, kernel: &str, boot: &str) -> Vec<Check> {
    let (facts, silent) = match facts {
        Ok(facts) => (facts, None),
        Err(error) => (FactsResponse::default(), Some(error)),
    };
    let shown = |text: String| silent.clone().unwrap_or(text);
    let other_boot = !facts.boot_id.is_empty() && facts.boot_id != boot;
    let hypervisor = match facts.has_hypervisor {
        true => format!("{} ({})", said(&facts.hypervisor), said(&facts.cpu_model)),
        false => "none, says CPUID".to_owned(),
    };
    vec![
        Check {
            name: "boot id",
            good: other_boot,
            host: boot.to_owned(),
            pod: shown(said(&facts.boot_id)),
        },
        Check {
            name: "kernel",
            // The same release may have been started twice.
            good: other_boot && !facts.kernel_release.is_empty(),
            host: kernel.to_owned(),
            pod: shown(said(&facts.kernel_release)),
        },
        Check {
            name: "hypervisor",
            good: facts.has_hypervisor,
            host: String::new(),
            pod: shown(hypervisor),
        },
    ]
}

/// A pod that no machine has: its processes are this host's.
fn without(pod: &Plain) -> Report {
    let (kernel, boot) = (release(), own(BOOT_ID));
    let process = match pod.pid {
        Some(pid) => format!("process {pid} of this host, {}", program(pid)),
        None => "none of a machine's".to_owned(),
    };
    let check = |name, host: String, pod: String| Check {
        name,
        good: false,
        host,
        pod,
    };
    Report {
        name: pod.name.clone(),
        id: pod.id.clone(),
        hardware: false,
        checks: vec![
            check("machine", "none".to_owned(), process),
            check("boot id", boot.clone(), boot),
            check("kernel", kernel.clone(), kernel),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(boot: &str) -> FactsResponse {
        FactsResponse {
            kernel_release: "6.12.1".into(),
            boot_id: boot.into(),
            has_hypervisor: true,
            hypervisor: "KVMKVMKVM".into(),
            ..FactsResponse::default()
        }
    }

    #[test]
    fn a_guest_that_is_the_host_is_found_out() {
        let good = |facts| -> Vec<bool> {
            let checks = compare(facts, "6.1.0", "a-b");
            checks.iter().map(|one| one.good).collect()
        };
        assert_eq!(good(Ok(facts("c-d"))), [true; 3]);
        assert_eq!(good(Ok(facts("a-b"))), [false, false, true]);
        assert_eq!(good(Ok(facts(""))), [false, false, true]);
        assert_eq!(good(Err("it says nothing".into())), [false; 3]);
        let checks = compare(Err("it says nothing".into()), "6.1.0", "a-b");
        assert_eq!(checks[0].pod, "it says nothing");
    }

    #[test]
    fn only_what_machines_are_made_of_runs_on_the_host() {
        let all = HashMap::from([
            (10, (1, "containerd-shim-pericarp-v2".to_owned())),
            (11, (10, "pericarp-fs".to_owned())),
            (12, (10, "qemu-system-x86_64".to_owned())),
            (13, (1, "bash".to_owned())),
        ]);
        let started = below(10, &all);
        assert_eq!(started.len(), 2);
        assert!(on_the_host(&started, String::new()).good);
        assert!(!on_the_host(&[], String::new()).good);
        let mut more = all.clone();
        more.insert(14, (11, "sh".to_owned()));
        let check = on_the_host(&below(10, &more), String::new());
        assert!(
            !check.good && check.host == "also sh (process 14)",
            "{check:?}"
        );
    }

    #[test]
    fn the_verdict_is_the_last_line_and_an_emulated_cpu_is_said() {
        let check = |good| Check {
            name: "boot id",
            good,
            host: "a".into(),
            pod: "b".into(),
        };
        let mut report = Report {
            name: "default/web".into(),
            id: "aa".into(),
            hardware: true,
            checks: vec![check(true)],
        };
        assert!(
            report
                .text()
                .ends_with("default/web is in a machine of its own.\n")
        );
        report.hardware = false;
        assert!(report.text().contains("is no wall"));
        report.checks.push(check(false));
        assert!(report.text().contains("NOT SHOWN") && !report.is_isolated());
        let said: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(said["isolated"], false);
    }
}
