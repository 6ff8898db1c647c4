//! What pods say of their containers, and what becomes of it: all of them at once, under runc.

use pericarp_tests::cri::config::IMAGE;
use serde_json::Value;

use crate::stage::{Stage, until};

/// One manifest of many objects.
const MANIFEST: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: red, shape: round}
---
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {password: secret}
---
apiVersion: v1
kind: Pod
metadata: {name: told, labels: {tier: front}}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, 'echo "$COLOUR $PASSWORD $ME $MEMORY $ALL_shape $(WORDS) $TIER"; echo $(WORDS)']
    resources: {limits: {memory: 64Mi}}
    envFrom: [{prefix: ALL_, configMapRef: {name: settings}}]
    env:
    - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: key, key: password}}}
    - {name: ME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: TIER, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: WORDS, value: "$(ME)-is-$(COLOUR)"}
---
apiVersion: v1
kind: Pod
metadata: {name: ordered}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  initContainers:
  - name: first
    image: IMAGE
    command: [/bin/sh, -c, echo first > /work/log]
    volumeMounts: [{name: work, mountPath: /work}]
  - name: beside
    image: IMAGE
    restartPolicy: Always
    command: [/bin/sh, -c, 'sleep 1; echo beside >> /work/log; trap "exit 0" TERM; sleep 100000 & wait']
    startupProbe: {exec: {command: [grep, beside, /work/log]}, periodSeconds: 1}
    volumeMounts: [{name: work, mountPath: /work}]
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, cat /work/log]
    volumeMounts: [{name: work, mountPath: /work}]
  volumes: [{name: work}]
---
apiVersion: v1
kind: Pod
metadata: {name: crashing}
spec:
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, echo it is broken > /dev/termination-log; exit 3]
---
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, mkdir -p /www; echo well > /www/health; exec httpd -f -p 8080 -h /www]
    ports: [{name: web, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /health, port: web}, periodSeconds: 1}
    livenessProbe:
      exec: {command: [/bin/sh, -c, test ! -e /www/sick]}
      periodSeconds: 1
      failureThreshold: 1
      terminationGracePeriodSeconds: 1
---
apiVersion: v1
kind: Pod
metadata: {name: filed, labels: {app: filed}}
spec:
  terminationGracePeriodSeconds: 1
  hostAliases: [{ip: 10.9.8.7, hostnames: [elsewhere]}]
  securityContext: {runAsUser: 1234, runAsGroup: 1235, fsGroup: 77}
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, sleep 100000]
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: settings, mountPath: /one/colour, subPath: colour}
    - {name: key, mountPath: /key}
    - {name: about, mountPath: /about}
    - {name: memory, mountPath: /memory}
    - {name: disk, mountPath: /disk, subPath: a/b}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: key, secret: {secretName: key, defaultMode: 0400}}
  - {name: about, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - {name: disk, emptyDir: {}}
---
apiVersion: v1
kind: Pod
metadata: {name: large}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, dd if=/dev/zero of=/data/file bs=1M count=3; sleep 100000]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {sizeLimit: 1Mi}}]
---
apiVersion: v1
kind: Pod
metadata: {name: wanting}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, sleep 100000]
    envFrom: [{configMapRef: {name: later}}]
---
apiVersion: v1
kind: Pod
metadata: {name: imageless}
spec:
  containers:
  - {name: never, image: "localhost/none:1", imagePullPolicy: Never}
  - {name: pulled, image: "127.0.0.1:9/none:1"}
---
apiVersion: v1
kind: Pod
metadata: {name: short}
spec:
  activeDeadlineSeconds: 1
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: IMAGE, command: [/bin/sh, -c, sleep 100000]}
---
apiVersion: v1
kind: Pod
metadata: {name: polite}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: main
    image: IMAGE
    command: [/bin/sh, -c, "trap 'exit 0' TERM; sleep 100000 & wait"]
    lifecycle:
      postStart: {exec: {command: [/bin/sh, -c, echo hello >> /host/said]}}
      preStop: {exec: {command: [/bin/sh, -c, echo bye >> /host/said]}}
    volumeMounts: [{name: host, mountPath: /host}]
  volumes: [{name: host, hostPath: {path: HOST, type: DirectoryOrCreate}}]
"#;

fn phase(stage: &Stage, pod: &str) -> String {
    let pod = stage.get(&["pod", pod]);
    pod["status"]["phase"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn main_of(stage: &Stage, pod: &str) -> Value {
    stage.get(&["pod", pod])["status"]["containerStatuses"][0].clone()
}

fn waits_for(stage: &Stage, pod: &str, container: usize, words: &[&str]) {
    until(&format!("{pod} waits for {words:?}"), || {
        let pod = stage.get(&["pod", pod]);
        let state = &pod["status"]["containerStatuses"][container]["state"];
        state["waiting"]["reason"]
            .as_str()
            .is_some_and(|reason| words.contains(&reason))
    });
}

pub(crate) fn pods_are_what_they_say(stage: &mut Stage) {
    let host = stage.node.scratch().path("host");
    let manifest = MANIFEST
        .replace("IMAGE", IMAGE)
        .replace("HOST", &host.display().to_string());
    stage.apply(&manifest);

    until("told ends", || phase(stage, "told") == "Succeeded");
    let said = stage.kubectl(&["logs", "told"]);
    assert_eq!(
        said,
        "red secret told 64 round told-is-red front\ntold-is-red\n"
    );

    until("ordered ends", || phase(stage, "ordered") == "Succeeded");
    assert_eq!(
        stage.kubectl(&["logs", "ordered", "-c", "main"]),
        "first\nbeside\n"
    );
    let beside = || stage.get(&["pod", "ordered"])["status"]["initContainerStatuses"][1].clone();
    until("the sidecar ends", || {
        !beside()["state"]["terminated"].is_null()
    });

    stage.ready("probed");
    stage.kubectl(&["exec", "probed", "--", "touch", "/www/sick"]);
    until("a sick container is started again", || {
        main_of(stage, "probed")["restartCount"] == 1
    });
    stage.ready("probed");

    files(stage);

    waits_for(stage, "crashing", 0, &["CrashLoopBackOff"]);
    let crashing = main_of(stage, "crashing");
    let last = &crashing["lastState"]["terminated"];
    assert_eq!(last["exitCode"], 3, "{crashing}");
    assert_eq!(last["message"], "it is broken\n", "{crashing}");
    let described = stage.kubectl(&["describe", "pod", "crashing"]);
    assert!(
        described.contains("Back-off restarting failed container"),
        "{described}"
    );

    waits_for(stage, "imageless", 0, &["ErrImageNeverPull"]);
    waits_for(stage, "imageless", 1, &["ErrImagePull", "ImagePullBackOff"]);

    waits_for(stage, "wanting", 0, &["CreateContainerConfigError"]);
    let why = main_of(stage, "wanting")["state"]["waiting"]["message"].clone();
    assert_eq!(why, "configmap \"later\" not found");
    stage.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: later}\ndata: {a: b}\n");
    stage.ready("wanting");

    for (pod, reason) in [("short", "DeadlineExceeded"), ("large", "Evicted")] {
        until(&format!("{pod} fails"), || phase(stage, pod) == "Failed");
        assert_eq!(stage.get(&["pod", pod])["status"]["reason"], reason);
    }

    stage.ready("polite");
    stage.kubectl(&["delete", "pod", "polite", "--timeout=60s"]);
    let said = std::fs::read_to_string(host.join("said")).unwrap_or_default();
    assert_eq!(said, "hello\nbye\n");
    stage.delete_all_pods();
    stage.kubectl(&[
        "delete",
        "configmap/settings",
        "configmap/later",
        "secret/key",
    ]);
    // Nothing of them is left on the node.
    let kube = stage.node.scratch().path("kube");
    for place in ["pods", "logs"] {
        let left: Vec<_> = std::fs::read_dir(kube.join(place))
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn files(stage: &Stage) {
    stage.ready("filed");
    let shell = |script: &str| stage.kubectl(&["exec", "filed", "--", "sh", "-c", script]);
    assert_eq!(
        shell("cat /settings/colour /one/colour /key/password"),
        "redredsecret"
    );
    assert_eq!(shell("cat /about/labels"), "app=\"filed\"");
    assert_eq!(shell("id -u; id -G"), "1234\n1235 77\n");
    assert_eq!(
        shell("grep -c elsewhere /etc/hosts; hostname"),
        "1\nfiled\n"
    );
    shell("echo mine > /disk/file; test $(stat -c %g /disk/file) = 77");
    shell("! dd if=/dev/zero of=/memory/file bs=1M count=2 2>/dev/null");
    shell("! touch /settings/colour 2>/dev/null");
    stage.kubectl(&[
        "patch",
        "cm",
        "settings",
        "--type=merge",
        "-p",
        r#"{"data":{"colour":"blue"}}"#,
    ]);
    until("a change arrives", || {
        shell("cat /settings/colour") == "blue"
    });
    // A part of a volume stays what it was.
    assert_eq!(shell("cat /one/colour"), "red");
}
