//! OCI images made here, without a registry: a tree around busybox, and archives of such trees.
//! Called by the suites `pericarp_run` and `cri`.
//!
//! Panics when something cannot be made: a test cannot go on without its image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::parts::Part;
use crate::scratch::Scratch;

/// The names under which Debian's static busybox is of use in a container.
pub const ALL_TOOLS: &[&str] = &[
    "awk", "cat", "chmod", "dd", "df", "echo", "env", "free", "grep", "head", "hostname", "httpd",
    "id", "ip", "kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mount", "mv", "nc", "nproc",
    "ping", "printf", "ps", "pwd", "readlink", "rm", "sed", "seq", "sh", "sleep", "stat", "stty",
    "sync", "tail", "tar", "test", "timeout", "touch", "tr", "true", "umount", "uname", "wc",
    "wget", "yes",
];

/// An image of an archive.
#[derive(Debug)]
pub struct Image<'a> {
    /// What containerd is to call it.
    pub name: Option<&'a str>,
    /// A directory for each layer, the lowest first.
    pub layers: Vec<&'a Path>,
    /// How it is run, as JSON.
    pub config: &'a str,
}

/// Makes a tree with busybox under these names.
///
/// # Panics
/// See above.
pub fn busybox(tree: &Path, tools: &[&str]) {
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(dir)).expect("a directory");
    }
    let busybox = Part::Busybox.find().expect("busybox is there");
    fs::copy(&busybox, tree.join("bin/busybox")).expect("a copy of busybox");
    for tool in tools {
        symlink("busybox", tree.join("bin").join(tool)).expect("a link to busybox");
    }
}

/// Writes an OCI archive with these images. Layers are kept once.
///
/// # Panics
/// See above.
pub fn archive(scratch: &Scratch, images: &[Image<'_>], archive: &Path) {
    let layout = scratch.path("layout");
    let blobs = Blobs(layout.join("blobs/sha256"));
    fs::create_dir_all(&blobs.0).expect("a directory");
    let mut layers: Vec<(&Path, Value)> = Vec::new();
    let layer = |tree: &Path| -> Value {
        let file = layout.join("layer");
        run(Command::new("tar")
            .args(["--numeric-owner", "-cf"])
            .arg(&file)
            .arg("-C")
            .args([tree, Path::new(".")]));
        blobs.keep(&file, "layer.v1.tar")
    };
    let mut manifests = Vec::new();
    for image in images {
        let mut own = Vec::new();
        for tree in &image.layers {
            let known = layers.iter().find(|(known, _)| known == tree);
            let blob = known.map(|(_, blob)| blob.clone());
            own.push(blob.unwrap_or_else(|| {
                let blob = layer(tree);
                layers.push((tree, blob.clone()));
                blob
            }));
        }
        manifests.push(blobs.manifest(image, &own));
    }
    let write = |name: &str, value: Value| {
        fs::write(layout.join(name), value.to_string()).expect("a file");
    };
    write(
        "index.json",
        json!({"schemaVersion": 2, "manifests": manifests}),
    );
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}));
    run(Command::new("tar")
        .arg("-cf")
        .arg(archive)
        .arg("-C")
        .arg(&layout)
        .args(["oci-layout", "index.json", "blobs"]));
}

/// The directory of what is named by its digest.
struct Blobs(PathBuf);

impl Blobs {
    /// Moves a file here; what describes it.
    fn keep(&self, file: &Path, kind: &str) -> Value {
        let sum = run(Command::new("sha256sum").arg(file));
        let digest = sum.split_whitespace().next().expect("a sum");
        let size = fs::metadata(file).expect("the file is there").len();
        fs::rename(file, self.0.join(digest)).expect("the file can be moved");
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{digest}"),
            "size": size,
        })
    }

    fn write(&self, value: &Value, kind: &str) -> Value {
        let file = self.0.join("new");
        fs::write(&file, value.to_string()).expect("a file");
        self.keep(&file, kind)
    }

    fn manifest(&self, image: &Image<'_>, layers: &[Value]) -> Value {
        let how: Value = serde_json::from_str(image.config).expect("a configuration");
        let digests: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": how,
            "rootfs": {"type": "layers", "diff_ids": digests},
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.write(&config, "config.v1+json"),
            "layers": layers,
        });
        let mut manifest = self.write(&manifest, "manifest.v1+json");
        if let Some(name) = image.name {
            manifest["annotations"] = json!({"io.containerd.image.name": name});
        }
        manifest
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("the program is there");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
