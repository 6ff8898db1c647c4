//! The file in which the states of features are kept.
//!
//! JSON, replaced as a whole: who reads it sees the old or the new one, after a crash as well. Changes
//! are made one at a time, under a lock on the directory. A file that is damaged is refused and left
//! as it is; a missing one says that every feature is off.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Feature, State};
use crate::problem::{shown, suggestion};

const NAME: &str = "features.json";
/// Under the lock nobody else writes to it.
const NEW: &str = "features.json.new";
const VERSION: u32 = 1;
/// Larger than any honest one, bytes.
const MOST: u64 = 64 << 10;

/// What can go wrong with the states of features.
#[derive(Debug, Error)]
pub enum FeatureError {
    /// The file cannot be read.
    #[error("'{}' cannot be read: {source}; check its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file or its directory cannot be written.
    #[error("'{}' cannot be written: {source}; check 'state-directory'", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What is in the file is not ours.
    #[error("'{}' {rule}; remove it, and features are off until they are prepared again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        rule: String,
    },
    /// A state that cannot follow.
    #[error("feature '{feature}': cannot go from {from} to {to}; prepare it first")]
    Order {
        /// The feature.
        feature: Feature,
        /// Its state.
        from: State,
        /// The state it was to have.
        to: State,
    },
    /// A pod needs it.
    #[error("feature '{feature}': is {state}; a pod that uses it has to wait until it is Ready")]
    NotReady {
        /// The feature.
        feature: Feature,
        /// Its state.
        state: State,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    features: BTreeMap<String, StoredState>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase", deny_unknown_fields)]
enum StoredState {
    Off,
    Preparing,
    Ready,
    Failed { reason: String },
}

/// Where the states of features are kept.
#[derive(Debug, Clone)]
pub struct FeatureFile {
    directory: PathBuf,
}

impl FeatureFile {
    /// The file in `directory`, which is `Config::state_directory`. Nothing is opened yet.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// The file itself.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// The state of every feature.
    ///
    /// # Errors
    ///
    /// [`FeatureError::Read`] and [`FeatureError::Damaged`]. A missing file is none.
    pub fn states(&self) -> Result<BTreeMap<Feature, State>, FeatureError> {
        let path = self.path();
        let mut states: BTreeMap<_, _> = Feature::ALL.map(|f| (f, State::Off)).into();
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MOST + 1).read_to_end(&mut text));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(states),
            Err(source) => return Err(FeatureError::Read { path, source }),
            Ok(_) => {}
        }
        let stored = parse(&text).map_err(|rule| FeatureError::Damaged { path, rule })?;
        states.extend(stored);
        Ok(states)
    }

    /// The state of one feature.
    ///
    /// # Errors
    ///
    /// As [`FeatureFile::states`].
    pub fn state(&self, feature: Feature) -> Result<State, FeatureError> {
        Ok(self.states()?.remove(&feature).unwrap_or_default())
    }

    /// Refuses what needs features that are not ready. Asks for no file if none is needed.
    ///
    /// # Errors
    ///
    /// [`FeatureError::NotReady`] for each of them, or why their states are not known.
    pub fn require(&self, features: &[Feature]) -> Result<(), Vec<FeatureError>> {
        if features.is_empty() {
            return Ok(());
        }
        let mut states = self.states().map_err(|error| vec![error])?;
        let errors: Vec<_> = features
            .iter()
            .map(|feature| (*feature, states.remove(feature).unwrap_or_default()))
            .filter(|(_, state)| *state != State::Ready)
            .map(|(feature, state)| FeatureError::NotReady { feature, state })
            .collect();
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    /// Changes the state of one feature, durably, and makes the directory if it is missing. Waits
    /// while others change something. Returns the state it had.
    ///
    /// # Errors
    ///
    /// Any but [`FeatureError::NotReady`]; the file is as it was then.
    pub fn set(&self, feature: Feature, state: State) -> Result<State, FeatureError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| FeatureError::Write { path, source }
        };
        fs::create_dir_all(&self.directory).map_err(failed(&self.directory))?;
        let directory = File::open(&self.directory).map_err(failed(&self.directory))?;
        // Until the descriptor is closed, at the end of this function.
        directory.lock().map_err(failed(&self.directory))?;
        let mut states = self.states()?;
        let from = states.get(&feature).cloned().unwrap_or_default();
        if !from.may_become(&state) {
            let to = state;
            return Err(FeatureError::Order { feature, from, to });
        }
        states.insert(feature, state);
        let (path, new) = (self.path(), self.directory.join(NEW));
        replace(&path, &new, states).map_err(failed(&path))?;
        directory.sync_all().map_err(failed(&self.directory))?;
        Ok(from)
    }
}

fn replace(path: &Path, new: &Path, states: BTreeMap<Feature, State>) -> io::Result<()> {
    let features = states
        .into_iter()
        .map(|(feature, state)| (feature.name().to_owned(), state.into()))
        .collect();
    let stored = Stored {
        version: VERSION,
        features,
    };
    let mut text = serde_json::to_vec_pretty(&stored)?;
    text.push(b'\n');
    // What a crash left is in the way, or a link of somebody who can write here.
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o644).open(new)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// What a file says, or what is wrong with it.
fn parse(text: &[u8]) -> Result<BTreeMap<Feature, State>, String> {
    if text.len() as u64 > MOST {
        return Err(format!("is larger than {MOST} bytes"));
    }
    let stored: Stored = serde_json::from_slice(text)
        .map_err(|error| format!("is damaged ({})", shown(&error.to_string())))?;
    if stored.version != VERSION {
        let version = stored.version;
        return Err(format!(
            "is of version {version}, and this program knows {VERSION}"
        ));
    }
    let known = |(name, state): (String, StoredState)| match Feature::parse(&name) {
        Some(feature) => Ok((feature, state.into())),
        None => Err(format!(
            "names the unknown feature '{}' ({})",
            shown(&name),
            suggestion(&name, Feature::ALL.map(Feature::name))
        )),
    };
    stored.features.into_iter().map(known).collect()
}

impl From<State> for StoredState {
    fn from(state: State) -> Self {
        match state {
            State::Off => Self::Off,
            State::Preparing => Self::Preparing,
            State::Ready => Self::Ready,
            State::Failed(reason) => Self::Failed { reason },
        }
    }
}

impl From<StoredState> for State {
    fn from(state: StoredState) -> Self {
        match state {
            StoredState::Off => Self::Off,
            StoredState::Preparing => Self::Preparing,
            StoredState::Ready => Self::Ready,
            StoredState::Failed { reason } => Self::Failed(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    const PINNING: Feature = Feature::CpuPinning;
    const PARAMETERS: Feature = Feature::KernelParameters;

    #[test]
    fn a_state_survives_and_a_missing_file_is_off() {
        let directory = Directory::new("feature-survives");
        // Its parent is made, too.
        let place = directory.path("var/lib");
        let file = FeatureFile::in_directory(&place);
        assert_eq!(file.state(PINNING).unwrap(), State::Off);
        assert!(!place.exists(), "reading makes nothing");
        assert_eq!(file.set(PINNING, State::Preparing).unwrap(), State::Off);
        let failed = State::Failed("no \"cpuset\"\n".into());
        file.set(PINNING, failed.clone()).unwrap();
        file.set(PARAMETERS, State::Preparing).unwrap();
        file.set(PARAMETERS, State::Ready).unwrap();
        // Another process, after a restart.
        let states = FeatureFile::in_directory(&place).states().unwrap();
        assert_eq!(states[&PINNING], failed);
        assert_eq!(states[&PARAMETERS], State::Ready);
        let names: Vec<_> = fs::read_dir(&place).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing but the file: {names:?}");
    }

    #[test]
    fn what_is_not_ready_is_named() {
        let directory = Directory::new("feature-require");
        let file = FeatureFile::in_directory(&directory.path(""));
        file.set(PARAMETERS, State::Preparing).unwrap();
        let errors = file.require(&[PINNING, PARAMETERS]).unwrap_err();
        let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
        let wait = "a pod that uses it has to wait until it is Ready";
        assert_eq!(
            lines,
            [
                format!("feature 'cpu-pinning': is Off; {wait}"),
                format!("feature 'kernel-parameters': is Preparing; {wait}"),
            ]
        );
        file.set(PARAMETERS, State::Ready).unwrap();
        assert!(file.require(&[PARAMETERS]).is_ok());
        assert!(file.require(&[]).is_ok());
    }

    #[test]
    fn a_state_out_of_order_changes_nothing() {
        let directory = Directory::new("feature-order");
        let file = FeatureFile::in_directory(&directory.path(""));
        let error = file.set(PINNING, State::Ready).unwrap_err();
        assert_eq!(
            error.to_string(),
            "feature 'cpu-pinning': cannot go from Off to Ready; prepare it first"
        );
        assert!(!file.path().exists());
    }

    #[test]
    fn a_damaged_file_is_refused_and_kept() {
        let directory = Directory::new("feature-damaged");
        let file = FeatureFile::in_directory(&directory.path(""));
        let long = " ".repeat(70_000);
        for (text, rule) in [
            ("", "is damaged (EOF while parsing"),
            ("{\"version\":1,\"feat", "is damaged (EOF while parsing"),
            (
                "{\"version\":1,\"features\":{},\"x\":1}",
                "is damaged (unknown field `x`",
            ),
            (
                "{\"version\":2,\"features\":{}}",
                "is of version 2, and this program knows 1;",
            ),
            (
                "{\"version\":1,\"features\":{\"cpu-pining\":{\"state\":\"ready\"}}}",
                "names the unknown feature 'cpu-pining' (did you mean 'cpu-pinning'?);",
            ),
            (
                "{\"version\":1,\"features\":{\"cpu-pinning\":{\"state\":\"done\"}}}",
                "is damaged (unknown variant `done`",
            ),
            (&long, "is larger than 65536 bytes;"),
        ] {
            fs::write(file.path(), text).unwrap();
            let start = format!("'{}' {rule}", file.path().display());
            for error in [
                file.states().unwrap_err(),
                file.set(PINNING, State::Preparing).unwrap_err(),
                file.require(&[PINNING]).unwrap_err().remove(0),
            ] {
                let line = error.to_string();
                assert!(line.starts_with(&start), "{line}");
                assert!(line.ends_with("until they are prepared again"), "{line}");
            }
            assert_eq!(fs::read_to_string(file.path()).unwrap(), text);
        }
    }

    #[test]
    fn a_write_that_was_cut_short_is_no_obstacle() {
        let directory = Directory::new("feature-cut");
        let file = FeatureFile::in_directory(&directory.path(""));
        file.set(PINNING, State::Preparing).unwrap();
        fs::write(directory.path(NEW), "{\"ver").unwrap();
        assert_eq!(file.state(PINNING).unwrap(), State::Preparing);
        file.set(PINNING, State::Ready).unwrap();
        assert_eq!(file.state(PINNING).unwrap(), State::Ready);
    }

    #[test]
    fn changes_at_the_same_time_are_all_kept() {
        let directory = Directory::new("feature-race");
        let place = directory.path("");
        std::thread::scope(|scope| {
            for feature in Feature::ALL {
                let place = &place;
                scope.spawn(move || {
                    let file = FeatureFile::in_directory(place);
                    for _ in 0..20 {
                        file.set(feature, State::Preparing).unwrap();
                        file.set(feature, State::Ready).unwrap();
                    }
                });
            }
        });
        let states = FeatureFile::in_directory(&place).states().unwrap();
        assert!(
            states.values().all(|state| *state == State::Ready),
            "{states:?}"
        );
    }
}
