//! Images made by hand, for the tests of this crate.
//!
//! An image is a list of layers, a layer a list of entries or any bytes; every part can be made
//! wrong before it is written. Archives are written by the `tar` crate, so that our reader is not
//! tested against itself.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::{Value, json};

use crate::{
    digest::Digest,
    image::{Image, ImageError, Location},
};

/// A directory that goes away.
pub(crate) struct Dir(PathBuf);

impl Dir {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pericarp-oci-{name}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = crate::rootfs::remove(&self.0);
    }
}

/// Says loudly that a test does not run; the test command forbids it.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    assert!(
        std::env::var_os("PERICARP_REQUIRE_ALL").is_none_or(|value| value != "1"),
        "{line}"
    );
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

pub(crate) fn program_is_there(test: &str, program: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|directory| directory.join(program).is_file());
    if !found {
        skip(
            test,
            &format!("{program} is missing: apt-get install {package}"),
        );
    }
    found
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// One entry of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) kind: tar::EntryType,
    pub(crate) name: String,
    pub(crate) link: String,
    pub(crate) content: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: (u64, u32),
    pub(crate) device: (u32, u32),
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn at(mut self, seconds: u64) -> Self {
        self.mtime = (seconds, 0);
        self
    }

    pub(crate) fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.xattrs.push((name.to_owned(), value.to_owned()));
        self
    }
}

pub(crate) mod entry {
    //! The kinds of entries.
    use tar::EntryType;

    use super::Entry;

    fn plain(kind: EntryType, name: &str, mode: u32) -> Entry {
        Entry {
            kind,
            name: name.to_owned(),
            link: String::new(),
            content: Vec::new(),
            mode,
            uid: 0,
            gid: 0,
            mtime: (1_000_000_000, 0),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    pub(crate) fn dir(name: &str) -> Entry {
        plain(EntryType::Directory, name, 0o755)
    }

    pub(crate) fn file(name: &str, content: &str) -> Entry {
        let mut entry = plain(EntryType::Regular, name, 0o644);
        entry.content = content.as_bytes().to_vec();
        entry
    }

    pub(crate) fn symlink(name: &str, target: &str) -> Entry {
        let mut entry = plain(EntryType::Symlink, name, 0o777);
        target.clone_into(&mut entry.link);
        entry
    }

    pub(crate) fn hard_link(name: &str, target: &str) -> Entry {
        let mut entry = plain(EntryType::Link, name, 0o644);
        target.clone_into(&mut entry.link);
        entry
    }

    pub(crate) fn fifo(name: &str) -> Entry {
        plain(EntryType::Fifo, name, 0o600)
    }

    pub(crate) fn device(name: &str, major: u32, minor: u32) -> Entry {
        let mut entry = plain(EntryType::Char, name, 0o666);
        entry.device = (major, minor);
        entry
    }
}

/// An archive of entries, long and odd names included.
pub(crate) fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut records: Vec<(String, Vec<u8>)> = entry
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone()))
            .collect();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime.0);
        header.set_size(entry.content.len() as u64);
        header.set_device_major(entry.device.0).unwrap();
        header.set_device_minor(entry.device.1).unwrap();
        if entry.mtime.1 > 0 {
            let text = format!("{}.{:09}", entry.mtime.0, entry.mtime.1);
            records.push(("mtime".into(), text.into()));
        }
        // The crate's own setters refuse hostile names.
        let raw = header.as_old_mut();
        for (field, text, key) in [
            (&mut raw.name, &entry.name, "path"),
            (&mut raw.linkname, &entry.link, "linkpath"),
        ] {
            if text.len() <= field.len() {
                field[..text.len()].copy_from_slice(text.as_bytes());
            } else {
                records.push((key.into(), text.clone().into()));
            }
        }
        let records: Vec<(&str, &[u8])> = records
            .iter()
            .map(|(key, value)| (&key[..], &value[..]))
            .collect();
        if !records.is_empty() {
            builder.append_pax_extensions(records).unwrap();
        }
        header.set_cksum();
        builder.append(&header, &entry.content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// By a program of the system's: not by what is to be tested.
pub(crate) fn compress(program: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(["-c", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output.stdout
}

/// A tree as GNU tar sees it: every name with all there is to it, attributes included.
pub(crate) fn archived(root: &Path) -> Vec<u8> {
    let output = Command::new("sh")
        .args(["-c", ARCHIVE])
        .arg(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// A shell command that does so; `$0` is the root.
pub(crate) const ARCHIVE: &str = "tar --create --sort=name --format=posix --numeric-owner \
    --xattrs --xattrs-include='*' \
    --pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f --directory=\"$0\" .";

/// What is in such an archive, for a person to read.
pub(crate) fn listed(archive: &[u8]) -> String {
    let dir = Dir::new("list");
    let path = dir.path().join("archive");
    fs::write(&path, archive).unwrap();
    let output = Command::new("tar")
        .args([
            "--list",
            "-vv",
            "--full-time",
            "--numeric-owner",
            "--xattrs",
        ])
        .arg("--xattrs-include=*")
        .arg("--file")
        .arg(&path)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image in the making: files of a layout by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Builder {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    pub(crate) config: Value,
    pub(crate) platform: Value,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            config: json!({}),
            platform: json!({"os": "linux", "architecture": "amd64"}),
            ..Self::default()
        }
    }

    pub(crate) fn blob(&mut self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        self.files
            .insert(format!("blobs/sha256/{}", digest.hex()), bytes.to_vec());
        digest.to_string()
    }

    pub(crate) fn layer(mut self, entries: &[Entry]) -> Self {
        let tar = tar_of(entries);
        let blob = tar.clone();
        self.add("application/vnd.oci.image.layer.v1.tar", &blob, &tar);
        self
    }

    pub(crate) fn packed_layer(mut self, entries: &[Entry], program: &str) -> Self {
        let tar = tar_of(entries);
        let media_type = format!("application/vnd.oci.image.layer.v1.tar+{program}");
        self.add(&media_type, &compress(program, &tar), &tar);
        self
    }

    pub(crate) fn add(&mut self, media_type: &str, blob: &[u8], tar: &[u8]) {
        let digest = self.blob(blob);
        self.layers
            .push(json!({"mediaType": media_type, "digest": digest, "size": blob.len()}));
        self.diff_ids.push(Digest::of(tar).to_string());
    }

    /// Writes config and manifest; the manifest's descriptor.
    pub(crate) fn manifest(&mut self) -> Value {
        let mut config = json!({
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
        });
        for (key, value) in self.platform.as_object().unwrap() {
            config[key] = value.clone();
        }
        let config = config.to_string();
        let digest = self.blob(config.as_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest,
                "size": config.len(),
            },
            "layers": self.layers,
        });
        self.descriptor("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    pub(crate) fn descriptor(&mut self, media_type: &str, document: &Value) -> Value {
        let text = document.to_string();
        let digest = self.blob(text.as_bytes());
        json!({"mediaType": media_type, "digest": digest, "size": text.len()})
    }

    pub(crate) fn index(&mut self, manifests: &Value) {
        self.file("oci-layout", r#"{"imageLayoutVersion": "1.0.0"}"#);
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.file("index.json", &index.to_string());
    }

    pub(crate) fn file(&mut self, name: &str, text: &str) {
        self.files.insert(name.to_owned(), text.into());
    }

    /// Everything one image needs.
    pub(crate) fn whole(mut self) -> Self {
        let manifest = self.manifest();
        self.index(&json!([manifest]));
        self
    }

    pub(crate) fn write_layout(&self, directory: &Path) {
        for (name, bytes) in &self.files {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    pub(crate) fn archive(&self) -> Vec<u8> {
        let entries: Vec<Entry> = self
            .files
            .iter()
            .map(|(name, bytes)| {
                let mut entry = entry::file(name, "");
                entry.content.clone_from(bytes);
                entry
            })
            .collect();
        tar_of(&entries)
    }

    /// Opened from an archive.
    pub(crate) fn open(&self, dir: &Dir) -> Result<Image, ImageError> {
        let path = dir.path().join("image.tar");
        fs::write(&path, self.archive()).unwrap();
        Image::open(&Location { path, name: None })
    }
}
