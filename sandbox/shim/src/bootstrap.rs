//! How a shim begins: containerd calls it with `start`, and reads from its output where the one
//! that serves can be reached.
//!
//! There are three ways of that. containerd 1.x reads an address, 2.x JSON (which it announces with
//! `MAX_SHIM_VERSION`), and from 2.3 on it writes a message to standard input and reads one. All
//! containers of a pod have one shim: it is named by the pod, so that `start` for a container finds
//! what `start` for the pod has made.

use std::{
    fs,
    io::{IsTerminal, Read},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use protobuf::Message;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    RUNTIME,
    arguments::Arguments,
    bundle::Bundle,
    error::{ShimError, during},
    events::TTRPC_ADDRESS,
    stamps::BEGAN,
};

/// Where shims listen. A socket's path has 107 bytes, and a digest takes 64.
const SOCKETS: &str = "/run/containerd/s";
/// The task service that we speak at most; 2 is the same under another name.
const VERSION: u32 = 3;
/// As much as containerd says at most.
const MAX_INPUT: u64 = 10 << 20;
/// Beside the bundle's other files; containerd reads it when it is started anew.
const ADDRESS_FILE: &str = "address";

/// How containerd wants to be answered.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Address,
    Json(u32),
    Message,
}

impl Reply {
    fn of(params: Option<&BootstrapParams>, max_version: Option<&str>) -> Self {
        match (params, max_version) {
            (Some(_), _) => Self::Message,
            (None, Some(max)) => Self::Json(max.trim().parse().unwrap_or(VERSION).min(VERSION)),
            (None, None) => Self::Address,
        }
    }

    fn with(&self, address: &str) -> Result<Vec<u8>, ShimError> {
        Ok(match self {
            Self::Address => address.as_bytes().to_vec(),
            Self::Json(version) => {
                json!({"version": version, "address": address, "protocol": "ttrpc"})
                    .to_string()
                    .into_bytes()
            }
            Self::Message => {
                let result = BootstrapResult {
                    version: VERSION as i32,
                    address: address.to_owned(),
                    protocol: "ttrpc".to_owned(),
                    ..BootstrapResult::default()
                };
                encoded(&result)?
            }
        })
    }
}

fn encoded(message: &impl Message) -> Result<Vec<u8>, ShimError> {
    message
        .write_to_bytes()
        .map_err(|error| ShimError::Machine(format!("an answer cannot be written: {error}")))
}

/// What `-info` answers.
pub(crate) fn info() -> Result<Vec<u8>, ShimError> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    encoded(&RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: Some(version).into(),
        ..RuntimeInfo::default()
    })
}

/// Starts the shim that serves this container, unless it is one of a pod that has one, and gives
/// the answer for containerd. This process began at `began`.
pub(crate) fn start(arguments: &Arguments, began: Duration) -> Result<Vec<u8>, ShimError> {
    let params = params(&read_input()?, arguments);
    let max_version = std::env::var("MAX_SHIM_VERSION").ok();
    let reply = Reply::of(params.as_ref(), max_version.as_deref());
    let mut events = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let mut sockets = PathBuf::from(SOCKETS);
    if let Some(params) = &params {
        if !params.containerd_ttrpc_address.is_empty() {
            events.clone_from(&params.containerd_ttrpc_address);
        }
        if let Some(directory) = params.socket_dir.as_ref().filter(|dir| !dir.is_empty()) {
            sockets = directory.into();
        }
    }
    let bundle = match arguments.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(during("the bundle"))?,
        false => arguments.bundle.clone(),
    };
    let pod = Bundle::read(&bundle)?.pod_id(&arguments.id);
    let socket = sockets.join(name(&arguments.address, &arguments.namespace, &pod));
    let address = format!("unix://{}", socket.display());
    if UnixStream::connect(&socket).is_err() {
        if pod != arguments.id {
            return Err(ShimError::NotFound(format!(
                "the pod {pod} has no shim: its machine has ended"
            )));
        }
        serve(arguments, &bundle, &socket, (&events, began))?;
    }
    let file = bundle.join(ADDRESS_FILE);
    fs::write(&file, &address).map_err(during(file.display()))?;
    reply.with(&address)
}

fn read_input() -> Result<Vec<u8>, ShimError> {
    let input = std::io::stdin();
    let mut bytes = Vec::new();
    // Started by hand there is nothing to read.
    if !input.is_terminal() {
        let read = input.lock().take(MAX_INPUT).read_to_end(&mut bytes);
        read.map_err(during("standard input"))?;
    }
    Ok(bytes)
}

/// containerd before 2.3 writes its runtime options there, which decode as this message, too, but
/// do not name our container.
fn params(input: &[u8], arguments: &Arguments) -> Option<BootstrapParams> {
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| {
            params.instance_id == arguments.id && params.namespace == arguments.namespace
        })
}

/// The name of a socket, which is what containerd's own shims would make of these three.
fn name(address: &str, namespace: &str, pod: &str) -> String {
    let place = Path::new(address).join(namespace).join(pod);
    let digest = Sha256::digest(place.to_string_lossy().as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the arguments of the shim that serves this pod have in them, and those of no other action.
pub(crate) fn serving(namespace: &str, pod: &str) -> Vec<u8> {
    format!("\0-namespace\0{namespace}\0-id\0{pod}\0").into_bytes()
}

/// Leaves a copy of this program behind, whose standard input is the socket. Nothing else of ours
/// stays open in it: containerd reads our output to its end.
fn serve(
    arguments: &Arguments,
    bundle: &Path,
    socket: &Path,
    (events, began): (&str, Duration),
) -> Result<(), ShimError> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).map_err(during(directory.display()))?;
    }
    // Nobody listens there: we have just asked.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(during(socket.display())(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(during(socket.display()))?;
    let program = std::env::current_exe().map_err(during("this program"))?;
    let mut command = Command::new(program);
    // In the order of `serving`.
    command
        .args(["-namespace", &arguments.namespace, "-id", &arguments.id])
        .args(["-address", &arguments.address])
        .args(["-publish-binary", &arguments.publish_binary]);
    if arguments.debug {
        command.arg("-debug");
    }
    command
        .current_dir(bundle)
        .env(TTRPC_ADDRESS, events)
        .env(BEGAN, began.as_nanos().to_string())
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map_err(during("a copy of this program"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_named_as_others_name_it() {
        assert_eq!(
            name("/run/containerd/containerd.sock", "default", "123"),
            "0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0"
        );
    }

    #[test]
    fn every_containerd_is_answered_in_its_own_way() {
        let address = "unix:///run/containerd/s/x";
        let old = Reply::of(None, None);
        assert_eq!(old.with(address).unwrap(), address.as_bytes());
        for (said, version) in [("2", 2), ("3", 3), ("4", 3), ("?", 3)] {
            let reply = Reply::of(None, Some(said)).with(address).unwrap();
            let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
            assert_eq!(
                reply,
                json!({"version": version, "address": address, "protocol": "ttrpc"})
            );
        }
        let arguments = Arguments {
            id: "a".into(),
            namespace: "n".into(),
            ..Arguments::default()
        };
        let params = |id: &str| {
            let params = BootstrapParams {
                instance_id: id.into(),
                namespace: "n".into(),
                ..BootstrapParams::default()
            };
            super::params(&params.write_to_bytes().unwrap(), &arguments)
        };
        // Options of an older containerd decode, too.
        assert!(params("types.containerd.io/options").is_none());
        let reply = Reply::of(params("a").as_ref(), Some("3"));
        let reply = BootstrapResult::parse_from_bytes(&reply.with(address).unwrap()).unwrap();
        assert_eq!((reply.version, reply.address.as_str()), (3, address));
    }

    #[test]
    fn what_it_is_can_be_asked() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!(info.name, RUNTIME);
    }
}
