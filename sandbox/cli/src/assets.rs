//! The guest's kernel, its modules, the agent and crun, as `cargo xtask setup` lays them out.
//!
//! Looked for where the user says, else beside the program; checked in full before a run starts.

use std::path::{Path, PathBuf};

use crate::input::problem::Problem;

/// The directory with everything a guest boots from.
#[derive(Debug)]
pub(crate) struct Assets {
    pub(crate) kernel: PathBuf,
    pub(crate) agent: PathBuf,
    /// What the guest has below its root: file by file, with the path there.
    pub(crate) tree: Vec<(String, PathBuf)>,
    pub(crate) modules: PathBuf,
    /// File names in load order.
    pub(crate) order: Vec<String>,
}

/// The part of the assets that becomes part of the guest's first file system as it is.
const GUEST: &str = "guest";
/// What the agent runs containers with.
const CRUN: &str = "bin/crun";

const CURE: &str = "run `cargo xtask setup`, which makes them";

impl Assets {
    /// Finds and checks the assets. `given` is what `--assets` says.
    pub(crate) fn find(given: Option<&Path>) -> Result<Self, Problem> {
        let (option, candidates) = match (given, std::env::var_os("PERICARP_ASSETS")) {
            (Some(path), _) => ("--assets", vec![path.to_owned()]),
            (None, Some(path)) => ("PERICARP_ASSETS", vec![PathBuf::from(path)]),
            (None, None) => ("--assets", beside_the_program()),
        };
        let found = candidates.iter().find(|candidate| candidate.is_dir());
        let Some(directory) = found.or(candidates.first()) else {
            return Err(Problem::new(
                option,
                None,
                "this program's own place is unknown",
                CURE,
            ));
        };
        Self::check(option, directory)
    }

    fn check(option: &str, directory: &Path) -> Result<Self, Problem> {
        let problem =
            |rule: String| Problem::new(option, directory.display().to_string(), rule, CURE);
        if !directory.is_dir() {
            return Err(problem(
                "no such directory; the guest's files are not there".into(),
            ));
        }
        // What is looked at now is opened by other programs, with another working directory.
        let directory =
            std::fs::canonicalize(directory).map_err(|error| problem(error.to_string()))?;
        let modules = directory.join("kernel/modules");
        let order = std::fs::read_to_string(modules.join("order"))
            .map_err(|error| problem(format!("'kernel/modules/order' cannot be read ({error})")))?;
        let order: Vec<String> = order
            .lines()
            .map(|line| line.trim().to_owned())
            .filter(|l| !l.is_empty())
            .collect();
        if let Some(odd) = order.iter().find(|name| name.contains('/')) {
            return Err(problem(format!(
                "'kernel/modules/order' names '{odd}', which is a path"
            )));
        }
        let assets = Self {
            kernel: directory.join("kernel/vmlinuz"),
            agent: directory.join("pericarp-agent"),
            tree: tree(&directory.join(GUEST))
                .map_err(|error| problem(format!("'{GUEST}' cannot be read ({error})")))?,
            modules,
            order,
        };
        if !assets.tree.iter().any(|(name, _)| name == CRUN) {
            return Err(problem(format!("'{GUEST}/{CRUN}' is missing")));
        }
        let files = [assets.kernel.clone(), assets.agent.clone()]
            .into_iter()
            .chain(assets.order.iter().map(|name| assets.modules.join(name)));
        for file in files {
            let readable = std::fs::File::open(&file).and_then(|opened| opened.metadata());
            let name = file
                .strip_prefix(&directory)
                .unwrap_or(&file)
                .display()
                .to_string();
            match readable {
                Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {}
                Ok(_) => return Err(problem(format!("'{name}' is empty or no file"))),
                Err(error) => return Err(problem(format!("'{name}' cannot be read ({error})"))),
            }
        }
        Ok(assets)
    }
}

/// All files below a directory; links are followed, and what is neither file nor directory is left
/// out.
fn tree(top: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut pending = vec![(String::new(), top.to_owned())];
    while let Some((prefix, directory)) = pending.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let path = entry.path();
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let metadata = std::fs::metadata(&path)?;
            // Deeper than any library lies.
            if metadata.is_dir() && prefix.matches('/').count() < 16 {
                pending.push((format!("{name}/"), path));
            } else if metadata.is_file() {
                files.push((name, path));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn beside_the_program() -> Vec<PathBuf> {
    let Some(directory) = program_directory() else {
        return Vec::new();
    };
    vec![
        directory.join("../assets"),
        directory.join("../share/pericarp"),
    ]
}

/// Where this program and those it starts lie: the directory of the executable. Test executables
/// lie one level deeper, in `deps`.
pub(crate) fn program_directory() -> Option<PathBuf> {
    let mut directory = std::env::current_exe().ok()?;
    directory.pop();
    if directory.file_name().is_some_and(|name| name == "deps") {
        directory.pop();
    }
    Some(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_missing_is_named() {
        let dir = std::env::temp_dir().join(format!("pericarp-assets-{}", std::process::id()));
        let refuse = || Assets::find(Some(&dir)).unwrap_err().to_string();
        assert!(refuse().ends_with(
            "no such directory; the guest's files are not there; run `cargo xtask setup`, which \
             makes them"
        ));
        std::fs::create_dir_all(dir.join("kernel/modules")).unwrap();
        assert!(
            refuse().contains("'kernel/modules/order' cannot be read"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("kernel/modules/order"), "a.ko.xz\n\n").unwrap();
        assert!(refuse().contains("'guest' cannot be read"), "{}", refuse());
        std::fs::create_dir_all(dir.join("guest/bin")).unwrap();
        assert!(
            refuse().contains("'guest/bin/crun' is missing"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("guest/bin/crun"), "c").unwrap();
        assert!(
            refuse().contains("'kernel/vmlinuz' cannot be read"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("kernel/vmlinuz"), "").unwrap();
        assert!(
            refuse().contains("'kernel/vmlinuz' is empty"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("kernel/vmlinuz"), "k").unwrap();
        std::fs::write(dir.join("pericarp-agent"), "i").unwrap();
        assert!(
            refuse().contains("'kernel/modules/a.ko.xz' cannot be read"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("kernel/modules/a.ko.xz"), "m").unwrap();
        assert_eq!(Assets::find(Some(&dir)).unwrap().order, ["a.ko.xz"]);
        std::fs::write(dir.join("kernel/modules/order"), "../a\n").unwrap();
        assert!(refuse().contains("which is a path"), "{}", refuse());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
