//! Manifests as people really write them: each mistake is one line that names the field, the value and
//! the cure, kubectl ends with code 1, and nothing is made.

use std::fs;

use serde_json::json;

use crate::stage::{Stage, idle};

/// The class of pods in machines that a node has without a configuration.
const CLASS: &str = "spec:\n  runtimeClassName: kata-mshv-vm-isolation\n";

/// What is wrong; what of a good manifest is replaced, and by what; what the line says.
const WRONG: &[(&str, &str, &str, &[&str])] = &[
    (
        "the article's typo",
        "spec:\n",
        "spec:\n  runtimeClassName: kata-mhsv-vm-isolation\n",
        &[
            "RuntimeClass \"kata-mhsv-vm-isolation\" not found",
            "did you mean \"kata-mshv-vm-isolation\"?",
        ],
    ),
    (
        "an unknown field",
        "containers:",
        "containerz:",
        &["unknown field \"spec.containerz\"; did you mean \"containers\"?"],
    ),
    (
        "another type",
        "terminationGracePeriodSeconds: 5",
        "terminationGracePeriodSeconds: five",
        &["spec.terminationGracePeriodSeconds: \"five\" is not a whole number"],
    ),
    (
        "a number for a variable",
        "    image:",
        "    env: [{name: PORT, value: 8080}]\n    image:",
        &["spec.containers[0].env[0].value: 8080 is not a string; write it in quotes"],
    ),
    (
        "a command that is no list",
        "    image:",
        "    args: --port 8080\n    image:",
        &["spec.containers[0].args: \"--port 8080\" is not a list"],
    ),
    (
        "no image",
        "    image: localhost/tools:1\n",
        "",
        &["spec.containers[0].image: is missing; name the image that it runs"],
    ),
    (
        "two containers of one name",
        "  containers:\n",
        "  containers:\n  - {name: main, image: \"localhost/tools:1\"}\n",
        &["spec.containers[1].name: \"main\" is there twice; choose another name"],
    ),
    (
        "an amount that is none",
        "    image:",
        "    resources: {limits: {memory: 64MB}}\n    image:",
        &[
            "spec.containers[0].resources.limits[memory]: \"64MB\" is not an amount, such as 100m \
             or 1Gi",
        ],
    ),
    (
        "a limit below the request",
        "    image:",
        "    resources: {limits: {cpu: 500m}, requests: {cpu: 2}}\n    image:",
        &[
            "spec.containers[0].resources.requests[cpu]: 2 is more than the limit of \"500m\"; ask \
             for less, or raise the limit",
        ],
    ),
    (
        "the host's network in a machine of its own",
        "spec:\n",
        "spec:\n  hostNetwork: true\n",
        &[
            "spec.hostNetwork: true asks for the host's network",
            "leave hostNetwork or runtimeClassName out",
        ],
    ),
    (
        "a device of the host in a machine of its own",
        "spec:\n",
        "spec:\n  volumes: [{name: kvm, hostPath: {path: /dev/kvm, type: CharDevice}}]\n",
        &[
            "spec.volumes[0].hostPath.type: \"CharDevice\" is a device of the host",
            "leave the volume or runtimeClassName out",
        ],
    ),
    (
        "a mount without its volume",
        "spec:\n",
        "spec:\n  volumes: [{name: data}]\n",
        &[
            "spec.containers[0].volumeMounts[0].name: the pod has no volume \"date\"; did you mean \"data\"?",
        ],
    ),
    (
        "a name that is none",
        "{name: wrong,",
        "{name: Wrong_Pod,",
        &["metadata.name: \"Wrong_Pod\" is not made of lower case letters, digits, '-' and '.'"],
    ),
    (
        "a port beyond all",
        "    image:",
        "    ports: [{containerPort: 80800}]\n    image:",
        &["spec.containers[0].ports[0].containerPort: 80800 is not between 1 and 65535"],
    ),
    (
        "a path of the host that leads up",
        "spec:\n",
        "spec:\n  volumes: [{name: host, hostPath: {path: ../etc}}]\n",
        &["spec.volumes[0].hostPath.path: \"../etc\" has to be an absolute path without '..'"],
    ),
    (
        "another version",
        "apiVersion: v1",
        "apiVersion: v2",
        // Which kubectl finds itself, and so says.
        &["no matches for kind \"Pod\" in version \"v2\""],
    ),
    (
        "a word that is none",
        "    image:",
        "    imagePullPolicy: Allways\n    image:",
        &[
            "spec.containers[0].imagePullPolicy: \"Allways\" is none of Always, IfNotPresent, Never; \
             did you mean \"Always\"?",
        ],
    ),
    (
        "another label than the node has",
        "spec:\n",
        "spec:\n  nodeSelector: {disk: ssd}\n",
        &["spec.nodeSelector: the node has no label disk=ssd"],
    ),
    (
        "a probe of another kind",
        "    image:",
        "    livenessProbe: {grpc: {port: 80}}\n    image:",
        &[
            "spec.containers[0].livenessProbe.grpc: is not supported here; use exec, httpGet or tcpSocket",
        ],
    ),
    (
        "a volume of a cluster",
        "spec:\n",
        "spec:\n  volumes: [{name: data, persistentVolumeClaim: {claimName: mine}}]\n",
        &[
            "spec.volumes[0].persistentVolumeClaim: there are no volumes of a cluster here; use one \
             of emptyDir, hostPath",
        ],
    ),
    (
        "containers that come later",
        "spec:\n",
        "spec:\n  ephemeralContainers: [{name: debug}]\n",
        &["spec.ephemeralContainers: is not supported here; use `kubectl exec`"],
    ),
];

pub(crate) fn wrong_manifests(stage: &mut Stage) {
    for (what, from, to, parts) in WRONG {
        let mut manifest = idle("wrong").replacen(from, to, 1);
        assert_ne!(manifest, idle("wrong"), "{what}");
        if what.ends_with("in a machine of its own") {
            manifest = manifest.replacen("spec:\n", CLASS, 1);
        }
        if what.starts_with("a mount") {
            let mounts = "    volumeMounts: [{name: date, mountPath: /data}]\n    image:";
            manifest = manifest.replacen("    image:", mounts, 1);
        }
        let said = stage.try_apply(&manifest);
        assert_eq!(said.code, Some(1), "{what}: {said:?}");
        assert_eq!(said.out, "", "{what}");
        for part in *parts {
            assert!(said.err.contains(part), "{what}: {}", said.err);
        }
        // kubectl adds a hint of its own to what it finds itself.
        let lines = said.err.trim_end().lines();
        let lines = lines.filter(|line| *line != "ensure CRDs are installed first");
        assert_eq!(lines.count(), 1, "{what}: {}", said.err);
    }
    // There is no pod of it, no event, no file, and nothing in containerd.
    for kind in ["pods", "events"] {
        assert_eq!(stage.get(&[kind, "-A"])["items"], json!([]), "{kind}");
    }
    assert!(stage.node.client().pods(None).unwrap().is_empty());
    for place in ["kube/pods", "kube/logs"] {
        let there = fs::read_dir(stage.node.scratch().path(place)).unwrap();
        assert_eq!(there.count(), 0, "{place}");
    }
}

/// Commands that want what there is not.
pub(crate) fn what_is_not_done_is_said(stage: &mut Stage) {
    stage.apply(&idle("plain"));
    for (arguments, part) in [
        (
            &["debug", "plain", "--image=x"][..],
            "ephemeral containers are not supported here; use `kubectl exec`",
        ),
        (
            &["apply", "--server-side", "-f", "manifest.yaml"],
            "server-side apply is not supported here; leave out --server-side",
        ),
        (
            &["get", "persistentvolumes"],
            "the server doesn't have a resource type \"persistentvolumes\"",
        ),
    ] {
        // Which asks for them at another address.
        if arguments[0] == "debug" && stage.is_old() {
            continue;
        }
        let said = stage.try_kubectl(arguments);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains(part), "{}", said.err);
        let lines = said.err.trim_end().lines();
        // What kubectl itself has to say of its own options.
        let own = ["Defaulting ", "--profile=legacy is deprecated"];
        let lines = lines.filter(|line| !own.iter().any(|one| line.starts_with(one)));
        assert_eq!(lines.count(), 1, "{}", said.err);
    }
}
