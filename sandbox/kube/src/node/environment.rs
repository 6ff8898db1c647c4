//! The environment of a container, and `$(NAME)` in it and in its command. Called by `container`.

use std::collections::HashMap;

use super::sources::{self, Data, Facts, Lookup, SourceError};
use super::spec::{Container, EnvVar, KeyRef, Pod, ValueFrom};

/// Names and values in the order in which they are set; each name is there once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: String) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.into(), value)),
        }
    }

    /// All of them.
    pub(super) fn pairs(&self) -> impl Iterator<Item = &(String, String)> {
        self.0.iter()
    }

    /// A word with the values of variables in it.
    pub(super) fn expand(&self, word: &str) -> String {
        let find = |name: &str| {
            let found = self.0.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        };
        expand(word, &find)
    }
}

/// The environment that a container's manifest says.
pub(super) fn environment(
    pod: &Pod,
    container: &Container,
    facts: &Facts,
    find: &Lookup<'_>,
) -> Result<Environment, SourceError> {
    let mut all = Environment::default();
    for from in &container.env_from {
        let map = from.config_map_ref.as_ref();
        let map = map.map(|of| (sources::config_map(find, &of.name), of.optional));
        let secret = from.secret_ref.as_ref();
        let secret = secret.map(|of| (sources::secret(find, &of.name), of.optional));
        for (data, optional) in map.into_iter().chain(secret) {
            for (key, value) in or_nothing(data, optional)?.unwrap_or_default() {
                all.set(&format!("{}{key}", from.prefix), text(value));
            }
        }
    }
    // Only what stands before it can be named in a value.
    let mut before: HashMap<&str, String> = HashMap::new();
    for variable in &container.env {
        let value = match &variable.value_from {
            Some(from) => match outside(pod, container, facts, find, from)? {
                Some(value) => value,
                None => continue,
            },
            None => plain(variable, &before),
        };
        before.insert(&variable.name, value.clone());
        all.set(&variable.name, value);
    }
    Ok(all)
}

fn plain(variable: &EnvVar, before: &HashMap<&str, String>) -> String {
    let value = variable.value.as_deref().unwrap_or_default();
    expand(value, &|name| before.get(name).cloned())
}

/// A value that is elsewhere; nothing when it is optional and not there.
fn outside(
    pod: &Pod,
    container: &Container,
    facts: &Facts,
    find: &Lookup<'_>,
    from: &ValueFrom,
) -> Result<Option<String>, SourceError> {
    if let Some(of) = &from.field_ref {
        return sources::field(pod, facts, &of.field_path).map(Some);
    }
    if let Some(of) = &from.resource_field_ref {
        return sources::resource(pod, container, facts, of).map(Some);
    }
    let (of, data, kind) = if let Some(of) = &from.config_map_key_ref {
        (of, sources::config_map(find, &of.name), "ConfigMap")
    } else if let Some(of) = &from.secret_key_ref {
        (of, sources::secret(find, &of.name), "Secret")
    } else {
        return Ok(Some(String::new()));
    };
    let KeyRef {
        name,
        key,
        optional,
    } = of;
    let Some(mut data) = or_nothing(data, *optional)? else {
        return Ok(None);
    };
    match data.remove(key) {
        Some(value) => Ok(Some(text(value))),
        None if *optional => Ok(None),
        None => Err(SourceError::NoKey {
            key: key.clone(),
            kind,
            namespace: pod.metadata.namespace.clone(),
            name: name.clone(),
        }),
    }
}

fn or_nothing(
    data: Result<Data, SourceError>,
    optional: bool,
) -> Result<Option<Data>, SourceError> {
    match data {
        Err(SourceError::NotFound { .. }) if optional => Ok(None),
        data => data.map(Some),
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts values in the place of `$(NAME)`. A name that is not known stays as it is written, and
/// `$$` is a dollar: kubernetes/third_party/forked/golang/expansion has the rules.
pub(super) fn expand(text: &str, find: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some(end) = after.strip_prefix('(').and_then(|name| name.find(')')) {
            let name = &after[1..=end];
            match find(name) {
                Some(value) => out.push_str(&value),
                None => out.push_str(&rest[at..at + end + 3]),
            }
            rest = &after[end + 2..];
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Kind;
    use serde_json::{Value, json};
    use std::sync::Arc;

    #[test]
    fn names_are_replaced_and_dollars_escaped() {
        let find = |name: &str| (name == "A").then(|| "a$(A)".to_owned());
        for (text, expanded) in [
            ("$(A)", "a$(A)"),
            ("x$(A)y$(A)", "xa$(A)ya$(A)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a$(A)"),
            ("$(B) $", "$(B) $"),
            ("$(A", "$(A"),
            ("$A $()", "$A $()"),
            ("\u{20ac}$(\u{20ac})", "\u{20ac}$(\u{20ac})"),
        ] {
            assert_eq!(expand(text, &find), expanded, "{text}");
        }
    }

    fn find(kind: Kind, name: &str) -> Option<Arc<Value>> {
        let object = match (kind, name) {
            (Kind::ConfigMap, "m") => json!({"data": {"A": "map", "K": "of the map"}}),
            (Kind::Secret, "s") => json!({"data": {"P": "c2VjcmV0"}}),
            _ => return None,
        };
        Some(Arc::new(object))
    }

    fn of(container: Value) -> Result<Vec<(String, String)>, SourceError> {
        let pod = Pod::read(&json!({
            "metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [container]},
        }))
        .unwrap();
        let facts = Facts::default();
        let all = environment(&pod, &pod.spec.containers[0], &facts, &find)?;
        Ok(all.pairs().cloned().collect())
    }

    #[test]
    fn sources_come_together_and_later_ones_win() {
        let all = of(json!({
            "name": "c",
            "envFrom": [
                {"prefix": "M_", "configMapRef": {"name": "m"}},
                {"secretRef": {"name": "s"}},
                {"configMapRef": {"name": "none", "optional": true}},
            ],
            "env": [
                {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "M_A", "value": "I am $(ME), not $(LATER)"},
                {"name": "LATER", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "K"}}},
                {"name": "NO", "valueFrom": {"secretKeyRef": {"name": "s", "key": "none", "optional": true}}},
                {"name": "EMPTY"},
            ],
        }));
        let all: HashMap<_, _> = all.unwrap().into_iter().collect();
        let wanted = [
            ("M_A", "I am p, not $(LATER)"),
            ("M_K", "of the map"),
            ("P", "secret"),
            ("ME", "p"),
            ("LATER", "of the map"),
            ("EMPTY", ""),
        ];
        assert_eq!(all.len(), wanted.len(), "{all:?}");
        for (name, value) in wanted {
            assert_eq!(all[name], value, "{name}");
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let said = |from: Value| {
            let container = json!({"name": "c", "env": [{"name": "X", "valueFrom": from}]});
            of(container).unwrap_err().to_string()
        };
        assert_eq!(
            said(json!({"configMapKeyRef": {"name": "none", "key": "k"}})),
            "configmap \"none\" not found"
        );
        assert_eq!(
            said(json!({"secretKeyRef": {"name": "s", "key": "k"}})),
            "couldn't find key k in Secret n/s"
        );
    }
}
