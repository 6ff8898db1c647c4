//! Objects: what can be done with them, what is refused, and what a restart loses: nothing.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use pericarp_tests::parts::Part;

use crate::stage::{Stage, idle};

/// A client without a certificate is ended by TLS.
pub(crate) fn strangers(stage: &mut Stage) {
    let said = stage
        .node
        .on_its_network(&Part::Kubectl.find().unwrap())
        .args([
            "--server",
            "https://127.0.0.1:7443",
            "--insecure-skip-tls-verify",
        ])
        // Else it asks for a name and a password.
        .args(["--token", "stranger", "get", "pods"])
        .env("HOME", stage.node.scratch().dir())
        .env("KUBECONFIG", "/dev/null")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("certificate required"), "{said}");
}

pub(crate) fn objects(stage: &mut Stage) {
    let version = stage.kubectl(&["version"]);
    assert!(
        version.contains("Server Version: ") && version.contains("pericarp"),
        "{version}"
    );
    let resources = stage.kubectl(&["api-resources"]);
    assert!(resources.contains("runtimeclasses"), "{resources}");
    stage.kubectl(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=colour=red",
    ]);
    let again = stage.refused(&["create", "configmap", "settings"]);
    assert!(
        again.contains("configmaps \"settings\" already exists"),
        "{again}"
    );
    stage.kubectl(&["create", "secret", "generic", "key", "--from-literal=a=b"]);
    assert_eq!(stage.get(&["secret", "key"])["data"]["a"], "Yg==");
    // Apply makes, changes and says when nothing changes.
    let map = |colour: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: applied, labels: {{x: old}}}}\n\
             data: {{colour: {colour}}}\n"
        )
    };
    assert_eq!(stage.apply(&map("red")), "configmap/applied created\n");
    assert_eq!(stage.apply(&map("red")), "configmap/applied unchanged\n");
    assert_eq!(stage.apply(&map("blue")), "configmap/applied configured\n");
    assert_eq!(stage.get(&["cm", "applied"])["data"]["colour"], "blue");
    stage.kubectl(&["label", "cm", "applied", "x-", "z=1"]);
    stage.kubectl(&[
        "patch",
        "cm",
        "applied",
        "--type=json",
        "-p",
        r#"[{"op":"add","path":"/data/size","value":"big"}]"#,
    ]);
    stage.kubectl(&[
        "patch",
        "cm",
        "applied",
        "--type=merge",
        "-p",
        r#"{"data":{"colour":null}}"#,
    ]);
    let found = stage.get(&["cm", "-l", "z=1"]);
    assert_eq!(found["items"].as_array().unwrap().len(), 1);
    assert_eq!(
        found["items"][0]["data"],
        serde_json::json!({"size": "big"})
    );
    if !stage.is_old() {
        stage.kubectl(&["create", "cm", "never", "--dry-run=server"]);
        stage.refused(&["get", "cm", "never"]);
    }
    let gone = stage.kubectl(&["delete", "cm", "applied", "settings"]);
    assert!(gone.contains("configmap \"applied\" deleted"), "{gone}");
    let missing = stage.refused(&["get", "cm", "applied"]);
    assert!(
        missing.contains("configmaps \"applied\" not found"),
        "{missing}"
    );
    stage.kubectl(&["delete", "secret", "key"]);
    let node = stage.kubectl(&["get", "nodes"]);
    assert!(node.contains("here") && node.contains("Ready"), "{node}");
    stage.kubectl(&["describe", "node", "here"]);
    let taint = stage.refused(&["taint", "nodes", "here", "a=b:NoSchedule"]);
    assert!(taint.contains("there is no scheduler"), "{taint}");
    let kept = stage.refused(&["delete", "node", "here"]);
    assert!(kept.contains("there is one node"), "{kept}");
}

pub(crate) fn watches(stage: &mut Stage) {
    let mut watch = stage
        .kubectl_command(&["get", "pods", "-l", "app=watched", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    stage.apply(&idle("watched"));
    stage.ready("watched");
    stage.kubectl(&["delete", "pod", "watched", "--now"]);
    let mut seen = Vec::new();
    for line in lines {
        let line = line.unwrap();
        let done = line.contains("Terminating") && seen.iter().any(|l: &String| l.contains("1/1"));
        seen.push(line);
        if done {
            break;
        }
    }
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert!(seen[0].starts_with("NAME "), "{seen:?}");
    assert!(seen.iter().any(|line| line.contains("Running")), "{seen:?}");
}

pub(crate) fn namespaces(stage: &mut Stage) {
    let missing = stage.refused(&["create", "cm", "a", "-n", "team"]);
    assert!(
        missing.contains("namespaces \"team\" not found"),
        "{missing}"
    );
    stage.kubectl(&["create", "namespace", "team"]);
    stage.kubectl(&["create", "cm", "a", "-n", "team"]);
    stage.kubectl(&[
        "run",
        "one",
        "-n",
        "team",
        "--image",
        "localhost/tools:1",
        "--command",
        "--",
        "/bin/sleep",
        "1000",
    ]);
    let all = stage.kubectl(&["get", "pods", "-A"]);
    assert!(all.contains("team"), "{all}");
    stage.kubectl(&["delete", "pods", "-n", "team", "--all", "--now"]);
    stage.kubectl(&["delete", "namespace", "team", "--timeout=60s"]);
    let said = stage.refused(&["get", "ns", "team"]);
    assert!(said.contains("not found"), "{said}");
    let kept = stage.refused(&["delete", "namespace", "default"]);
    assert!(kept.contains("forbidden"), "{kept}");
}
