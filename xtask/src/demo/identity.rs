//! The first half of the demo: one command, run in a container and in a
//! virtual machine, says where it finds itself.
//!
//! Called by the demo. The verdict rests on the boot id, which a kernel draws
//! once when it starts: two places with different boot ids run on different
//! kernels even when these are of the same release.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::pericarp::{Root, in_container, in_machine};
use super::table::{self, Align};
use crate::command::Failure;
use crate::janitor::Janitor;
use crate::project::Project;

/// One `name=value` line per fact.
const SCRIPT: &str = "\
echo kernel=$(uname -r)
echo boot_id=$(cat /proc/sys/kernel/random/boot_id)
echo cpus=$(nproc)
while read -r name value unit; do
  [ \"$name\" = MemTotal: ] && echo memory=$((value / 1024)) MiB
done < /proc/meminfo
read -r pid1 < /proc/1/comm
echo pid1=$pid1";

/// What a command sees of the machine it runs on.
#[derive(Debug, PartialEq)]
struct Identity {
    kernel: String,
    boot_id: String,
    cpus: String,
    memory: String,
    pid1: String,
}

impl Identity {
    /// Reads what [`SCRIPT`] printed.
    fn parse(printed: &str) -> Result<Self, Failure> {
        let value = |name: &str| {
            printed
                .lines()
                .filter_map(|line| line.trim_end().split_once('='))
                .find(|(key, value)| *key == name && !value.is_empty())
                .map(|(_, value)| value.to_owned())
                .ok_or_else(|| format!("the command did not print its {name}"))
        };
        Ok(Self {
            kernel: value("kernel")?,
            boot_id: value("boot_id")?,
            cpus: value("cpus")?,
            memory: value("memory")?,
            pid1: value("pid1")?,
        })
    }
}

/// Runs the command in both places and returns the table with its verdict.
pub(crate) fn compare(
    project: &Project,
    image: &Path,
    janitor: &mut Janitor,
) -> Result<String, Failure> {
    let mut see = |mut command: Command| {
        let output = janitor.run_well(command.args(["sh", "-c", SCRIPT]))?;
        Identity::parse(&output.stdout)
    };
    let trusted = see(in_container(project, Root::Oci(image)))?;
    let untrusted = see(in_machine(project, Root::Oci(image), None))?;
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|e| format!("cannot read this machine's boot id: {e}"))?;
    let verdict = verdict(host.trim(), &trusted, &untrusted)?;
    Ok(format!("{}  {verdict}\n", sides(&trusted, &untrusted)))
}

fn sides(trusted: &Identity, untrusted: &Identity) -> String {
    let row = |name: &str, fact: fn(&Identity) -> &String| {
        vec![
            name.to_owned(),
            fact(trusted).clone(),
            fact(untrusted).clone(),
        ]
    };
    table::set(
        &[
            vec![
                String::new(),
                "trusted: runc".to_owned(),
                "untrusted: own VM".to_owned(),
            ],
            row("kernel", |it| &it.kernel),
            row("boot id", |it| &it.boot_id),
            row("CPUs", |it| &it.cpus),
            row("memory", |it| &it.memory),
            row("first process", |it| &it.pid1),
        ],
        Align::Left,
    )
}

/// The one sentence the table is for; an error when isolation is not shown.
fn verdict(host: &str, trusted: &Identity, untrusted: &Identity) -> Result<String, Failure> {
    if trusted.boot_id != host {
        return Err("the container does not run on this machine's kernel; nothing is shown".into());
    }
    if untrusted.boot_id == host {
        return Err("the virtual machine reports this machine's own boot id: not isolated".into());
    }
    Ok(format!(
        "Two kernels: the container shares this machine's ({}), the virtual machine booted its own ({}).",
        trusted.kernel, untrusted.kernel
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "\
kernel=6.12.1-cloud-amd64
boot_id=11111111-2222-3333-4444-555555555555
cpus=1
memory=1987 MiB
pid1=sh
";

    #[test]
    fn facts_are_read_by_name() {
        let identity = Identity::parse(&PRINTED.replace('\n', "\r\n")).unwrap();
        assert_eq!(identity.kernel, "6.12.1-cloud-amd64");
        assert_eq!(identity.memory, "1987 MiB");
        assert_eq!(identity.pid1, "sh");
    }

    #[test]
    fn a_missing_fact_is_an_error() {
        let failure = Identity::parse("kernel=6\nboot_id=\n").unwrap_err();
        assert_eq!(failure.to_string(), "the command did not print its boot_id");
    }

    #[test]
    fn the_verdict_needs_a_boot_id_of_its_own() {
        let vm = Identity::parse(PRINTED).unwrap();
        let container = Identity::parse(&PRINTED.replace("1111", "9999")).unwrap();
        assert!(verdict(&container.boot_id, &container, &vm).is_ok());
        assert!(verdict(&container.boot_id, &container, &container).is_err());
        assert!(verdict(&vm.boot_id, &container, &vm).is_err());
    }
}
