//! What `deny.toml` says of dependencies, without cargo-deny and without a network: their
//! licences are allowed ones, no crate is there in two versions but for those that are
//! named with a reason, and all come from crates.io. Advisories take cargo-deny and its database.
//!
//! Called by `check`. Asks cargo, changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::command::{Failure, capture, cargo};

const FILE: &str = "deny.toml";
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// A crate of somebody else's.
struct Package {
    name: String,
    version: String,
    licence: String,
    source: String,
}

/// What the file allows.
#[derive(Debug, Default)]
struct Rules {
    target: String,
    licences: BTreeSet<String>,
    /// `name@version`.
    skipped: BTreeSet<String>,
}

/// Prints what is not allowed, and what is allowed in vain, and fails when there is any.
pub(crate) fn inspect(root: &Path) -> Result<(), Failure> {
    let text =
        fs::read_to_string(root.join(FILE)).map_err(|e| format!("cannot read {FILE}: {e}"))?;
    let rules = Rules::read(&text)?;
    let mut metadata = cargo();
    metadata.current_dir(root).args([
        "metadata",
        "--locked",
        "--format-version=1",
        "--filter-platform",
        &rules.target,
    ]);
    let metadata = capture(&mut metadata)?;
    let packages = packages(&metadata)?;
    let wrong = rules.broken(&packages);
    for line in &wrong {
        eprintln!("{FILE}: {line}");
    }
    match wrong.len() {
        0 => Ok(()),
        few => Err(format!("{few} broken by {} crates", packages.len()).into()),
    }
}

fn packages(metadata: &str) -> Result<Vec<Package>, Failure> {
    let metadata: Value =
        serde_json::from_str(metadata).map_err(|e| format!("cargo metadata: {e}"))?;
    let all = metadata["packages"].as_array();
    let all = all.ok_or("cargo metadata names no packages")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let foreign = all.iter().filter(|package| package["source"].is_string());
    Ok(foreign
        .map(|package| Package {
            name: text(&package["name"]),
            version: text(&package["version"]),
            licence: text(&package["license"]),
            source: text(&package["source"]),
        })
        .collect())
}

impl Rules {
    /// Reads the lists; whatever else is there is cargo-deny's.
    fn read(text: &str) -> Result<Self, Failure> {
        let list = |key: &str| {
            let begin = text.find(&format!("\n{key} = ["));
            let begin = begin.ok_or_else(|| format!("{FILE} has no {key}"))?;
            let rest = &text[begin..];
            let end = rest
                .find("]\n")
                .ok_or_else(|| format!("{FILE}: {key} has no end"))?;
            Ok::<_, Failure>(&rest[..end])
        };
        let strings = |text: &str| -> BTreeSet<String> {
            text.split('"')
                .skip(1)
                .step_by(2)
                .map(str::to_owned)
                .collect()
        };
        let mut skipped = BTreeSet::new();
        for line in list("skip")?.lines().skip(2) {
            let quoted: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
            match quoted[..] {
                [name, reason] if !reason.is_empty() => {
                    skipped.insert(name.to_owned());
                }
                _ => return Err(format!("{FILE}: '{}' has no reason", line.trim()).into()),
            }
        }
        let targets = strings(list("targets")?);
        let Some(target) = targets.into_iter().next() else {
            return Err(format!("{FILE} names no target").into());
        };
        Ok(Self {
            target,
            licences: strings(list("allow")?),
            skipped,
        })
    }

    /// One line for each rule that a crate breaks, and for each that none needs.
    fn broken(&self, packages: &[Package]) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut needed = BTreeSet::new();
        let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for package in packages {
            let Package { name, version, .. } = package;
            if package.source != REGISTRY {
                wrong.push(format!("{name} {version} is of {}", package.source));
            }
            match Licence::parse(&package.licence) {
                Some(licence) if licence.is_allowed(&self.licences, &mut needed) => {}
                _ => wrong.push(format!(
                    "{name} {version}: the licence '{}' is not allowed",
                    package.licence
                )),
            }
            versions.entry(name).or_default().push(version);
        }
        let mut of_use = BTreeSet::new();
        for (name, all) in versions.iter().filter(|(_, all)| all.len() > 1) {
            let full = all.iter().map(|version| format!("{name}@{version}"));
            let (known, rest): (Vec<_>, Vec<_>) = full.partition(|v| self.skipped.contains(v));
            of_use.extend(known);
            if rest.len() > 1 {
                wrong.push(format!("{name} is there as {}", all.join(" and ")));
            }
        }
        for skip in self.skipped.difference(&of_use) {
            wrong.push(format!("{skip} is no second version: leave it out"));
        }
        for licence in self.licences.difference(&needed) {
            wrong.push(format!(
                "no crate needs the licence {licence}: leave it out"
            ));
        }
        wrong
    }
}

/// An SPDX expression, as far as crates have them.
#[derive(Debug, PartialEq, Eq)]
enum Licence {
    One(String),
    Any(Vec<Licence>),
    All(Vec<Licence>),
}

impl Licence {
    /// `None` where it makes no sense.
    fn parse(text: &str) -> Option<Self> {
        // The old way to write OR.
        let text = text.replace('/', " OR ");
        let text = text.replace('(', " ( ").replace(')', " ) ");
        let words: Vec<&str> = text.split_whitespace().collect();
        let mut words = &words[..];
        let licence = Self::any(&mut words)?;
        words.is_empty().then_some(licence)
    }

    fn any(words: &mut &[&str]) -> Option<Self> {
        let mut parts = vec![Self::all(words)?];
        while take(words, "OR") {
            parts.push(Self::all(words)?);
        }
        Some(match parts.len() {
            1 => parts.remove(0),
            _ => Self::Any(parts),
        })
    }

    fn all(words: &mut &[&str]) -> Option<Self> {
        let mut parts = vec![Self::one(words)?];
        while take(words, "AND") {
            parts.push(Self::one(words)?);
        }
        Some(match parts.len() {
            1 => parts.remove(0),
            _ => Self::All(parts),
        })
    }

    fn one(words: &mut &[&str]) -> Option<Self> {
        if take(words, "(") {
            let inner = Self::any(words)?;
            return take(words, ")").then_some(inner);
        }
        let (name, rest) = words.split_first()?;
        *words = rest;
        if matches!(*name, ")" | "OR" | "AND" | "WITH") {
            return None;
        }
        let mut name = (*name).to_owned();
        if take(words, "WITH") {
            let (exception, rest) = words.split_first()?;
            *words = rest;
            name = format!("{name} WITH {exception}");
        }
        Some(Self::One(name))
    }

    /// Whether the allowed ones are enough; which of them it takes goes to `needed`.
    fn is_allowed(&self, allowed: &BTreeSet<String>, needed: &mut BTreeSet<String>) -> bool {
        match self {
            Self::One(name) => {
                let is = allowed.contains(name);
                if is {
                    needed.insert(name.clone());
                }
                is
            }
            Self::Any(parts) => parts.iter().any(|part| part.is_allowed(allowed, needed)),
            Self::All(parts) => parts.iter().all(|part| part.is_allowed(allowed, needed)),
        }
    }
}

fn take(words: &mut &[&str], word: &str) -> bool {
    match words.split_first() {
        Some((first, rest)) if *first == word => {
            *words = rest;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[graph]\ntargets = [\"x\"]\n[licenses]\nallow = [\"MIT\", \"ISC\"]\n\
        [bans]\nskip = [\n    { crate = \"a@1.0.0\", reason = \"b\" },\n]\n";

    fn package(name: &str, version: &str, licence: &str) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            licence: licence.into(),
            source: REGISTRY.into(),
        }
    }

    #[test]
    fn what_is_not_allowed_and_what_is_not_needed_is_said() {
        let rules = Rules::read(TEXT).unwrap();
        let good = [
            package("a", "1.0.0", "MIT"),
            package("a", "2.0.0", "GPL-3.0 OR (MIT AND ISC)"),
        ];
        assert_eq!(rules.broken(&good), Vec::<String>::new());
        let mut bad = vec![
            package("a", "2.0.0", "MIT"),
            package("b", "1.0.0", "MIT AND GPL-3.0"),
            package("b", "2.0.0", ""),
        ];
        bad[0].source = "git+https://example".into();
        let said = rules.broken(&bad).join("\n");
        for line in [
            "a 2.0.0 is of git+https://example",
            "b 1.0.0: the licence 'MIT AND GPL-3.0' is not allowed",
            "b 2.0.0: the licence '' is not allowed",
            "b is there as 1.0.0 and 2.0.0",
            "a@1.0.0 is no second version",
            "no crate needs the licence ISC",
        ] {
            assert!(said.contains(line), "{line}: {said}");
        }
    }

    #[test]
    fn a_skip_has_a_reason() {
        assert!(Rules::read(&TEXT.replace("\"b\"", "\"\"")).is_err());
        assert!(Rules::read(&TEXT.replace("skip", "skips")).is_err());
    }

    #[test]
    fn expressions_are_read_as_spdx_has_them() {
        let one = |name: &str| Licence::One(name.into());
        assert_eq!(
            Licence::parse("Apache-2.0 WITH LLVM-exception OR MIT/ISC"),
            Some(Licence::Any(vec![
                one("Apache-2.0 WITH LLVM-exception"),
                one("MIT"),
                one("ISC")
            ]))
        );
        // AND binds more than OR does.
        assert_eq!(
            Licence::parse("A OR B AND C"),
            Some(Licence::Any(vec![
                one("A"),
                Licence::All(vec![one("B"), one("C")])
            ]))
        );
        for nonsense in ["", "(MIT", "MIT ISC", "OR MIT", "MIT AND", "A WITH"] {
            assert_eq!(Licence::parse(nonsense), None, "{nonsense}");
        }
    }
}
