//! The description of one run, which the host sends to the guest before anything else.
//!
//! Written by `pericarp run`, read by `pericarp-init`. Sent as JSON in one or more `Spec` frames;
//! the guest refuses one larger than [`MAX_SPEC`].

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Frame, MAX_PAYLOAD};

/// Largest description; the kernel's own limit for arguments and environment is of this order.
pub const MAX_SPEC: usize = 4 * 1024 * 1024;

/// What to run, and in which surroundings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// The disk with the root file system.
    pub root: Disk,
    /// Further disks, seen in the guest as `/dev/pericarp/<id>`.
    pub disks: Vec<Disk>,
    /// Host name of the guest.
    pub hostname: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment, in order.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// What the command may use.
    pub limits: Limits,
}

/// A disk, known by the serial that its backend reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Serial, at most [`crate::MAX_DISK_ID`] bytes.
    pub id: String,
    /// Mount or use it read-only.
    pub read_only: bool,
}

/// The command's own limits, held inside the guest; the machine is larger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub milli_cpus: Option<u32>,
    /// Bytes.
    pub memory: Option<u64>,
}

/// Why a description cannot be used.
#[derive(Debug, Error)]
pub enum SpecError {
    /// It is larger than [`MAX_SPEC`].
    #[error("the command line and environment are larger than {MAX_SPEC} bytes")]
    TooLarge,
    /// It is no JSON of this shape.
    #[error("the description of the run cannot be read")]
    Json(#[from] serde_json::Error),
}

impl RunSpec {
    /// The frames that carry this description.
    ///
    /// # Errors
    ///
    /// It is too large.
    pub fn frames(&self) -> Result<Vec<Frame>, SpecError> {
        let bytes = serde_json::to_vec(self)?;
        if bytes.len() > MAX_SPEC {
            return Err(SpecError::TooLarge);
        }
        let mut frames: Vec<Frame> = bytes
            .chunks(MAX_PAYLOAD)
            .map(|part| Frame::Spec(part.to_vec()))
            .collect();
        frames.push(Frame::Spec(Vec::new()));
        Ok(frames)
    }

    /// Reads a description from its collected parts.
    ///
    /// # Errors
    ///
    /// It is no description.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > MAX_SPEC {
            return Err(SpecError::TooLarge);
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(argument: String) -> RunSpec {
        RunSpec {
            root: Disk {
                id: "root".into(),
                read_only: true,
            },
            disks: vec![Disk {
                id: "disk1".into(),
                read_only: false,
            }],
            hostname: "pericarp".into(),
            argv: vec!["/bin/true".into(), argument],
            env: vec![("PATH".into(), "/bin".into())],
            cwd: "/".into(),
            limits: Limits {
                milli_cpus: Some(500),
                memory: None,
            },
        }
    }

    #[test]
    fn a_long_command_travels_in_parts() {
        let sent = spec("x".repeat(3 * MAX_PAYLOAD));
        let frames = sent.frames().unwrap();
        assert_eq!(frames.len(), 5);
        assert_eq!(frames.last(), Some(&Frame::Spec(vec![])));
        let bytes: Vec<u8> = frames
            .into_iter()
            .flat_map(|frame| match frame {
                Frame::Spec(part) => part,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(RunSpec::from_bytes(&bytes).unwrap(), sent);
    }

    #[test]
    fn what_is_too_large_or_strange_is_refused() {
        assert!(matches!(
            spec("x".repeat(MAX_SPEC)).frames(),
            Err(SpecError::TooLarge)
        ));
        assert!(matches!(
            RunSpec::from_bytes(b"{}"),
            Err(SpecError::Json(_))
        ));
        let mut json: serde_json::Value = serde_json::to_value(spec(String::new())).unwrap();
        json["surprise"] = 1.into();
        assert!(RunSpec::from_bytes(json.to_string().as_bytes()).is_err());
    }
}
