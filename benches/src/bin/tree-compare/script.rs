//! What is done in a directory, as shell scripts that print how long each part
//! took. The same text on the host and in a guest.

use std::path::Path;
use std::time::Duration;

use pericarp_benches::Outcome;
use pericarp_benches::served::TAG;

/// What is done with a source tree, one after the other.
pub(crate) const PHASES: &[&str] = &["unpack", "commit", "status", "search", "remove"];
/// What is done with the other tree.
pub(crate) const WALK: &str = "walk";

/// Runs a part and prints its name and its nanoseconds.
const PHASE: &str = "\
phase() {
    name=$1; shift
    from=$(date +%s%N)
    \"$@\" >/dev/null
    echo \"phase $name $(($(date +%s%N) - from))\"
}
commit() {
    git init -q .
    git add -A
    git -c user.name=bench -c user.email=bench@localhost commit -qm tree
}
search() {
    # Nothing is found, which is no failure.
    grep -rl 'no such line' . || true
}
";

/// All phases of a source tree that is in this archive.
pub(crate) fn source(archive: &Path) -> String {
    format!(
        "{PHASE}export HOME=$PWD GIT_CONFIG_NOSYSTEM=1\n\
         phase unpack tar xf {}\n\
         cd tree\n\
         phase commit commit\n\
         phase status git status --short\n\
         phase search search\n\
         cd ..\n\
         phase remove rm -r tree\n",
        archive.display()
    )
}

/// A walk through all of a tree, each file looked at.
pub(crate) fn walk() -> String {
    format!("{PHASE}phase {WALK} find . -type f -size +1\n")
}

/// The script as a guest runs it: in the directory that is mounted, with marks
/// on the host when it is done.
pub(crate) fn in_guest(marks: &Path, script: &str) -> String {
    format!(
        "modules=/usr/lib/uml/modules/$(uname -r)/kernel/fs/fuse\n\
         insmod $modules/fuse.ko\n\
         insmod $modules/virtiofs.ko\n\
         mkdir share marks\n\
         mount -t virtiofs {TAG} share\n\
         mount -t hostfs marks marks -o {}\n\
         marks=$PWD/marks\n\
         cd share\n{script}\
         touch $marks/held\n\
         while [ ! -e $marks/seen ]; do sleep 0.05; done\n",
        marks.display()
    )
}

/// Names and times out of what a script wrote.
pub(crate) fn phases(said: &str) -> Outcome<Vec<(&'static str, Duration)>> {
    let mut found = Vec::new();
    for line in said.lines() {
        let Some(rest) = line.strip_prefix("phase ") else {
            continue;
        };
        let (name, nanoseconds) = rest.split_once(' ').ok_or("a phase without a time")?;
        let name = PHASES.iter().chain([&WALK]).find(|phase| **phase == name);
        let name = name.ok_or_else(|| format!("an unknown phase: {line}"))?;
        found.push((*name, Duration::from_nanos(nanoseconds.trim().parse()?)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn scripts_say_how_long_each_phase_took() {
        let script = format!("{PHASE}phase {WALK} true\nphase status echo words\n");
        let output = Command::new("/bin/sh").args(["-ec", &script]).output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        let found = phases(&said).unwrap();
        let names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, [WALK, "status"], "{said}");
        assert!(found.iter().all(|(_, took)| !took.is_zero()));
    }

    #[test]
    fn every_phase_is_in_the_script() {
        let script = source(Path::new("/some/archive.tar"));
        for phase in PHASES {
            assert!(script.contains(&format!("phase {phase} ")), "{phase}");
        }
        assert!(phases("phase nonsense 1").is_err());
    }
}
