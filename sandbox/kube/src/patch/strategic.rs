//! Kubernetes' strategic merge patch, which `kubectl apply` and `kubectl edit` send.
//!
//! Lists of objects are merged by the field that tells them apart (`objects::shape` has it for each),
//! all others are replaced. Directives: `$patch: replace` and `delete`, `$retainKeys`,
//! `$setElementOrder/LIST` and `$deleteFromPrimitiveList/LIST`.

use serde_json::{Map, Value};

use crate::{
    failure::Failure,
    objects::shape::{Shape, Type, field},
};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// What `object` becomes.
pub(super) fn apply(shape: Shape, object: &Value, patch: &Value) -> Result<Value, Failure> {
    let mut object = object.clone();
    merge(Type::Object(shape), &mut object, patch).map_err(Failure::bad_request)?;
    Ok(object)
}

fn merge(of: Type, value: &mut Value, patch: &Value) -> Result<(), String> {
    let Some(fields) = patch.as_object() else {
        *value = patch.clone();
        return Ok(());
    };
    match fields.get(PATCH).and_then(Value::as_str) {
        Some("replace") => {
            let mut fields = fields.clone();
            fields.remove(PATCH);
            *value = Value::Object(fields);
            return Ok(());
        }
        Some("delete") => {
            *value = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(_) => return Err("$patch is none of merge, replace and delete".to_owned()),
    }
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Some(object) = value.as_object_mut() else {
        return Ok(());
    };
    if let Some(kept) = fields.get(RETAIN) {
        let kept = kept.as_array().ok_or("$retainKeys is not a list")?;
        object.retain(|name, _| kept.iter().any(|one| one == name));
    }
    for (name, patch) in fields {
        if [PATCH, RETAIN].contains(&name.as_str()) || name.starts_with(ORDER) {
            continue;
        }
        if let Some(list) = name.strip_prefix(DELETE) {
            let gone = patch.as_array().ok_or("a list to delete from is none")?;
            if let Some(Value::Array(items)) = object.get_mut(list) {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if patch.is_null() {
            object.remove(name);
            continue;
        }
        let of = match of {
            Type::Object(shape) | Type::Keyed(_, shape) => field(shape, name),
            Type::Map(of) => Some(*of),
            _ => None,
        };
        let of = of.unwrap_or(Type::Any);
        match (of, patch) {
            (Type::Keyed(key, shape), Value::Array(patches)) => {
                let list = object.entry(name.as_str()).or_insert(Value::Null);
                keyed(key, shape, list, patches)?;
            }
            (Type::Set, Value::Array(added)) => {
                let list = object.entry(name.as_str()).or_insert(Value::Null);
                let mut items = list.as_array().cloned().unwrap_or_default();
                let new = added.iter().filter(|one| !items.contains(one)).cloned();
                let new: Vec<Value> = new.collect();
                items.extend(new);
                *list = Value::Array(items);
            }
            (of, patch) => merge(
                of,
                object.entry(name.as_str()).or_insert(Value::Null),
                patch,
            )?,
        }
    }
    // The order is that of the whole list, when its items are all there.
    for (name, order) in fields {
        if let Some(list) = name.strip_prefix(ORDER)
            && let Some(Value::Array(items)) = object.get_mut(list)
        {
            let order = order.as_array().ok_or("an order of a list is none")?;
            let of = match of {
                Type::Object(shape) | Type::Keyed(_, shape) => field(shape, list),
                _ => None,
            };
            match of {
                Some(Type::Keyed(key, _)) => sort(items, order, |item| &item[key]),
                _ => sort(items, order, |item| item),
            }
        }
    }
    Ok(())
}

/// Items are found by their key; new ones come at the end.
fn keyed(key: &str, shape: Shape, list: &mut Value, patches: &[Value]) -> Result<(), String> {
    let mut items = list.as_array().cloned().unwrap_or_default();
    if patches.iter().any(|patch| patch[PATCH] == "replace") {
        // The rest of the list is what there is from now on.
        let rest = patches.iter().filter(|patch| patch[PATCH].is_null());
        *list = Value::Array(rest.cloned().collect());
        return Ok(());
    }
    for patch in patches {
        let wanted = &patch[key];
        if wanted.is_null() {
            return Err(format!("an item of a list in the patch has no {key}"));
        }
        let found = items.iter().position(|item| item[key] == *wanted);
        match (patch[PATCH].as_str(), found) {
            (Some("delete"), _) => items.retain(|item| item[key] != *wanted),
            (_, Some(index)) => {
                if let Some(item) = items.get_mut(index) {
                    merge(Type::Object(shape), item, patch)?;
                }
            }
            (_, None) => {
                let mut item = Value::Object(Map::new());
                merge(Type::Object(shape), &mut item, patch)?;
                items.push(item);
            }
        }
    }
    *list = Value::Array(items);
    Ok(())
}

/// As ordered; what is not named keeps its place after what came before it.
fn sort(items: &mut Vec<Value>, order: &[Value], key: impl Fn(&Value) -> &Value) {
    let place = |item: &Value| {
        let of = |one: &Value| {
            if one.is_object() {
                key(one).clone()
            } else {
                one.clone()
            }
        };
        order.iter().position(|one| of(one) == *key(item))
    };
    let mut last = 0;
    let mut placed: Vec<(usize, Value)> = Vec::with_capacity(items.len());
    for item in items.drain(..) {
        last = place(&item).unwrap_or(last);
        placed.push((last, item));
    }
    placed.sort_by_key(|(place, _)| *place);
    items.extend(placed.into_iter().map(|(_, item)| item));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{objects::shape, store::Kind};

    fn patched(object: &Value, patch: &Value) -> Value {
        apply(shape::of(Kind::Pod), object, patch).unwrap()
    }

    #[test]
    fn lists_are_merged_by_their_keys() {
        let pod = json!({"spec": {"containers": [
            {"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}], "args": ["1", "2"]},
            {"name": "b", "image": "1"},
        ]}});
        let patch = json!({"spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
            "containers": [
                {"name": "a", "image": "2", "args": ["3"],
                 "env": [{"name": "Y", "value": "2"}, {"name": "X", "$patch": "delete"}]},
                {"name": "b", "$patch": "delete"},
                {"name": "c", "image": "3"},
            ],
        }});
        assert_eq!(
            patched(&pod, &patch),
            json!({"spec": {"containers": [
                {"name": "c", "image": "3"},
                {"name": "a", "image": "2", "args": ["3"], "env": [{"name": "Y", "value": "2"}]},
            ]}})
        );
    }

    #[test]
    fn labels_are_added_and_removed() {
        let pod = json!({"metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]}});
        let patch = json!({"metadata": {
            "labels": {"a": null, "c": "3"},
            "finalizers": ["z"],
            "$deleteFromPrimitiveList/finalizers": ["x"],
        }});
        assert_eq!(
            patched(&pod, &patch),
            json!({"metadata": {"labels": {"b": "2", "c": "3"}, "finalizers": ["y", "z"]}})
        );
    }

    #[test]
    fn directives_replace_and_retain() {
        let pod = json!({"spec": {
            "volumes": [{"name": "v", "emptyDir": {}}],
            "securityContext": {"runAsUser": 1},
        }});
        let patch = json!({"spec": {
            "volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}],
            "securityContext": {"$patch": "replace", "runAsGroup": 2},
        }});
        assert_eq!(
            patched(&pod, &patch),
            json!({"spec": {
                "volumes": [{"name": "v", "hostPath": {"path": "/x"}}],
                "securityContext": {"runAsGroup": 2},
            }})
        );
        let patch = json!({"spec": {"volumes": [{"$patch": "replace"}, {"name": "w"}]}});
        assert_eq!(
            patched(&pod, &patch)["spec"]["volumes"],
            json!([{"name": "w"}])
        );
        let wrong = json!({"spec": {"volumes": [{"emptyDir": {}}]}});
        assert!(apply(shape::of(Kind::Pod), &pod, &wrong).is_err());
        let wrong = json!({"spec": {"$patch": "paint"}});
        assert!(apply(shape::of(Kind::Pod), &pod, &wrong).is_err());
    }
}
