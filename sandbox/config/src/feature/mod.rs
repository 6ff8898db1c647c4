//! Features that a node must be prepared for, and how far that is.
//!
//! An operator names them in the configuration (`features`), which makes their experimental keys
//! usable. Whoever enables a node prepares them, and writes down how far it is ([`FeatureFile`]); the
//! shim refuses a pod that needs one which is not ready. So a wish and a fact are kept apart.

mod file;

use std::fmt;

pub use file::{FeatureError, FeatureFile};

/// A feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    /// Pods that run on CPUs of their own: the key `cpus`.
    CpuPinning,
    /// Parameters of the guest's kernel: the key `kernel-parameters`.
    KernelParameters,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::CpuPinning, Self::KernelParameters];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuPinning => "cpu-pinning",
            Self::KernelParameters => "kernel-parameters",
        }
    }

    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|feature| feature.name() == name)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a node is with a feature.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum State {
    /// Not asked for.
    #[default]
    Off,
    /// Somebody prepares the node, or was ended at it: then it begins anew.
    Preparing,
    /// Pods may use it.
    Ready,
    /// It cannot be had, for this reason.
    Failed(String),
}

impl State {
    /// Whether a feature may go from this state to `next`. What is to be ready is prepared first, so
    /// that nobody finds a node ready that nobody has looked at.
    #[must_use]
    pub fn may_become(&self, next: &Self) -> bool {
        match (self, next) {
            (_, Self::Off | Self::Preparing) => true,
            (Self::Preparing | Self::Ready, Self::Ready | Self::Failed(_)) => true,
            (Self::Failed(_), Self::Failed(_)) => true,
            (Self::Off | Self::Failed(_), Self::Ready) | (Self::Off, Self::Failed(_)) => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => write!(f, "Off"),
            Self::Preparing => write!(f, "Preparing"),
            Self::Ready => write!(f, "Ready"),
            Self::Failed(reason) => write!(f, "Failed ({})", crate::problem::shown(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_ready_that_was_not_prepared() {
        let failed = || State::Failed("x".into());
        let all = [State::Off, State::Preparing, State::Ready, failed()];
        let may = all
            .each_ref()
            .map(|from| all.each_ref().map(|to| from.may_become(to)));
        assert_eq!(
            may,
            [
                [true, true, false, false],
                [true, true, true, true],
                [true, true, true, true],
                [true, true, false, true],
            ]
        );
    }

    #[test]
    fn features_have_names() {
        for feature in Feature::ALL {
            assert_eq!(Feature::parse(feature.name()), Some(feature));
        }
        assert_eq!(Feature::parse("CpuPinning"), None);
    }
}
