//! Targets for which cargo makes no harness (`test = false`, `doctest = false`), to be compiled
//! sooner: none of them may have a test, which nobody would run.
//!
//! Called by `check`. Asks cargo, changes nothing.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::command::{Failure, capture, cargo};
use crate::house::collect;

/// Prints every test that nobody runs and fails when there is one.
pub(crate) fn inspect(root: &Path) -> Result<(), Failure> {
    let mut metadata = cargo();
    metadata.current_dir(root).args([
        "metadata",
        "--locked",
        "--no-deps",
        "--offline",
        "--format-version=1",
    ]);
    let metadata: Value = serde_json::from_str(&capture(&mut metadata)?)
        .map_err(|e| format!("cannot read cargo's metadata: {e}"))?;
    let mut lost = 0;
    for target in targets(&metadata) {
        for file in target.files() {
            let text = fs::read_to_string(&file)
                .map_err(|e| format!("cannot read {}: {e}", file.display()))?;
            if (target.without_tests && has_test(&text))
                || (target.without_examples && has_example(&text))
            {
                let shown = file.strip_prefix(root).unwrap_or(&file);
                eprintln!(
                    "{}: has a test, which nobody runs: {} has no harness in its Cargo.toml",
                    shown.display(),
                    target.name
                );
                lost += 1;
            }
        }
    }
    match lost {
        0 => Ok(()),
        few => Err(format!("{few} files have tests that nobody runs").into()),
    }
}

/// One without a harness of some kind.
struct Target {
    name: String,
    source: PathBuf,
    without_tests: bool,
    without_examples: bool,
}

impl Target {
    /// All that it is made of: what lies beside its first file, if that is a folder's own.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let own = self.source.ends_with("main.rs") || self.source.ends_with("lib.rs");
        match self.source.parent() {
            Some(folder) if own && collect(folder, &mut files).is_ok() => files,
            _ => vec![self.source.clone()],
        }
    }
}

fn targets(metadata: &Value) -> Vec<Target> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages = list(&metadata["packages"]);
    let all = packages
        .iter()
        .flat_map(|package| list(&package["targets"]));
    let targets = all.filter_map(|target| {
        let kinds = list(&target["kind"]);
        let is = |kind: &str| kinds.iter().any(|one| one == kind);
        let found = Target {
            name: target["name"].as_str()?.to_owned(),
            source: target["src_path"].as_str()?.into(),
            without_tests: (is("bin") || is("lib")) && target["test"] == false,
            without_examples: is("lib") && target["doctest"] == false,
        };
        (found.without_tests || found.without_examples).then_some(found)
    });
    targets.collect()
}

fn has_test(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    lines.any(|line| line == "#[test]" || line.starts_with("proptest! {"))
}

/// Whether documentation has a block of Rust: one without the name of another language.
fn has_example(text: &str) -> bool {
    let comments = text.lines().filter_map(|line| {
        let line = line.trim();
        line.strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"))
    });
    let mut open = false;
    for line in comments {
        let Some(language) = line.trim().strip_prefix("```") else {
            continue;
        };
        let rust = language.split(',').next().is_some_and(|word| {
            ["", "rust", "no_run", "should_panic", "compile_fail"].contains(&word)
        });
        if !open && rust {
            return true;
        }
        open = !open;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_without_a_harness_are_found() {
        let metadata = serde_json::json!({"packages": [{"targets": [
            {"name": "a", "kind": ["bin"], "src_path": "/a/main.rs", "test": false, "doctest": false},
            {"name": "b", "kind": ["lib"], "src_path": "/b/lib.rs", "test": true, "doctest": false},
            {"name": "c", "kind": ["lib"], "src_path": "/c/lib.rs", "test": true, "doctest": true},
            {"name": "d", "kind": ["bench"], "src_path": "/d.rs", "test": false, "doctest": false},
        ]}]});
        let found: Vec<_> = targets(&metadata)
            .into_iter()
            .map(|one| (one.name, one.without_tests, one.without_examples))
            .collect();
        assert_eq!(
            found,
            [("a".to_owned(), true, false), ("b".to_owned(), false, true)]
        );
    }

    #[test]
    fn tests_and_examples_are_told_from_words() {
        assert!(has_test("mod tests {\n    #[test]\n    fn a() {}\n}"));
        assert!(!has_test("// #[test] is what a test has\n"));
        assert!(has_example("/// ```\n/// assert!(true);\n/// ```\n"));
        assert!(has_example("//! ```no_run\n//! ```\n"));
        assert!(!has_example("//! ```text\n//! a drawing\n//! ```\n"));
        assert!(!has_example("let fence = \"```\";\n"));
    }
}
