//! RFC 6902: a list of operations, all of which succeed or none.

use serde_json::Value;

use crate::failure::Failure;

/// A longer list is refused.
const LONGEST: usize = 10_000;
/// An object nested deeper could not be read back from the store.
const DEEPEST: usize = 100;
/// All copies of a patch may have so many bytes: each could double what the last has made.
const COPIED: usize = 3 << 20;

/// What `object` becomes.
pub(super) fn apply(object: &Value, patch: &Value) -> Result<Value, Failure> {
    let Some(operations) = patch.as_array() else {
        return Err(Failure::bad_request(
            "the patch is not a list of operations",
        ));
    };
    if operations.len() > LONGEST {
        return Err(Failure::bad_request("the patch has too many operations"));
    }
    let mut object = object.clone();
    let mut copied = 0;
    for (index, operation) in operations.iter().enumerate() {
        one(&mut object, operation, &mut copied).map_err(|why| {
            Failure::unprocessable(format!("operation {index} of the patch: {why}"))
        })?;
    }
    Ok(object)
}

fn one(object: &mut Value, operation: &Value, copied: &mut usize) -> Result<(), String> {
    let path = text(operation, "path")?;
    let value = || operation.get("value").cloned().ok_or("has no value");
    let fits = |value: Value| match path.matches('/').count() + depth(&value) > DEEPEST {
        true => Err(format!("nests deeper than {DEEPEST} levels")),
        false => Ok(value),
    };
    match text(operation, "op")? {
        "add" => add(object, path, fits(value()?)?),
        "remove" => remove(object, path).map(drop),
        "replace" => {
            let found = object.pointer_mut(path).ok_or_else(|| nothing(path))?;
            *found = fits(value()?)?;
            Ok(())
        }
        "test" => match object.pointer(path) == Some(&value()?) {
            true => Ok(()),
            false => Err(format!("{path} has another value")),
        },
        "move" => {
            let from = text(operation, "from")?;
            if path.starts_with(&format!("{from}/")) {
                return Err(format!("{from} cannot be moved into itself"));
            }
            let moved = remove(object, from)?;
            add(object, path, fits(moved)?)
        }
        "copy" => {
            let from = text(operation, "from")?;
            let found = object.pointer(from).ok_or_else(|| nothing(from))?;
            *copied += found.to_string().len();
            if *copied > COPIED {
                return Err("copies too much".to_owned());
            }
            let found = found.clone();
            add(object, path, fits(found)?)
        }
        other => Err(format!(
            "there is no operation \"{}\"",
            other.escape_debug()
        )),
    }
}

/// How many levels there are below a value; without calling itself, since it may be deep.
fn depth(value: &Value) -> usize {
    let mut deepest = 0;
    let mut all = vec![(value, 0)];
    while let Some((value, depth)) = all.pop() {
        deepest = deepest.max(depth);
        match value {
            Value::Object(fields) => all.extend(fields.values().map(|one| (one, depth + 1))),
            Value::Array(items) => all.extend(items.iter().map(|one| (one, depth + 1))),
            _ => {}
        }
    }
    deepest
}

fn text<'a>(operation: &'a Value, field: &str) -> Result<&'a str, String> {
    operation[field]
        .as_str()
        .ok_or_else(|| format!("has no {field}"))
}

fn nothing(path: &str) -> String {
    format!("there is nothing at {}", path.escape_debug())
}

/// The place that holds what a path names, and its name there.
fn parent<'a>(object: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), String> {
    let (before, last) = path.rsplit_once('/').ok_or_else(|| nothing(path))?;
    let name = last.replace("~1", "/").replace("~0", "~");
    let found = object.pointer_mut(before).ok_or_else(|| nothing(before))?;
    Ok((found, name))
}

/// A place in a list, as RFC 6901 has it.
fn index(name: &str, limit: usize) -> Option<usize> {
    let plain = name == "0" || !name.starts_with('0') && !name.starts_with('+');
    let index = name.parse().ok().filter(|_| plain)?;
    (index < limit).then_some(index)
}

fn add(object: &mut Value, path: &str, value: Value) -> Result<(), String> {
    if path.is_empty() {
        *object = value;
        return Ok(());
    }
    let (parent, name) = parent(object, path)?;
    match parent {
        Value::Object(fields) => {
            fields.insert(name, value);
            Ok(())
        }
        Value::Array(items) if name == "-" => {
            items.push(value);
            Ok(())
        }
        Value::Array(items) => {
            let index = index(&name, items.len() + 1).ok_or_else(|| nothing(path))?;
            items.insert(index, value);
            Ok(())
        }
        _ => Err(nothing(path)),
    }
}

fn remove(object: &mut Value, path: &str) -> Result<Value, String> {
    let (parent, name) = parent(object, path)?;
    let removed = match parent {
        Value::Object(fields) => fields.remove(&name),
        Value::Array(items) => index(&name, items.len()).map(|index| items.remove(index)),
        _ => None,
    };
    removed.ok_or_else(|| nothing(path))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn operations_are_done_in_turn() {
        let object = json!({"a": [1, 2], "b": {"c/d": 1}});
        let patch = json!([
            {"op": "test", "path": "/b/c~1d", "value": 1},
            {"op": "add", "path": "/a/1", "value": 9},
            {"op": "add", "path": "/a/-", "value": 8},
            {"op": "remove", "path": "/a/0"},
            {"op": "move", "from": "/b/c~1d", "path": "/e"},
            {"op": "copy", "from": "/e", "path": "/f"},
            {"op": "replace", "path": "/f", "value": 3},
        ]);
        assert_eq!(
            apply(&object, &patch).unwrap(),
            json!({"a": [9, 2, 8], "b": {}, "e": 1, "f": 3})
        );
    }

    #[test]
    fn an_object_grows_within_bounds() {
        let mut path = "/a".to_owned();
        let mut deep = Vec::new();
        for _ in 0..200 {
            deep.push(json!({"op": "add", "path": path, "value": {}}));
            path += "/a";
        }
        let refused = apply(&json!({}), &Value::Array(deep)).unwrap_err();
        assert!(refused.message().contains("nests deeper"), "{refused:?}");
        let twice = json!({"op": "copy", "from": "/a", "path": "/a/b"});
        let twice = Value::Array(vec![twice; 200]);
        let refused = apply(&json!({"a": {"text": "x".repeat(100)}}), &twice).unwrap_err();
        assert!(refused.message().contains("of the patch: "), "{refused:?}");
        let many = json!({"op": "copy", "from": "/a", "path": "/b"});
        let many = Value::Array(vec![many; 60]);
        let refused = apply(&json!({"a": "x".repeat(100_000)}), &many).unwrap_err();
        assert!(refused.message().contains("copies too much"), "{refused:?}");
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let object = json!({"a": [1], "b": {}});
        for operation in [
            json!({"op": "remove", "path": "/c"}),
            json!({"op": "remove", "path": ""}),
            json!({"op": "add", "path": "/a/3", "value": 1}),
            json!({"op": "add", "path": "/a/01", "value": 1}),
            json!({"op": "add", "path": "/a/0"}),
            json!({"op": "add", "path": "/a/0/b", "value": 1}),
            json!({"op": "replace", "path": "/x/y", "value": 1}),
            json!({"op": "test", "path": "/a", "value": 1}),
            json!({"op": "move", "from": "/b", "path": "/b/c"}),
            json!({"op": "paint", "path": "/a"}),
            json!({"path": "/a"}),
            json!(7),
        ] {
            let failure = apply(&object, &json!([operation])).unwrap_err();
            assert_eq!(failure.code, 422, "{operation}");
        }
    }
}
