//! The authority's two files: its certificate, and its key, which only root can read.
//!
//! The certificate is the truth: it is written last, and without it there is no authority. Before it
//! stands until when it is valid, as text that readers of PEM pass over.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::CertificateError;

const CERTIFICATE: &str = "ca.crt";
const KEY: &str = "ca.key";
const UNTIL: &str = "valid until ";
/// Larger files are not ours.
const LARGEST: u64 = 64 << 10;

/// What is in the files.
pub(super) struct Kept {
    pub(super) certificate: String,
    pub(super) key: String,
    pub(super) until: SystemTime,
}

/// Where the key is.
pub(super) fn key(directory: &Path) -> PathBuf {
    directory.join(KEY)
}

fn at(path: &Path) -> impl Fn(io::Error) -> CertificateError {
    let path = path.to_owned();
    move |source| CertificateError::File {
        path: path.clone(),
        source,
    }
}

/// The authority, if there is one.
pub(super) fn read(directory: &Path) -> Result<Option<Kept>, CertificateError> {
    let path = directory.join(CERTIFICATE);
    let certificate = match text(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(at(&path))?,
    };
    let garbled = |what: &str| CertificateError::Garbled {
        path: path.clone(),
        what: what.to_owned(),
    };
    let (first, pem) = certificate
        .split_once('\n')
        .ok_or_else(|| garbled("is cut short"))?;
    let until = first.strip_prefix(UNTIL);
    let until = until.and_then(|until| humantime::parse_rfc3339(until).ok());
    let until = until.ok_or_else(|| garbled("does not begin with how long it is valid"))?;
    let key = key(directory);
    Ok(Some(Kept {
        certificate: pem.to_owned(),
        key: text(&key).map_err(at(&key))?,
        until,
    }))
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LARGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// Keeps an authority in the place of an earlier one.
pub(super) fn write(directory: &Path, kept: &Kept) -> Result<(), CertificateError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(at(directory))?;
    let until = humantime::format_rfc3339_seconds(kept.until);
    let certificate = format!("{UNTIL}{until}\n{}", kept.certificate);
    replace(&directory.join(KEY), kept.key.as_bytes(), 0o600)?;
    replace(&directory.join(CERTIFICATE), certificate.as_bytes(), 0o644)
}

/// Whole or not at all, whatever happens meanwhile.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CertificateError> {
    let new = path.with_extension("new");
    let written = || {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let directory = path.parent().unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    };
    written().map_err(at(path))
}
