//! Patches: what an object becomes by one. Called by `http`.
//!
//! Three forms, by their media types: merge (RFC 7386), JSON patch (RFC 6902) and Kubernetes' own
//! strategic merge, which `kubectl apply` sends and which merges lists by their keys. Server-side
//! apply is not among them: nothing here keeps who owns which field.

mod json;
mod strategic;

use serde_json::Value;

use crate::{failure::Failure, objects::shape::Shape};

/// The forms that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Merge,
    Json,
    Strategic,
}

impl Form {
    /// The form of a media type.
    pub(crate) fn of(media_type: &str) -> Result<Self, Failure> {
        match media_type {
            "application/merge-patch+json" => Ok(Form::Merge),
            "application/json-patch+json" => Ok(Form::Json),
            "application/strategic-merge-patch+json" => Ok(Form::Strategic),
            "application/apply-patch+yaml" => Err(Failure::media_type(
                "server-side apply is not supported here; leave out --server-side",
            )),
            _ => Err(Failure::media_type(
                "a patch has to be application/strategic-merge-patch+json, \
                 application/merge-patch+json or application/json-patch+json",
            )),
        }
    }

    /// What `object` becomes.
    pub(crate) fn apply(
        self,
        shape: Shape,
        object: &Value,
        patch: &Value,
    ) -> Result<Value, Failure> {
        match self {
            Form::Json => json::apply(object, patch),
            Form::Merge | Form::Strategic if !patch.is_object() => {
                Err(Failure::bad_request("the patch is not an object"))
            }
            Form::Merge => {
                let mut object = object.clone();
                merge(&mut object, patch);
                Ok(object)
            }
            Form::Strategic => strategic::apply(shape, object, patch),
        }
    }
}

/// RFC 7386: null removes, objects are merged, all else replaces.
fn merge(value: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = Value::Object(serde_json::Map::new());
    }
    for (name, patch) in fields {
        if patch.is_null() {
            if let Some(fields) = value.as_object_mut() {
                fields.remove(name);
            }
        } else {
            merge(&mut value[name], patch);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_merge_removes_replaces_and_adds() {
        let mut object = json!({"a": {"b": 1, "c": 2}, "l": [1, 2]});
        merge(
            &mut object,
            &json!({"a": {"b": null, "d": {"e": null, "f": 1}}, "l": [3]}),
        );
        assert_eq!(object, json!({"a": {"c": 2, "d": {"f": 1}}, "l": [3]}));
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        assert_eq!(
            Form::of("application/apply-patch+yaml").unwrap_err().code,
            415
        );
        assert_eq!(Form::of("text/plain").unwrap_err().code, 415);
        let object = json!({});
        for form in [Form::Merge, Form::Strategic, Form::Json] {
            assert_eq!(form.apply(&[], &object, &json!(1)).unwrap_err().code, 400);
        }
    }
}
