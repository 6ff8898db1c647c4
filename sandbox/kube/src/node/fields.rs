//! What a Pod may say in a cluster and this node does not do. Called when a pod is admitted: what
//! is not done is refused, never ignored.

use serde_json::Value;

/// A field that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Where it is, such as `spec.containers[0].securityContext.procMount`.
    pub field: String,
    /// Why, and what to do.
    pub why: &'static str,
}

/// Which values are refused.
#[derive(Clone, Copy)]
enum Rule {
    All,
    /// All but these; numbers and truths as they are written.
    AllBut(&'static [&'static str]),
}

use Rule::{All, AllBut};

const NO_LABELS: &str = "is not supported here: SELinux labels are not set";
const NO_WINDOWS: &str = "only linux runs here";
const NO_PROFILES: &str = "is not supported here: AppArmor profiles are not loaded";
const SECCOMP: &str = "is not supported here; use RuntimeDefault or Unconfined";
const NO_ACCOUNTS: &str = "there are no service accounts here; leave it out";
const NO_TLS: &str = "is not supported here; use HTTP, or exec";

const OF_PODS: &[(&str, Rule, &str)] = &[
    (
        "subdomain",
        All,
        "there is no DNS of a cluster here; use hostname and hostAliases",
    ),
    ("serviceAccountName", AllBut(&["", "default"]), NO_ACCOUNTS),
    ("serviceAccount", AllBut(&["", "default"]), NO_ACCOUNTS),
    (
        "automountServiceAccountToken",
        AllBut(&["false"]),
        NO_ACCOUNTS,
    ),
    (
        "priorityClassName",
        All,
        "there are no priorities here; leave it out",
    ),
    (
        "priority",
        AllBut(&["0"]),
        "there are no priorities here; leave it out",
    ),
    (
        "preemptionPolicy",
        All,
        "there are no priorities here; leave it out",
    ),
    ("securityContext.seLinuxOptions", All, NO_LABELS),
    ("securityContext.seLinuxChangePolicy", All, NO_LABELS),
    ("securityContext.windowsOptions", All, NO_WINDOWS),
    ("securityContext.appArmorProfile", All, NO_PROFILES),
    (
        "securityContext.seccompProfile.type",
        AllBut(&["RuntimeDefault", "Unconfined"]),
        SECCOMP,
    ),
    (
        "securityContext.supplementalGroupsPolicy",
        AllBut(&["Merge"]),
        "is not supported here; leave it out for Merge",
    ),
    (
        "volumes[].projected.sources[].serviceAccountToken",
        All,
        NO_ACCOUNTS,
    ),
    (
        "volumes[].projected.sources[].clusterTrustBundle",
        All,
        "is not supported here; use a configMap",
    ),
];

const OF_CONTAINERS: &[(&str, Rule, &str)] = &[
    ("securityContext.seLinuxOptions", All, NO_LABELS),
    ("securityContext.windowsOptions", All, NO_WINDOWS),
    ("securityContext.appArmorProfile", All, NO_PROFILES),
    (
        "securityContext.seccompProfile.type",
        AllBut(&["RuntimeDefault", "Unconfined"]),
        SECCOMP,
    ),
    (
        "securityContext.procMount",
        AllBut(&["Default"]),
        "is not supported here; leave it out for Default",
    ),
    (
        "volumeMounts[].recursiveReadOnly",
        AllBut(&["Disabled"]),
        "is not supported here; leave it out",
    ),
    (
        "resources.claims",
        All,
        "there are no resource claims here; leave it out",
    ),
    ("livenessProbe.httpGet.scheme", AllBut(&["HTTP"]), NO_TLS),
    ("readinessProbe.httpGet.scheme", AllBut(&["HTTP"]), NO_TLS),
    ("startupProbe.httpGet.scheme", AllBut(&["HTTP"]), NO_TLS),
    (
        "lifecycle.postStart.httpGet.scheme",
        AllBut(&["HTTP"]),
        NO_TLS,
    ),
    (
        "lifecycle.preStop.httpGet.scheme",
        AllBut(&["HTTP"]),
        NO_TLS,
    ),
];

/// What of a Pod this node does not do.
pub fn refused(pod: &Value) -> Vec<Refused> {
    let mut found = Vec::new();
    let spec = &pod["spec"];
    for (path, rule, why) in OF_PODS {
        look(spec, "spec".into(), path, *rule, why, &mut found);
    }
    for list in ["initContainers", "containers"] {
        for (at, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            for (path, rule, why) in OF_CONTAINERS {
                let at = format!("spec.{list}[{at}]");
                look(container, at, path, *rule, why, &mut found);
            }
        }
    }
    found
}

fn look(
    value: &Value,
    at: String,
    path: &str,
    rule: Rule,
    why: &'static str,
    found: &mut Vec<Refused>,
) {
    let (part, rest) = match path.split_once('.') {
        Some((part, rest)) => (part, Some(rest)),
        None => (path, None),
    };
    if let Some(list) = part.strip_suffix("[]") {
        let items = value[list].as_array().into_iter().flatten();
        for (index, item) in items.enumerate() {
            let at = format!("{at}.{list}[{index}]");
            look(item, at, rest.unwrap_or_default(), rule, why, found);
        }
        return;
    }
    let (value, at) = (&value[part], format!("{at}.{part}"));
    match rest {
        Some(rest) => look(value, at, rest, rule, why, found),
        None if is_refused(value, rule) => found.push(Refused { field: at, why }),
        None => {}
    }
}

fn is_refused(value: &Value, rule: Rule) -> bool {
    let written = match value {
        Value::Null => return false,
        Value::String(text) => text.clone(),
        // Nothing is asked for by them.
        Value::Array(items) if items.is_empty() => return false,
        Value::Object(fields) if fields.is_empty() => return false,
        other => other.to_string(),
    };
    match rule {
        All => !written.is_empty(),
        AllBut(known) => !known.contains(&written.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_not_done_is_named() {
        let pod = json!({"spec": {
            "serviceAccountName": "default", "priority": 0, "subdomain": "x",
            "automountServiceAccountToken": false,
            "securityContext": {"seLinuxOptions": {}, "seccompProfile": {"type": "RuntimeDefault"}},
            "initContainers": [{"name": "i", "resources": {"claims": []}}],
            "containers": [
                {"name": "a", "volumeMounts": [{"name": "v"}, {"recursiveReadOnly": "Enabled"}]},
                {"name": "b", "livenessProbe": {"httpGet": {"scheme": "HTTPS"}},
                    "readinessProbe": {"httpGet": {"scheme": "HTTP"}},
                    "securityContext": {"seccompProfile": {"type": "Localhost"}, "procMount": "Default"}},
            ],
            "volumes": [{"projected": {"sources": [{}, {"serviceAccountToken": {"path": "t"}}]}}],
        }});
        let fields: Vec<String> = refused(&pod).into_iter().map(|one| one.field).collect();
        let wanted = [
            "spec.subdomain",
            "spec.volumes[0].projected.sources[1].serviceAccountToken",
            "spec.containers[0].volumeMounts[1].recursiveReadOnly",
            "spec.containers[1].securityContext.seccompProfile.type",
            "spec.containers[1].livenessProbe.httpGet.scheme",
        ];
        assert_eq!(fields, wanted);
        assert!(refused(&json!({})).is_empty());
    }
}
