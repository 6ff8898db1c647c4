//! One thing that is wrong with the input: option, value, rule, cure, in one line.

use std::fmt;

pub(crate) use pericarp_config::nearest;

/// A violated rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    option: String,
    value: Option<String>,
    rule: String,
    cure: String,
}

impl Problem {
    /// `option` with `value` breaks `rule`; `cure` says what to do.
    pub(crate) fn new(
        option: &str,
        value: impl Into<Option<String>>,
        rule: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            option: option.to_owned(),
            value: value.into(),
            rule: rule.into(),
            cure: cure.into(),
        }
    }

    /// A message that says all of it by itself: value, rule and cure.
    pub(crate) fn whole(option: &str, message: &str) -> Self {
        Self::new(option, None, message, "")
    }

    /// A name nobody knows, with the nearest one that is known.
    pub(crate) fn unknown(what: &str, name: &str, nearest: Option<&str>, help: &str) -> Self {
        let cure = match nearest {
            Some(known) => format!("did you mean '{known}'?"),
            None => format!("see `{help}`"),
        };
        Self::new(what, name.to_owned(), format!("unknown {what}"), cure)
    }

    /// The option concerned.
    pub(crate) fn option(&self) -> &str {
        &self.option
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match &self.value {
            Some(value) if self.rule.starts_with("unknown ") => format!("'{value}': "),
            Some(value) => format!("{} '{value}': ", self.option),
            None => format!("{}: ", self.option),
        };
        // A path may hold anything, and this is to stay one line.
        let line = pericarp_api::hello::printable(&line);
        write!(f, "{line}{}", self.rule)?;
        if self.cure.is_empty() {
            return Ok(());
        }
        write!(f, "; {}", self.cure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_suggested_and_a_far_one_is_not() {
        let known = [
            "--cpus",
            "--memory",
            "--rootfs",
            "--rootfs-image",
            "--runtime",
        ];
        assert_eq!(nearest("--cpu", known), Some("--cpus"));
        assert_eq!(nearest("--rootfs-img", known), Some("--rootfs-image"));
        assert_eq!(nearest("--rutime", known), Some("--runtime"));
        assert_eq!(nearest("--publish", known), None);
    }

    #[test]
    fn a_problem_is_one_line() {
        let problem = Problem::new(
            "--disk",
            "a\nb".to_owned(),
            "no such file",
            "check the path",
        );
        assert_eq!(
            problem.to_string(),
            "--disk 'a\u{fffd}b': no such file; check the path"
        );
    }
}
