//! The files that volumes of ConfigMaps, Secrets and the pod itself have. Called by `volumes`.

use super::atomic::{File, Files};
use crate::node::sources::{self, Data, Facts, Lookup, SourceError};
use crate::node::spec::{
    ConfigMapSource, Container, DownwardSource, KeyToPath, Pod, Projected, SecretSource,
};

/// Who may read a file of which nobody says it.
const MODE: u32 = 0o644;

/// What the sources are taken from.
pub(super) struct From<'a> {
    pub(super) pod: &'a Pod,
    pub(super) facts: &'a Facts,
    pub(super) find: &'a Lookup<'a>,
}

type Answer = Result<Files, SourceError>;

impl From<'_> {
    pub(super) fn config_map(&self, of: &ConfigMapSource) -> Answer {
        let data = sources::config_map(self.find, &of.name);
        chosen(
            data,
            of.items.as_deref(),
            of.default_mode,
            of.optional,
            "configmap",
        )
    }

    pub(super) fn secret(&self, of: &SecretSource) -> Answer {
        let data = sources::secret(self.find, &of.secret_name);
        chosen(
            data,
            of.items.as_deref(),
            of.default_mode,
            of.optional,
            "secret",
        )
    }

    pub(super) fn downward(&self, of: &DownwardSource, mode: Option<u32>) -> Answer {
        let mut files = Files::new();
        // A resource names its container here.
        let nobody = Container::default();
        for item in &of.items {
            let text = match (&item.field_ref, &item.resource_field_ref) {
                (Some(of), _) => sources::field(self.pod, self.facts, &of.field_path)?,
                (_, Some(of)) => sources::resource(self.pod, &nobody, self.facts, of)?,
                _ => String::new(),
            };
            let mode = item.mode.or(of.default_mode).or(mode);
            files.insert(item.path.clone(), file(text.into_bytes(), mode));
        }
        Ok(files)
    }

    pub(super) fn projected(&self, of: &Projected) -> Answer {
        let mut files = Files::new();
        for source in &of.sources {
            if let Some(map) = &source.config_map {
                let data = sources::config_map(self.find, &map.name);
                let items = map.items.as_deref();
                files.extend(chosen(
                    data,
                    items,
                    of.default_mode,
                    map.optional,
                    "configmap",
                )?);
            }
            if let Some(secret) = &source.secret {
                let data = sources::secret(self.find, &secret.name);
                let items = secret.items.as_deref();
                files.extend(chosen(
                    data,
                    items,
                    of.default_mode,
                    secret.optional,
                    "secret",
                )?);
            }
            if let Some(downward) = &source.downward_api {
                files.extend(self.downward(downward, of.default_mode)?);
            }
        }
        Ok(files)
    }
}

fn file(bytes: Vec<u8>, mode: Option<u32>) -> File {
    let mode = mode.unwrap_or(MODE);
    File { bytes, mode }
}

fn chosen(
    data: Result<Data, SourceError>,
    items: Option<&[KeyToPath]>,
    mode: Option<u32>,
    optional: bool,
    kind: &'static str,
) -> Answer {
    let mut data = match data {
        Err(SourceError::NotFound { .. }) if optional => return Ok(Files::new()),
        data => data?,
    };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        let all = data.into_iter();
        return Ok(all.map(|(key, bytes)| (key, file(bytes, mode))).collect());
    };
    let mut files = Files::new();
    for item in items {
        match data.get_mut(&item.key) {
            Some(bytes) => {
                let mode = item.mode.or(mode);
                files.insert(item.path.clone(), file(bytes.clone(), mode));
            }
            None if optional => {}
            None => {
                let key = item.key.clone();
                return Err(SourceError::NoItem { key, kind });
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Kind;
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn find(kind: Kind, name: &str) -> Option<Arc<Value>> {
        let object = match (kind, name) {
            (Kind::ConfigMap, "m") => json!({"data": {"a": "1", "b": "2"}}),
            (Kind::Secret, "s") => json!({"data": {"p": "c2VjcmV0"}}),
            _ => return None,
        };
        Some(Arc::new(object))
    }

    fn files(volume: Value) -> Result<Vec<(String, String, u32)>, String> {
        let pod = Pod::read(&json!({
            "metadata": {"name": "p", "labels": {"l": "x"}},
            "spec": {
                "containers": [{"name": "c", "resources": {"limits": {"memory": "1Mi"}}}],
                "volumes": [volume],
            },
        }))
        .unwrap();
        let facts = Facts::default();
        let from = From {
            pod: &pod,
            facts: &facts,
            find: &find,
        };
        let volume = &pod.spec.volumes[0];
        let files = match volume {
            _ if volume.config_map.is_some() => {
                from.config_map(volume.config_map.as_ref().unwrap())
            }
            _ if volume.secret.is_some() => from.secret(volume.secret.as_ref().unwrap()),
            _ => from.projected(volume.projected.as_ref().unwrap()),
        };
        let files = files.map_err(|error| error.to_string())?;
        let text = |file: File| (String::from_utf8(file.bytes).unwrap(), file.mode);
        Ok(files
            .into_iter()
            .map(|(place, file)| {
                let (text, mode) = text(file);
                (place, text, mode)
            })
            .collect())
    }

    fn three(place: &str, text: &str, mode: u32) -> (String, String, u32) {
        (place.into(), text.into(), mode)
    }

    #[test]
    fn keys_become_files() {
        let all = files(json!({"name": "v", "configMap": {"name": "m"}})).unwrap();
        assert_eq!(all, [three("a", "1", 0o644), three("b", "2", 0o644)]);
        let some = files(
            json!({"name": "v", "configMap": {"name": "m", "defaultMode": 0o600,
            "items": [{"key": "b", "path": "d/x"}]}}),
        );
        assert_eq!(some.unwrap(), [three("d/x", "2", 0o600)]);
    }

    #[test]
    fn what_is_missing_is_said_unless_it_is_optional() {
        let said = |volume: Value| files(volume).unwrap_err();
        let missing = json!({"name": "v", "secret": {"secretName": "none"}});
        assert_eq!(said(missing), "secret \"none\" not found");
        let items = json!([{"key": "z", "path": "z"}]);
        let wrong = json!({"name": "v", "configMap": {"name": "m", "items": items.clone()}});
        assert_eq!(said(wrong), "configmap references non-existent key: z");
        let optional =
            json!({"name": "v", "configMap": {"name": "m", "items": items, "optional": true}});
        assert_eq!(files(optional), Ok(Vec::new()));
    }

    #[test]
    fn sources_are_put_together() {
        let all = files(
            json!({"name": "v", "projected": {"defaultMode": 0o400, "sources": [
                {"configMap": {"name": "m", "items": [{"key": "a", "path": "map/a"}]}},
                {"secret": {"name": "s"}},
                {"downwardAPI": {"items": [
                    {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}, "mode": 0o444},
                    {"path": "memory", "resourceFieldRef":
                        {"containerName": "c", "resource": "limits.memory", "divisor": "1Ki"}},
                ]}},
            ]}}),
        );
        let wanted = [
            three("labels", "l=\"x\"", 0o444),
            three("map/a", "1", 0o400),
            three("memory", "1024", 0o400),
            three("p", "secret", 0o400),
        ];
        assert_eq!(all.unwrap(), wanted);
    }
}
