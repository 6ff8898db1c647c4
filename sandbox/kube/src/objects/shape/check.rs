//! Whether an object has the fields of its kind, and they hold what they should.

use pericarp_config::nearest;
use serde_json::{Map, Value};

use super::{Shape, Type};
use crate::objects::quantity::Quantity;

/// So many are listed.
const SHOWN: usize = 10;

/// What is wrong with an object's form.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Fields that the kind does not have, each a sentence.
    pub(crate) unknown: Vec<String>,
    /// Fields that hold something else, likewise.
    pub(crate) wrong: Vec<String>,
}

/// Compares an object with the fields of its kind.
pub(crate) fn check(shape: Shape, object: &Value) -> Faults {
    let mut faults = Faults::default();
    faults.see("", Type::Object(shape), object);
    faults
}

impl Faults {
    fn see(&mut self, path: &str, of: Type, value: &Value) {
        // Nothing is what a field that is not there is, for all types.
        if value.is_null() {
            return;
        }
        let fits = match of {
            Type::Any => return,
            Type::Text => value.is_string(),
            Type::Flag => value.is_boolean(),
            Type::Whole => value.is_i64() || value.is_u64(),
            Type::NumberOrText => value.is_i64() || value.is_string(),
            Type::Quantity => Quantity::of(value).is_some(),
            Type::Base64 => value.as_str().is_some_and(is_base64),
            Type::Object(shape) => match value.as_object() {
                Some(fields) => return self.fields(path, shape, fields),
                None => false,
            },
            Type::Map(of) => match value.as_object() {
                Some(fields) => {
                    for (name, value) in fields {
                        self.see(&format!("{path}[{name}]"), *of, value);
                    }
                    return;
                }
                None => false,
            },
            Type::List(of) => match value.as_array() {
                Some(items) => return self.items(path, *of, items),
                None => false,
            },
            Type::Set => match value.as_array() {
                Some(items) => return self.items(path, Type::Text, items),
                None => false,
            },
            Type::Keyed(_, shape) => match value.as_array() {
                Some(items) => return self.items(path, Type::Object(shape), items),
                None => false,
            },
        };
        if !fits && self.wrong.len() < SHOWN {
            let found = shown(value);
            // A number or a truth of YAML's, where a word was meant.
            let cure = match (of, value) {
                (Type::Text, Value::Number(_) | Value::Bool(_)) => "; write it in quotes",
                _ => "",
            };
            self.wrong
                .push(format!("{path}: {found} is not {}{cure}", wanted(of)));
        }
    }

    fn items(&mut self, path: &str, of: Type, items: &[Value]) {
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            match item {
                Value::Null => self.wrong.push(format!("{path}: is empty")),
                item => self.see(&path, of, item),
            }
        }
    }

    fn fields(&mut self, path: &str, shape: Shape, fields: &Map<String, Value>) {
        for (name, value) in fields {
            let dot = if path.is_empty() { "" } else { "." };
            match super::field(shape, name) {
                Some(of) => self.see(&format!("{path}{dot}{name}"), of, value),
                None if self.unknown.len() < SHOWN => {
                    let path = printable(&format!("{path}{dot}{name}"));
                    let near = nearest(name, shape.iter().map(|(known, _)| *known));
                    let near = near.map(|near| format!("; did you mean \"{near}\"?"));
                    let near = near.unwrap_or_default();
                    self.unknown.push(format!("unknown field \"{path}\"{near}"));
                }
                None => {}
            }
        }
    }
}

fn wanted(of: Type) -> &'static str {
    match of {
        Type::Text => "a string",
        Type::Whole => "a whole number",
        Type::Flag => "true or false",
        Type::Quantity => "an amount, such as 100m or 1Gi",
        Type::NumberOrText => "a whole number or a string",
        Type::Base64 => "base64",
        Type::Map(_) | Type::Object(_) | Type::Any => "an object",
        Type::List(_) | Type::Set | Type::Keyed(..) => "a list",
    }
}

/// A value for a message, which stays one short line.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(256).map(plain).collect()
}

/// The standard alphabet with padding, as JSON has bytes.
fn is_base64(text: &str) -> bool {
    let data = text.trim_end_matches('=');
    let alphabet = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
    text.len().is_multiple_of(4) && text.len() - data.len() < 3 && data.bytes().all(alphabet)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{objects::shape, store::Kind};

    #[test]
    fn unknown_fields_are_named_with_the_nearest() {
        let pod = json!({"spec": {"containerz": [], "containers": [{"nam": "a"}], "zzzzzzzzz": 1}});
        let faults = check(shape::of(Kind::Pod), &pod);
        assert_eq!(
            faults.unknown,
            [
                "unknown field \"spec.containers[0].nam\"; did you mean \"name\"?",
                "unknown field \"spec.containerz\"; did you mean \"containers\"?",
                "unknown field \"spec.zzzzzzzzz\"",
            ]
        );
        assert!(faults.wrong.is_empty());
    }

    #[test]
    fn wrong_types_are_named() {
        let pod = json!({
            "metadata": {"labels": {"a": 1}},
            "spec": {"containers": {}, "hostNetwork": "yes", "overhead": {"cpu": "much"}},
        });
        let faults = check(shape::of(Kind::Pod), &pod);
        assert_eq!(
            faults.wrong,
            [
                "metadata.labels[a]: 1 is not a string; write it in quotes",
                "spec.containers: {} is not a list",
                "spec.hostNetwork: \"yes\" is not true or false",
                "spec.overhead[cpu]: \"much\" is not an amount, such as 100m or 1Gi",
            ]
        );
    }

    #[test]
    fn base64_is_told_from_other_text() {
        for good in ["", "aGVsbG8=", "YQ==", "YWJj", "+/+/"] {
            assert!(is_base64(good), "{good}");
        }
        for bad in ["a", "YQ=", "Y===", "Y Q=", "YQ==\n", "-_-_"] {
            assert!(!is_base64(bad), "{bad}");
        }
    }
}
