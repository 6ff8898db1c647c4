//! The JSON of an image: index, manifest, configuration, and which media types are which.
//!
//! Read by `image`. Unknown members are ignored, as the specification demands; what is absent and
//! has no default makes the whole document wrong.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full name, where `docker save` and BuildKit put only the tag into the other.
const FULL_NAME: &str = "io.containerd.image.name";

/// Points to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) variant: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
}

/// The image's configuration blob.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    #[serde(flatten)]
    pub(crate) platform: Platform,
    /// What a container of it is to be.
    #[serde(default)]
    pub(crate) config: Option<Defaults>,
    pub(crate) rootfs: Rootfs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Rootfs {
    #[serde(default)]
    pub(crate) diff_ids: Vec<Digest>,
}

/// What an image says about the containers made of it. Members that mean nothing here (labels,
/// exposed ports, volumes, health checks) are not read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Defaults {
    /// `user[:group]`, names or numbers; empty: root.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// `KEY=VALUE`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// The words before the command.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The command where none is given.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Absolute path; empty: the root directory.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// Name or number; empty: SIGTERM.
    #[serde(deserialize_with = "or_default")]
    pub stop_signal: String,
}

/// Go writes an empty slice as `null`.
fn or_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// What a blob is, by its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Index,
    Manifest,
    Config,
    Layer(Compression),
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Kind {
    pub(crate) fn of(media_type: &str) -> Option<Self> {
        Some(match media_type {
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => Self::Index,
            "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json" => Self::Manifest,
            "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json" => Self::Config,
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Self::Layer(Compression::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
                Self::Layer(Compression::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Self::Layer(Compression::Zstd),
            _ => return None,
        })
    }
}

impl Platform {
    /// The one platform the guest's kernel runs.
    pub(crate) fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) if !variant.is_empty() => write!(out, "/{variant}"),
            _ => Ok(()),
        }
    }
}

impl Descriptor {
    /// What it may be called by, the fullest first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let annotations = self.annotations.as_ref();
        [FULL_NAME, REF_NAME]
            .into_iter()
            .filter_map(move |key| annotations?.get(key))
            .map(String::as_str)
    }

    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.digest.to_string() == name || self.names().any(|own| own == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_absent_mean_the_default() {
        let defaults: Defaults =
            serde_json::from_str(r#"{"Env": null, "Cmd": ["a"], "Labels": {"x": "y"}}"#).unwrap();
        assert_eq!(
            defaults,
            Defaults {
                cmd: vec!["a".into()],
                ..Defaults::default()
            }
        );
    }

    #[test]
    fn the_configuration_has_its_platform_at_the_top() {
        let config: Config = serde_json::from_str(
            r#"{"os": "linux", "architecture": "arm", "variant": "v7", "rootfs": {"type": "layers"}}"#,
        )
        .unwrap();
        assert_eq!(config.platform.to_string(), "linux/arm/v7");
        assert!(!config.platform.is_ours() && config.config.is_none());
        assert!(serde_json::from_str::<Config>(r#"{"os": "linux"}"#).is_err());
    }

    #[test]
    fn dockers_media_types_are_the_same_things() {
        for (oci, docker) in [
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
            (
                "application/vnd.oci.image.index.v1+json",
                "application/vnd.docker.distribution.manifest.list.v2+json",
            ),
        ] {
            assert_eq!(Kind::of(oci), Kind::of(docker));
            assert!(Kind::of(oci).is_some());
        }
        assert_eq!(
            Kind::of("application/vnd.oci.image.layer.v1.tar+encrypted"),
            None
        );
    }
}
