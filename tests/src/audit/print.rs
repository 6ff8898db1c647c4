//! An audit for people, as a table, and for programs, as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::facts::{Facts, Root};
use super::promise::names;
use super::{Audit, Finding};

/// What cannot be read of a process, said wherever a table or JSON is given.
const UNREADABLE: &str = "Landlock rules and what rings are restricted to are shown by no kernel: \
    `cargo test -p pericarp-tests --test escape` tries what they forbid";

const HEADS: [&str; 11] = [
    "PID",
    "PROGRAM",
    "UID",
    "THREADS",
    "CAPABILITIES",
    "GAINS",
    "FILTERS",
    "OWN NAMESPACES",
    "ROOT",
    "DUMPS",
    "FILES",
];

/// The aligned table of each pod, what is open, and at the end what is looser.
pub fn table(audits: &[Audit]) -> String {
    let mut text = String::new();
    for audit in audits {
        let _ = writeln!(
            text,
            "pod of process {}: {}",
            audit.pod.first.pid,
            short(audit)
        );
        let mut rows = vec![HEADS.map(str::to_owned)];
        rows.extend(audit.findings.iter().map(row));
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..HEADS.len()).map(width).collect();
        for row in &rows {
            let cells = row.iter().zip(&widths);
            let line: Vec<String> = cells
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            let _ = writeln!(text, "{}", line.join("  ").trim_end());
        }
        for finding in &audit.findings {
            let open = finding.facts.descriptors.iter();
            let open: Vec<String> = open
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect();
            let (program, pid) = (&finding.member.program, finding.member.pid);
            let _ = writeln!(text, "{program} {pid} has open: {}", open.join(", "));
            for file in &finding.facts.files {
                let _ = writeln!(text, "    {file}");
            }
        }
        let _ = writeln!(text);
    }
    let _ = writeln!(text, "{UNREADABLE}");
    for line in audits.iter().flat_map(Audit::looser) {
        let _ = writeln!(text, "looser than promised: {line}");
    }
    text
}

fn short(audit: &Audit) -> String {
    let line = &audit.pod.first.line;
    match line.char_indices().nth(100) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.clone(),
    }
}

fn row(finding: &Finding) -> [String; 11] {
    let Finding { member, facts, .. } = finding;
    let namespaces: Vec<&str> = facts.namespaces.iter().copied().collect();
    [
        member.pid.to_string(),
        member.program.clone(),
        facts.user.to_string(),
        facts.threads.to_string(),
        names(facts.capabilities),
        if facts.no_new_privileges { "no" } else { "yes" }.to_owned(),
        filters(facts),
        match namespaces.is_empty() {
            true => "none".to_owned(),
            false => namespaces.join(" "),
        },
        match facts.root {
            Root::Empty => "empty".to_owned(),
            Root::Trees(count) => format!("{count} trees"),
            Root::Other(count) => format!("{count} names"),
        },
        match (facts.no_core, facts.dumpable) {
            (true, Some(false)) => "neither",
            (true, _) => "no core",
            (false, _) => "core",
        }
        .to_owned(),
        facts.open_files.clone(),
    ]
}

fn filters(facts: &Facts) -> String {
    match (facts.filtered, facts.filters) {
        (false, _) => "none".to_owned(),
        (true, (fewest, most)) if fewest == most => most.to_string(),
        (true, (fewest, most)) => format!("{fewest}-{most}"),
    }
}

/// The same for programs.
pub fn json(audits: &[Audit]) -> Value {
    let pods = audits.iter().map(|audit| {
        let processes: Vec<Value> = audit.findings.iter().map(process).collect();
        json!({
            "pid": audit.pod.first.pid,
            "command": audit.pod.first.line,
            "processes": processes,
        })
    });
    let looser: Vec<String> = audits.iter().flat_map(Audit::looser).collect();
    json!({
        "pods": pods.collect::<Vec<Value>>(),
        "looser": looser,
        "unreadable": UNREADABLE,
    })
}

fn process(finding: &Finding) -> Value {
    let Finding {
        member,
        facts,
        looser,
    } = finding;
    json!({
        "pid": member.pid,
        "program": member.program,
        "user": facts.user,
        "threads": facts.threads,
        "capabilities": names(facts.capabilities),
        "capabilities_passed_on": names(facts.passed_on),
        "no_new_privileges": facts.no_new_privileges,
        "filtered": facts.filtered,
        "filters": [facts.filters.0, facts.filters.1],
        "own_namespaces": facts.namespaces,
        "root": match facts.root {
            Root::Empty => json!("empty"),
            Root::Trees(count) => json!({"trees": count}),
            Root::Other(count) => json!({"names": count}),
        },
        "mounts": facts.mounts,
        "no_core": facts.no_core,
        "dumpable": facts.dumpable,
        "open_files_limit": facts.open_files,
        "cgroup": facts.cgroup,
        "descriptors": facts.descriptors,
        "files": facts.files,
        "looser": looser,
    })
}
