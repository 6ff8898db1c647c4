//! What a key means and what it is set to: `explain KEY`.
//!
//! For commands that show the configuration. All of it comes from the key's entry in `keys` and from
//! the configuration that was loaded.

use std::fmt;

use crate::{
    annotation,
    config::{Config, full_name},
    key::{Key, Maturity, Scope},
    keys::{self, KEYS},
    problem::{Place, Violation},
    settings::Draft,
};

/// One value of a key, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// The key with the table it stands in.
    pub key: String,
    /// As it is shown, or what holds in its place.
    pub value: String,
    /// File and line; none is the default.
    pub place: Option<Place>,
}

/// Everything there is to say of a key. Prints as a few lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Its name, without the table it stands in.
    pub name: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What its values are.
    pub value_type: &'static str,
    /// Which of these there may be.
    pub range: String,
    /// What holds where nothing is said.
    pub default: &'static str,
    /// Whether one can rely on it.
    pub maturity: Maturity,
    /// The annotation by which a pod says it, where its profile allows that.
    pub annotation: Option<String>,
    /// Who reads it, and when.
    pub user: &'static str,
    /// What it is set to, in each profile. None for what only a pod says.
    pub values: Vec<Value>,
}

impl Config {
    /// Every key, by name, in the order in which they are documented.
    pub fn keys() -> impl Iterator<Item = &'static Key> {
        KEYS.iter()
    }

    /// Explains a key, named alone, with its profile (`profiles.NAME.KEY`, for that one's value
    /// only), or as an annotation.
    ///
    /// # Errors
    ///
    /// No such key or profile; the nearest that there is is named.
    pub fn explain(&self, name: &str) -> Result<Explanation, Violation> {
        let (key, only) = self.find(name)?;
        let value = |profile: Option<&str>, draft: &Draft, place: Option<&Place>| Value {
            key: full_name(profile, key.name),
            value: (key.show)(draft).unwrap_or_else(|| key.unset.to_owned()),
            place: place.cloned(),
        };
        let values = match key.scope {
            Scope::Node => vec![value(None, &self.draft, self.places.get(key.name))],
            Scope::Profile => self
                .profiles()
                .filter(|profile| only.is_none_or(|only| profile.name() == only))
                .map(|profile| {
                    let place = profile.places.get(key.name);
                    value(Some(profile.name()), &profile.draft, place)
                })
                .collect(),
            Scope::Pod => Vec::new(),
        };
        Ok(Explanation {
            name: key.name,
            meaning: key.meaning,
            value_type: key.kind.type_name(),
            range: key.kind.range(),
            default: key.unset,
            maturity: key.maturity,
            annotation: annotation::name_of(key),
            user: key.user,
            values,
        })
    }

    /// The key, and the profile that was named with it.
    fn find<'a>(&self, name: &'a str) -> Result<(&'static Key, Option<&'a str>), Violation> {
        let unknown = |key: &str| {
            let known = KEYS.iter().map(|key| key.name);
            Violation::unknown(None, "key", key, known)
        };
        if let Some(said) = name.strip_prefix(annotation::PREFIX) {
            // As a template, or of a volume.
            let (key, _) = annotation::find(said).ok_or_else(|| unknown(said))?;
            return Ok((key, None));
        }
        let Some((profile, key)) = name
            .strip_prefix("profiles.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return keys::find(name)
                .map(|key| (key, None))
                .ok_or_else(|| unknown(name));
        };
        if !self.profiles.contains_key(profile) {
            let known = self.profiles.keys().map(String::as_str);
            return Err(Violation::unknown(None, "profile", profile, known));
        }
        match keys::find(key) {
            Some(key) if key.scope == Scope::Profile => Ok((key, Some(profile))),
            _ => Err(unknown(key)),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, self.meaning)?;
        let annotation = self.annotation.as_deref().unwrap_or("none");
        for (what, text) in [
            ("type", self.value_type),
            ("range", &self.range),
            ("default", self.default),
            ("maturity", &self.maturity.to_string()),
            ("annotation", annotation),
            ("used by", self.user),
        ] {
            writeln!(f, "  {what:<10} {text}")?;
        }
        for Value { key, value, place } in &self.values {
            let place = match place {
                Some(place) => place.to_string(),
                None => "default".to_owned(),
            };
            writeln!(f, "  {key} = {value} ({place})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::load;

    #[test]
    fn a_key_is_explained_with_its_values_and_their_places() {
        let config = load("[profiles.small]\n\nsizing = \"aks-ga\"\n").unwrap();
        let explanation = config.explain("sizing").unwrap();
        let small = explanation.values[1].clone();
        assert_eq!(
            (small.value.as_str(), small.place.as_ref().unwrap().line),
            ("aks-ga", 3)
        );
        let place = small.place.unwrap();
        assert_eq!(
            explanation.to_string(),
            format!(
                "sizing: How the limits of a pod's containers, x CPUs and y bytes, become its \
                 machine's size: aks-preview has ceil(1+x) CPUs and 2 GiB + y; aks-ga has ceil(x) \
                 and y, or 1 and 512 MiB; kata has ceil(x+0.2) and y + 32 MiB, or 1 and 2 GiB.\n\
                 \x20 type       a word\n\
                 \x20 range      aks-preview, aks-ga, kata\n\
                 \x20 default    aks-preview\n\
                 \x20 maturity   stable\n\
                 \x20 annotation io.pericarp/sizing\n\
                 \x20 used by    the shim, when it sizes a pod's machine\n\
                 \x20 profiles.pericarp.sizing = aks-preview (default)\n\
                 \x20 profiles.small.sizing = aks-ga ({place})\n"
            )
        );
        let one = config.explain("profiles.small.max-vcpus").unwrap();
        assert_eq!(one.values.len(), 1);
        assert_eq!(one.values[0].value, "what the host has");
        assert_eq!(config.explain("state-directory").unwrap().values.len(), 1);
        assert_eq!(config.explain("vcpus").unwrap().values, []);
        let pinning = config
            .explain("io.pericarp/cpus")
            .unwrap()
            .maturity
            .to_string();
        assert_eq!(pinning, "experimental, needs the feature 'cpu-pinning'");
    }

    #[test]
    fn every_key_can_be_explained_under_each_of_its_names() {
        let config = Config::default();
        for key in Config::keys() {
            let explanation = config.explain(key.name()).unwrap();
            assert!(explanation.to_string().lines().count() >= 7);
            if let Some(annotation) = &explanation.annotation {
                assert_eq!(config.explain(annotation).unwrap().name, key.name());
            }
        }
    }

    #[test]
    fn what_is_no_key_is_refused_with_the_nearest() {
        let config = Config::default();
        for (name, line) in [
            ("sizeing", "'sizeing': unknown key; did you mean 'sizing'?"),
            (
                "profiles.pericrap.sizing",
                "'pericrap': unknown profile; did you mean 'pericarp'?",
            ),
            (
                "profiles.pericarp.memori",
                "'memori': unknown key; did you mean 'memory'?",
            ),
            (
                "io.pericarp/vcpu",
                "'vcpu': unknown key; did you mean 'vcpus'?",
            ),
        ] {
            assert_eq!(config.explain(name).unwrap_err().to_string(), line);
        }
    }
}
