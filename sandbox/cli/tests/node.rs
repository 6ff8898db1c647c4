//! The commands that look at a node and change it, as an operator calls them. That what `node
//! enable` writes is what containerd wants is for the suite `cri`, whose nodes it sets up.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("pericarp-node-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn pericarp(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pericarp"));
    let Output {
        status,
        stdout,
        stderr,
    } = command.args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn every_wrong_parameter_is_named_and_nothing_is_written() {
    let place = Place::new("parameters");
    let containerd = place.file("containerd.toml", "version = 2\n");
    let config = place.file("config.toml", "[profiles.a]\nsizing = \"large\"\n");
    let (code, said, errors) = pericarp(&[
        "node",
        "enable",
        "--containerd-config",
        &containerd,
        "--config",
        &config,
        "--workload-runtime",
        "OCIContainer",
        "--os-sku",
        "Windows2022",
    ]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    let lines: Vec<&str> = errors.lines().collect();
    assert_eq!(lines.len(), 3, "{errors}");
    for (line, parts) in lines.iter().zip([
        ["--workload-runtime 'OCIContainer'", "KataMshvVmIsolation"],
        ["--os-sku 'Windows2022'", "AzureLinux"],
        ["'large'", "aks-preview"],
    ]) {
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert_eq!(fs::read_to_string(containerd).unwrap(), "version = 2\n");
}

#[test]
fn a_dry_run_shows_and_changes_nothing() {
    let place = Place::new("dry");
    let containerd = place.file("containerd.toml", "version = 2\n");
    let options = ["--containerd-config", containerd.as_str(), "--dry-run"];
    let enable = [&["node", "enable"][..], &options].concat();
    let (code, said, _) =
        pericarp(&[&enable[..], &["--workload-runtime", "KataMshvVmIsolation"]].concat());
    assert_eq!(code, Some(0));
    assert!(said.starts_with(&format!("--- {containerd}\n")), "{said}");
    assert!(
        said.contains("+ConfigPath = \"#kata-mshv-vm-isolation\"\n"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(&containerd).unwrap(), "version = 2\n");
    let disable = [&["node", "disable"][..], &options].concat();
    let (code, said, errors) = pericarp(&disable);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert!(errors.contains("is as it should be"), "{errors}");
}

#[test]
fn a_file_to_which_nothing_can_be_added_is_bad_input() {
    let place = Place::new("old");
    let containerd = place.file("containerd.toml", "[plugins]\n");
    let (code, _, errors) = pericarp(&[
        "node",
        "enable",
        "--dry-run",
        "--containerd-config",
        &containerd,
    ]);
    assert_eq!(code, Some(2), "{errors}");
    assert!(errors.contains("is of version 1"), "{errors}");
}

#[test]
fn features_are_prepared_and_stay_so() {
    let place = Place::new("features");
    let state = place.0.join("state");
    let config = format!("state-directory = \"{}\"\n", state.display());
    let config = place.file("config.toml", &config);
    let feature = |arguments: &[&str]| {
        let all = [&["feature", "--config", config.as_str()], arguments].concat();
        pericarp(&all)
    };
    let (code, said, _) = feature(&["show"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "cpu-pinning: Off\nkernel-parameters: Off\n")
    );
    let (code, said, _) = feature(&["enable", "kernel-parameters"]);
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "kernel-parameters: Ready\n")
    );
    assert_eq!(
        feature(&["show", "kernel-parameters"]).1,
        "kernel-parameters: Ready\n"
    );
    assert_eq!(
        feature(&["disable", "kernel-parameters"]).1,
        "kernel-parameters: Off\n"
    );
    let (code, _, errors) = feature(&["show", "cpu-pining"]);
    assert_eq!(code, Some(2));
    assert!(errors.contains("did you mean 'cpu-pinning'?"), "{errors}");
}

#[test]
fn keys_are_explained_and_findings_are_for_programs_too() {
    let (code, said, _) = pericarp(&["config", "explain", "io.pericarp/memory"]);
    assert_eq!(code, Some(0));
    assert!(
        said.starts_with("memory: ") && said.contains("maturity   stable"),
        "{said}"
    );
    let (code, _, errors) = pericarp(&["config", "explain", "memroy"]);
    assert_eq!(code, Some(2));
    assert!(errors.contains("did you mean 'memory'?"), "{errors}");
    let (code, said, _) = pericarp(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(code, Some(i32::from(report["usable"] == false)));
    let findings = report["findings"].as_array().unwrap();
    assert!(
        findings
            .iter()
            .any(|finding| finding["name"] == "virtualization")
    );
    let (code, said, _) = pericarp(&["node", "manifests"]);
    assert_eq!(code, Some(0));
    assert_eq!(said.matches("\nkind: RuntimeClass\n").count(), 4, "{said}");
}

#[test]
fn a_cluster_is_told_how_its_nodes_prepare_themselves() {
    let (code, said, errors) = pericarp(&["node", "manifests", "--daemon-set", "here/node:1"]);
    assert_eq!(code, Some(0), "{errors}");
    for (kind, count) in [("Namespace", 1), ("DaemonSet", 1), ("RuntimeClass", 4)] {
        let found = said.matches(&format!("\nkind: {kind}\n")).count();
        assert_eq!(found, count, "{kind}: {said}");
    }
    assert_eq!(said.matches("io.pericarp/node: \"true\"\n").count(), 5);
    let (code, said, errors) = pericarp(&[
        "node",
        "manifests",
        "--daemon-set",
        "a b",
        "--node-selector",
        "x",
        "--restart",
        "-k",
    ]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    assert_eq!(errors.lines().count(), 3, "{errors}");
    let (code, said, _) = pericarp(&["node", "manifests", "--image-recipe"]);
    assert_eq!(code, Some(0));
    assert!(said.contains("\nFROM "), "{said}");
    let (code, _, errors) = pericarp(&["node", "manifests", "--node-selector", "a=b"]);
    assert_eq!(code, Some(2), "{errors}");
}

/// kubectl knows every key: what it reads as a DaemonSet is all that is in the text.
#[test]
fn kubectl_reads_all_of_the_daemon_set() {
    let place = Place::new("kubectl");
    let (_, said, _) = pericarp(&["node", "manifests", "--daemon-set", "here/node:1"]);
    let document = said
        .split("---\n")
        .find(|text| text.contains("kind: DaemonSet"));
    let file = place.file("set.yaml", document.unwrap());
    let kubectl = |words: &[&str]| -> Option<serde_json::Value> {
        let mut command = Command::new("kubectl");
        let common = ["--local", "-o", "json", "-f", &file];
        let output = command.args(words).args(common).output().ok()?;
        assert!(output.status.success(), "{output:?}");
        Some(serde_json::from_slice(&output.stdout).unwrap())
    };
    // As any object, and as what it is.
    let Some(mut text) = kubectl(&["label", "--overwrite", "app.kubernetes.io/part-of=pericarp"])
    else {
        println!("SKIPPED kubectl_reads_all_of_the_daemon_set: kubectl is missing");
        return;
    };
    // Nothing is printed where nothing is changed.
    let read = kubectl(&["set", "image", "install=there"]).unwrap();
    text["spec"]["template"]["spec"]["containers"][0]["image"] = "there".into();
    let mut missing = Vec::new();
    is_in(&text, &read, "", &mut missing);
    assert!(missing.is_empty(), "{missing:?}");
    let pod = &read["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["securityContext"]["privileged"], true);
    assert_eq!(pod["nodeSelector"]["io.pericarp/node"], "true");
    assert_eq!(pod["volumes"][0]["hostPath"]["path"], "/");
    let mount = &pod["containers"][0]["volumeMounts"][0];
    let command = pod["containers"][0]["command"].as_array().unwrap();
    let host = format!("--host={}", mount["mountPath"].as_str().unwrap());
    assert!(command.iter().any(|word| *word == host), "{command:?}");
}

fn is_in(one: &serde_json::Value, other: &serde_json::Value, at: &str, missing: &mut Vec<String>) {
    match (one.as_object(), one.as_array()) {
        (Some(object), _) => {
            for (key, value) in object {
                is_in(value, &other[key], &format!("{at}.{key}"), missing);
            }
        }
        (_, Some(array)) => {
            for (index, value) in array.iter().enumerate() {
                is_in(value, &other[index], &format!("{at}[{index}]"), missing);
            }
        }
        _ if one != other => missing.push(format!("{at}: {one} is {other}")),
        _ => {}
    }
}
