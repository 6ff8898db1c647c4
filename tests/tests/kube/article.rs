//! The article's walk: two manifests, a pod under runc and one in a machine of its own.

use pericarp_tests::cri::{Handler, config::ARTICLES_IMAGE};

use crate::restarts::a_pod_outlives_both;
use crate::stage::{MACHINES, Stage, machines, until};
use crate::terminal::{a_shell_is_typed_at, files_are_copied};

/// As the article has it, but for where the annotation makes the machine small.
fn manifest(name: &str, class: &str) -> String {
    format!(
        "kind: Pod\napiVersion: v1\nmetadata:\n  name: {name}\n  annotations:\n    \
         io.pericarp/memory: 256M\nspec:\n{class}  containers:\n  - name: {name}\n    \
         image: {ARTICLES_IMAGE}\n    imagePullPolicy: IfNotPresent\n    \
         command: [\"/bin/sh\", \"-ec\", \"while :; do echo '.'; sleep 1 ; done\"]\n"
    )
}

pub(crate) fn play() {
    let handlers = vec![Handler::runc("runc"), machines()];
    let Some(mut stage) = Stage::start("the_articles_commands", handlers, &MACHINES) else {
        return;
    };
    let trusted = stage.apply(&manifest("trusted", ""));
    assert_eq!(trusted, "pod/trusted created\n");
    let typo = stage.try_apply(&manifest(
        "untrusted",
        "  runtimeClassName: kata-mhsv-vm-isolation\n",
    ));
    let cure = "RuntimeClass \"kata-mhsv-vm-isolation\" not found; did you mean \
                \"kata-mshv-vm-isolation\"?";
    assert!(typo.err.contains(cure), "{typo:?}");
    let untrusted = stage.apply(&manifest(
        "untrusted",
        "  runtimeClassName: kata-mshv-vm-isolation\n",
    ));
    assert_eq!(untrusted, "pod/untrusted created\n");
    for pod in ["trusted", "untrusted"] {
        let pod = format!("pod/{pod}");
        stage.kubectl(&["wait", "--for=condition=Ready", &pod, "--timeout=220s"]);
    }
    let list = stage.kubectl(&["get", "pods", "--all-namespaces"]);
    for name in ["trusted", "untrusted"] {
        let row = list
            .lines()
            .find(|line| line.contains(&format!(" {name} ")));
        let row: Vec<&str> = row.unwrap_or_default().split_whitespace().collect();
        assert_eq!(
            row.get(..5),
            Some(&["default", name, "1/1", "Running", "0"][..]),
            "{list}"
        );
    }
    let release = |pod: &str| stage.kubectl(&["exec", pod, "--", "uname", "-r"]);
    assert_ne!(release("trusted"), release("untrusted"));
    until("the log grows", || {
        stage.kubectl(&["logs", "untrusted"]).lines().count() > 1
    });
    let described = stage.kubectl(&["describe", "pod", "untrusted"]);
    // Which older ones do not show.
    assert!(
        stage.is_old() || described.contains("Runtime Class Name:  kata-mshv-vm-isolation"),
        "{described}"
    );
    assert!(
        described.contains("Started container untrusted"),
        "{described}"
    );
    a_shell_is_typed_at(&stage, "untrusted");
    files_are_copied(&stage, "untrusted");
    a_pod_outlives_both(&mut stage, "untrusted");
    let deleted = stage.kubectl(&["delete", "pod", "trusted", "untrusted", "--now"]);
    assert!(deleted.contains("pod \"untrusted\" deleted"), "{deleted}");
    stage.end();
}
