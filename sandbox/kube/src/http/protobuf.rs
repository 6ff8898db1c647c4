//! Objects as protobuf, in which `kubectl create` sends a few kinds whatever it is told.
//!
//! Read here into what the same object is as JSON: `k8s\0`, an envelope, and in it the object. Only
//! what such commands make is understood; everything else is refused, and can be sent as JSON.

use serde_json::{Map, Value, json};

use crate::{failure::Failure, objects::base64, store::Kind};

const MAGIC: &[u8] = b"k8s\0";

/// A field of a message: its number, and what is in it.
enum Held<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The object of a body.
pub(crate) fn read(kind: Kind, body: &[u8]) -> Result<Value, Failure> {
    let known = [Kind::ConfigMap, Kind::Secret, Kind::Namespace];
    if !known.contains(&kind) {
        let name = kind.name();
        let message = format!("a {name} has to be sent as application/json, and not as protobuf");
        return Err(Failure::media_type(message));
    }
    object(kind, body)
        .ok_or_else(|| Failure::bad_request("the body is no object in Kubernetes' protobuf"))
}

fn object(kind: Kind, body: &[u8]) -> Option<Value> {
    let envelope = body.strip_prefix(MAGIC)?;
    let mut found = json!({});
    let mut raw: &[u8] = &[];
    each(envelope, |number, held| {
        match (number, held) {
            (1, Held::Bytes(bytes)) => each(bytes, |number, held| {
                match (number, held) {
                    (1, Held::Bytes(bytes)) => found["apiVersion"] = text(bytes)?,
                    (2, Held::Bytes(bytes)) => found["kind"] = text(bytes)?,
                    _ => {}
                }
                Some(())
            })?,
            (2, Held::Bytes(bytes)) => raw = bytes,
            // It is not compressed, and of no other form.
            (3, Held::Bytes(bytes)) if !bytes.is_empty() => return None,
            _ => {}
        }
        Some(())
    })?;
    let mut fields = Map::new();
    each(raw, |number, held| {
        match (kind, number, held) {
            (_, 1, Held::Bytes(bytes)) => {
                fields.insert("metadata".into(), metadata(bytes)?);
            }
            (Kind::ConfigMap, 2, Held::Bytes(bytes)) | (Kind::Secret, 4, Held::Bytes(bytes)) => {
                let name = match kind {
                    Kind::Secret => "stringData",
                    _ => "data",
                };
                entry(&mut fields, name, bytes, text)?;
            }
            (Kind::ConfigMap, 3, Held::Bytes(bytes)) => {
                entry(&mut fields, "binaryData", bytes, encoded)?;
            }
            (Kind::Secret, 2, Held::Bytes(bytes)) => entry(&mut fields, "data", bytes, encoded)?,
            (Kind::Secret, 3, Held::Bytes(bytes)) => {
                fields.insert("type".into(), text(bytes)?);
            }
            (Kind::ConfigMap, 4, Held::Number(flag)) | (Kind::Secret, 5, Held::Number(flag)) => {
                fields.insert("immutable".into(), json!(flag != 0));
            }
            // A namespace's spec and status are the server's to say.
            (Kind::Namespace, 2 | 3, _) => {}
            _ => return None,
        }
        Some(())
    })?;
    for (name, value) in fields {
        found[name] = value;
    }
    Some(found)
}

fn metadata(bytes: &[u8]) -> Option<Value> {
    let mut fields = Map::new();
    each(bytes, |number, held| {
        let Held::Bytes(bytes) = held else {
            // Its generation and such, which the server says.
            return Some(());
        };
        let name = match number {
            1 => "name",
            2 => "generateName",
            3 => "namespace",
            5 => "uid",
            6 => "resourceVersion",
            11 => return entry(&mut fields, "labels", bytes, text),
            12 => return entry(&mut fields, "annotations", bytes, text),
            // Owners and finalizers, which would be refused; not seen, they must be, too.
            13 | 14 => return None,
            _ => return Some(()),
        };
        if !bytes.is_empty() {
            fields.insert(name.into(), text(bytes)?);
        }
        Some(())
    })?;
    Some(Value::Object(fields))
}

/// One entry of a map.
fn entry(
    fields: &mut Map<String, Value>,
    name: &str,
    bytes: &[u8],
    read: fn(&[u8]) -> Option<Value>,
) -> Option<()> {
    let (mut key, mut value) = (String::new(), read(&[])?);
    each(bytes, |number, held| {
        match (number, held) {
            (1, Held::Bytes(bytes)) => key = str::from_utf8(bytes).ok()?.to_owned(),
            (2, Held::Bytes(bytes)) => value = read(bytes)?,
            _ => {}
        }
        Some(())
    })?;
    let map = fields.entry(name).or_insert_with(|| json!({}));
    map.as_object_mut()?.insert(key, value);
    Some(())
}

fn text(bytes: &[u8]) -> Option<Value> {
    Some(Value::from(str::from_utf8(bytes).ok()?))
}

fn encoded(bytes: &[u8]) -> Option<Value> {
    Some(Value::from(base64(bytes)))
}

/// Goes through the fields of a message. `None` when it is none.
fn each<'a>(mut bytes: &'a [u8], mut see: impl FnMut(u64, Held<'a>) -> Option<()>) -> Option<()> {
    while !bytes.is_empty() {
        let tag = number(&mut bytes)?;
        let held = match tag & 7 {
            0 => Held::Number(number(&mut bytes)?),
            2 => {
                let length = usize::try_from(number(&mut bytes)?).ok()?;
                let (held, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Held::Bytes(held)
            }
            _ => return None,
        };
        see(tag >> 3, held)?;
    }
    Some(())
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut all = vec![number << 3 | 2, bytes.len() as u8];
        all.extend(bytes);
        all
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let of = [field(1, b"v1"), field(2, kind.as_bytes())].concat();
        [
            MAGIC.to_vec(),
            field(1, &of),
            field(2, raw),
            field(3, b""),
            field(4, b""),
        ]
        .concat()
    }

    #[test]
    fn what_kubectl_creates_is_read() {
        let entry = |name: &[u8], value: &[u8]| [field(1, name), field(2, value)].concat();
        let metadata = [
            field(1, b"settings"),
            field(2, b""),
            field(8, &[]),
            field(11, &entry(b"a", b"b")),
        ]
        .concat();
        let raw = [field(1, &metadata), field(2, &entry(b"colour", b"red"))].concat();
        assert_eq!(
            read(Kind::ConfigMap, &envelope("ConfigMap", &raw)).unwrap(),
            json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"colour": "red"},
                "metadata": {"name": "settings", "labels": {"a": "b"}}})
        );
        let mut raw = [
            field(1, &metadata),
            field(2, &entry(b"a", &[0xff])),
            field(3, b"Opaque"),
        ]
        .concat();
        raw.extend([5 << 3, 1]);
        let secret = read(Kind::Secret, &envelope("Secret", &raw)).unwrap();
        assert_eq!(secret["data"], json!({"a": "/w=="}));
        assert_eq!(
            (&secret["type"], &secret["immutable"]),
            (&json!("Opaque"), &json!(true))
        );
        let raw = [field(1, &metadata), field(2, b""), field(3, b"")].concat();
        let space = read(Kind::Namespace, &envelope("Namespace", &raw)).unwrap();
        assert_eq!(space["metadata"]["name"], "settings");
    }

    #[test]
    fn what_is_cut_short_or_of_another_kind_is_refused() {
        let raw = field(1, &field(1, b"settings"));
        let whole = envelope("ConfigMap", &raw);
        for end in 0..whole.len() - 4 {
            // Where a field ends, what is left is a message, of less.
            let _ = read(Kind::ConfigMap, &whole[..end]);
        }
        assert_eq!(read(Kind::Pod, &whole).unwrap_err().code, 415);
        assert_eq!(read(Kind::ConfigMap, b"{}").unwrap_err().code, 400);
        let endless = [MAGIC, &[0xff; 20]].concat();
        assert_eq!(read(Kind::ConfigMap, &endless).unwrap_err().code, 400);
    }
}
