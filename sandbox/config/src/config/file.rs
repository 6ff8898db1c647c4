//! One file: from TOML to what it says of which key, each with its line.
//!
//! Called by `config` for the main file and each file of the directory beside it. Knows which tables
//! and keys there are, and reports those there are not; values are read by the key's kind, later.

use std::{
    fs::File,
    io::{self, Read as _},
    ops::Range,
    path::Path,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{
    annotation::PREFIX,
    key::{Annotation, HANDLER_CURE, Key, Raw, Scope},
    keys::{self, KEYS},
    problem::{Place, Violation},
    value::is_handler,
};

/// The one table at the top: profiles by name.
const PROFILES: &str = "profiles";
/// Larger than any configuration, bytes.
const MOST: u64 = 1 << 20;

/// A key with a value.
#[derive(Debug)]
pub(super) struct Statement {
    /// The profile it stands in; none is the top of the file.
    pub(super) profile: Option<String>,
    pub(super) key: &'static Key,
    pub(super) raw: Raw,
    pub(super) place: Place,
}

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Profiles that have a table, which may be empty.
    pub(super) profiles: Vec<String>,
    pub(super) statements: Vec<Statement>,
}

/// Reads a file whole; none if it is missing.
pub(super) fn text(path: &Path) -> Result<Option<String>, Violation> {
    let broken = |rule: String, cure: &str| Violation::File {
        path: path.to_owned(),
        rule,
        cure: cure.to_owned(),
    };
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let rule = format!("cannot be read ({error})");
            return Err(broken(rule, "check its kind and permissions"));
        }
        Ok(_) => {}
    }
    if bytes.len() as u64 > MOST {
        let rule = format!("is larger than {MOST} bytes");
        return Err(broken(rule, "is it a configuration?"));
    }
    let text = String::from_utf8(bytes);
    let text = text.map_err(|_| broken("is not valid UTF-8".into(), "mend or remove it"))?;
    Ok(Some(text))
}

/// Reads what a file says. A file that is not TOML says nothing.
pub(super) fn parse(path: &Path, text: &str, violations: &mut Vec<Violation>) -> Contents {
    let (root, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        path,
        text,
        violations,
        contents: Contents::default(),
    };
    for error in &errors {
        let place = reader.place(error.span().unwrap_or_default());
        reader.violations.push(Violation::Syntax {
            place,
            rule: error.message().to_owned(),
        });
    }
    if errors.is_empty() {
        reader.root(root.get_ref());
    }
    reader.contents
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    violations: &'a mut Vec<Violation>,
    contents: Contents,
}

impl Reader<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        Place {
            path: self.path.to_owned(),
            line: 1 + before.iter().filter(|byte| **byte == b'\n').count(),
        }
    }

    fn root(&mut self, root: &DeTable<'_>) {
        for (name, value) in root {
            let place = self.place(name.span());
            if name.get_ref() == PROFILES {
                self.profiles(place, value.get_ref());
            } else {
                self.statement(None, name.get_ref(), place, value);
            }
        }
    }

    fn profiles(&mut self, place: Place, value: &DeValue<'_>) {
        let Some(profiles) = value.as_table() else {
            return self.no_table(place, PROFILES, value);
        };
        for (name, value) in profiles {
            let place = self.place(name.span());
            let table = format!("{PROFILES}.{}", name.get_ref());
            if !is_handler(name.get_ref()) {
                self.violations.push(Violation::Value {
                    place: Some(Box::new(place)),
                    key: PROFILES.to_owned(),
                    value: name.get_ref().to_string(),
                    rule: "is no name of a handler".into(),
                    cure: HANDLER_CURE.into(),
                });
                continue;
            }
            let Some(keys) = value.get_ref().as_table() else {
                self.no_table(place, &table, value.get_ref());
                continue;
            };
            let profile = name.get_ref().to_string();
            for (name, value) in keys {
                let place = self.place(name.span());
                self.statement(Some(&profile), name.get_ref(), place, value);
            }
            self.contents.profiles.push(profile);
        }
    }

    fn no_table(&mut self, place: Place, table: &str, value: &DeValue<'_>) {
        self.violations.push(Violation::Value {
            place: Some(Box::new(place)),
            key: table.to_owned(),
            value: raw(value).text(),
            rule: "is no table".into(),
            cure: format!("write [{PROFILES}.NAME] and its keys below"),
        });
    }

    fn statement(
        &mut self,
        profile: Option<&str>,
        name: &str,
        place: Place,
        value: &Spanned<DeValue<'_>>,
    ) {
        let scope = match profile {
            Some(_) => Scope::Profile,
            None => Scope::Node,
        };
        match keys::find(name) {
            Some(key) if key.scope == scope => self.contents.statements.push(Statement {
                profile: profile.map(str::to_owned),
                key,
                raw: raw(value.get_ref()),
                place,
            }),
            Some(key) => self.violations.push(Violation::Unknown {
                place: Some(Box::new(place)),
                what: "key",
                name: full_name(profile, name),
                cure: elsewhere(key),
            }),
            None => {
                let known = KEYS.iter().filter(|key| key.scope == scope);
                let known: Vec<_> = known.map(|key| key.name).collect();
                let mut violation = Violation::unknown(Some(place), "key", name, known);
                if let Violation::Unknown { name, .. } = &mut violation {
                    *name = full_name(profile, name);
                }
                self.violations.push(violation);
            }
        }
    }
}

/// Where a key belongs that was found in the wrong place.
fn elsewhere(key: &Key) -> String {
    match (key.scope, key.annotation) {
        (Scope::Node, _) => "it belongs to the top of the file, before any table".to_owned(),
        (Scope::Profile, _) => {
            format!("it belongs into a profile, such as [{PROFILES}.pericarp]")
        }
        (Scope::Pod, Annotation::None | Annotation::PerVolume(_)) => "a pod says it".to_owned(),
        (Scope::Pod, Annotation::Whole) => {
            format!("a pod says it, by the annotation {PREFIX}{}", key.name)
        }
    }
}

/// A key with the table it stands in.
pub(crate) fn full_name(profile: Option<&str>, name: &str) -> String {
    match profile {
        Some(profile) => format!("{PROFILES}.{profile}.{name}"),
        None => name.to_owned(),
    }
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => {
            // A plus sign is TOML's alone.
            Raw::Number(number.as_str().trim_start_matches('+').to_owned())
        }
        DeValue::Integer(_) => Raw::Other("a number that is not decimal"),
        DeValue::Float(number) => Raw::Number(number.as_str().to_owned()),
        DeValue::Array(all) => {
            let words = all.iter().map(|value| value.get_ref().as_str());
            match words.map(|word| word.map(str::to_owned)).collect() {
                Some(words) => Raw::Words(words),
                None => Raw::Other("a list of other things than strings"),
            }
        }
        DeValue::Boolean(_) => Raw::Other("true or false"),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}
