//! The demo's image: the same Debian root as an OCI archive of two layers.
//!
//! Called by `image` with the finished root. The layers are those of a real image: a large one,
//! compressed, and a small one on top that changes a file, adds one and deletes some. The archive
//! depends on the root's files and on nothing else: no clock, no order of directories.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::image::{DATA_IN_TREE, create, write};
use crate::command::{Failure, find_program};
use crate::janitor::Janitor;

/// Raised when the image is to be made in another way.
const FORM: u32 = 1;
/// Bookworm's release. Files that are younger got their time when the root was made; they get
/// this one instead.
const TIME: &str = "@1686355200";
const CREATED: &str = "2023-06-10T00:00:00Z";
const MOTD: &str = "This container runs in a virtual machine of its own.\n";

/// Makes `dir/pericarp-demo.tar` unless it is there and was made by `recipe`. What is unfinished is
/// in `scratch`.
pub(crate) fn prepare(
    dir: &Path,
    scratch: &Path,
    tree: &Path,
    recipe: &str,
    janitor: &mut Janitor,
) -> Result<PathBuf, Failure> {
    let finished = dir.join("pericarp-demo.tar");
    let label = dir.join("pericarp-demo.recipe");
    let recipe = format!("{FORM} {TIME} {recipe}");
    if finished.exists() && fs::read_to_string(&label).is_ok_and(|text| text == recipe) {
        println!("      {} is there from an earlier run", finished.display());
        return Ok(finished);
    }
    println!("      an OCI image of it, of two layers");
    let work = scratch.join("oci");
    create(&work)?;
    let mut layout = Layout::new(work.join("layout"), janitor)?;
    let base = work.join("base.tar");
    layout.run_tar(tree, &base, &[&format!("--exclude=.{DATA_IN_TREE}")])?;
    layout.add_layer(&base, true)?;
    let top = work.join("top");
    make_top(&top)?;
    let change = work.join("top.tar");
    // What lies below our own directory is root's in the image, whoever runs this.
    layout.run_tar(&top, &change, &["--owner=0", "--group=0"])?;
    layout.add_layer(&change, false)?;
    let archive = work.join("image.tar");
    layout.finish(&archive)?;
    // Never a label beside an image that it does not describe.
    if label.exists() {
        fs::remove_file(&label).map_err(|e| format!("cannot remove {}: {e}", label.display()))?;
    }
    fs::rename(&archive, &finished)
        .map_err(|e| format!("cannot move the image into place: {e}"))?;
    write(&label, &recipe)?;
    Ok(finished)
}

/// The second layer: `/etc/motd` changed, the logs of the installation deleted, and of the caches
/// nothing left but a new file that says so.
fn make_top(top: &Path) -> Result<(), Failure> {
    for directory in ["etc", "var/log", "var/cache"] {
        create(&top.join(directory))?;
    }
    write(&top.join("etc/motd"), MOTD)?;
    for marker in [
        "var/log/.wh.apt",
        "var/log/.wh.dpkg.log",
        "var/cache/.wh..wh..opq",
    ] {
        write(&top.join(marker), "")?;
    }
    write(
        &top.join("var/cache/README"),
        "Emptied by the image's second layer.\n",
    )?;
    set_modes(top)
}

/// Whatever this process's umask is, the image's modes are these.
fn set_modes(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = |e| format!("cannot prepare {}: {e}", path.display());
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(failed)? {
            set_modes(&entry.map_err(failed)?.path())?;
        }
    }
    Ok(())
}

/// An OCI layout in the making.
struct Layout<'a> {
    dir: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    janitor: &'a mut Janitor,
}

impl<'a> Layout<'a> {
    fn new(dir: PathBuf, janitor: &'a mut Janitor) -> Result<Self, Failure> {
        create(&dir.join("blobs/sha256"))?;
        Ok(Self {
            dir,
            layers: Vec::new(),
            diff_ids: Vec::new(),
            janitor,
        })
    }

    /// Archives what is in `from`, always the same for the same files.
    fn run_tar(&mut self, from: &Path, to: &Path, more: &[&str]) -> Result<(), Failure> {
        self.janitor.run_well(
            Command::new("tar")
                .args(["--create", "--sort=name", "--numeric-owner"])
                .args([&format!("--mtime={TIME}"), "--clamp-mtime"])
                // Extended headers carry the attributes, and by default the number of this process.
                .args(["--format=posix", "--xattrs"])
                .arg("--xattrs-include=security.capability")
                .arg("--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f")
                .args(more)
                .arg("--file")
                .arg(to)
                .arg("--directory")
                .arg(from)
                .arg("."),
        )?;
        Ok(())
    }

    fn add_layer(&mut self, tar: &Path, compressed: bool) -> Result<(), Failure> {
        let diff_id = self.digest(tar)?;
        self.diff_ids.push(format!("sha256:{diff_id}"));
        let mut media_type = "application/vnd.oci.image.layer.v1.tar".to_owned();
        let mut blob = tar.to_owned();
        if compressed {
            let gzip = find_program("gzip").ok_or("gzip is missing; it is part of every Debian")?;
            // Without name and time; quick, because it is read once.
            self.janitor.run_well(
                Command::new(gzip)
                    .args(["--no-name", "-1", "--keep"])
                    .arg(tar),
            )?;
            media_type += "+gzip";
            blob.as_mut_os_string().push(".gz");
        }
        let descriptor = self.add_blob(&blob, &media_type)?;
        self.layers.push(descriptor);
        Ok(())
    }

    /// Moves a file to the blobs; its descriptor.
    fn add_blob(&mut self, file: &Path, media_type: &str) -> Result<Value, Failure> {
        let digest = self.digest(file)?;
        let failed = |e| format!("cannot add {} to the image: {e}", file.display());
        let size = file.metadata().map_err(failed)?.len();
        fs::rename(file, self.dir.join("blobs/sha256").join(&digest)).map_err(failed)?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size}))
    }

    fn add_document(&mut self, media_type: &str, document: &Value) -> Result<Value, Failure> {
        let file = self.dir.join("document");
        write(&file, &document.to_string())?;
        self.add_blob(&file, media_type)
    }

    /// Adds what describes the layers, and archives it all.
    fn finish(mut self, to: &Path) -> Result<(), Failure> {
        let config = self.add_document(
            "application/vnd.oci.image.config.v1+json",
            &json!({
                "created": CREATED,
                "architecture": "amd64",
                "os": "linux",
                "config": {
                    "Env": [
                        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                        "LANG=C.UTF-8",
                    ],
                    "Cmd": ["bash"],
                    "WorkingDir": "/root",
                },
                "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
                "history": [
                    {"created": CREATED, "created_by": "mmdebstrap"},
                    {"created": CREATED, "created_by": "cargo xtask demo"},
                ],
            }),
        )?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config,
            "layers": self.layers,
        });
        let mut manifest = self.add_document(media_type, &manifest)?;
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        write(&self.dir.join("index.json"), &index.to_string())?;
        write(
            &self.dir.join("oci-layout"),
            &json!({"imageLayoutVersion": "1.0.0"}).to_string(),
        )?;
        set_modes(&self.dir)?;
        self.janitor.run_well(
            Command::new("tar")
                .args(["--create", "--sort=name", "--format=ustar"])
                .args(["--owner=0", "--group=0", "--numeric-owner"])
                .arg(format!("--mtime={TIME}"))
                .arg("--file")
                .arg(to)
                .arg("--directory")
                .arg(&self.dir)
                .args(["oci-layout", "index.json", "blobs"]),
        )?;
        Ok(())
    }

    fn digest(&mut self, file: &Path) -> Result<String, Failure> {
        let output = self.janitor.run_well(Command::new("sha256sum").arg(file))?;
        output
            .stdout
            .split_whitespace()
            .next()
            .map(|text| text.trim_start_matches('\\').to_owned())
            .filter(|text| text.len() == 64)
            .ok_or_else(|| format!("sha256sum gave no digest of {}", file.display()).into())
    }
}
