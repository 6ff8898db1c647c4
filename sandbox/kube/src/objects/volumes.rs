//! What the volumes of a pod have to be, and where containers may have them.

use std::collections::BTreeSet;

use pericarp_config::nearest;
use serde_json::{Value, json};

use super::{Faults, default, entries, items, items_mut, names, quantity::Quantity, shape::shown};

/// What a volume may be made of here.
const SOURCES: [&str; 6] = [
    "emptyDir",
    "hostPath",
    "configMap",
    "secret",
    "projected",
    "downwardAPI",
];
/// Fields of a pod that its containers can be told in variables and files.
const FIELDS: [&str; 4] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "metadata.labels",
];
/// Further ones in variables.
const FIELDS_OF_VARIABLES: [&str; 7] = [
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
    "metadata.name",
];
const RESOURCES: [&str; 6] = [
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
];

/// Sets what is not said.
pub(super) fn complete(volume: &mut Value) {
    let Some(fields) = volume.as_object_mut() else {
        return;
    };
    if SOURCES.iter().all(|source| !fields.contains_key(*source)) && fields.len() < 2 {
        fields.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["configMap", "secret", "projected", "downwardAPI"] {
        if let Some(source) = volume.get_mut(source) {
            default(source, "defaultMode", 0o644);
        }
    }
    if let Some(host) = volume.get_mut("hostPath")
        && host["type"].is_null()
    {
        host["type"] = json!("");
    }
    for place in ["/downwardAPI/items", "/projected/sources"] {
        let Some(list) = volume.pointer_mut(place) else {
            continue;
        };
        for item in items_mut(list) {
            if let Some(field) = item.get_mut("fieldRef") {
                default(field, "apiVersion", "v1");
            }
            let Some(further) = item.pointer_mut("/downwardAPI/items") else {
                continue;
            };
            for item in items_mut(further) {
                if let Some(field) = item.get_mut("fieldRef") {
                    default(field, "apiVersion", "v1");
                }
            }
        }
    }
}

/// The volumes of a pod; their names.
pub(super) fn check<'a>(spec: &'a Value, faults: &mut Faults) -> BTreeSet<&'a str> {
    let mut known = BTreeSet::new();
    for (index, volume) in items(&spec["volumes"]) {
        let path = format!("spec.volumes[{index}]");
        match volume["name"].as_str() {
            None | Some("") => {
                faults.add(format!("{path}.name"), "is missing; give the volume a name");
            }
            Some(name) => {
                faults.check(format!("{path}.name"), names::label(name));
                if !known.insert(name) {
                    faults.add(format!("{path}.name"), super::pod::twice(name));
                }
            }
        }
        let sources: Vec<&String> = entries(volume)
            .map(|(field, _)| field)
            .filter(|field| *field != "name")
            .collect();
        match sources[..] {
            [source] if SOURCES.contains(&source.as_str()) => {
                check_source(source, &volume[source.as_str()], &path, faults);
            }
            [source] => {
                let list = SOURCES.join(", ");
                let source = names::printable(source);
                let message = format!("there are no volumes of a cluster here; use one of {list}");
                faults.add(format!("{path}.{source}"), message);
            }
            _ => faults.add(path, "has to have exactly one source"),
        }
    }
    known
}

fn check_source(kind: &str, source: &Value, path: &str, faults: &mut Faults) {
    let path = format!("{path}.{kind}");
    match kind {
        "emptyDir" => {
            let medium = source["medium"].as_str().unwrap_or_default();
            if !["", "Memory"].contains(&medium) {
                let said = shown(&source["medium"]);
                let message =
                    format!("{said} is neither \"Memory\" nor empty, which means the disk");
                faults.add(format!("{path}.medium"), message);
            }
            let limit = &source["sizeLimit"];
            if Quantity::of(limit).is_some_and(|limit| limit.thousandths() < 0) {
                faults.add(
                    format!("{path}.sizeLimit"),
                    format!("{} is negative", shown(limit)),
                );
            }
        }
        "hostPath" => {
            match source["path"].as_str() {
                Some(host) if host.starts_with('/') && !host.split('/').any(|p| p == "..") => {}
                said => {
                    let rule = "has to be an absolute path without '..'";
                    let message = match said {
                        Some(said) => format!("{} {rule}", shown(&json!(said))),
                        None => format!("is missing, and {rule}"),
                    };
                    faults.add(format!("{path}.path"), message);
                }
            }
            let known = [
                "DirectoryOrCreate",
                "Directory",
                "FileOrCreate",
                "File",
                "Socket",
                "CharDevice",
                "BlockDevice",
            ];
            // Nothing is asked of it.
            if source["type"] != "" {
                super::pod::words(source, &path, "type", &known, faults);
            }
        }
        "configMap" | "secret" => {
            let name = match kind {
                "secret" => "secretName",
                _ => "name",
            };
            if source[name].as_str().unwrap_or_default().is_empty() {
                faults.add(format!("{path}.{name}"), "is missing");
            }
            check_items(source, &path, faults);
        }
        "downwardAPI" => check_downward(source, &path, faults),
        _ => {
            for (index, one) in items(&source["sources"]) {
                let path = format!("{path}.sources[{index}]");
                match &entries(one).collect::<Vec<_>>()[..] {
                    [(of, source)] if ["configMap", "secret"].contains(&of.as_str()) => {
                        if source["name"].as_str().unwrap_or_default().is_empty() {
                            faults.add(format!("{path}.{of}.name"), "is missing");
                        }
                        check_items(source, &format!("{path}.{of}"), faults);
                    }
                    [(of, source)] if *of == "downwardAPI" => {
                        check_downward(source, &format!("{path}.{of}"), faults);
                    }
                    _ => faults.add(path, "has to be one of configMap, secret and downwardAPI"),
                }
            }
        }
    }
    mode(source, "defaultMode", &path, faults);
}

fn mode(value: &Value, field: &str, path: &str, faults: &mut Faults) {
    let outside = |mode: i64| !(0..=0o777).contains(&mode);
    if value[field].as_i64().is_some_and(outside) {
        faults.add(format!("{path}.{field}"), "is not between 0 and 0777");
    }
}

fn check_items(source: &Value, path: &str, faults: &mut Faults) {
    for (index, item) in items(&source["items"]) {
        let path = format!("{path}.items[{index}]");
        if item["key"].as_str().unwrap_or_default().is_empty() {
            faults.add(format!("{path}.key"), "is missing");
        }
        inside(&item["path"], &format!("{path}.path"), faults);
        mode(item, "mode", &path, faults);
    }
}

fn check_downward(source: &Value, path: &str, faults: &mut Faults) {
    for (index, item) in items(&source["items"]) {
        let path = format!("{path}.items[{index}]");
        inside(&item["path"], &format!("{path}.path"), faults);
        mode(item, "mode", &path, faults);
        match (&item["fieldRef"], &item["resourceFieldRef"]) {
            (field, Value::Null) if !field.is_null() => {
                check_field(field, &format!("{path}.fieldRef"), true, faults);
            }
            (Value::Null, resource) if !resource.is_null() => {
                let path = format!("{path}.resourceFieldRef");
                if resource["containerName"]
                    .as_str()
                    .unwrap_or_default()
                    .is_empty()
                {
                    faults.add(format!("{path}.containerName"), "is missing");
                }
                check_resource(resource, &path, faults);
            }
            _ => faults.add(path, "has to have either fieldRef or resourceFieldRef"),
        }
    }
}

/// A path that stays below the volume it is in.
fn inside(value: &Value, path: &str, faults: &mut Faults) {
    let bad = |text: &str| {
        text.is_empty() || text.starts_with('/') || text.split('/').any(|part| part == "..")
    };
    if value.as_str().is_none_or(bad) {
        faults.add(path, "has to be a relative path without '..'");
    }
}

/// One of the fields that containers may be told.
pub(super) fn check_field(source: &Value, path: &str, of_file: bool, faults: &mut Faults) {
    let said = source["fieldPath"].as_str().unwrap_or_default();
    let annotations = "metadata.annotations";
    let whole = said == "metadata.labels" || said == annotations;
    let single = ["metadata.labels['", "metadata.annotations['"]
        .iter()
        .any(|start| said.starts_with(start) && said.ends_with("']"));
    let plain = FIELDS.contains(&said) && !whole;
    let variable = !of_file && FIELDS_OF_VARIABLES.contains(&said);
    if plain || single || variable || (of_file && whole) {
        return;
    }
    let all = FIELDS.iter().chain(&FIELDS_OF_VARIABLES).copied();
    let near = nearest(said, all.filter(|known| *known != "metadata.labels"));
    let near = near.map(|near| format!("; did you mean \"{near}\"?"));
    let said = names::printable(said);
    let message = format!(
        "\"{said}\" is no field that containers can be told{}",
        near.unwrap_or_default()
    );
    faults.add(format!("{path}.fieldPath"), message);
}

/// One of the amounts that containers may be told.
pub(super) fn check_resource(source: &Value, path: &str, faults: &mut Faults) {
    let said = source["resource"].as_str().unwrap_or_default();
    if !RESOURCES.contains(&said) {
        let list = RESOURCES.join(", ");
        let said = names::printable(said);
        faults.add(
            format!("{path}.resource"),
            format!("\"{said}\" is none of {list}"),
        );
    }
    if Quantity::of(&source["divisor"]).is_some_and(|divisor| divisor.thousandths() <= 0) {
        // Nothing said is one.
        if source["divisor"] != "0" && source["divisor"] != 0 {
            faults.add(format!("{path}.divisor"), "is not positive");
        }
    }
}

/// Where a container has the volumes.
pub(super) fn check_mounts(
    container: &Value,
    path: &str,
    volumes: &BTreeSet<&str>,
    faults: &mut Faults,
) {
    let mut places = BTreeSet::new();
    for (index, mount) in items(&container["volumeMounts"]) {
        let path = format!("{path}.volumeMounts[{index}]");
        let name = mount["name"].as_str().unwrap_or_default();
        if !volumes.contains(name) {
            let cure = match nearest(name, volumes.iter().copied()) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => "add it to spec.volumes".to_owned(),
            };
            let name = names::printable(name);
            let message = format!("the pod has no volume \"{name}\"; {cure}");
            faults.add(format!("{path}.name"), message);
        }
        match mount["mountPath"].as_str() {
            None | Some("") => faults.add(format!("{path}.mountPath"), "is missing"),
            Some(place) if place.contains(':') => {
                let message = format!("{} must not contain ':'", shown(&mount["mountPath"]));
                faults.add(format!("{path}.mountPath"), message);
            }
            Some(place) if place.split('/').any(|part| part == "..") => {
                let message = format!("{} must not contain '..'", shown(&mount["mountPath"]));
                faults.add(format!("{path}.mountPath"), message);
            }
            Some(place) if !places.insert(place) => {
                let said = shown(&mount["mountPath"]);
                let message = format!("{said} is taken by another volume; choose another path");
                faults.add(format!("{path}.mountPath"), message);
            }
            Some(_) => {}
        }
        let both = mount["subPath"]
            .as_str()
            .is_some_and(|path| !path.is_empty());
        if both {
            inside(&mount["subPath"], &format!("{path}.subPath"), faults);
        }
        if let Some(expression) = mount["subPathExpr"].as_str()
            && !expression.is_empty()
        {
            inside(
                &mount["subPathExpr"],
                &format!("{path}.subPathExpr"),
                faults,
            );
            if both {
                faults.add(path.clone(), "has both subPath and subPathExpr");
            }
        }
        let known = ["None", "HostToContainer", "Bidirectional"];
        super::pod::words(mount, &path, "mountPropagation", &known, faults);
    }
}
