//! The guest's kernel, its modules, the agent and crun, as `cargo xtask setup` lays them out.
//!
//! Checked in full before anything starts. Where they are is said in [`place`].

pub mod place;

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use thiserror::Error;

use place::Held;

/// What is wrong with the directory.
#[derive(Debug, Error)]
#[error("'{}': {rule}", .directory.display())]
pub struct AssetsError {
    /// The directory.
    pub directory: PathBuf,
    /// What is missing in it.
    pub rule: String,
}

/// The directory with everything a guest boots from.
#[derive(Debug)]
pub struct Assets {
    /// Where all of it lies, without links.
    pub directory: PathBuf,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The guest's first process.
    pub agent: PathBuf,
    /// What the guest has below its root: file by file, with the path there.
    pub tree: Vec<(String, PathBuf)>,
    /// Where the modules lie.
    pub modules: PathBuf,
    /// File names in load order.
    pub order: Vec<String>,
    /// What a guest with shares loads after these; none in assets of an older making.
    pub share_order: Option<Vec<String>>,
    /// The same for network cards.
    pub card_order: Option<Vec<String>>,
    /// What a guest loads when a disk with XFS comes; the host shows it the files then.
    pub xfs_order: Option<Vec<String>>,
    /// Keeps a version of a store from being removed as long as this value is there.
    held: Option<Held>,
}

const KERNEL: &str = "kernel/vmlinuz";
const RELEASE: &str = "kernel/release";
const AGENT: &str = "pericarp-agent";
const MODULES: &str = "kernel/modules";
/// The part of the assets that becomes part of the guest's first file system as it is.
const GUEST: &str = "guest";
/// What every guest loads, in order.
const ORDER: &str = "kernel/modules/order";
/// What a guest with shares loads, in order.
pub const SHARE_ORDER: &str = "kernel/modules/order-shares";
/// What a guest with network cards loads, in order.
pub const CARD_ORDER: &str = "kernel/modules/order-net";
/// What a guest loads when a disk with XFS comes, in order.
pub const XFS_ORDER: &str = "kernel/modules/order-xfs";
/// What the agent runs containers with.
const CRUN: &str = "bin/crun";

/// What to do where they are not there.
pub const CURE: &str = "run `cargo xtask setup`, which makes them, or `pericarp assets add`";

impl Assets {
    /// Checks all of the directory, so that no start fails for a file that is not there. A store of
    /// versions means the one in use, which stays there as long as the value does.
    ///
    /// # Errors
    ///
    /// The first thing that is missing.
    pub fn open(directory: &Path) -> Result<Self, AssetsError> {
        let given = directory;
        let problem = |rule: String| AssetsError {
            directory: given.to_owned(),
            rule,
        };
        if !directory.is_dir() {
            return Err(problem(
                "no such directory; the guest's files are not there".into(),
            ));
        }
        // What is looked at now is opened by other programs, with another working directory, and when
        // another version may be in use.
        let (directory, held) = place::hold(directory).map_err(problem)?;
        let modules = directory.join(MODULES);
        let list = |file: &str| -> Result<Option<Vec<String>>, AssetsError> {
            let text = match std::fs::read_to_string(directory.join(file)) {
                Err(error) if file != ORDER && error.kind() == ErrorKind::NotFound => {
                    return Ok(None);
                }
                other => {
                    other.map_err(|error| problem(format!("'{file}' cannot be read ({error})")))?
                }
            };
            let names = text.lines().map(str::trim).filter(|name| !name.is_empty());
            let names: Vec<String> = names.map(str::to_owned).collect();
            match names.iter().find(|name| name.contains('/')) {
                Some(odd) => Err(problem(format!("'{file}' names '{odd}', which is a path"))),
                None => Ok(Some(names)),
            }
        };
        let order = list(ORDER)?.unwrap_or_default();
        let share_order = list(SHARE_ORDER)?;
        let card_order = list(CARD_ORDER)?;
        let xfs_order = list(XFS_ORDER)?;
        let assets = Self {
            kernel: directory.join(KERNEL),
            agent: directory.join(AGENT),
            tree: tree(&directory.join(GUEST))
                .map_err(|error| problem(format!("'{GUEST}' cannot be read ({error})")))?,
            modules,
            order,
            share_order,
            card_order,
            xfs_order,
            directory: directory.clone(),
            held,
        };
        if !assets.tree.iter().any(|(name, _)| name == CRUN) {
            return Err(problem(format!("'{GUEST}/{CRUN}' is missing")));
        }
        let files = [assets.kernel.clone(), assets.agent.clone()]
            .into_iter()
            .chain(
                assets
                    .load_order(true, true)
                    .chain(assets.xfs_order.iter().flatten())
                    .map(|name| assets.modules.join(name)),
            );
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

    /// The files of the modules for XFS, in order.
    #[must_use]
    pub fn xfs(&self) -> Vec<PathBuf> {
        let names = self.xfs_order.iter().flatten();
        names.map(|name| self.modules.join(name)).collect()
    }

    /// The name of the version, where they are one of a store's.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.held.as_ref().map(Held::name)
    }

    /// Every file that a guest may be given: its name below the directory, and where it is. In the
    /// order of the names; nothing else in the directory is ever looked at.
    #[must_use]
    pub fn files(&self) -> Vec<(String, PathBuf)> {
        let lists = [
            Some(ORDER),
            self.share_order.is_some().then_some(SHARE_ORDER),
            self.card_order.is_some().then_some(CARD_ORDER),
            self.xfs_order.is_some().then_some(XFS_ORDER),
        ];
        let lists = lists
            .into_iter()
            .flatten()
            .map(|name| (name.to_owned(), self.directory.join(name)));
        let modules = self
            .load_order(true, true)
            .chain(self.xfs_order.iter().flatten())
            .map(|name| (format!("{MODULES}/{name}"), self.modules.join(name)));
        let tree = self
            .tree
            .iter()
            .map(|(name, path)| (format!("{GUEST}/{name}"), path.clone()));
        let mut files: Vec<_> = [
            (KERNEL.to_owned(), self.kernel.clone()),
            (AGENT.to_owned(), self.agent.clone()),
        ]
        .into_iter()
        .chain(lists)
        .chain(modules)
        .chain(tree)
        .collect();
        let release = self.directory.join(RELEASE);
        if release.is_file() {
            files.push((RELEASE.to_owned(), release));
        }
        files.sort();
        files.dedup();
        files
    }

    /// The kernel's release, as far as the directory says it.
    #[must_use]
    pub fn release(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.directory.join(RELEASE)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// The modules a guest loads, in order.
    pub fn load_order(&self, has_shares: bool, has_cards: bool) -> impl Iterator<Item = &String> {
        let shares = self.share_order.iter().filter(move |_| has_shares);
        let cards = self.card_order.iter().filter(move |_| has_cards);
        let more = shares.chain(cards).flatten();
        self.order.iter().chain(more)
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

/// Where this program and those it starts lie: the directory of the executable. Test executables
/// lie one level deeper, in `deps`.
#[must_use]
pub fn program_directory() -> Option<PathBuf> {
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
        let refuse = || Assets::open(&dir).unwrap_err().to_string();
        assert!(refuse().ends_with("no such directory; the guest's files are not there"));
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
        let assets = Assets::open(&dir).unwrap();
        let files = assets.files();
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "guest/bin/crun",
                "kernel/modules/a.ko.xz",
                "kernel/modules/order",
                "kernel/vmlinuz",
                "pericarp-agent",
            ]
        );
        assert_eq!(assets.version(), None);
        assert_eq!(assets.order, ["a.ko.xz"]);
        assert_eq!(assets.share_order, None);
        assert!(assets.load_order(true, true).eq(["a.ko.xz"]));
        std::fs::write(dir.join("kernel/modules/order-shares"), "b.ko\n").unwrap();
        assert!(
            refuse().contains("'kernel/modules/b.ko' cannot be read"),
            "{}",
            refuse()
        );
        std::fs::write(dir.join("kernel/modules/b.ko"), "m").unwrap();
        let assets = Assets::open(&dir).unwrap();
        assert!(assets.load_order(true, true).eq(["a.ko.xz", "b.ko"]));
        assert!(assets.load_order(false, true).eq(["a.ko.xz"]));
        std::fs::write(dir.join("kernel/modules/order"), "../a\n").unwrap();
        assert!(refuse().contains("which is a path"), "{}", refuse());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
