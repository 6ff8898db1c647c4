//! The account of what holds: filled by each measure, read by `main` for its
//! one log line and by whoever must refuse to run with less. It decides nothing.

use std::fmt;

/// One kind of protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Measure {
    /// No privileges by executing a file.
    NoNewPrivs,
    /// All capability sets are empty, but for what [`Sharing`](crate::Sharing)
    /// keeps in the permitted, effective and bounding ones.
    Capabilities,
    /// No core files, no `ptrace` by the same user.
    Dumps,
    /// Own namespaces.
    Namespaces,
    /// The root directory is empty and read-only.
    EmptyRoot,
    /// Shared directories are mounts of their own. Of [`enter_sharing`] alone.
    ///
    /// [`enter_sharing`]: crate::enter_sharing
    Trees,
    /// Landlock rules.
    Landlock,
    /// The system call filter.
    Seccomp,
}

impl Measure {
    /// All of them, in the order in which they are applied.
    pub const ALL: [Self; 8] = [
        Self::Namespaces,
        Self::Trees,
        Self::EmptyRoot,
        Self::NoNewPrivs,
        Self::Capabilities,
        Self::Dumps,
        Self::Landlock,
        Self::Seccomp,
    ];
}

/// Which measures hold, and which do not and why.
///
/// `Display` gives it as one line for the log.
#[derive(Debug, Clone, Default)]
#[must_use = "measures may be missing: log it or check is_complete()"]
pub struct Confinement {
    held: Vec<(Measure, String)>,
    missing: Vec<(Measure, String)>,
}

impl Confinement {
    /// The measures that hold, each with a few words for the reader.
    pub fn held(&self) -> &[(Measure, String)] {
        &self.held
    }

    /// The measures that do not hold in full, each with the reason. A measure
    /// can be in both lists: one namespace refused, the others entered.
    pub fn missing(&self) -> &[(Measure, String)] {
        &self.missing
    }

    /// Whether nothing that was asked for is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether `measure` holds at least in part.
    #[must_use]
    pub fn has(&self, measure: Measure) -> bool {
        self.held.iter().any(|(held, _)| *held == measure)
    }

    pub(crate) fn holds(&mut self, measure: Measure, words: impl Into<String>) {
        self.held.push((measure, words.into()));
    }

    pub(crate) fn lacks(&mut self, measure: Measure, reason: impl Into<String>) {
        self.missing.push((measure, reason.into()));
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (_, words)) in self.held.iter().enumerate() {
            write!(f, "{}{words}", if index == 0 { "confined: " } else { ", " })?;
        }
        for (index, (_, reason)) in self.missing.iter().enumerate() {
            write!(
                f,
                "{}{reason}",
                if index == 0 { "; not applied: " } else { ", " }
            )?;
        }
        Ok(())
    }
}
