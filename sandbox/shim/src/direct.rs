//! Volumes that a storage driver leaves to the pod's machine: Kata's `direct-volume` convention. The
//! driver mounts nothing; it says in a file which device the volume is, and the guest mounts that.
//!
//! ```text
//! /run/kata-containers/shared/direct-volumes/<volume's path, base64url>/mountInfo.json
//! {"volume-type": "block", "device": "/dev/sdb", "fstype": "ext4", "options": ["noatime"],
//!  "metadata": {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"}}
//! ```
//!
//! Asked by `spec` for each source of a bind mount. The files are root's, as the device nodes are.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use pericarp_api::VOLUME_KINDS;
use serde_json::Value;

use crate::{
    bundle::refused,
    error::{ShimError, during},
    subpath,
};

const PLACE: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";
/// No such file is longer.
const LONGEST: u64 = 64 << 10;
/// What a file system can do with more of them is not known.
const MOST_OPTIONS: usize = 64;

/// What such a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Direct {
    /// The directory that it is about.
    pub(crate) volume: PathBuf,
    /// What of it is wanted; empty: all.
    pub(crate) inside: String,
    /// Where that is said.
    pub(crate) file: PathBuf,
    /// A block device, or an image.
    pub(crate) device: PathBuf,
    pub(crate) kind: String,
    pub(crate) options: Vec<String>,
    /// Who is to have access to all of it; whether nothing is done where the top is theirs.
    pub(crate) group: Option<(u32, bool)>,
}

impl Direct {
    pub(crate) fn read_only(&self) -> bool {
        self.options.iter().any(|option| option == "ro")
    }
}

/// What is said of this volume, or of the one that this is a part of, if anything is.
pub(crate) fn find(path: &Path) -> Result<Option<Direct>, ShimError> {
    let place = Path::new(PLACE);
    match subpath::of(path) {
        None => find_in(place, path),
        Some(part) => {
            let found = find_in(place, &part.volume)?;
            let inside = part.inside;
            Ok(found.map(|direct| Direct { inside, ..direct }))
        }
    }
}

fn find_in(place: &Path, volume: &Path) -> Result<Option<Direct>, ShimError> {
    let file = place
        .join(base64url(volume.as_os_str().as_bytes()))
        .join(FILE);
    let mut text = Vec::new();
    let read = File::open(&file).and_then(|open| open.take(LONGEST + 1).read_to_end(&mut text));
    match read {
        Ok(_) => {}
        // A longer name is that of no directory.
        Err(error) if [ErrorKind::NotFound, ErrorKind::InvalidFilename].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(during(file.display())(error)),
    }
    if text.len() as u64 > LONGEST {
        let rule = format!("is longer than {LONGEST} bytes");
        return Err(refused(&file.display().to_string(), &rule));
    }
    parse(volume, &file, &text).map(Some)
}

fn parse(volume: &Path, file: &Path, text: &[u8]) -> Result<Direct, ShimError> {
    let wrong = |rule: &str| refused(&file.display().to_string(), rule);
    let all: Value =
        serde_json::from_slice(text).map_err(|error| wrong(&format!("is no JSON: {error}")))?;
    let field = |name: &str| {
        let value = all[name].as_str().filter(|value| !value.contains('\0'));
        value.ok_or_else(|| wrong(&format!("{name}: is missing or no text")))
    };
    match field("volume-type")? {
        "block" => {}
        other => {
            return Err(wrong(&format!(
                "volume-type: '{other}' is none of ours: block is"
            )));
        }
    }
    let device = Path::new(field("device")?);
    if !device.is_absolute() {
        let rule = format!("device: '{}' is no absolute path", device.display());
        return Err(wrong(&rule));
    }
    let kind = field("fstype")?;
    if !VOLUME_KINDS.contains(&kind) {
        let known = VOLUME_KINDS.join(", ");
        let rule = format!("fstype: '{kind}' is not known to the guest's kernel: {known} are");
        return Err(wrong(&rule));
    }
    let options = options(&all["options"]).ok_or_else(|| {
        wrong(&format!(
            "options: is no list of at most {MOST_OPTIONS} texts without commas"
        ))
    })?;
    Ok(Direct {
        volume: volume.to_owned(),
        inside: String::new(),
        file: file.to_owned(),
        device: device.to_owned(),
        kind: kind.to_owned(),
        options,
        group: group(&all["metadata"]).map_err(|rule| wrong(&rule))?,
    })
}

fn options(list: &Value) -> Option<Vec<String>> {
    let one = |option: &Value| {
        let text = option.as_str()?;
        let is_one = !text.is_empty() && !text.contains([',', '\0']);
        is_one.then(|| text.to_owned())
    };
    match list {
        Value::Null => Some(Vec::new()),
        Value::Array(all) if all.len() <= MOST_OPTIONS => all.iter().map(one).collect(),
        _ => None,
    }
}

/// Kata's metadata: nothing else of it changes what a container sees.
fn group(metadata: &Value) -> Result<Option<(u32, bool)>, String> {
    let all = match metadata {
        Value::Null => return Ok(None),
        Value::Object(all) => all,
        _ => return Err("metadata: is no object".into()),
    };
    let (mut group, mut on_mismatch) = (None, false);
    for (name, value) in all {
        let wrong = |rule: &str| Err(format!("metadata: {name}: {value} {rule}"));
        match (name.as_str(), value.as_str()) {
            ("fsGroup", Some(number)) => match number.parse() {
                // The kernel takes the largest number for "unchanged".
                Ok(id) if id != u32::MAX => group = Some(id),
                _ => return wrong("is no group"),
            },
            ("fsGroupChangePolicy", Some("OnRootMismatch")) => on_mismatch = true,
            ("fsGroupChangePolicy", Some("Always" | "")) => on_mismatch = false,
            ("fsGroup" | "fsGroupChangePolicy", _) => {
                return wrong("is none of: a number as a text, OnRootMismatch, Always");
            }
            _ => log::warn!("a direct volume's metadata '{name}' does not mean anything here"),
        }
    }
    Ok(group.map(|id| (id, on_mismatch)))
}

/// RFC 4648, 5: with padding, as Go's `base64.URLEncoding` has it.
fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let at = |index: usize| u32::from(three.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 0x3f;
            text.push(match digit > three.len() {
                true => '=',
                false => char::from(DIGITS[value as usize]),
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn paths_are_encoded_as_katas_are() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("/a?>b", "L2E_PmI="),
            (
                "/var/lib/kubelet/pods/1/volumes/x/mount",
                "L3Zhci9saWIva3ViZWxldC9wb2RzLzEvdm9sdW1lcy94L21vdW50",
            ),
        ] {
            assert_eq!(base64url(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn a_volume_is_what_its_file_says() {
        let place = std::env::temp_dir().join(format!("pericarp-direct-{}", std::process::id()));
        let volume = Path::new("/var/lib/v");
        assert_eq!(find_in(&place, volume).unwrap(), None);
        let long = PathBuf::from(format!("/{}", "x".repeat(300)));
        assert_eq!(find_in(&place, &long).unwrap(), None);
        let directory = place.join("L3Zhci9saWIvdg==");
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(find_in(&place, volume).unwrap(), None);
        let file = directory.join("mountInfo.json");
        let text = r#"{"volume-type": "block", "device": "/dev/sdb", "fstype": "ext4",
            "metadata": {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch", "x": "y"},
            "options": ["ro", "noatime"]}"#;
        fs::write(&file, text).unwrap();
        let found = find_in(&place, volume).unwrap().unwrap();
        let said = Direct {
            volume: volume.to_owned(),
            inside: String::new(),
            file: file.clone(),
            device: "/dev/sdb".into(),
            kind: "ext4".into(),
            options: vec!["ro".into(), "noatime".into()],
            group: Some((1000, true)),
        };
        assert_eq!(found, said);
        assert!(found.read_only());
        fs::write(&file, vec![b' '; 65537]).unwrap();
        let error = find_in(&place, volume).unwrap_err().to_string();
        assert!(
            error.ends_with("mountInfo.json: is longer than 65536 bytes"),
            "{error}"
        );
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn wrong_files_are_refused_in_a_line() {
        let file = |members: &str| {
            let usual = r#""volume-type": "block", "device": "/d", "fstype": "ext4""#;
            format!("{{{usual}{members}}}")
        };
        // The last member of a name holds.
        for (text, said) in [
            ("{".to_owned(), "is no JSON: EOF"),
            ("[]".to_owned(), "volume-type: is missing or no text"),
            (
                file(r#", "volume-type": "vfio""#),
                "volume-type: 'vfio' is none of ours: block is",
            ),
            (
                file(r#", "device": "sdb""#),
                "device: 'sdb' is no absolute path",
            ),
            (file(r#", "device": 7"#), "device: is missing or no text"),
            (
                file(r#", "fstype": "zfs""#),
                "fstype: 'zfs' is not known to the guest's kernel: ext4, xfs are",
            ),
            (file(r#", "options": "ro""#), "options: is no list"),
            (file(r#", "options": ["a,b"]"#), "options: is no list"),
            (file(r#", "metadata": []"#), "metadata: is no object"),
            (
                file(r#", "metadata": {"fsGroup": "-1"}"#),
                "metadata: fsGroup: \"-1\" is no group",
            ),
            (
                file(r#", "metadata": {"fsGroupChangePolicy": "Never"}"#),
                "metadata: fsGroupChangePolicy: \"Never\" is none of",
            ),
        ] {
            let error = parse(Path::new("/v"), Path::new("/f"), text.as_bytes()).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with(&format!("/f: {said}")), "{error}");
        }
        let found = parse(Path::new("/v"), Path::new("/f"), file("").as_bytes()).unwrap();
        assert_eq!((found.options.len(), found.group), (0, None));
        assert!(!found.read_only());
    }
}
