//! What a pod has to be, and what is added to it.
//!
//! What this node cannot honour is refused here, so that nothing is promised by being ignored.

use std::collections::BTreeSet;

use pericarp_config::nearest;
use serde_json::{Value, json};

use super::{
    Context, Faults, default, entries, items, items_mut, name_of, names, quantity::Quantity,
    shape::shown, volumes,
};
use crate::{failure::Failure, store::Kind};

const LISTS: [&str; 2] = ["initContainers", "containers"];
const PROBES: [&str; 3] = ["livenessProbe", "readinessProbe", "startupProbe"];

/// Fields of a pod that mean nothing on one node or that it cannot do, and what to do about it.
const REFUSED: &[(&str, &str)] = &[
    (
        "affinity",
        "there is one node and no scheduler; leave it out",
    ),
    (
        "topologySpreadConstraints",
        "there is one node and no scheduler; leave it out",
    ),
    ("schedulingGates", "there is no scheduler; leave it out"),
    (
        "readinessGates",
        "nothing here sets further conditions; leave it out",
    ),
    ("resourceClaims", "is not supported here"),
    (
        "resources",
        "is not supported here; give it for each container",
    ),
    (
        "ephemeralContainers",
        "is not supported here; use `kubectl exec`",
    ),
    ("setHostnameAsFQDN", "is not supported here"),
];
/// The same of a container.
const REFUSED_OF_CONTAINERS: &[(&str, &str)] = &[
    ("volumeDevices", "block devices are not supported here"),
    (
        "resizePolicy",
        "the resources of a running container cannot be changed here; leave it out",
    ),
];

/// Sets what is not said.
pub(super) fn complete(node: &str, pod: &mut Value) {
    pod["status"] = json!({"phase": "Pending", "qosClass": quality(pod)});
    let Some(_) = pod["spec"].as_object() else {
        return;
    };
    let spec = &mut pod["spec"];
    default(spec, "restartPolicy", "Always");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "enableServiceLinks", true);
    default(spec, "serviceAccountName", "default");
    default(spec, "securityContext", json!({}));
    default(spec, "nodeName", node);
    for list in LISTS {
        for container in items_mut(&mut spec[list]) {
            complete_container(container);
        }
    }
    if spec["initContainers"].is_null() {
        super::remove(spec, "initContainers");
    }
    items_mut(&mut spec["volumes"]).for_each(volumes::complete);
    if spec["volumes"].is_null() {
        super::remove(spec, "volumes");
    }
}

fn complete_container(container: &mut Value) {
    if !container.is_object() {
        return;
    }
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    let image = container["image"].as_str().unwrap_or_default();
    let policy = match floats(image) {
        true => "Always",
        false => "IfNotPresent",
    };
    default(container, "imagePullPolicy", policy);
    default(container, "resources", json!({}));
    // What may be used is asked for, unless less is.
    let limits: Vec<(String, Value)> = entries(&container["resources"]["limits"])
        .map(|(name, amount)| (name.clone(), amount.clone()))
        .collect();
    if !limits.is_empty() {
        default(&mut container["resources"], "requests", json!({}));
        for (name, amount) in limits {
            default(&mut container["resources"]["requests"], &name, amount);
        }
    }
    if let Some(ports) = container.get_mut("ports") {
        for port in items_mut(ports) {
            default(port, "protocol", "TCP");
        }
    }
    for probe in PROBES {
        let Some(probe) = container.get_mut(probe) else {
            continue;
        };
        default(probe, "timeoutSeconds", 1);
        default(probe, "periodSeconds", 10);
        default(probe, "successThreshold", 1);
        default(probe, "failureThreshold", 3);
        if let Some(get) = probe.get_mut("httpGet") {
            default(get, "path", "/");
            default(get, "scheme", "HTTP");
        }
    }
    if let Some(variables) = container.get_mut("env") {
        for variable in items_mut(variables) {
            if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef") {
                default(field, "apiVersion", "v1");
            }
        }
    }
}

/// Whether an image's name may mean another image tomorrow.
fn floats(image: &str) -> bool {
    let last = image.rsplit('/').next().unwrap_or_default();
    !image.contains('@') && last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// Kubernetes' classes of pods.
fn quality(pod: &Value) -> &'static str {
    let mut guaranteed = true;
    let mut any = false;
    for (_, container) in LISTS.iter().flat_map(|list| items(&pod["spec"][list])) {
        let resources = &container["resources"];
        for name in ["cpu", "memory"] {
            let amount = |of: &str| Quantity::of(&resources[of][name]);
            let (limit, request) = (amount("limits"), amount("requests"));
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Everything that can be seen in the pod alone.
pub(super) fn check(pod: &Value, faults: &mut Faults) {
    let spec = &pod["spec"];
    let some = |value: &Value| match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    for (field, why) in REFUSED {
        if some(&spec[field]) {
            faults.add(format!("spec.{field}"), *why);
        }
    }
    words(
        spec,
        "spec",
        "restartPolicy",
        &["Always", "OnFailure", "Never"],
        faults,
    );
    let policies = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    words(spec, "spec", "dnsPolicy", &policies, faults);
    words(
        spec,
        "spec",
        "schedulerName",
        &["default-scheduler"],
        faults,
    );
    if spec["os"]["name"]
        .as_str()
        .is_some_and(|name| name != "linux")
    {
        let message = format!(
            "{} does not run here; leave it out",
            shown(&spec["os"]["name"])
        );
        faults.add("spec.os.name", message);
    }
    if spec["hostUsers"] == false {
        let message = "user namespaces of pods are not supported here; use a runtimeClassName \
                       whose pods have machines of their own";
        faults.add("spec.hostUsers", message);
    }
    at_least(spec, "spec", "terminationGracePeriodSeconds", 0, faults);
    at_least(spec, "spec", "activeDeadlineSeconds", 1, faults);
    // What the kubelet's half does not do.
    for refused in crate::node::refused(pod) {
        faults.add(refused.field, refused.why);
    }
    if let Some(name) = spec["hostname"].as_str() {
        faults.check("spec.hostname", names::label(name));
    }
    if spec["runtimeClassName"] == "" {
        faults.add(
            "spec.runtimeClassName",
            "is empty; leave it out for the default handler",
        );
    }
    for field in ["runAsUser", "runAsGroup", "fsGroup"] {
        at_least(
            &spec["securityContext"],
            "spec.securityContext",
            field,
            0,
            faults,
        );
    }
    let known = volumes::check(spec, faults);
    let mut seen = BTreeSet::new();
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        let message = "there has to be at least one, with a name and an image";
        faults.add("spec.containers", message);
    }
    for list in LISTS {
        for (index, container) in items(&spec[list]) {
            let path = format!("spec.{list}[{index}]");
            let name = container["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                faults.add(
                    format!("{path}.name"),
                    "is missing; give the container a name",
                );
            } else {
                faults.check(format!("{path}.name"), names::label(name));
                if !seen.insert(name) {
                    faults.add(format!("{path}.name"), twice(name));
                }
            }
            for (field, why) in REFUSED_OF_CONTAINERS {
                if some(&container[field]) {
                    faults.add(format!("{path}.{field}"), *why);
                }
            }
            let restart = &container["restartPolicy"];
            if !restart.is_null() && (list == "containers" || restart != "Always") {
                let message = "only an init container may have one, and only \"Always\", which \
                               makes it a sidecar";
                faults.add(format!("{path}.restartPolicy"), message);
            }
            let probed = PROBES.iter().any(|probe| some(&container[probe]));
            if list == "initContainers" && restart.is_null() && probed {
                let message = "an init container has no probes, unless its restartPolicy is Always";
                faults.add(path.clone(), message);
            }
            check_container(container, &path, &known, faults);
        }
    }
}

fn check_container(container: &Value, path: &str, volumes: &BTreeSet<&str>, faults: &mut Faults) {
    match container["image"].as_str() {
        None | Some("") => {
            let message = "is missing; name the image that it runs";
            faults.add(format!("{path}.image"), message);
        }
        Some(image) if image.contains(|c: char| c.is_control() || c.is_whitespace()) => {
            let message = format!(
                "\"{}\" has spaces or control characters; leave them out",
                names::printable(image)
            );
            faults.add(format!("{path}.image"), message);
        }
        Some(_) => {}
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    words(container, path, "imagePullPolicy", &policies, faults);
    let policies = ["File", "FallbackToLogsOnError"];
    words(
        container,
        path,
        "terminationMessagePolicy",
        &policies,
        faults,
    );
    for (index, port) in items(&container["ports"]) {
        let path = format!("{path}.ports[{index}]");
        let said = &port["containerPort"];
        if !is_port(said) {
            faults.add(format!("{path}.containerPort"), no_port(said));
        }
        let said = &port["hostPort"];
        if !said.is_null() && *said != 0 && !is_port(said) {
            faults.add(format!("{path}.hostPort"), no_port(said));
        }
        words(port, &path, "protocol", &["TCP", "UDP", "SCTP"], faults);
    }
    for (index, variable) in items(&container["env"]) {
        check_variable(variable, &format!("{path}.env[{index}]"), faults);
    }
    for (index, source) in items(&container["envFrom"]) {
        let path = format!("{path}.envFrom[{index}]");
        let (map, secret) = (&source["configMapRef"], &source["secretRef"]);
        if map.is_null() == secret.is_null() {
            faults.add(path, "has to have either configMapRef or secretRef");
        } else if map["name"].as_str().or(secret["name"].as_str()).is_none() {
            faults.add(path, "says no name");
        }
    }
    for (name, limit) in entries(&container["resources"]["limits"]) {
        let request = &container["resources"]["requests"][name];
        let amounts = Quantity::of(request).zip(Quantity::of(limit));
        if amounts.is_some_and(|(request, limit)| request > limit) {
            let path = format!("{path}.resources.requests[{name}]");
            let (request, limit) = (shown(request), shown(limit));
            let message = format!(
                "{request} is more than the limit of {limit}; ask for less, or raise the limit"
            );
            faults.add(path, message);
        }
    }
    for of in ["limits", "requests"] {
        for (name, amount) in entries(&container["resources"][of]) {
            let path = format!("{path}.resources.{of}[{name}]");
            if !["cpu", "memory", "ephemeral-storage"].contains(&name.as_str()) {
                let message = "is not a resource of this node, which has cpu, memory and \
                               ephemeral-storage";
                faults.add(path, message);
            } else if Quantity::of(amount).is_some_and(|amount| amount.thousandths() < 0) {
                faults.add(path, format!("{} is negative", shown(amount)));
            }
        }
    }
    volumes::check_mounts(container, path, volumes, faults);
    for probe in PROBES {
        if !container[probe].is_null() {
            check_probe(&container[probe], &format!("{path}.{probe}"), faults);
        }
    }
    for hook in ["postStart", "preStop"] {
        let path = format!("{path}.lifecycle.{hook}");
        let hook = &container["lifecycle"][hook];
        if !hook.is_null() {
            handler(
                hook,
                &path,
                &["exec", "httpGet", "tcpSocket", "sleep"],
                faults,
            );
        }
    }
    if !container["lifecycle"]["stopSignal"].is_null() {
        let message = "is not supported here; the image's own is used";
        faults.add(format!("{path}.lifecycle.stopSignal"), message);
    }
    let context = format!("{path}.securityContext");
    for field in ["runAsUser", "runAsGroup"] {
        at_least(&container["securityContext"], &context, field, 0, faults);
    }
}

fn check_variable(variable: &Value, path: &str, faults: &mut Faults) {
    match variable["name"].as_str() {
        None | Some("") => faults.add(format!("{path}.name"), "is missing"),
        Some(name) => faults.check(format!("{path}.name"), names::variable(name)),
    }
    let from = &variable["valueFrom"];
    if from.is_null() {
        return;
    }
    if variable["value"]
        .as_str()
        .is_some_and(|value| !value.is_empty())
    {
        faults.add(path, "has both value and valueFrom");
    }
    let path = format!("{path}.valueFrom");
    match &entries(from).collect::<Vec<_>>()[..] {
        [(of, source)] => match of.as_str() {
            "fieldRef" => volumes::check_field(source, &format!("{path}.{of}"), false, faults),
            "resourceFieldRef" => volumes::check_resource(source, &format!("{path}.{of}"), faults),
            _ => {
                for field in ["name", "key"] {
                    if source[field].as_str().unwrap_or_default().is_empty() {
                        faults.add(format!("{path}.{of}.{field}"), "is missing");
                    }
                }
            }
        },
        _ => faults.add(path, "has to have exactly one source"),
    }
}

fn check_probe(probe: &Value, path: &str, faults: &mut Faults) {
    handler(
        probe,
        path,
        &["exec", "httpGet", "tcpSocket", "grpc"],
        faults,
    );
    if !probe["grpc"].is_null() {
        let message = "is not supported here; use exec, httpGet or tcpSocket";
        faults.add(format!("{path}.grpc"), message);
    }
    at_least(probe, path, "initialDelaySeconds", 0, faults);
    for field in [
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ] {
        at_least(probe, path, field, 1, faults);
    }
    if !path.ends_with("readinessProbe") && probe["successThreshold"] != 1 {
        faults.add(format!("{path}.successThreshold"), "has to be 1");
    }
}

/// One way to ask a container, and only one.
fn handler(value: &Value, path: &str, known: &[&str], faults: &mut Faults) {
    let given: Vec<&str> = known
        .iter()
        .copied()
        .filter(|one| !value[one].is_null())
        .collect();
    let [one] = given[..] else {
        let list = known.join(", ");
        return faults.add(path, format!("has to have exactly one of {list}"));
    };
    let path = format!("{path}.{one}");
    let value = &value[one];
    match one {
        "exec" if value["command"].as_array().is_none_or(Vec::is_empty) => {
            faults.add(format!("{path}.command"), "is missing");
        }
        "httpGet" | "tcpSocket" => {
            let port = &value["port"];
            let named = port.as_str().is_some_and(|name| !name.is_empty());
            if !named && !is_port(port) {
                let message = match port {
                    Value::Null => "is missing; give a port or the name of one".to_owned(),
                    port => format!("{}, or the name of a port", no_port(port)),
                };
                faults.add(format!("{path}.port"), message);
            }
            words(value, &path, "scheme", &["HTTP", "HTTPS"], faults);
        }
        _ => {}
    }
}

/// What is said of a second one of a name.
pub(super) fn twice(name: &str) -> String {
    let name = names::printable(name);
    format!("\"{name}\" is there twice; choose another name")
}

/// What is said of what is no port.
fn no_port(said: &Value) -> String {
    match said {
        Value::Null => "is missing; give a number between 1 and 65535".to_owned(),
        said => format!("{} is not between 1 and 65535", shown(said)),
    }
}

fn is_port(value: &Value) -> bool {
    value
        .as_i64()
        .is_some_and(|port| (1..=65535).contains(&port))
}

/// One of these words, with the nearest for what is none.
pub(super) fn words(value: &Value, path: &str, field: &str, known: &[&str], faults: &mut Faults) {
    let Some(said) = value[field].as_str() else {
        return;
    };
    if !known.contains(&said) {
        let list = known.join(", ");
        let near = nearest(said, known.iter().copied());
        let near = near.map(|near| format!("; did you mean \"{near}\"?"));
        let said = names::printable(said);
        let near = near.unwrap_or_default();
        faults.add(
            format!("{path}.{field}"),
            format!("\"{said}\" is none of {list}{near}"),
        );
    }
}

fn at_least(value: &Value, path: &str, field: &str, least: i64, faults: &mut Faults) {
    if let Some(number) = value[field].as_i64().filter(|number| *number < least) {
        let message = format!("{number} is less than {least}");
        faults.add(format!("{path}.{field}"), message);
    }
}

/// What depends on the rest of the node: its name, its labels, the runtime class.
pub(super) fn place(context: &Context<'_>, pod: &mut Value) -> Result<(), Failure> {
    let name = name_of(pod);
    let refuse = |why: String| Err(Failure::forbidden(Kind::Pod, &name, &why));
    let wanted = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if wanted != context.node {
        let wanted = names::printable(wanted);
        return refuse(format!(
            "spec.nodeName: there is no node \"{wanted}\"; this one is \"{}\"",
            context.node
        ));
    }
    if let Some(node) = context.store.get(Kind::Node, "", context.node) {
        if node["spec"]["unschedulable"] == true {
            return refuse(format!(
                "the node is cordoned; `kubectl uncordon {}` ends that",
                context.node
            ));
        }
        for (key, value) in entries(&pod["spec"]["nodeSelector"]) {
            if node["metadata"]["labels"][key] != *value {
                return refuse(format!(
                    "spec.nodeSelector: the node has no label {}={}",
                    names::printable(key),
                    names::printable(value.as_str().unwrap_or_default())
                ));
            }
        }
    }
    let Some(class) = pod["spec"]["runtimeClassName"].as_str() else {
        if !pod["spec"]["overhead"].is_null() {
            return refuse("spec.overhead: comes from a RuntimeClass, and none is named".into());
        }
        return Ok(());
    };
    let Some(found) = context.store.get(Kind::RuntimeClass, "", class) else {
        let (all, _) = context.store.list(Kind::RuntimeClass, None);
        let all: Vec<String> = all.iter().map(|class| name_of(class)).collect();
        let cure = match nearest(class, all.iter().map(String::as_str)) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None if all.is_empty() => "there is none on this node".to_owned(),
            None => format!("there are {}", all.join(", ")),
        };
        let class = names::printable(class);
        return refuse(format!("RuntimeClass \"{class}\" not found; {cure}"));
    };
    let handler = found["handler"].as_str().unwrap_or_default();
    if context.machines.iter().any(|machine| machine == handler)
        && let Some(why) = not_of_machines(&pod["spec"], class)
    {
        return refuse(why);
    }
    let overhead = &found["overhead"]["podFixed"];
    let said = &pod["spec"]["overhead"];
    if !said.is_null() && said != overhead {
        return refuse("spec.overhead: is not that of the RuntimeClass; leave it out".into());
    }
    if overhead.is_object() {
        pod["spec"]["overhead"] = overhead.clone();
    }
    Ok(())
}

/// What is the host's, and so nothing that a pod in a machine of its own can have.
fn not_of_machines(spec: &Value, class: &str) -> Option<String> {
    let class = names::printable(class);
    let own = format!("and pods of RuntimeClass \"{class}\" have machines of their own");
    for (field, what) in [
        ("hostNetwork", "network"),
        ("hostPID", "processes"),
        ("hostIPC", "IPC"),
    ] {
        if spec[field] == true {
            return Some(format!(
                "spec.{field}: true asks for the host's {what}, {own}; leave {field} or \
                 runtimeClassName out"
            ));
        }
    }
    let is_device = |(_, volume): &(usize, &Value)| volume["hostPath"]["type"] == "CharDevice";
    let (index, _) = items(&spec["volumes"]).find(is_device)?;
    Some(format!(
        "spec.volumes[{index}].hostPath.type: \"CharDevice\" is a device of the host, {own}; leave \
         the volume or runtimeClassName out"
    ))
}

/// A change leaves out what was completed, as `kubectl replace` does.
pub(super) fn complete_change(old: &Value, pod: &mut Value) {
    let status = old["status"].clone();
    let node = old["spec"]["nodeName"].as_str().unwrap_or_default();
    complete(node, pod);
    pod["status"] = status;
    if pod["spec"]["overhead"].is_null() && !old["spec"]["overhead"].is_null() {
        super::copy(&old["spec"], &mut pod["spec"], "overhead");
    } else if pod["spec"]["overhead"].is_null() {
        super::remove(&mut pod["spec"], "overhead");
    }
}

/// A pod's spec is what it was created with.
pub(super) fn check_change(old: &Value, pod: &Value, faults: &mut Faults) {
    let (old, new) = (&old["spec"], &pod["spec"]);
    if old == new {
        return;
    }
    let names: BTreeSet<&String> = entries(old)
        .chain(entries(new))
        .map(|(name, _)| name)
        .filter(|name| old[name.as_str()] != new[name.as_str()])
        .collect();
    for name in names {
        let message = "cannot be changed of a pod that is there; delete it, and apply it anew";
        faults.add(format!("spec.{}", names::printable(name)), message);
    }
}
