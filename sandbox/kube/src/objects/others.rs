//! What is no pod: what it has to be, and what is added to it.

use serde_json::{Value, json};

use super::{Faults, default, entries, names, remove};
use crate::store::Kind;

/// Sets what is not said.
pub(super) fn complete(kind: Kind, object: &mut Value) {
    match kind {
        Kind::Secret => {
            default(object, "type", "Opaque");
            let Some(text) = object.get("stringData").cloned() else {
                return;
            };
            // It is a form of writing only: what is kept is data.
            default(object, "data", json!({}));
            for (key, value) in entries(&text) {
                let value = value.as_str().unwrap_or_default();
                object["data"][key.as_str()] = json!(base64(value.as_bytes()));
            }
            remove(object, "stringData");
        }
        Kind::Namespace => {
            object["status"] = json!({"phase": "Active"});
            default(object, "spec", json!({}));
            let name = object["metadata"]["name"].clone();
            default(&mut object["metadata"], "labels", json!({}));
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
        }
        Kind::Event => {
            default(object, "type", "Normal");
            let now = crate::store::now();
            default(object, "firstTimestamp", now.clone());
            default(object, "lastTimestamp", now);
            default(object, "count", 1);
        }
        _ => {}
    }
}

/// Everything that can be seen in the object alone.
pub(super) fn check(kind: Kind, object: &Value, faults: &mut Faults) {
    match kind {
        Kind::RuntimeClass => {
            match object["handler"].as_str() {
                None | Some("") => faults.add("handler", "is missing"),
                Some(handler) => faults.check("handler", names::label(handler)),
            }
            let scheduling = &object["scheduling"];
            if entries(scheduling).next().is_some() {
                faults.add(
                    "scheduling",
                    "there is one node and no scheduler; leave it out",
                );
            }
        }
        Kind::ConfigMap | Kind::Secret => {
            for field in ["data", "binaryData"] {
                for (key, _) in entries(&object[field]) {
                    faults.check(
                        format!("{field}[{}]", names::printable(key)),
                        names::key(key),
                    );
                    if field == "binaryData" && !object["data"][key].is_null() {
                        let message = "is in data, too";
                        faults.add(format!("binaryData[{}]", names::printable(key)), message);
                    }
                }
            }
        }
        Kind::Namespace => {
            let given = object["spec"]["finalizers"].as_array();
            if given.is_some_and(|list| list.iter().any(|one| one != "kubernetes")) {
                faults.add("spec.finalizers", "nothing here acts on it; leave it out");
            }
        }
        Kind::Event => {
            let place = object["involvedObject"]["namespace"].as_str();
            let own = object["metadata"]["namespace"].as_str().unwrap_or_default();
            if place.is_some_and(|place| place != own && !(place.is_empty() && own == "default")) {
                faults.add("involvedObject.namespace", "is not the event's");
            }
        }
        Kind::Node => {
            let taints = object["spec"]["taints"].as_array();
            if taints.is_some_and(|list| !list.is_empty()) {
                let message =
                    "there is no scheduler to heed them; `kubectl cordon` refuses new pods";
                faults.add("spec.taints", message);
            }
        }
        Kind::Pod => {}
    }
}

/// What may not change of an object that is there.
pub(super) fn check_change(kind: Kind, old: &Value, new: &Value, faults: &mut Faults) {
    let mut fixed = |field: &str, message: &str| {
        if old[field] != new[field] {
            faults.add(field, message);
        }
    };
    match kind {
        Kind::ConfigMap | Kind::Secret => {
            if kind == Kind::Secret {
                fixed("type", "cannot be changed");
            }
            if old["immutable"] == true {
                for field in ["data", "binaryData", "immutable"] {
                    fixed(field, "cannot be changed: the object is immutable");
                }
            }
        }
        Kind::RuntimeClass => fixed("handler", "cannot be changed; make another class"),
        _ => {}
    }
}

/// The standard alphabet, with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or_default());
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for index in 0..4 {
            // Six bits of 24.
            let six = (word >> (18 - 6 * index)) & 63;
            let padding = index > chunk.len();
            let letter = ALPHABET[six as usize];
            text.push(if padding { '=' } else { char::from(letter) });
        }
    }
    text
}
