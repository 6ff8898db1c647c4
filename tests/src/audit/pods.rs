//! Which processes belong to which pod: a shim or a `pericarp run`, and all that it has
//! started. Only looks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// What a pod's first process is.
const FIRST: [&str; 2] = ["containerd-shim-pericarp-v2", "pericarp"];

/// A process of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub pid: i32,
    /// The name of the file that it executes.
    pub program: String,
    /// With its arguments.
    pub line: String,
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The process that all others are below.
    pub first: Member,
    /// That one first, and all below it.
    pub members: Vec<Member>,
}

impl Pod {
    /// Whether the command line of any of its processes has this word, or a path with this
    /// component, as it has its id and what its user calls it. The directory of a run has its id
    /// behind `run-`.
    pub fn is_called(&self, name: &str) -> bool {
        let is = |part: &str| part == name || part.strip_prefix("run-") == Some(name);
        let parts = |line: &str| line.split([' ', '/', '=', ',']).any(is);
        self.members.iter().any(|member| parts(&member.line))
    }
}

/// All pods that run here and have processes of their own.
///
/// # Errors
/// There is no `/proc`.
pub fn running() -> io::Result<Vec<Pod>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Ok(pid) = name.parse::<i32>() else {
            continue;
        };
        if let Some((parent, member)) = look(pid, &path) {
            all.insert(pid, (parent, member));
        }
    }
    Ok(pods(&all))
}

fn pods(all: &BTreeMap<i32, (i32, Member)>) -> Vec<Pod> {
    let is_first = |member: &Member| FIRST.contains(&member.program.as_str());
    let firsts = all.values().filter(|(parent, member)| {
        // Its own half that waits is none.
        is_first(member) && all.get(parent).is_none_or(|(_, parent)| !is_first(parent))
    });
    let mut pods = Vec::new();
    for (_, first) in firsts {
        let mut members = vec![first.clone()];
        let mut next = 0;
        while let Some(parent) = members.get(next).map(|member| member.pid) {
            let below = all.values().filter(|(own, _)| *own == parent);
            members.extend(below.map(|(_, member)| member.clone()));
            next += 1;
        }
        if members.iter().any(|member| !is_first(member)) {
            pods.push(Pod {
                first: first.clone(),
                members,
            });
        }
    }
    pods
}

/// A process and its parent; `None` if it has ended, or is the kernel's.
fn look(pid: i32, path: &Path) -> Option<(i32, Member)> {
    let program = fs::read_link(path.join("exe")).ok()?;
    let program = program.file_name()?.to_string_lossy().into_owned();
    let program = program.trim_end_matches(" (deleted)").to_owned();
    let status = fs::read_to_string(path.join("status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    let line = fs::read(path.join("cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let member = Member {
        pid,
        program,
        line: line.trim_end().to_owned(),
    };
    Some((parent.trim().parse().ok()?, member))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(processes: &[(i32, i32, &str)]) -> BTreeMap<i32, (i32, Member)> {
        let member = |pid, line: &str| Member {
            pid,
            program: line.split(' ').next().unwrap().to_owned(),
            line: line.to_owned(),
        };
        let rows = processes.iter();
        rows.map(|&(pid, parent, line)| (pid, (parent, member(pid, line))))
            .collect()
    }

    #[test]
    fn a_pod_is_what_its_first_process_has_started() {
        let all = table(&[
            (1, 0, "init"),
            (10, 1, "pericarp run --name web"),
            (
                11,
                10,
                "pericarp-block --device id=root,socket=/run/p/ab12/root.sock",
            ),
            (12, 11, "qemu-system-x86_64"),
            (20, 1, "pericarp node serve"),
            (30, 1, "containerd-shim-pericarp-v2 -id cd34"),
            (
                31,
                30,
                "pericarp-fs --shared-dir /tmp/pericarp-0/run-ef56/root",
            ),
            (40, 1, "pericarp-fs --shared-dir /srv"),
        ]);
        let pods = pods(&all);
        let ids: Vec<Vec<i32>> = pods
            .iter()
            .map(|pod| pod.members.iter().map(|member| member.pid).collect())
            .collect();
        assert_eq!(ids, [vec![10, 11, 12], vec![30, 31]]);
        assert!(pods[0].is_called("web") && pods[0].is_called("ab12"));
        assert!(pods[1].is_called("cd34") && !pods[1].is_called("web"));
        assert!(!pods[0].is_called("b12"));
        // What `pericarp run -d` has printed.
        assert!(pods[1].is_called("ef56") && !pods[1].is_called("f56"));
    }

    #[test]
    fn the_half_of_a_run_that_waits_is_part_of_it() {
        let all = table(&[
            (10, 1, "pericarp run -d"),
            (11, 10, "pericarp run -d"),
            (12, 11, "pericarp-vsock"),
        ]);
        assert_eq!(pods(&all).len(), 1);
    }
}
