//! What git knows: what to compare with, its files, and the regressions that
//! commits own up to.
//!
//! Reads the repository of the source tree; changes nothing in it but the list
//! of its work trees.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::verdict::Accepted;
use crate::command::{self, Failure};

/// The repository.
pub(super) struct History {
    root: PathBuf,
}

/// What this tree is compared with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Against {
    /// The full hash of a commit.
    Commit(String),
    /// There is nothing, for this reason.
    Nothing(String),
    /// What was asked for is not there: the line for the operator.
    Mistake(String),
}

/// How a commit owns up to a regression.
const TRAILER: &str = "Accepts-slower";

impl History {
    pub(super) fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn git(&self, dir: &Path) -> Command {
        let mut command = Command::new("git");
        command.arg("-C").arg(dir);
        // A hook's own view of the repository is not ours.
        for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
            command.env_remove(name);
        }
        command
    }

    /// What git answers, in one line; nothing if it refuses.
    fn ask(&self, words: &[&str]) -> Option<String> {
        let output = self.git(&self.root).args(words).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim_end().to_owned())
    }

    fn commit(&self, name: &str) -> Option<String> {
        let name = format!("{name}^{{commit}}");
        self.ask(&[
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            &name,
        ])
    }

    fn is_changed(&self) -> bool {
        self.ask(&["status", "--porcelain"])
            .is_some_and(|text| !text.is_empty())
    }

    /// The commit that is asked for, else HEAD where something is not committed,
    /// else its first parent.
    pub(super) fn against(&self, asked: Option<&str>) -> Against {
        if let Some(name) = asked {
            return match self.commit(name) {
                Some(commit) => Against::Commit(commit),
                None => Against::Mistake(format!(
                    "--base '{name}': no such commit here; fetch it, or name another"
                )),
            };
        }
        if self.commit("HEAD").is_none() {
            return Against::Nothing("this is no git repository with a commit".into());
        }
        let name = if self.is_changed() { "HEAD" } else { "HEAD^" };
        self.commit(name).map_or_else(
            || {
                Against::Nothing(
                    "HEAD has no parent here, as in a clone of depth 1; \
                     fetch more, or name a commit with --base"
                        .into(),
                )
            },
            Against::Commit,
        )
    }

    /// A commit in a few words.
    pub(super) fn name(&self, commit: &str) -> Result<String, Failure> {
        let name = self.ask(&["log", "-1", "--format=%h (%s)", commit]);
        name.ok_or_else(|| format!("git does not know {commit}").into())
    }

    /// This tree in a few words.
    pub(super) fn here(&self) -> Result<String, Failure> {
        let name = self.name("HEAD")?;
        let changed = if self.is_changed() {
            "what is not committed, on "
        } else {
            ""
        };
        Ok(format!("{changed}{name}"))
    }

    /// The files of a commit in a work tree at `dir`, which is made or moved:
    /// what has not changed keeps its time, and cargo its objects.
    pub(super) fn check_out(&self, commit: &str, dir: &Path) -> Result<PathBuf, Failure> {
        let mut move_it = self.git(dir);
        move_it.args(["checkout", "--quiet", "--force", "--detach", commit]);
        if dir.join(".git").exists() && command::capture(&mut move_it).is_ok() {
            return Ok(dir.to_owned());
        }
        if dir.exists() {
            std::fs::remove_dir_all(dir)
                .map_err(|e| format!("cannot remove {}: {e}", dir.display()))?;
        }
        let mut add = self.git(&self.root);
        add.args(["worktree", "add", "--quiet", "--force", "--detach"]);
        command::run(add.arg(dir).arg(commit))?;
        Ok(dir.to_owned())
    }

    /// The regressions that the commits since `base` own up to.
    pub(super) fn accepted(&self, base: &str) -> Result<Vec<Accepted>, Failure> {
        let format =
            format!("--format=%h%x09%(trailers:key={TRAILER},valueonly,unfold,separator=%x09)");
        let text = self
            .ask(&["log", &format, &format!("{base}..HEAD")])
            .ok_or("git cannot list the commits since the base")?;
        let mut all = Vec::new();
        for line in text.lines() {
            let mut words = line.split('\t');
            let commit = words.next().unwrap_or_default();
            for value in words.filter(|value| !value.trim().is_empty()) {
                match Accepted::parse(commit, value) {
                    Some(accepted) => all.push(accepted),
                    None => println!(
                        "regress: {commit}: '{TRAILER}: {value}' accepts nothing: \
                         a metric, a space and a reason are wanted"
                    ),
                }
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository of its own with these commit messages.
    fn repository(name: &str, messages: &[&str]) -> History {
        let dir = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let history = History::of(&dir);
        let run = |words: &[&str]| {
            let who = ["-c", "user.name=test", "-c", "user.email=test@example"];
            let mut command = history.git(&dir);
            command.args(who).args(words);
            command::capture(&mut command).unwrap();
        };
        run(&["init", "--quiet"]);
        for message in messages {
            run(&["commit", "--quiet", "--allow-empty", "-m", message]);
        }
        history
    }

    #[test]
    fn the_base_is_the_parent_or_head_when_something_changed() {
        let history = repository("base", &["first", "second"]);
        let parent = history.commit("HEAD^").unwrap();
        assert_eq!(history.against(None), Against::Commit(parent.clone()));
        assert_eq!(history.against(Some("HEAD~1")), Against::Commit(parent));
        assert!(matches!(
            history.against(Some("nothing")),
            Against::Mistake(_)
        ));
        std::fs::write(history.root.join("file"), "new").unwrap();
        let head = history.commit("HEAD").unwrap();
        assert_eq!(history.against(None), Against::Commit(head));
        std::fs::remove_dir_all(&history.root).unwrap();
    }

    #[test]
    fn a_first_commit_has_nothing_to_be_compared_with() {
        let history = repository("first", &["first"]);
        assert!(matches!(history.against(None), Against::Nothing(_)));
        std::fs::remove_dir_all(&history.root).unwrap();
        std::fs::create_dir(&history.root).unwrap();
        assert!(matches!(history.against(None), Against::Nothing(_)));
        std::fs::remove_dir(&history.root).unwrap();
    }

    #[test]
    fn trailers_since_the_base_count_and_no_others() {
        let history = repository(
            "trailers",
            &[
                "one\n\nAccepts-slower: a/old long ago",
                "two\n\nAccepts-slower: a/b for a reason\nAccepts-slower: c/* for\n another",
                "three\n\nAccepts-slower: said in prose.\n\nThe end.",
            ],
        );
        let accepted = history.accepted("HEAD~2").unwrap();
        let got: Vec<_> = accepted
            .iter()
            .map(|a| (a.metric.as_str(), a.reason.as_str()))
            .collect();
        assert_eq!(got, [("a/b", "for a reason"), ("c/*", "for another")]);
        std::fs::remove_dir_all(&history.root).unwrap();
    }
}
