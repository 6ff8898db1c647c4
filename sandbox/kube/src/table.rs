//! Lists as kubectl prints them: columns and rows. Called by `http`.

mod pods;

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::store::Kind;

/// What is sent of each object beside its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Include {
    Nothing,
    Metadata,
    Object,
}

/// A column: its name, and whether it is shown with `-o wide` only.
type Column = (&'static str, bool);

/// These objects as a table. The columns may be left out of all but the first table of a watch.
pub(crate) fn of<'a>(
    kind: Kind,
    objects: impl Iterator<Item = &'a Value>,
    version: &str,
    include: Include,
    with_columns: bool,
) -> Value {
    let columns: Vec<Value> = columns(kind)
        .iter()
        .map(|(name, wide)| {
            let format = if *name == "Name" { "name" } else { "" };
            json!({
                "name": name, "type": "string", "format": format, "description": "",
                "priority": u8::from(*wide),
            })
        })
        .collect();
    let rows: Vec<Value> = objects
        .map(|object| {
            let mut row = json!({"cells": cells(kind, object)});
            match include {
                Include::Nothing => {}
                Include::Object => row["object"] = object.clone(),
                Include::Metadata => {
                    row["object"] = json!({
                        "kind": "PartialObjectMetadata",
                        "apiVersion": "meta.k8s.io/v1",
                        "metadata": object["metadata"],
                    });
                }
            }
            row
        })
        .collect();
    let columns = if with_columns { columns } else { Vec::new() };
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": columns,
        "rows": rows,
    })
}

fn columns(kind: Kind) -> &'static [Column] {
    match kind {
        Kind::Pod => pods::COLUMNS,
        Kind::RuntimeClass => &[("Name", false), ("Handler", false), ("Age", false)],
        Kind::ConfigMap => &[("Name", false), ("Data", false), ("Age", false)],
        Kind::Secret => &[
            ("Name", false),
            ("Type", false),
            ("Data", false),
            ("Age", false),
        ],
        Kind::Namespace => &[("Name", false), ("Status", false), ("Age", false)],
        Kind::Event => &[
            ("Last Seen", false),
            ("Type", false),
            ("Reason", false),
            ("Object", false),
            ("Subobject", true),
            ("Source", true),
            ("Message", false),
            ("First Seen", true),
            ("Count", true),
            ("Name", true),
        ],
        Kind::Node => &[
            ("Name", false),
            ("Status", false),
            ("Roles", false),
            ("Age", false),
            ("Version", false),
            ("Internal-IP", true),
            ("External-IP", true),
            ("OS-Image", true),
            ("Kernel-Version", true),
            ("Container-Runtime", true),
        ],
    }
}

fn cells(kind: Kind, object: &Value) -> Vec<Value> {
    let name = text(&object["metadata"]["name"]);
    let age = since(&object["metadata"]["creationTimestamp"]);
    let count = |fields: &[&str]| -> String {
        let each = fields.iter().map(|field| &object[field]);
        let each = each.filter_map(|map| Some(map.as_object()?.len()));
        each.sum::<usize>().to_string()
    };
    let row: Vec<String> = match kind {
        Kind::Pod => return pods::cells(object),
        Kind::RuntimeClass => vec![name, text(&object["handler"]), age],
        Kind::ConfigMap => vec![name, count(&["data", "binaryData"]), age],
        Kind::Secret => vec![name, text(&object["type"]), count(&["data"]), age],
        Kind::Namespace => vec![name, text(&object["status"]["phase"]), age],
        Kind::Event => {
            let subject = &object["involvedObject"];
            let kind = text(&subject["kind"]).to_lowercase();
            let source = &object["source"];
            let last = match &object["lastTimestamp"] {
                Value::Null => &object["eventTime"],
                last => last,
            };
            vec![
                since(last),
                text(&object["type"]),
                text(&object["reason"]),
                format!("{kind}/{}", text(&subject["name"])),
                text(&subject["fieldPath"]),
                join(&[text(&source["component"]), text(&source["host"])]),
                text(&object["message"]).trim().to_owned(),
                since(&object["firstTimestamp"]),
                object["count"].as_i64().unwrap_or(1).to_string(),
                name,
            ]
        }
        Kind::Node => node(object, name, age),
    };
    row.into_iter().map(Value::String).collect()
}

fn join(parts: &[String]) -> String {
    let parts = parts.iter().filter(|part| !part.is_empty());
    parts.cloned().collect::<Vec<_>>().join(", ")
}

fn node(object: &Value, name: String, age: String) -> Vec<String> {
    let status = &object["status"];
    let conditions = status["conditions"].as_array();
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|c| c["type"] == "Ready");
    let mut state = match ready.map(|ready| ready["status"] == "True") {
        Some(true) => "Ready".to_owned(),
        Some(false) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if object["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let roles = object["metadata"]["labels"].as_object();
    let roles = roles.into_iter().flatten();
    let roles: Vec<&str> = roles
        .filter_map(|(label, _)| label.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    let roles = roles.join(",");
    let address = |of: &str| {
        let all = status["addresses"].as_array().into_iter().flatten();
        let found = all.into_iter().find(|one| one["type"] == of);
        or(found.map(|one| text(&one["address"])), "<none>")
    };
    let info = |field: &str| or(Some(text(&status["nodeInfo"][field])), "<unknown>");
    vec![
        name,
        state,
        or(Some(roles), "<none>"),
        age,
        info("kubeletVersion"),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn or(text: Option<String>, none: &str) -> String {
    let text = text.filter(|text| !text.is_empty());
    text.unwrap_or_else(|| none.to_owned())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// How long ago, as kubectl has it.
fn since(time: &Value) -> String {
    let time = time.as_str().and_then(|t| humantime::parse_rfc3339(t).ok());
    match time {
        None => "<unknown>".to_owned(),
        Some(time) => short(SystemTime::now().duration_since(time).unwrap_or_default()),
    }
}

/// The two largest units that say something.
fn short(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let with = |whole: u64, unit: &str, rest: u64, small: &str| match rest {
        0 => format!("{whole}{unit}"),
        rest => format!("{whole}{unit}{rest}{small}"),
    };
    match (seconds, minutes, hours, days) {
        (0..120, ..) => format!("{seconds}s"),
        (_, 0..10, ..) => with(minutes, "m", seconds % 60, "s"),
        (_, 0..180, ..) => format!("{minutes}m"),
        (_, _, 0..8, _) => with(hours, "h", minutes % 60, "m"),
        (_, _, 0..48, _) => format!("{hours}h"),
        (_, _, _, 0..8) => with(days, "d", hours % 24, "h"),
        (_, _, _, 0..730) => format!("{days}d"),
        _ => with(days / 365, "y", days % 365, "d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (150, "2m30s"),
            (600, "10m"),
            (10_799, "179m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 300, "3h5m"),
            (9 * 3600 + 5, "9h"),
            (3 * 86400 + 3600, "3d1h"),
            (20 * 86400, "20d"),
            (800 * 86400, "2y70d"),
        ] {
            assert_eq!(short(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_row_has_a_cell_for_each_column() {
        for kind in Kind::ALL {
            let object = json!({"metadata": {"name": "a"}});
            let table = of(kind, [&object].into_iter(), "1", Include::Metadata, true);
            let columns = table["columnDefinitions"].as_array().unwrap().len();
            assert_eq!(table["rows"][0]["cells"].as_array().unwrap().len(), columns);
            assert_eq!(table["rows"][0]["object"]["metadata"]["name"], "a");
        }
    }
}
