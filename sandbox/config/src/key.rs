//! What a key is: its name, what it means, and how its value is read.
//!
//! The keys themselves are in `keys`. One entry there is all that is said of a key anywhere: values are
//! checked by it, `explain` prints it.

use std::{fmt, path::PathBuf, time::Duration};

use crate::{
    feature::Feature,
    problem::{Broken, list, suggestion},
    settings::Draft,
    value::{self, CpuSet, size},
};

/// Whether one can rely on a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maturity {
    /// It stays, and keeps its meaning.
    Stable,
    /// It may change or go. It can be used once its feature is named in `features`, and pods get
    /// it once that feature is ready.
    Experimental(Feature),
}

impl fmt::Display for Maturity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stable => write!(f, "stable"),
            Self::Experimental(feature) => {
                write!(f, "experimental, needs the feature '{feature}'")
            }
        }
    }
}

/// Who can say a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The operator, at the top of a file.
    Node,
    /// The operator, in a profile.
    Profile,
    /// A pod alone.
    Pod,
}

/// How a pod says a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Annotation {
    /// Not at all.
    None,
    /// By an annotation with the key's name.
    Whole,
    /// By one for each volume, which ends with this.
    PerVolume(&'static str),
}

/// A key of the configuration, or of a pod's annotations.
pub struct Key {
    pub(crate) name: &'static str,
    pub(crate) scope: Scope,
    pub(crate) meaning: &'static str,
    /// Who reads it, and when.
    pub(crate) user: &'static str,
    /// What holds where nothing is said and `show` shows nothing.
    pub(crate) unset: &'static str,
    pub(crate) maturity: Maturity,
    pub(crate) annotation: Annotation,
    pub(crate) kind: Kind,
    pub(crate) show: fn(&Draft) -> Option<String>,
}

impl Key {
    /// Its name, without the table it stands in.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Key {}

/// A value as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Raw {
    Text(String),
    /// Digits, perhaps with a point and a sign.
    Number(String),
    Words(Vec<String>),
    /// Of a type that no key has.
    Other(&'static str),
}

impl Raw {
    /// As a message shows it.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Text(text) | Self::Number(text) => text.clone(),
            Self::Words(words) => list(words.iter().map(String::as_str)),
            Self::Other(kind) => (*kind).to_owned(),
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Number(_) => "a number",
            Self::Words(_) => "a list of strings",
            Self::Other(_) => "of another type",
        }
    }
}

/// How a value is read and where it goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// One of some names. `set` knows the same ones.
    Word {
        names: &'static [&'static str],
        set: fn(&mut Draft, &str) -> bool,
    },
    Number {
        least: u64,
        most: u64,
        set: fn(&mut Draft, u64),
    },
    /// Bytes.
    Size {
        least: u64,
        most: u64,
        set: fn(&mut Draft, u64),
    },
    Seconds {
        set: fn(&mut Draft, Duration),
    },
    Cpus {
        set: fn(&mut Draft, CpuSet),
    },
    Parameters {
        set: fn(&mut Draft, String),
    },
    Directory {
        set: fn(&mut Draft, PathBuf),
    },
    Handlers {
        set: fn(&mut Draft, Vec<String>),
    },
    /// Some of the names that `known` gives.
    Names {
        known: fn() -> Vec<&'static str>,
        set: fn(&mut Draft, Vec<&'static str>),
    },
}

impl Kind {
    /// An annotation's text, as a file would have it.
    pub(crate) fn of_annotation(self, text: &str) -> Raw {
        match self {
            Self::Number { .. } | Self::Seconds { .. } => Raw::Number(text.to_owned()),
            _ => Raw::Text(text.to_owned()),
        }
    }

    /// Checks a value and stores it; what is wrong comes back with the part it is about.
    pub(crate) fn store(self, draft: &mut Draft, raw: &Raw) -> Result<(), Vec<(String, Broken)>> {
        let stored = match (self, raw) {
            (Self::Word { names, set }, Raw::Text(text)) => match set(draft, text) {
                true => Ok(()),
                false => Err(Broken::new(
                    "is none of its values",
                    suggestion(text, names.iter().copied()),
                )),
            },
            (Self::Number { least, most, set }, Raw::Number(text)) => {
                value::number(text, least, most).map(|number| set(draft, number))
            }
            (Self::Size { least, most, set }, Raw::Number(text) | Raw::Text(text)) => {
                value::bytes(text, least, most).map(|bytes| set(draft, bytes))
            }
            (Self::Seconds { set }, Raw::Number(text)) => {
                value::seconds(text).map(|seconds| set(draft, seconds))
            }
            (Self::Cpus { set }, Raw::Text(text)) => {
                CpuSet::parse(text).map(|cpus| set(draft, cpus))
            }
            (Self::Parameters { set }, Raw::Text(text)) => {
                value::parameters(text).map(|words| set(draft, words))
            }
            (Self::Directory { set }, Raw::Text(text)) => {
                value::directory(text).map(|path| set(draft, path))
            }
            (Self::Handlers { .. } | Self::Names { .. }, Raw::Words(words)) => {
                return self.store_words(draft, words);
            }
            _ => {
                let rule = format!("is {}", raw.type_name());
                Err(Broken::new(rule, format!("write {}", self.form())))
            }
        };
        stored.map_err(|broken| vec![(raw.text(), broken)])
    }

    /// Every word that is wrong is reported, and none is stored then.
    fn store_words(self, draft: &mut Draft, words: &[String]) -> Result<(), Vec<(String, Broken)>> {
        let known = match self {
            Self::Names { known, .. } => known(),
            _ => Vec::new(),
        };
        let mut broken = Vec::new();
        for (index, word) in words.iter().enumerate() {
            let problem = if words[..index].contains(word) {
                Broken::new("is given twice", "leave one out")
            } else if let Self::Handlers { .. } = self {
                if value::is_handler(word) {
                    continue;
                }
                Broken::new("is no name of a handler", HANDLER_CURE)
            } else if known.contains(&word.as_str()) {
                continue;
            } else {
                Broken::new("is unknown", suggestion(word, known.iter().copied()))
            };
            broken.push((word.clone(), problem));
        }
        if !broken.is_empty() {
            return Err(broken);
        }
        match self {
            Self::Handlers { set } => set(draft, words.to_vec()),
            Self::Names { set, .. } => {
                let given = |name: &&str| words.iter().any(|word| word == name);
                set(draft, known.into_iter().filter(given).collect());
            }
            // Called for these two.
            _ => {}
        }
        Ok(())
    }

    /// What its values are.
    pub(crate) fn type_name(self) -> &'static str {
        match self {
            Self::Word { .. } => "a word",
            Self::Number { .. } => "a whole number",
            Self::Size { .. } => "a size, in bytes or with K, M, G or T (powers of 1024)",
            Self::Seconds { .. } => "seconds",
            Self::Cpus { .. } => "a list of CPUs",
            Self::Parameters { .. } => "kernel parameters",
            Self::Directory { .. } => "a directory",
            Self::Handlers { .. } | Self::Names { .. } => "a list of words",
        }
    }

    /// Which of these there may be.
    pub(crate) fn range(self) -> String {
        match self {
            Self::Word { names, .. } => list(names.iter().copied()),
            Self::Number { least, most, .. } => format!("{least} to {most}"),
            Self::Size { least, most, .. } => format!("{} to {}", size(least), size(most)),
            Self::Seconds { .. } => "0.1 to 3600".to_owned(),
            Self::Cpus { .. } => "numbers and ranges, such as 0-3,8".to_owned(),
            Self::Parameters { .. } => format!(
                "words of printable ASCII, at most {} characters; not what the machine's own \
                 start depends on",
                value::MAX_PARAMETERS
            ),
            Self::Directory { .. } => "an absolute path".to_owned(),
            Self::Handlers { .. } => "names of handlers".to_owned(),
            Self::Names { known, .. } => list(known()),
        }
    }

    /// How a file has it.
    fn form(self) -> &'static str {
        match self {
            Self::Word { .. } => "a string",
            Self::Number { .. } => "a whole number, without quotes",
            Self::Size { .. } => "a number of bytes, or a string such as \"512M\"",
            Self::Seconds { .. } => "a number, without quotes",
            Self::Cpus { .. } => "a string such as \"0-3,8\"",
            Self::Parameters { .. } => "a string with a space between words",
            Self::Directory { .. } => "a string with an absolute path",
            Self::Handlers { .. } | Self::Names { .. } => "a list of strings, such as [\"a\"]",
        }
    }
}

/// How a handler may be called.
pub(crate) const HANDLER_CURE: &str =
    "use lower-case letters, digits and '-' inside, at most 63 characters";
