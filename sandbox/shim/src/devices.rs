//! The block devices that a container is to have, out of `linux.devices` of its configuration and
//! the rules in `linux.resources.devices`: raw block volumes (`volumeDevices` of a pod).
//!
//! Called by `spec`; text in, text out. All other devices are the host's and refused. A privileged container
//! may be handed all of them by containerd (unless its handler has `privileged_without_host_devices`): it is
//! privileged in its guest, and gets none of these but those that its pod names.

use pericarp_api::share::check_node;
use serde_json::Value;

use crate::{bundle::refused, error::ShimError};

const FIELD: &str = "linux.devices";

/// A block device of the host's that the container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Where, in the container.
    pub(crate) path: String,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) read_only: bool,
    /// Permission bits; 0 where the configuration has none.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Node {
    /// What says so, for messages.
    pub(crate) fn field(&self) -> String {
        format!("{FIELD}: {}", self.path)
    }

    /// What a pod's annotations call it: nothing else of a raw block volume has a name here.
    pub(crate) fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// Whether a rule lets the container have any device of its kernel's.
pub(crate) fn is_privileged(rules: &Value) -> bool {
    let mut rules = rules.as_array().into_iter().flatten();
    rules.any(|rule| rule["allow"] == true && is_of_all(rule))
}

fn is_of_all(rule: &Value) -> bool {
    rule["type"].as_str().is_none_or(|kind| kind == "a")
}

/// Those that its pod names.
pub(crate) fn nodes(devices: &Value, rules: &Value) -> Result<Vec<Node>, ShimError> {
    let privileged = is_privileged(rules);
    let mut nodes: Vec<Node> = Vec::new();
    for device in named(devices, rules, privileged) {
        let node = node(device, rules, privileged)?;
        if nodes.iter().any(|other| other.path == node.path) {
            return Err(refused(&node.field(), "is there twice"));
        }
        nodes.push(node);
    }
    Ok(nodes)
}

/// All devices of the list, unless it is the host's: then those that rules name by their numbers. containerd
/// adds one for each that a pod names, and puts these first; of the host's devices it lists the same
/// again.
fn named<'d>(devices: &'d Value, rules: &Value, privileged: bool) -> Vec<&'d Value> {
    let all = || devices.as_array().into_iter().flatten();
    // Which every host has, and no container is handed alone.
    let is_null = |device: &Value| device["path"] == "/dev/null" && device["type"] == "c";
    if !privileged || !all().any(is_null) {
        return all().collect();
    }
    let mut left: Vec<[&Value; 2]> = rules
        .as_array()
        .into_iter()
        .flatten()
        .filter(|rule| rule["allow"] == true && rule["type"] == "b")
        .map(|rule| [&rule["major"], &rule["minor"]])
        .collect();
    let is_named = |device: &&Value| {
        let number = [&device["major"], &device["minor"]];
        let found = left.iter().position(|rule| *rule == number);
        device["type"] == "b" && found.map(|at| left.remove(at)).is_some()
    };
    all().filter(is_named).collect()
}

fn node(device: &Value, rules: &Value, privileged: bool) -> Result<Node, ShimError> {
    let path = &device["path"];
    if device["type"] != "b" {
        let rule = format!("{path} is the host's, which no guest can have");
        return Err(refused(FIELD, &rule));
    }
    let path = path.as_str().unwrap_or_default();
    let field = format!("{FIELD}: {path}");
    check_node(path).map_err(|error| refused(&field, &format!("it {error}")))?;
    let number = |name: &str, default: Option<u32>| match &device[name] {
        Value::Null => default,
        value => value.as_u64().and_then(|number| u32::try_from(number).ok()),
    };
    let needed = |name: &str, default| {
        let rule = || {
            refused(
                &field,
                &format!("its {name} is no number that a device can have"),
            )
        };
        number(name, default).ok_or_else(rule)
    };
    let (major, minor) = (needed("major", None)?, needed("minor", None)?);
    let mut access = access(rules, major, minor);
    if access.is_empty() && privileged {
        access = vec!['r', 'w'];
    }
    if !access.contains(&'r') {
        let rule = "no rule of linux.resources.devices lets it be read";
        return Err(refused(&field, rule));
    }
    Ok(Node {
        path: path.to_owned(),
        major,
        minor,
        read_only: !access.contains(&'w'),
        mode: needed("fileMode", Some(0))? & 0o777,
        uid: needed("uid", Some(0))?,
        gid: needed("gid", Some(0))?,
    })
}

/// What the rules allow with a block device, one after the other as a control group does. One that
/// allows everything says nothing of this disk, which the host may keep from being written.
fn access(rules: &Value, major: u32, minor: u32) -> Vec<char> {
    let mut allowed = Vec::new();
    for rule in rules.as_array().into_iter().flatten() {
        let kind = rule["type"].as_str().unwrap_or("a");
        if rule["allow"] == true && is_of_all(rule) {
            continue;
        }
        // -1, or nothing: any.
        let is = |name: &str, number: u32| match rule[name].as_i64() {
            None | Some(-1) => true,
            Some(said) => said == i64::from(number),
        };
        if !["a", "b"].contains(&kind) || !is("major", major) || !is("minor", minor) {
            continue;
        }
        let access = rule["access"].as_str().filter(|access| !access.is_empty());
        let access: Vec<char> = access.unwrap_or("rwm").chars().collect();
        match rule["allow"] == true {
            true => allowed.extend(access),
            false => allowed.retain(|one| !access.contains(one)),
        }
    }
    allowed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(access: &str) -> Value {
        json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 7, "minor": 1, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": 1, "access": access},
        ])
    }

    #[test]
    fn a_block_device_is_as_its_rule_says() {
        let device = json!({"path": "/dev/xvda", "type": "b", "major": 7, "minor": 1,
            "fileMode": 0o60640, "uid": 5, "gid": 6});
        let found = nodes(&json!([device]), &rules("rwm")).unwrap();
        let node = Node {
            path: "/dev/xvda".into(),
            major: 7,
            minor: 1,
            read_only: false,
            mode: 0o640,
            uid: 5,
            gid: 6,
        };
        assert_eq!(found, std::slice::from_ref(&node));
        let found = nodes(&json!([device]), &rules("r")).unwrap();
        assert!(found[0].read_only);
        // What is allowed later counts, and so does what is denied.
        let mut changed = rules("r");
        let later = json!({"allow": true, "type": "b", "major": 7, "minor": -1, "access": "w"});
        changed.as_array_mut().unwrap().push(later);
        assert!(!nodes(&json!([device]), &changed).unwrap()[0].read_only);
        let last = json!({"allow": false, "type": "b", "access": "w"});
        changed.as_array_mut().unwrap().push(last);
        assert!(nodes(&json!([device]), &changed).unwrap()[0].read_only);
        assert_eq!(nodes(&Value::Null, &Value::Null).unwrap(), []);
    }

    #[test]
    fn a_privileged_container_has_what_its_pod_names() {
        let block =
            |path: &str, minor: u32| json!({"path": path, "type": "b", "major": 7, "minor": minor});
        let null = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3});
        let rule = |minor: u32, access: &str| json!({"allow": true, "type": "b", "major": 7, "minor": minor, "access": access});
        let rules = |named: &[Value]| {
            let all = json!({"allow": true, "access": "rwm"});
            let none = json!({"allow": false, "access": "rwm"});
            Value::from([&[none], named, &[all]].concat())
        };
        let found = |devices: Value, rules: &Value| -> Vec<(String, bool)> {
            let found = nodes(&devices, rules).unwrap();
            let seen = found.into_iter().map(|node| (node.path, node.read_only));
            seen.collect()
        };
        // The host's devices behind those of the pod, which are among them.
        let host = [block("/dev/loop0", 0), block("/dev/loop1", 1), null.clone()];
        let pods = [block("/dev/xvda", 0), block("/disk", 0), block("/dev/r", 1)];
        let three = rules(&[rule(0, "rwm"), rule(0, "rwm"), rule(1, "r")]);
        let expected = [("/dev/xvda", false), ("/disk", false), ("/dev/r", true)];
        let expected = expected.map(|(path, read_only)| (path.to_owned(), read_only));
        let devices = Value::from([&pods[..], &host].concat());
        assert_eq!(found(devices, &three), expected);
        assert_eq!(found(Value::from(&host[..]), &rules(&[])), []);
        // At its own place.
        let devices = Value::from([&[block("/dev/loop1", 1)][..], &host].concat());
        let one = [("/dev/loop1".to_owned(), false)];
        assert_eq!(found(devices, &rules(&[rule(1, "rwm")])), one);

        // No list of the host's: all of it was picked.
        assert_eq!(found(Value::from(&pods[..]), &three), expected);
        let one = [("/dev/xvda".to_owned(), false)];
        assert_eq!(found(json!([pods[0]]), &rules(&[])), one);
        let fuse = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
        let error = nodes(&fuse, &rules(&[])).unwrap_err().to_string();
        assert!(error.contains("/dev/fuse\" is the host's"), "{error}");
    }

    #[test]
    fn what_no_guest_can_have_is_refused_by_name() {
        let block = |path: &str| json!({"path": path, "type": "b", "major": 7, "minor": 1});
        for (devices, access, said) in [
            (
                json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]),
                "rwm",
                "linux.devices: \"/dev/fuse\" is the host's",
            ),
            (
                json!([{"path": "/dev/p", "type": "p"}]),
                "rwm",
                "linux.devices: \"/dev/p\" is the host's",
            ),
            (
                json!([block("/dev/a/../b")]),
                "rwm",
                "linux.devices: /dev/a/../b: it has an empty part",
            ),
            (
                json!([block("/proc/a")]),
                "rwm",
                "linux.devices: /proc/a: it lies in the container's own /proc",
            ),
            (
                json!([block("/dev/a"), block("/dev/a")]),
                "rwm",
                "linux.devices: /dev/a: is there twice",
            ),
            (
                json!([block("/dev/a")]),
                "w",
                "linux.devices: /dev/a: no rule of linux.resources.devices lets it be read",
            ),
            (
                json!([{"path": "/dev/a", "type": "b", "major": -1, "minor": 1}]),
                "rwm",
                "linux.devices: /dev/a: its major is no number",
            ),
            (
                json!([{"path": "/dev/a", "type": "b", "major": 7, "minor": 1, "uid": "x"}]),
                "rwm",
                "linux.devices: /dev/a: its uid is no number",
            ),
        ] {
            let error = nodes(&devices, &rules(access)).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
