//! Versions of what guests boot from: a pod that runs keeps its own, the next one has the new one, and
//! what is used is not removed. runc's pods have no guest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use pericarp_tests::cri::{container, pod};
use pericarp_tests::guest::Assets;
use serde_json::Value;

use crate::stage::{IDLE, Stage, until};

/// The files of `assets` with another kernel, in `directory`.
fn with_kernel(assets: &Assets, kernel: &Path, directory: &Path) {
    fs::create_dir(directory).unwrap();
    let link = |from: &Path, name: &str| symlink(from, directory.join(name)).unwrap();
    link(kernel, "kernel");
    for name in ["guest", "pericarp-agent"] {
        link(&fs::canonicalize(assets.dir().join(name)).unwrap(), name);
    }
}

pub(crate) fn a_pod_keeps_its_guest_and_the_next_has_the_new_one(stage: &mut Stage) {
    let found = Assets::find().unwrap();
    let scratch = stage.node.scratch();
    let store = scratch.path("store").display().to_string();
    let config = scratch.path("pericarp.toml").display().to_string();
    let run = |words: &[&str]| {
        stage
            .node
            .pericarp(&[&["assets"], words, &["--store", &store]].concat())
    };
    let pericarp = |words: &[&str]| -> Value {
        let (code, said, errors) = run(&[words, &["--json"]].concat());
        assert_eq!(code, Some(0), "{words:?}: {errors}");
        serde_json::from_str(&said).unwrap()
    };
    let kernel = |name: &str| fs::canonicalize(found.dir().join(name)).unwrap();
    let (new, old) = (scratch.path("new-files"), scratch.path("old-files"));
    with_kernel(&found, &kernel("kernel"), &new);
    with_kernel(&found, &kernel("older/kernel"), &old);
    let release = |files: &Path| -> String {
        let text = fs::read_to_string(files.join("kernel/release")).unwrap();
        text.trim().to_owned()
    };
    fs::create_dir(format!("{config}.d")).unwrap();
    let said = format!("[profiles.pericarp]\nassets = \"{store}\"\n");
    fs::write(format!("{config}.d/assets.toml"), said).unwrap();

    let added = pericarp(&["add", &old.display().to_string(), "--name", "1", "--use"]);
    assert_eq!(
        (&added["added"], &added["current"]),
        (&true.into(), &true.into())
    );
    let (one, idle) = stage.idle("one");
    assert_eq!(idle.shell("uname -r"), release(&old));
    // While it runs.
    pericarp(&["add", &new.display().to_string(), "--name", "2", "--use"]);
    let next = stage.node.run_pod(pod("two"), stage.subject.name).unwrap();
    let other = next.start(&container("idle", &IDLE)).unwrap();
    assert_eq!(other.shell("uname -r"), release(&new));
    assert_eq!(idle.shell("uname -r"), release(&old));

    let users =
        |version: usize| pericarp(&["list", "--check"])["versions"][version]["users"].clone();
    assert_eq!(users(0)[0]["pod"], "default/one");
    assert_eq!(users(1)[0]["pod"], "default/two");
    let (code, _, errors) = run(&["rm", "1", "--config", &config]);
    assert_eq!(code, Some(2), "{errors}");
    assert!(
        errors.contains("is in use by the pod default/one"),
        "{errors}"
    );
    let (code, _, errors) = run(&["rm", "2", "--config", &config]);
    assert_eq!(code, Some(2), "{errors}");
    assert!(errors.contains("is what new pods take"), "{errors}");

    one.remove().unwrap();
    until("its version can be removed", || {
        run(&["rm", "1", "--config", &config]).0 == Some(0)
    });
    assert_eq!(other.shell("echo here"), "here");
    next.remove().unwrap();
    until("nobody uses the other", || {
        users(0).as_array().unwrap().is_empty()
    });
}
