//! What the interface has: its groups, kinds and verbs, and that it checks fields.

use serde_json::{Value, json};

use crate::store::Kind;

/// The version of Kubernetes whose objects these are; clients compare it with their own.
const VERSION: (&str, &str) = ("1", "32");

/// The answer at an address that is for no objects, if there is one.
pub(crate) fn about(path: &str) -> Option<Value> {
    Some(match path {
        "" => json!({"paths": ["/api", "/api/v1", "/apis", "/apis/node.k8s.io",
            "/apis/node.k8s.io/v1", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"]}),
        "version" => json!({
            "major": VERSION.0,
            "minor": VERSION.1,
            "gitVersion": concat!("v1.32.0+pericarp.", env!("CARGO_PKG_VERSION")),
            "platform": format!("linux/{}", std::env::consts::ARCH),
        }),
        "api" => json!({"kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": []}),
        "apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]}),
        "apis/node.k8s.io" => {
            let mut group = group();
            group["kind"] = json!("APIGroup");
            group["apiVersion"] = json!("v1");
            group
        }
        "api/v1" => resources("v1"),
        "apis/node.k8s.io/v1" => resources("node.k8s.io/v1"),
        "openapi/v3" => json!({"paths": {
            "api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"},
            "apis/node.k8s.io/v1": {"serverRelativeURL": "/openapi/v3/apis/node.k8s.io/v1"},
        }}),
        "openapi/v3/api/v1" => operations("v1"),
        "openapi/v3/apis/node.k8s.io/v1" => operations("node.k8s.io/v1"),
        _ => return None,
    })
}

/// A description of version 2 that describes no kinds, in protobuf: older clients want one, and leave
/// the check of fields to us for what is not in it.
pub(crate) const OPENAPI_V2: &[u8] = b"\x0a\x032.0\x12\x10\x0a\x08pericarp\x12\x04v1.0";
pub(crate) const OPENAPI_V2_TYPE: &str =
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

fn group() -> Value {
    let version = json!({"groupVersion": "node.k8s.io/v1", "version": "v1"});
    json!({"name": "node.k8s.io", "versions": [version], "preferredVersion": version})
}

fn of(version: &str) -> impl Iterator<Item = Kind> {
    let all = Kind::ALL.into_iter();
    all.filter(move |kind| kind.api_version() == version)
}

fn resources(version: &str) -> Value {
    let mut list: Vec<Value> = of(version)
        .map(|kind| {
            let mut resource = json!({
                "name": kind.plural(),
                "singularName": kind.name().to_lowercase(),
                "namespaced": kind.namespaced(),
                "kind": kind.name(),
                "verbs": verbs(kind),
            });
            let short: &[&str] = match kind {
                Kind::Pod => &["po"],
                Kind::ConfigMap => &["cm"],
                Kind::Namespace => &["ns"],
                Kind::Event => &["ev"],
                Kind::Node => &["no"],
                Kind::Secret | Kind::RuntimeClass => &[],
            };
            if !short.is_empty() {
                resource["shortNames"] = json!(short);
            }
            if kind == Kind::Pod {
                resource["categories"] = json!(["all"]);
            }
            resource
        })
        .collect();
    if version == "v1" {
        for (part, kind, verbs) in [
            ("log", "Pod", json!(["get"])),
            ("exec", "PodExecOptions", json!(["create", "get"])),
            ("attach", "PodAttachOptions", json!(["create", "get"])),
            (
                "portforward",
                "PodPortForwardOptions",
                json!(["create", "get"]),
            ),
        ] {
            list.push(json!({
                "name": format!("pods/{part}"), "singularName": "", "namespaced": true,
                "kind": kind, "verbs": verbs,
            }));
        }
    }
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": list,
    })
}

/// What can be done with objects of a kind. The node is ours: it is neither made nor deleted.
pub(crate) fn verbs(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Node => &["get", "list", "patch", "update", "watch"],
        _ => &[
            "create",
            "delete",
            "deletecollection",
            "get",
            "list",
            "patch",
            "update",
            "watch",
        ],
    }
}

/// Clients look here for whether fields are checked and changes can be tried; no more is said.
fn operations(version: &str) -> Value {
    let mut paths = serde_json::Map::new();
    for kind in of(version) {
        let root = match kind.group() {
            "" => "/api/v1".to_owned(),
            group => format!("/apis/{group}/v1"),
        };
        let space = if kind.namespaced() {
            "/namespaces/{namespace}"
        } else {
            ""
        };
        let path = format!("{root}{space}/{}/{{name}}", kind.plural());
        let parameter =
            |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string"}});
        let operation = |action: &str| {
            json!({
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": {
                    "group": kind.group(), "kind": kind.name(), "version": "v1",
                },
                "parameters": [parameter("dryRun"), parameter("fieldValidation")],
                "responses": {"200": {"description": "OK"}},
            })
        };
        let of_path = json!({"patch": operation("patch"), "put": operation("put")});
        paths.insert(path, of_path);
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "pericarp node", "version": "v1"},
        "paths": paths,
        "components": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_in_one_list() {
        let mut seen = Vec::new();
        for path in ["api/v1", "apis/node.k8s.io/v1"] {
            let list = about(path).unwrap();
            for one in list["resources"].as_array().unwrap() {
                seen.push(one["name"].as_str().unwrap().to_owned());
            }
        }
        for kind in Kind::ALL {
            let name = kind.plural();
            assert_eq!(seen.iter().filter(|one| *one == name).count(), 1, "{name}");
        }
        assert!(about("apis/apps/v1").is_none());
    }
}
