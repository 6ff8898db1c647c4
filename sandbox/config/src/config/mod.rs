//! The configuration: a file, the files that add to it, and the profiles they make.
//!
//! Read by the shim for each pod and by commands that check or explain it. `FILE.d/*.toml` beside
//! the file add to it in the order of their names, key by key: what a later file says of a key
//! replaces what an earlier one said. Every file is checked in full, with what is replaced later.

mod file;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    feature::Feature,
    key::{Key, Maturity},
    keys,
    problem::{Place, Violation, Violations},
    settings::{Draft, Settings},
    sizing::CpuRequests,
    value::{is_handler, size},
};
use file::{Contents, Statement};

pub(crate) use file::full_name;

/// Where the configuration is unless somebody says otherwise. It may be missing.
pub const DEFAULT_PATH: &str = "/etc/pericarp/config.toml";
/// Where states are kept unless the configuration says otherwise.
pub(crate) const STATE_DIRECTORY: &str = "/var/lib/pericarp";
/// The profile that is always there.
pub const DEFAULT_PROFILE: &str = "pericarp";
/// What manifests written for AKS and Kata call us. They mean the default profile, unless a profile
/// has the name, or names it among its aliases.
const ALIASES: [&str; 3] = ["kata-mshv-vm-isolation", "kata-vm-isolation", "kata"];

/// What containerd passes of a handler: `runtimeoptions.v1.Options.ConfigPath`.
///
/// A shim is not told by which handler it was asked for. So the handler's options say it, behind the
/// path: `ConfigPath = "/etc/pericarp/config.toml#kata"`. containerd passes the text as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigPath {
    /// The file; without it, [`DEFAULT_PATH`] if it is there.
    pub path: Option<PathBuf>,
    /// The handler; [`DEFAULT_PROFILE`] if none is named.
    pub handler: String,
}

impl ConfigPath {
    /// Reads `PATH`, `PATH#HANDLER`, `#HANDLER` or nothing.
    ///
    /// # Errors
    ///
    /// A path that is not absolute, and a name that is none of a handler.
    pub fn parse(text: &str) -> Result<Self, Violation> {
        let broken = |rule: &str, cure: &str| Violation::Value {
            place: None,
            key: "ConfigPath".into(),
            value: text.to_owned(),
            rule: rule.into(),
            cure: cure.into(),
        };
        let (path, handler) = text.rsplit_once('#').unwrap_or((text, DEFAULT_PROFILE));
        if !is_handler(handler) {
            let rule = "names no handler behind its '#'";
            return Err(broken(rule, crate::key::HANDLER_CURE));
        }
        if !path.is_empty() && !path.starts_with('/') {
            return Err(broken("is not an absolute path", "begin it with '/'"));
        }
        Ok(Self {
            path: (!path.is_empty()).then(|| path.into()),
            handler: handler.to_owned(),
        })
    }
}

/// How pods of one handler, or of several, run.
#[derive(Debug, Clone)]
pub struct Profile {
    pub(crate) name: String,
    pub(crate) draft: Draft,
    /// Where each key is said that is.
    pub(crate) places: BTreeMap<&'static str, Place>,
}

impl Profile {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            draft: Draft::default(),
            places: BTreeMap::new(),
        }
    }

    /// Its name, which is that of its first handler.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Further handlers that mean it.
    #[must_use]
    pub fn aliases(&self) -> &[String] {
        self.draft.aliases.as_deref().unwrap_or_default()
    }

    /// What a pod may say of its own.
    #[must_use]
    pub fn annotations(&self) -> &[&'static Key] {
        &self.draft.annotations
    }

    /// What holds where a pod says nothing.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.draft.settings
    }
}

/// What is configured, checked as a whole.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) profiles: BTreeMap<String, Profile>,
    /// Of the node.
    pub(crate) draft: Draft,
    pub(crate) places: BTreeMap<&'static str, Place>,
    files: Vec<PathBuf>,
}

impl Default for Config {
    /// What holds without any file.
    fn default() -> Self {
        let mut config = Self {
            profiles: BTreeMap::from([(DEFAULT_PROFILE.into(), Profile::new(DEFAULT_PROFILE))]),
            draft: Draft::default(),
            places: BTreeMap::new(),
            files: Vec::new(),
        };
        config.add_usual_aliases();
        config
    }
}

impl Config {
    /// Reads `path` and what adds to it; without a path [`DEFAULT_PATH`], which may be missing.
    ///
    /// # Errors
    ///
    /// Everything that is wrong in any of the files, each with its place.
    pub fn load(path: Option<&Path>) -> Result<Self, Violations> {
        let required = path.is_some();
        let path = path.unwrap_or(Path::new(DEFAULT_PATH));
        let mut violations = Vec::new();
        let mut config = Self {
            files: Vec::new(),
            ..Self::default()
        };
        // They are added again, to what no file names.
        for profile in config.profiles.values_mut() {
            profile.draft.aliases = None;
        }
        match file::text(path) {
            Ok(Some(text)) => config.add(path, &text, &mut violations),
            Ok(None) if !required => {}
            Ok(None) => violations.push(Violation::File {
                path: path.to_owned(),
                rule: "does not exist".into(),
                cure: "check the path, or leave it out for the built-in configuration".into(),
            }),
            Err(violation) => violations.push(violation),
        }
        for path in additions(path, &mut violations) {
            match file::text(&path) {
                Ok(Some(text)) => config.add(&path, &text, &mut violations),
                // Removed since it was listed.
                Ok(None) => {}
                Err(violation) => violations.push(violation),
            }
        }
        config.check(&mut violations);
        config.add_usual_aliases();
        if violations.is_empty() {
            Ok(config)
        } else {
            Err(Violations(violations))
        }
    }

    /// The profile that a handler means.
    ///
    /// # Errors
    ///
    /// No profile has the name, or the alias; the nearest that there is is named.
    pub fn profile(&self, handler: &str) -> Result<&Profile, Violation> {
        let by_alias = |profile: &&Profile| profile.aliases().iter().any(|name| name == handler);
        self.profiles
            .get(handler)
            .or_else(|| self.profiles.values().find(by_alias))
            .ok_or_else(|| {
                let known: Vec<&str> = self.handlers().map(|(name, _)| name).collect();
                Violation::unknown(None, "handler", handler, known)
            })
    }

    /// Every profile, by name.
    pub fn profiles(&self) -> impl Iterator<Item = &Profile> {
        self.profiles.values()
    }

    /// Every handler, and the profile it means.
    pub fn handlers(&self) -> impl Iterator<Item = (&str, &Profile)> {
        self.profiles.values().flat_map(|profile| {
            let aliases = profile.aliases().iter().map(String::as_str);
            let names = std::iter::once(profile.name()).chain(aliases);
            names.map(move |name| (name, profile))
        })
    }

    /// Features that the operator wants.
    #[must_use]
    pub fn features(&self) -> &[Feature] {
        &self.draft.features
    }

    /// Where the state of features is kept, see [`crate::feature::FeatureFile`].
    #[must_use]
    pub fn state_directory(&self) -> &Path {
        let said = self.draft.state_directory.as_deref();
        said.unwrap_or(Path::new(STATE_DIRECTORY))
    }

    /// The files that were read, in that order.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Adds what a file says, key by key.
    fn add(&mut self, path: &Path, text: &str, violations: &mut Vec<Violation>) {
        self.files.push(path.to_owned());
        let Contents {
            profiles,
            mut statements,
        } = file::parse(path, text, violations);
        for name in profiles {
            let new = Profile::new(&name);
            self.profiles.entry(name).or_insert(new);
        }
        statements.sort_by(|one, other| one.place.cmp(&other.place));
        for statement in statements {
            self.say(statement, violations);
        }
    }

    fn say(&mut self, statement: Statement, violations: &mut Vec<Violation>) {
        let Statement {
            profile,
            key,
            raw,
            place,
        } = statement;
        let (draft, places) = match profile.as_ref().map(|name| self.profiles.get_mut(name)) {
            Some(Some(profile)) => (&mut profile.draft, &mut profile.places),
            // There is one for each name: it was added before.
            Some(None) => return,
            None => (&mut self.draft, &mut self.places),
        };
        match key.kind.store(draft, &raw) {
            Ok(()) => drop(places.insert(key.name, place)),
            Err(all) => {
                violations.extend(all.into_iter().map(|(value, broken)| Violation::Value {
                    place: Some(Box::new(place.clone())),
                    key: full_name(profile.as_deref(), key.name),
                    value,
                    rule: broken.rule,
                    cure: broken.cure,
                }))
            }
        }
    }

    /// What no key alone can break.
    fn check(&self, violations: &mut Vec<Violation>) {
        for profile in self.profiles.values() {
            let mut broken = |key: &'static str, value: String, rule: String, cure: &str| {
                violations.push(Violation::Value {
                    place: profile.places.get(key).cloned().map(Box::new),
                    key: full_name(Some(&profile.name), key),
                    value,
                    rule,
                    cure: cure.to_owned(),
                });
            };
            for key in profile.places.keys().filter_map(|name| keys::find(name)) {
                if let Maturity::Experimental(feature) = key.maturity
                    && !self.features().contains(&feature)
                {
                    let value = (key.show)(&profile.draft).unwrap_or_default();
                    broken(key.name, value, experimental(feature), &opt_in(feature));
                }
            }
            for key in profile.annotations() {
                if let Maturity::Experimental(feature) = key.maturity
                    && !self.features().contains(&feature)
                {
                    let rule = experimental(feature);
                    broken("annotations", key.name.into(), rule, &opt_in(feature));
                }
            }
            for alias in profile.aliases() {
                let others = self
                    .profiles
                    .values()
                    .filter(|other| other.name != profile.name);
                let others: Vec<&Profile> = others.collect();
                let other = others.iter().find(|other| other.aliases().contains(alias));
                if alias == profile.name() || others.iter().any(|other| other.name == *alias) {
                    let rule = "is the name of a profile".to_owned();
                    broken("aliases", alias.clone(), rule, "leave it out");
                } else if let Some(other) = other {
                    let rule = format!("is an alias of the profile '{}', too", other.name);
                    broken(
                        "aliases",
                        alias.clone(),
                        rule,
                        "leave it out of one of them",
                    );
                }
            }
            let settings = profile.settings();
            let policy = settings.sizing;
            if settings.cpu_requests == CpuRequests::Counted && !policy.may_count_requests() {
                let rule = format!("has no meaning under the policy '{}'", policy.name());
                let cure = "leave it out, or set 'sizing' to kata";
                broken("cpu-requests", "counted".into(), rule, cure);
            }
            if let Some(most) = settings
                .max_memory
                .filter(|most| *most < policy.least_memory())
            {
                let rule = format!(
                    "is less than the {} of the smallest machine under the policy '{}'",
                    size(policy.least_memory()),
                    policy.name()
                );
                let cure = "raise it, or set 'sizing' to another policy";
                broken("max-memory", size(most), rule, cure);
            }
        }
    }

    /// Gives the default profile the usual handlers that no other profile has.
    fn add_usual_aliases(&mut self) {
        let taken: BTreeSet<String> = self.handlers().map(|(name, _)| name.to_owned()).collect();
        if let Some(profile) = self.profiles.get_mut(DEFAULT_PROFILE)
            && profile.draft.aliases.is_none()
        {
            let free = ALIASES.into_iter().filter(|alias| !taken.contains(*alias));
            profile.draft.aliases = Some(free.map(str::to_owned).collect());
        }
    }
}

pub(crate) fn experimental(feature: Feature) -> String {
    format!("is experimental, and the feature '{feature}' is not asked for")
}

fn opt_in(feature: Feature) -> String {
    format!("add '{feature}' to 'features', or leave the key out")
}

/// The files that add to `path`, in the order in which they do.
fn additions(path: &Path, violations: &mut Vec<Violation>) -> Vec<PathBuf> {
    let mut directory = path.as_os_str().to_owned();
    directory.push(".d");
    let directory = PathBuf::from(directory);
    let list = || -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            // What editors leave has other names.
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            if name.ends_with(b".toml") && !name.starts_with(b".") {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    };
    match list() {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            violations.push(Violation::File {
                path: directory,
                rule: format!("cannot be read ({error})"),
                cure: "make it a directory of files that add to the configuration".into(),
            });
            Vec::new()
        }
    }
}
