//! Opens an image: finds the one manifest that is meant and reads what it says, all of it checked.
//!
//! Called by whoever runs containers, first. Accepts a directory with an OCI layout or a tar of
//! one (`oci-archive`). Every document is bounded in size and has the digest it is named by;
//! layers are only located here, `rootfs` reads them. Nothing is written.

mod error;
mod manifest;
mod store;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

pub use error::ImageError;
pub use manifest::Defaults;
use manifest::{Config, Descriptor, Index, Kind, Manifest, Platform};
use serde::{Deserialize, de::DeserializeOwned};

pub(crate) use self::{manifest::Compression, store::Span};
use crate::digest::Digest;
use store::Store;

/// Largest index, manifest or configuration: registries refuse larger ones.
const MOST_JSON: u64 = 4 << 20;
/// Docker stops at 127.
const MOST_LAYERS: usize = 1024;
/// Indexes inside indexes: one is common, two have been seen.
const MOST_NESTED: usize = 4;
/// Names shown in a message.
const MOST_NAMES: usize = 20;

/// Where an image is, as given on a command line: `PATH` or `PATH:NAME`.
///
/// A path that exists is all path, colons and all. Otherwise it ends at the first colon before
/// which something exists, and the rest is the name: the image's reference as its index has it, or
/// the digest of its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The directory or archive.
    pub path: PathBuf,
    /// Which of its images.
    pub name: Option<String>,
}

/// An image whose parts are all there and fit together; the content of its layers is not yet read.
#[derive(Debug)]
pub struct Image {
    store: Store,
    digest: Digest,
    defaults: Defaults,
    layers: Vec<Layer>,
}

/// One layer, lowest first.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) digest: Digest,
    size: u64,
    pub(crate) compression: Compression,
    /// Of the tar in it.
    pub(crate) diff_id: Digest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutMark {
    image_layout_version: String,
}

impl Location {
    /// Takes the two parts apart.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let whole = || Self {
            path: text.into(),
            name: None,
        };
        if Path::new(text).exists() {
            return whole();
        }
        text.match_indices(':')
            .map(|(at, _)| (&text[..at], &text[at + 1..]))
            .find(|(path, name)| !name.is_empty() && Path::new(path).exists())
            .map_or_else(whole, |(path, name)| Self {
                path: path.into(),
                name: Some(name.to_owned()),
            })
    }
}

impl Image {
    /// Reads everything but the layers.
    pub fn open(location: &Location) -> Result<Self, ImageError> {
        let path = &location.path;
        let store = Store::open(path)?;
        let mark: LayoutMark = top(&store, "oci-layout")?;
        if mark.image_layout_version != "1.0.0" {
            let version = mark.image_layout_version.chars().take(32).collect();
            return Err(ImageError::Version(version));
        }
        let index: Index = top(&store, "index.json")?;
        let descriptor = choose(&store, path, index, location.name.as_deref())?;
        let manifest: Manifest = document(&store, "manifest", &descriptor)?;
        if Kind::of(&manifest.config.media_type) != Some(Kind::Config) {
            return Err(ImageError::MediaType {
                what: "configuration",
                media_type: printable(&manifest.config.media_type),
                rule: "it is no container image but something else stored like one",
            });
        }
        let config: Config = document(&store, "configuration", &manifest.config)?;
        if !config.platform.is_ours() {
            return Err(ImageError::Platform {
                found: printable(&config.platform.to_string()),
            });
        }
        Ok(Self {
            layers: layers(&store, &manifest, &config.rootfs.diff_ids)?,
            store,
            digest: descriptor.digest,
            defaults: config.config.unwrap_or_default(),
        })
    }

    /// Of the manifest: the same digest is the same image.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What the image says about containers made of it.
    #[must_use]
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// Bytes of all layers as they are stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(crate) fn layer_blob(&self, layer: &Layer) -> Result<Span, ImageError> {
        self.store.blob("layer", layer.digest, layer.size)
    }
}

/// The layers as manifest and configuration name them together; each must be there.
fn layers(
    store: &Store,
    manifest: &Manifest,
    diff_ids: &[Digest],
) -> Result<Vec<Layer>, ImageError> {
    if manifest.layers.len() > MOST_LAYERS {
        return Err(ImageError::TooMany {
            what: "layers",
            most: MOST_LAYERS,
        });
    }
    if manifest.layers.len() != diff_ids.len() {
        return Err(ImageError::LayerCount {
            layers: manifest.layers.len(),
            diff_ids: diff_ids.len(),
        });
    }
    manifest
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(descriptor, &diff_id)| {
            let Some(Kind::Layer(compression)) = Kind::of(&descriptor.media_type) else {
                return Err(ImageError::MediaType {
                    what: "layer",
                    media_type: printable(&descriptor.media_type),
                    rule: "layers are read as tar, tar+gzip and tar+zstd, not encrypted",
                });
            };
            store.blob("layer", descriptor.digest, descriptor.size)?;
            Ok(Layer {
                digest: descriptor.digest,
                size: descriptor.size,
                compression,
                diff_id,
            })
        })
        .collect()
}

/// The manifest that is meant: by name where one is given, then by platform.
fn choose(
    store: &Store,
    path: &Path,
    index: Index,
    wanted: Option<&str>,
) -> Result<Descriptor, ImageError> {
    let mut entries = index.manifests;
    if let Some(wanted) = wanted {
        let names = names(&entries);
        entries.retain(|entry| entry.is_called(wanted));
        if entries.is_empty() {
            return Err(ImageError::NoSuch {
                path: path.to_owned(),
                wanted: printable(wanted),
                names,
            });
        }
    }
    let mut usable = ours(entries)?;
    if usable.len() > 1 {
        return Err(ImageError::Several {
            path: path.to_owned(),
            names: names(&usable),
        });
    }
    for _ in 0..=MOST_NESTED {
        // Of several variants of one platform, the one that names none runs everywhere.
        let at = usable.iter().position(|entry| {
            entry
                .platform
                .as_ref()
                .is_none_or(|it| it.variant.is_none())
        });
        let entry = usable.swap_remove(at.unwrap_or(0));
        match Kind::of(&entry.media_type) {
            Some(Kind::Manifest) => return Ok(entry),
            Some(Kind::Index) => {
                let index: Index = document(store, "index", &entry)?;
                usable = ours(index.manifests)?;
            }
            _ => {
                return Err(ImageError::MediaType {
                    what: "manifest",
                    media_type: printable(&entry.media_type),
                    rule: "manifests and indexes of OCI and of docker (schema 2) are read",
                });
            }
        }
    }
    Err(ImageError::TooMany {
        what: "indexes inside each other",
        most: MOST_NESTED,
    })
}

/// The entries that may be for our platform, at least one, each digest once.
fn ours(mut entries: Vec<Descriptor>) -> Result<Vec<Descriptor>, ImageError> {
    if entries.is_empty() {
        return Err(ImageError::Missing("manifest in its index".to_owned()));
    }
    let found = listed(entries.iter().filter_map(|entry| {
        let platform = entry.platform.as_ref().map(Platform::to_string);
        // Build records are stored beside images as if for a machine of this name.
        platform.filter(|text| text != "unknown/unknown")
    }));
    // Without a platform here, the configuration has it.
    entries.retain(|entry| entry.platform.as_ref().is_none_or(Platform::is_ours));
    let mut seen = std::collections::HashSet::new();
    entries.retain(|entry| seen.insert(entry.digest));
    if entries.is_empty() {
        return Err(ImageError::Platform { found });
    }
    Ok(entries)
}

fn names(entries: &[Descriptor]) -> String {
    listed(entries.iter().map(|entry| {
        let name = entry.names().next().map(str::to_owned);
        name.unwrap_or_else(|| entry.digest.to_string())
    }))
}

fn listed(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.map(|name| printable(&name)).collect();
    names.dedup();
    let more = names.len().saturating_sub(MOST_NAMES);
    names.truncate(MOST_NAMES);
    let mut text = names.join(", ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    if text.is_empty() {
        text += "nothing that has a name";
    }
    text
}

/// Text from an image, safe to print on a terminal and not endless.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .take(200)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn top<T: DeserializeOwned>(store: &Store, name: &str) -> Result<T, ImageError> {
    let what = format!("file {name}");
    let span = store
        .find(name)?
        .ok_or_else(|| ImageError::Missing(what.clone()))?;
    let bytes = read_small(&what, span)?;
    serde_json::from_slice(&bytes).map_err(|source| ImageError::Json { what, source })
}

/// A JSON blob, of the size and the digest its descriptor says.
fn document<T: DeserializeOwned>(
    store: &Store,
    what: &'static str,
    descriptor: &Descriptor,
) -> Result<T, ImageError> {
    let digest = descriptor.digest;
    let name = format!("{what} {digest}");
    let bytes = read_small(&name, store.blob(what, digest, descriptor.size)?)?;
    let found = Digest::of(&bytes);
    if found != digest {
        return Err(ImageError::Damaged {
            what,
            named: digest,
            found,
        });
    }
    serde_json::from_slice(&bytes).map_err(|source| ImageError::Json { what: name, source })
}

fn read_small(what: &str, mut span: Span) -> Result<Vec<u8>, ImageError> {
    let size = span.len();
    if size > MOST_JSON {
        return Err(ImageError::TooLarge {
            what: what.to_owned(),
            size,
            most: MOST_JSON,
        });
    }
    let mut bytes = Vec::new();
    span.read_to_end(&mut bytes)
        .map_err(|source| ImageError::Read {
            path: what.into(),
            source,
        })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
