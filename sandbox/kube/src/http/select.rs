//! Which objects a list or a watch is for: by labels and by fields.

use serde_json::Value;

use super::query::Query;
use crate::{failure::Failure, objects, store::Kind};

/// A condition on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Label {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

/// Conditions that all have to hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    labels: Vec<Label>,
    /// Field, value, and whether it has to be that value.
    fields: Vec<(&'static str, String, bool)>,
}

/// Fields that may be asked for, as pointers into objects.
const FIELDS: &[(&str, &str)] = &[
    ("metadata.name", "/metadata/name"),
    ("metadata.namespace", "/metadata/namespace"),
    ("metadata.uid", "/metadata/uid"),
    ("spec.nodeName", "/spec/nodeName"),
    ("spec.restartPolicy", "/spec/restartPolicy"),
    ("spec.schedulerName", "/spec/schedulerName"),
    ("spec.serviceAccountName", "/spec/serviceAccountName"),
    ("spec.unschedulable", "/spec/unschedulable"),
    ("status.phase", "/status/phase"),
    ("status.podIP", "/status/podIP"),
    ("type", "/type"),
    ("reason", "/reason"),
    ("reportingComponent", "/reportingComponent"),
    ("source", "/source/component"),
    ("involvedObject.kind", "/involvedObject/kind"),
    ("involvedObject.namespace", "/involvedObject/namespace"),
    ("involvedObject.name", "/involvedObject/name"),
    ("involvedObject.uid", "/involvedObject/uid"),
    ("involvedObject.apiVersion", "/involvedObject/apiVersion"),
    ("involvedObject.fieldPath", "/involvedObject/fieldPath"),
    (
        "involvedObject.resourceVersion",
        "/involvedObject/resourceVersion",
    ),
];

impl Selector {
    /// What a request asks for.
    pub(crate) fn of(kind: Kind, query: &Query) -> Result<Self, Failure> {
        let labels = query.get("labelSelector").unwrap_or_default();
        let fields = query.get("fieldSelector").unwrap_or_default();
        let bad = |text: &str| {
            let text = text.escape_debug();
            Failure::bad_request(format!("unable to parse requirement: '{text}'"))
        };
        let mut selector = Self::default();
        for part in split(labels) {
            selector.labels.push(label(part).ok_or_else(|| bad(part))?);
        }
        for part in fields.split(',').filter(|part| !part.is_empty()) {
            let (name, value, equal) = match (part.split_once("!="), part.split_once('=')) {
                (Some((name, value)), _) => (name, value, false),
                (None, Some((name, value))) => (name, value.trim_start_matches('='), true),
                (None, None) => return Err(bad(part)),
            };
            let found = FIELDS.iter().find(|(known, _)| *known == name);
            let Some((_, pointer)) = found else {
                let text = name.escape_debug();
                let plural = kind.plural();
                return Err(Failure::bad_request(format!(
                    "field label not supported for {plural}: {text}"
                )));
            };
            selector.fields.push((pointer, value.to_owned(), equal));
        }
        Ok(selector)
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        let value = |key: &String| {
            object["metadata"]["labels"]
                .get(key)
                .and_then(Value::as_str)
        };
        let labels = self.labels.iter().all(|label| match label {
            Label::In(key, values) => value(key).is_some_and(|v| values.iter().any(|o| o == v)),
            Label::NotIn(key, values) => value(key).is_none_or(|v| !values.iter().any(|o| o == v)),
            Label::Exists(key) => value(key).is_some(),
            Label::Missing(key) => value(key).is_none(),
        });
        let fields = self.fields.iter().all(|(pointer, wanted, equal)| {
            let found = match object.pointer(pointer) {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Bool(true)) => "true".to_owned(),
                _ => String::new(),
            };
            (found == *wanted) == *equal
        });
        labels && fields
    }
}

/// At commas that are in no parentheses.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_i32;
    let parts = text.split(move |c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty())
}

fn label(part: &str) -> Option<Label> {
    let key = |text: &str| {
        let text = text.trim();
        objects::is_label(text).then(|| text.to_owned())
    };
    if let Some(rest) = part.strip_prefix('!')
        && !rest.contains('=')
    {
        return Some(Label::Missing(key(rest)?));
    }
    if let Some((name, value)) = part.split_once("!=") {
        return Some(Label::NotIn(key(name)?, vec![value.trim().to_owned()]));
    }
    if let Some((name, value)) = part.split_once('=') {
        let value = value.trim_start_matches('=').trim();
        return Some(Label::In(key(name)?, vec![value.to_owned()]));
    }
    if let Some((head, list)) = part.split_once('(') {
        let list = list.strip_suffix(')')?;
        let values = list.split(',').map(|value| value.trim().to_owned());
        let values: Vec<String> = values.collect();
        let head = head.trim();
        return match (head.strip_suffix(" notin"), head.strip_suffix(" in")) {
            (Some(name), _) => Some(Label::NotIn(key(name)?, values)),
            (None, Some(name)) => Some(Label::In(key(name)?, values)),
            (None, None) => None,
        };
    }
    Some(Label::Exists(key(part)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn selects(query: &str, object: &Value) -> bool {
        let query = Query::parse(query).unwrap();
        Selector::of(Kind::Pod, &query).unwrap().matches(object)
    }

    #[test]
    fn labels_and_fields_select() {
        let pod = json!({
            "metadata": {"name": "a", "labels": {"app": "web", "x.y/z": ""}},
            "status": {"phase": "Running"},
        });
        for yes in [
            "",
            "labelSelector=app%3Dweb",
            "labelSelector=app%3D%3Dweb,x.y/z",
            "labelSelector=app+in+(db,web),!gone",
            "labelSelector=app+notin+(db),app!%3Ddb",
            "fieldSelector=metadata.name%3Da,status.phase!%3DFailed",
        ] {
            assert!(selects(yes, &pod), "{yes}");
        }
        for no in [
            "labelSelector=app%3Ddb",
            "labelSelector=!app",
            "labelSelector=app+in+(db)",
            "labelSelector=gone",
            "fieldSelector=metadata.name%3Db",
            "fieldSelector=spec.nodeName%3Dx",
        ] {
            assert!(!selects(no, &pod), "{no}");
        }
        for bad in [
            "labelSelector=app+in+db)",
            "labelSelector=a+b",
            "labelSelector=app+among+(db)",
            "fieldSelector=metadata.name",
            "fieldSelector=spec.colour%3Dred",
        ] {
            let query = Query::parse(bad).unwrap();
            assert!(Selector::of(Kind::Pod, &query).is_err(), "{bad}");
        }
    }
}
