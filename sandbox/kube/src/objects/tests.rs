//! What is let in, and what is said of what is not.

use serde_json::json;

use super::*;

struct Node {
    store: Store,
    path: std::path::PathBuf,
    machines: Vec<String>,
}

impl Node {
    fn new(name: &str) -> Self {
        let name = format!("pericarp-objects-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let store = Store::open(&path).unwrap();
        let machines = vec!["pericarp".to_owned()];
        let node = Self {
            store,
            path,
            machines,
        };
        node.keep(Kind::Namespace, json!({"metadata": {"name": "default"}}));
        for class in ["kata-mshv-vm-isolation", "pericarp"] {
            node.keep(
                Kind::RuntimeClass,
                json!({"metadata": {"name": class}, "handler": class,
                    "overhead": {"podFixed": {"memory": "40Mi"}}}),
            );
        }
        node
    }

    fn keep(&self, kind: Kind, object: Value) {
        let object = self.admit(kind, object).unwrap();
        self.store.create(kind, object).unwrap();
    }

    fn context(&self) -> Context<'_> {
        Context {
            store: &self.store,
            node: "here",
            machines: &self.machines,
            unknown: Unknown::Refused,
        }
    }

    fn admit(&self, kind: Kind, object: Value) -> Result<Value, String> {
        let namespace = if kind.namespaced() { "default" } else { "" };
        admit(&self.context(), kind, namespace, object)
            .map(|(object, _)| object)
            .map_err(|failure| failure.message().to_owned())
    }

    fn refused(&self, kind: Kind, object: Value) -> String {
        self.admit(kind, object).unwrap_err()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn pod(spec: Value) -> Value {
    json!({"metadata": {"name": "untrusted"}, "spec": spec})
}

fn with_class(class: &str) -> Value {
    pod(json!({"runtimeClassName": class, "containers": [{"name": "a", "image": "i"}]}))
}

#[test]
fn the_articles_pod_is_completed() {
    let node = Node::new("article");
    let pod = node
        .admit(Kind::Pod, with_class("kata-mshv-vm-isolation"))
        .unwrap();
    assert_eq!(pod["spec"]["overhead"]["memory"], "40Mi");
    assert_eq!(pod["spec"]["nodeName"], "here");
    assert_eq!(pod["spec"]["restartPolicy"], "Always");
    assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], "Always");
    assert_eq!(pod["status"]["qosClass"], "BestEffort");
    assert_eq!(pod["metadata"]["namespace"], "default");
    assert!(pod["spec"].get("volumes").is_none());
}

#[test]
fn the_articles_typo_is_named_with_the_nearest_class() {
    let node = Node::new("typo");
    assert_eq!(
        node.refused(Kind::Pod, with_class("kata-mhsv-vm-isolation")),
        "pods \"untrusted\" is forbidden: RuntimeClass \"kata-mhsv-vm-isolation\" not found; did \
         you mean \"kata-mshv-vm-isolation\"?"
    );
    let far = node.refused(Kind::Pod, with_class("zzzzzzzzzzzzzzzzzzz"));
    assert!(
        far.ends_with("there are kata-mshv-vm-isolation, pericarp"),
        "{far}"
    );
}

#[test]
fn wrong_pods_are_refused_in_one_line_each() {
    let node = Node::new("wrong");
    let container = json!({"name": "a", "image": "i"});
    let with = |field: &str, value: Value| {
        let mut container = container.clone();
        container[field] = value;
        pod(json!({"containers": [container]}))
    };
    for (object, part) in [
        (
            pod(json!({})),
            "spec.containers: there has to be at least one",
        ),
        (json!({"spec": {}}), "metadata.name: is missing"),
        (
            json!({"metadata": {"name": "A"}}),
            "metadata.name: \"A\" is not made of",
        ),
        (
            with("name", json!("")),
            "spec.containers[0].name: is missing",
        ),
        (
            with("name", json!("../a")),
            "spec.containers[0].name: \"../a\"",
        ),
        (
            with("image", json!("")),
            "spec.containers[0].image: is missing; name the image that it runs",
        ),
        (
            with("imagePullPolicy", json!("Allways")),
            "\"Allways\" is none of Always, IfNotPresent, Never; did you mean \"Always\"?",
        ),
        (
            with("volumeMounts", json!([{"name": "x", "mountPath": "/x"}])),
            "spec.containers[0].volumeMounts[0].name: the pod has no volume \"x\"",
        ),
        (
            with(
                "resources",
                json!({"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}),
            ),
            "spec.containers[0].resources.requests[cpu]: \"2\" is more than the limit of \"1\"; ask for \
             less, or raise the limit",
        ),
        (
            with("livenessProbe", json!({})),
            "spec.containers[0].livenessProbe: has to have exactly one of exec",
        ),
        (
            with(
                "env",
                json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIp"}}}]),
            ),
            "did you mean \"status.podIP\"?",
        ),
        (
            with("ports", json!([{"containerPort": 0}])),
            "spec.containers[0].ports[0].containerPort: 0 is not between 1 and 65535",
        ),
        (
            pod(json!({"containers": [container], "affinity": {"nodeAffinity": {}}})),
            "spec.affinity: there is one node and no scheduler",
        ),
        (
            pod(json!({"containers": [container], "volumes": [{"name": "v", "nfs": {}}]})),
            "spec.volumes[0].nfs: there are no volumes of a cluster here; use one of emptyDir, hostPath",
        ),
        (
            pod(
                json!({"containers": [container], "nodeSelector": {"a": "b"}, "nodeName": "there"}),
            ),
            "there is no node \"there\"",
        ),
        (
            pod(json!({"containers": [container, container]})),
            "spec.containers[1].name: \"a\" is there twice; choose another name",
        ),
        (
            json!({"metadata": {"name": "a", "finalizers": ["x/y"]}, "spec": {"containers": [container]}}),
            "metadata.finalizers: nothing here acts on it",
        ),
    ] {
        let message = node.refused(Kind::Pod, object);
        assert!(message.contains(part), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn what_is_the_hosts_is_refused_where_pods_have_machines() {
    let node = Node::new("machines");
    for (field, what) in [
        ("hostNetwork", "network"),
        ("hostPID", "processes"),
        ("hostIPC", "IPC"),
    ] {
        let mut object = with_class("pericarp");
        object["spec"][field] = json!(true);
        let message = node.refused(Kind::Pod, object.clone());
        assert_eq!(
            message,
            format!(
                "pods \"untrusted\" is forbidden: spec.{field}: true asks for the host's {what}, and \
                 pods of RuntimeClass \"pericarp\" have machines of their own; leave {field} or \
                 runtimeClassName out"
            )
        );
        object["spec"]["runtimeClassName"] = json!("kata-mshv-vm-isolation");
        node.admit(Kind::Pod, object).unwrap();
    }
    let mut object = with_class("pericarp");
    object["spec"]["volumes"] =
        json!([{"name": "v", "hostPath": {"path": "/dev/kvm", "type": "CharDevice"}}]);
    let message = node.refused(Kind::Pod, object);
    assert!(
        message.contains("spec.volumes[0].hostPath.type: \"CharDevice\" is a device of the host"),
        "{message}"
    );
}

#[test]
fn unknown_fields_are_refused_warned_of_or_kept() {
    let node = Node::new("unknown");
    let odd = pod(json!({"containers": [{"name": "a", "image": "i"}], "colour": "red"}));
    let message = node.refused(Kind::Pod, odd.clone());
    assert!(message.contains("strict decoding error: unknown field \"spec.colour\""));
    let mut context = node.context();
    context.unknown = Unknown::Warned;
    let (kept, warnings) = admit(&context, Kind::Pod, "default", odd).unwrap();
    assert_eq!(warnings.len(), 1);
    assert_eq!(kept["spec"]["colour"], "red");
}

#[test]
fn a_pods_spec_stays_and_its_labels_may_change() {
    let node = Node::new("change");
    let old = node.admit(Kind::Pod, with_class("pericarp")).unwrap();
    let change = |new: Value| admit_change(&node.context(), Kind::Pod, &old, new);
    let mut new = with_class("pericarp");
    new["metadata"]["labels"] = json!({"a": "b"});
    let (changed, _) = change(new).unwrap();
    assert_eq!(changed["metadata"]["labels"]["a"], "b");
    assert_eq!(changed["spec"], old["spec"]);
    let mut new = old.clone();
    new["spec"]["containers"][0]["image"] = json!("other:1");
    let message = change(new).unwrap_err().message().to_owned();
    assert!(
        message.contains("spec.containers: cannot be changed"),
        "{message}"
    );
    let mut new = old.clone();
    new["metadata"]["resourceVersion"] = json!("1");
    let mut versioned = old.clone();
    versioned["metadata"]["resourceVersion"] = json!("2");
    let failure = admit_change(&node.context(), Kind::Pod, &versioned, new).unwrap_err();
    assert_eq!(failure.code, 409);
}

#[test]
fn secrets_become_data_and_immutable_ones_stay() {
    let node = Node::new("secrets");
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"a": "hello", "b": ""}});
    let kept = node.admit(Kind::Secret, secret).unwrap();
    assert_eq!(kept["data"], json!({"a": "aGVsbG8=", "b": ""}));
    assert!(kept.get("stringData").is_none());
    let mut fixed = kept.clone();
    fixed["immutable"] = json!(true);
    let mut new = fixed.clone();
    new["data"]["a"] = json!("YQ==");
    let failure = admit_change(&node.context(), Kind::Secret, &fixed, new).unwrap_err();
    assert!(failure.message().contains("the object is immutable"));
    let bad = json!({"metadata": {"name": "s"}, "data": {"../a": "YQ=="}});
    assert!(node.refused(Kind::Secret, bad).contains("data[../a]"));
    let bad = json!({"metadata": {"name": "s"}, "data": {"a": "%%%"}});
    assert!(node.refused(Kind::Secret, bad).contains("is not base64"));
}

#[test]
fn what_has_no_namespace_is_not_kept() {
    let node = Node::new("namespace");
    let map = json!({"metadata": {"name": "m"}});
    let failure = admit(&node.context(), Kind::ConfigMap, "nowhere", map).unwrap_err();
    assert_eq!(failure.message(), "namespaces \"nowhere\" not found");
}
