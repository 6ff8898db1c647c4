//! One thing that is wrong, in one line: where, what, which value, which rule, and the cure.
//!
//! Made by everything here that reads what others wrote; printed as it is by whoever called.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Longer values are cut where they are shown, characters.
const SHOWN: usize = 100;

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", shown_path(&self.path), self.line)
    }
}

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Violation {
    /// A file or directory that cannot be read, or is not what it should be.
    #[error("'{path}': {rule}; {cure}", path = shown_path(.path))]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        rule: String,
        /// What to do.
        cure: String,
    },
    /// Text that is not TOML.
    #[error("{place}: is not TOML: {}; mend this line, or the one before it", shown(.rule))]
    Syntax {
        /// Where the parser stopped.
        place: Place,
        /// What it says.
        rule: String,
    },
    /// A name that nobody knows.
    #[error("{}'{}': unknown {what}; {cure}", before(.place), shown(.name))]
    Unknown {
        /// Where it is written, if that is a file.
        place: Option<Box<Place>>,
        /// What it should have named: a key, an annotation, ...
        what: &'static str,
        /// As written.
        name: String,
        /// The nearest known name, or all of them.
        cure: String,
    },
    /// A known key, and a value that it cannot have.
    #[error("{}{key} '{}': {rule}; {cure}", before(.place), shown(.value))]
    Value {
        /// Where it is written, if that is a file.
        place: Option<Box<Place>>,
        /// The key, with its table, or the annotation.
        key: String,
        /// As written.
        value: String,
        /// The rule it breaks.
        rule: String,
        /// What to do.
        cure: String,
    },
}

impl Violation {
    /// A name nobody knows among `known` ones.
    pub(crate) fn unknown<'a>(
        place: Option<Place>,
        what: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'a str> + Clone,
    ) -> Self {
        Self::Unknown {
            place: place.map(Box::new),
            what,
            name: name.to_owned(),
            cure: suggestion(name, known),
        }
    }
}

/// Everything that is wrong, one line each.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, violation) in self.0.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{violation}")?;
        }
        Ok(())
    }
}

/// What a value breaks, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) rule: String,
    pub(crate) cure: String,
}

impl Broken {
    pub(crate) fn new(rule: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            rule: rule.into(),
            cure: cure.into(),
        }
    }
}

fn before(place: &Option<Box<Place>>) -> String {
    place
        .as_ref()
        .map_or_else(String::new, |place| format!("{place}: "))
}

/// Text of others, on one line of bounded length.
pub(crate) fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(SHOWN).map(plain).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    shown
}

fn shown_path(path: &Path) -> String {
    // Not cut: a path that is shown in part is of no use.
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    path.to_string_lossy().chars().map(plain).collect()
}

/// The cure for a name that is not among the known ones: the nearest, or all of them.
pub(crate) fn suggestion<'a>(
    name: &str,
    known: impl IntoIterator<Item = &'a str> + Clone,
) -> String {
    if let Some(near) = nearest(name, known.clone()) {
        return format!("did you mean '{near}'?");
    }
    match list(known) {
        known if known.is_empty() => "there is none".to_owned(),
        known => format!("known: {known}"),
    }
}

/// Names with commas between them.
pub(crate) fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// The known name that is most like `name`, if one is close.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // The comparison takes time with the product of both lengths, and nobody's key is that long.
    if name.len() > SHOWN {
        return None;
    }
    known
        .into_iter()
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 2.max(candidate.len() / 3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edits (insert, delete, replace) between two words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_suggested_else_all_of_them() {
        let known = ["sizing", "hypervisor"];
        assert_eq!(suggestion("sizeing", known), "did you mean 'sizing'?");
        assert_eq!(suggestion("colour", known), "known: sizing, hypervisor");
        assert_eq!(suggestion("colour", []), "there is none");
        assert_eq!(nearest(&"sizing".repeat(100), known), None);
    }

    #[test]
    fn a_violation_is_one_line() {
        let place = Place {
            path: "/etc/a\nb".into(),
            line: 3,
        };
        let violation = Violation::Value {
            place: Some(Box::new(place.clone())),
            key: "profiles.a.sizing".into(),
            value: "x\ny".into(),
            rule: "is no policy".into(),
            cure: "use another".into(),
        };
        assert_eq!(
            violation.to_string(),
            "/etc/a\u{fffd}b:3: profiles.a.sizing 'x\u{fffd}y': is no policy; use another"
        );
        let unknown = Violation::unknown(None, "handler", &"h".repeat(101), ["kata"]);
        assert_eq!(
            unknown.to_string(),
            format!("'{}...': unknown handler; known: kata", "h".repeat(100))
        );
        let both = Violations(vec![
            Violation::Syntax {
                place,
                rule: "what".into(),
            },
            unknown,
        ]);
        assert_eq!(both.to_string().lines().count(), 2);
    }
}
