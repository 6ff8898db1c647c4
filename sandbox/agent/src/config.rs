//! The OCI configuration of a container or process: what the host sent, with what only the guest
//! knows.
//!
//! Text in, text out; nothing here touches the system. Called by `container` with the answers of
//! `user` and `disks`.

use std::path::Path;

use pericarp_api::agent::{Device, Share, Streams};
use serde_json::{Map, Value, json};

use crate::{disks::Disk, error::RequestError, user::User};

/// Permission bits of a disk's node, as udev sets them.
const NODE_MODE: u32 = 0o660;

/// The permission bits of a device's node.
pub(crate) fn node_mode(device: &Device) -> u32 {
    match device.mode & 0o777 {
        0 => NODE_MODE,
        mode => mode,
    }
}

/// A parsed configuration of a container.
pub(crate) struct Container(Map<String, Value>);

/// A parsed process object.
pub(crate) struct Process(Map<String, Value>);

fn object(bytes: &[u8], what: &str) -> Result<Map<String, Value>, RequestError> {
    serde_json::from_slice(bytes)
        .map_err(|error| RequestError::Invalid(format!("the {what} is no JSON object: {error}")))
}

/// The object at `key`, made if it is missing.
fn child<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Map<String, Value>, RequestError> {
    let value = parent.entry(key).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value
        .as_object_mut()
        .ok_or_else(|| RequestError::Invalid(format!("'{key}' in the configuration is no object")))
}

fn list<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Vec<Value>, RequestError> {
    let value = parent.entry(key).or_insert_with(|| json!([]));
    if value.is_null() {
        *value = json!([]);
    }
    value
        .as_array_mut()
        .ok_or_else(|| RequestError::Invalid(format!("'{key}' in the configuration is no list")))
}

impl Container {
    /// Reads `config.json`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RequestError> {
        Ok(Self(object(bytes, "configuration")?))
    }

    /// Where its root is mounted.
    pub(crate) fn set_root(&mut self, path: &str) -> Result<(), RequestError> {
        child(&mut self.0, "root")?.insert("path".into(), path.into());
        Ok(())
    }

    /// Where its group is.
    pub(crate) fn set_group(&mut self, name: &str) -> Result<(), RequestError> {
        child(&mut self.0, "linux")?.insert("cgroupsPath".into(), name.into());
        Ok(())
    }

    /// Puts it into a process namespace that is there.
    pub(crate) fn join_processes(&mut self, path: &Path) -> Result<(), RequestError> {
        let namespaces = list(child(&mut self.0, "linux")?, "namespaces")?;
        if namespaces
            .iter()
            .any(|one| one.get("type") == Some(&json!("pid")))
        {
            return Err(RequestError::Invalid(
                "a container that shares processes has no process namespace of its own".into(),
            ));
        }
        namespaces.push(json!({"type": "pid", "path": path}));
        Ok(())
    }

    /// Shows a disk as a block device below `/dev`.
    pub(crate) fn add_device(&mut self, device: &Device, disk: &Disk) -> Result<(), RequestError> {
        list(child(&mut self.0, "linux")?, "devices")?.push(json!({
            "path": device.path,
            "type": "b",
            "major": disk.major,
            "minor": disk.minor,
            "fileMode": node_mode(device),
            "uid": device.uid,
            "gid": device.gid,
        }));
        Ok(())
    }

    /// Shows the block device at `from` elsewhere: a root takes no nodes, and those on it cannot be
    /// opened.
    pub(crate) fn add_node(&mut self, device: &Device, from: &Path) -> Result<(), RequestError> {
        list(&mut self.0, "mounts")?.push(json!({
            "destination": device.path,
            "type": "bind",
            "source": from,
            "options": ["bind", "rprivate", "nosuid", "noexec"],
        }));
        Ok(())
    }

    /// Allows the use of a disk as a block device.
    pub(crate) fn allow_device(
        &mut self,
        device: &Device,
        disk: &Disk,
    ) -> Result<(), RequestError> {
        let linux = child(&mut self.0, "linux")?;
        let access = if device.read_only { "rm" } else { "rwm" };
        list(child(linux, "resources")?, "devices")?.push(json!({
            "allow": true,
            "type": "b",
            "major": disk.major,
            "minor": disk.minor,
            "access": access,
        }));
        Ok(())
    }

    /// Shows a share, which is mounted at `from`, as a bind mount: after all mounts that are there.
    pub(crate) fn add_share(&mut self, share: &Share, from: &Path) -> Result<(), RequestError> {
        let access = if share.read_only { "ro" } else { "rw" };
        list(&mut self.0, "mounts")?.push(json!({
            "destination": share.path,
            "type": "bind",
            "source": from,
            "options": ["rbind", "rprivate", "nodev", access],
        }));
        Ok(())
    }

    /// Says where a bind mount really comes from.
    pub(crate) fn set_source(&mut self, mount: u32, from: &Path) -> Result<(), RequestError> {
        let mounts = list(&mut self.0, "mounts")?;
        let found = usize::try_from(mount)
            .ok()
            .and_then(|index| mounts.get_mut(index))
            .and_then(Value::as_object_mut);
        let bind = |found: &Map<String, Value>| {
            let options = found.get("options").and_then(Value::as_array);
            found.get("type") == Some(&json!("bind"))
                && options.is_some_and(|all| {
                    all.iter()
                        .any(|option| option == "bind" || option == "rbind")
                })
        };
        match found {
            Some(found) if bind(found) => {
                found.insert("source".into(), json!(from));
                Ok(())
            }
            _ => Err(RequestError::Invalid(format!(
                "mount {mount} of the configuration is no bind mount"
            ))),
        }
    }

    /// Takes the process object out, to be given back with [`Container::text`].
    pub(crate) fn take_process(&mut self) -> Result<Process, RequestError> {
        match self.0.remove("process") {
            Some(Value::Object(process)) => Ok(Process(process)),
            _ => Err(RequestError::Invalid(
                "the configuration has no process".into(),
            )),
        }
    }

    /// The whole, for crun.
    pub(crate) fn text(mut self, process: Process) -> Vec<u8> {
        self.0.insert("process".into(), Value::Object(process.0));
        Value::Object(self.0).to_string().into_bytes()
    }
}

impl Process {
    /// Reads a process object.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RequestError> {
        Ok(Self(object(bytes, "process")?))
    }

    /// What it runs, for messages.
    pub(crate) fn program(&self) -> Result<String, RequestError> {
        self.0
            .get("args")
            .and_then(Value::as_array)
            .and_then(|args| args.first())
            .and_then(Value::as_str)
            .filter(|program| !program.is_empty())
            .map(str::to_owned)
            .ok_or_else(|| RequestError::Invalid("the process has no program to run".into()))
    }

    /// Where it starts.
    pub(crate) fn directory(&self) -> Result<&str, RequestError> {
        self.0
            .get("cwd")
            .and_then(Value::as_str)
            .filter(|cwd| cwd.starts_with('/'))
            .ok_or_else(|| {
                RequestError::Invalid("the process's working directory is not absolute".into())
            })
    }

    /// Whether it has a terminal. One stream carries all of a terminal's output.
    pub(crate) fn has_terminal(&self, streams: &Streams) -> Result<bool, RequestError> {
        let terminal = self
            .0
            .get("terminal")
            .is_some_and(|value| value == &json!(true));
        if terminal && streams.stderr {
            return Err(RequestError::Invalid(
                "a process with a terminal has no stderr of its own".into(),
            ));
        }
        Ok(terminal)
    }

    /// Whom the host says it runs as: user, group, further groups.
    pub(crate) fn user(&self) -> Result<(u32, u32, Vec<u32>), RequestError> {
        let number = |value: Option<&Value>| {
            let number = value.map_or(Some(0), Value::as_u64)?;
            // The kernel takes the largest number for "unchanged".
            u32::try_from(number).ok().filter(|id| *id != u32::MAX)
        };
        let read = || {
            let user = match self.0.get("user") {
                None | Some(Value::Null) => return Some((0, 0, Vec::new())),
                Some(user) => user.as_object()?,
            };
            let groups = match user.get("additionalGids") {
                None | Some(Value::Null) => Vec::new(),
                Some(groups) => groups
                    .as_array()?
                    .iter()
                    .map(|group| number(Some(group)))
                    .collect::<Option<_>>()?,
            };
            Some((number(user.get("uid"))?, number(user.get("gid"))?, groups))
        };
        read().ok_or_else(|| RequestError::Invalid("the process's user is no number".into()))
    }

    /// Whom it runs as, and where that user is at home unless the host has said so.
    pub(crate) fn set_user(&mut self, user: &User) -> Result<(), RequestError> {
        let fields = child(&mut self.0, "user")?;
        fields.insert("uid".into(), user.uid.into());
        fields.insert("gid".into(), user.gid.into());
        fields.insert("additionalGids".into(), json!(user.groups));
        fields.remove("username");
        let variables = list(&mut self.0, "env")?;
        let has_home = variables
            .iter()
            .filter_map(Value::as_str)
            .any(|variable| variable.starts_with("HOME="));
        if !has_home {
            variables.push(format!("HOME={}", user.home).into());
        }
        Ok(())
    }

    /// The size its terminal has from the beginning.
    pub(crate) fn set_size(&mut self, columns: u16, rows: u16) {
        let size = json!({ "width": columns, "height": rows });
        self.0.insert("consoleSize".into(), size);
    }

    /// The object, for crun.
    pub(crate) fn text(self) -> Vec<u8> {
        Value::Object(self.0).to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Container {
        Container::parse(
            br#"{"process":{"args":["sh"],"cwd":"/","env":["A=1"],"user":{"umask":18}},
                "root":{"readonly":true},"mounts":[{"destination":"/proc"}],
                "linux":{"resources":{"memory":{"limit":1000},"devices":[{"allow":false}]}}}"#,
        )
        .unwrap()
    }

    fn user() -> User {
        User {
            uid: 5,
            gid: 6,
            groups: vec![7],
            home: "/home/x".into(),
        }
    }

    #[test]
    fn what_the_guest_knows_is_added() {
        let mut config = sample();
        config.set_root("/r").unwrap();
        config.set_group("/pericarp/a").unwrap();
        let device = Device {
            path: "/dev/data".into(),
            read_only: true,
            mode: 0o600,
            uid: 7,
            ..Device::default()
        };
        let disk = Disk {
            node: "/dev/vdb".into(),
            major: 254,
            minor: 16,
        };
        config.add_device(&device, &disk).unwrap();
        config.allow_device(&device, &disk).unwrap();
        let elsewhere = Device {
            path: "/disk".into(),
            ..Device::default()
        };
        config.add_node(&elsewhere, Path::new("/n/0")).unwrap();
        let share = Share {
            path: "/data".into(),
            read_only: true,
            ..Share::default()
        };
        config.add_share(&share, Path::new("/s/volume1")).unwrap();
        let mut process = config.take_process().unwrap();
        assert_eq!(process.program().unwrap(), "sh");
        assert_eq!(process.directory().unwrap(), "/");
        process.set_user(&user()).unwrap();
        process.set_size(80, 25);
        let text: Value = serde_json::from_slice(&config.text(process)).unwrap();
        assert_eq!(text["root"], json!({"readonly": true, "path": "/r"}));
        assert_eq!(
            text["process"]["user"],
            json!({"uid": 5, "gid": 6, "additionalGids": [7], "umask": 18})
        );
        assert_eq!(text["process"]["env"], json!(["A=1", "HOME=/home/x"]));
        assert_eq!(
            text["process"]["consoleSize"],
            json!({"width": 80, "height": 25})
        );
        assert_eq!(text["linux"]["cgroupsPath"], "/pericarp/a");
        let resources = &text["linux"]["resources"];
        assert_eq!(resources["devices"][1]["access"], "rm");
        let node = &text["linux"]["devices"][0];
        assert_eq!((&node["minor"], &node["uid"]), (&json!(16), &json!(7)));
        assert_eq!(node["fileMode"], 0o600);
        assert_eq!(node_mode(&elsewhere), 0o660);
        assert_eq!(
            text["mounts"],
            json!([
                {"destination": "/proc"},
                {
                    "destination": "/disk",
                    "type": "bind",
                    "source": "/n/0",
                    "options": ["bind", "rprivate", "nosuid", "noexec"],
                },
                {
                    "destination": "/data",
                    "type": "bind",
                    "source": "/s/volume1",
                    "options": ["rbind", "rprivate", "nodev", "ro"],
                },
            ])
        );
    }

    #[test]
    fn a_container_has_one_process_namespace() {
        let mut config = Container::parse(b"{}").unwrap();
        config.join_processes(Path::new("/p")).unwrap();
        let namespaces = &config.0["linux"]["namespaces"];
        assert_eq!(namespaces, &json!([{"type": "pid", "path": "/p"}]));
        assert!(config.join_processes(Path::new("/p")).is_err());
    }

    #[test]
    fn only_bind_mounts_get_another_source() {
        let mut config = Container::parse(
            br#"{"mounts":[{"destination":"/proc","type":"proc"},
                {"destination":"/a","type":"bind","options":["rbind","ro"]}]}"#,
        )
        .unwrap();
        config.set_source(1, Path::new("/m/1")).unwrap();
        assert_eq!(config.0["mounts"][1]["source"], "/m/1");
        assert!(config.set_source(0, Path::new("/m/0")).is_err());
        assert!(config.set_source(2, Path::new("/m/2")).is_err());
    }

    #[test]
    fn a_user_in_the_specification_is_numbers() {
        let user = |text: &str| Process::parse(text.as_bytes()).unwrap().user();
        assert_eq!(user("{}").unwrap(), (0, 0, vec![]));
        let text = r#"{"user":{"uid":7,"gid":8,"additionalGids":[9]}}"#;
        assert_eq!(user(text).unwrap(), (7, 8, vec![9]));
        for bad in [
            r#"{"user":{"uid":-1}}"#,
            r#"{"user":{"uid":4294967295}}"#,
            r#"{"user":{"additionalGids":["a"]}}"#,
            r#"{"user":[]}"#,
        ] {
            assert!(user(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_home_that_was_given_stays() {
        let mut process = Process::parse(br#"{"env":["HOME=/else"]}"#).unwrap();
        process.set_user(&user()).unwrap();
        let text = String::from_utf8(process.text()).unwrap();
        assert!(text.contains("HOME=/else") && !text.contains("/home/x"));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Container::parse(b"[]").is_err());
        assert!(Container::parse(b"{").is_err());
        let mut config = Container::parse(br#"{"linux":[],"process":null}"#).unwrap();
        assert!(config.set_group("/x").is_err());
        assert!(config.take_process().is_err());
        for text in [r#"{}"#, r#"{"args":[]}"#, r#"{"args":[""],"cwd":"x"}"#] {
            let process = Process::parse(text.as_bytes()).unwrap();
            assert!(process.program().is_err() && process.directory().is_err());
        }
        let process = Process::parse(br#"{"terminal":true}"#).unwrap();
        let mut streams = Streams {
            stdout: true,
            ..Streams::default()
        };
        assert!(process.has_terminal(&streams).unwrap());
        streams.stderr = true;
        assert!(process.has_terminal(&streams).is_err());
    }
}
