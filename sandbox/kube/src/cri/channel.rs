//! gRPC over a unix socket: one question, one answer. Called by `client`.
//!
//! It is synchronous outside, may be used by any number of threads at once, and each call has its
//! time. A connection that ended is made again by the next call: containerd may be restarted under
//! running pods.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{SendRequest, handshake};
use http::{HeaderMap, Request, StatusCode};
use protobuf::Message;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Before every message: one byte that says whether it is compressed, four of length.
const PREFIX: usize = 5;
/// gRPC's code of a server that is not there now.
const UNAVAILABLE: u32 = 14;
/// gRPC's code of what was not found.
const NOT_FOUND: u32 = 5;
/// An answer may have so many bytes: a list of thousands of containers has fewer.
const LARGEST: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// The socket is not there, or nobody listens.
    #[error("containerd's socket cannot be used")]
    Socket(#[from] io::Error),
    /// The other side speaks no HTTP/2, or went away.
    #[error("the connection to containerd failed")]
    Connection(#[from] h2::Error),
    /// It was answered with an error; what containerd says.
    #[error("{message}")]
    Refused {
        /// One of gRPC's, such as 5 for what was not found.
        code: u32,
        /// In words.
        message: String,
    },
    /// It was not answered in time.
    #[error("containerd does not answer in time")]
    Late,
    /// The answer is none.
    #[error("containerd's answer makes no sense: {0}")]
    Garbled(String),
}

impl CallError {
    /// Whether containerd is away, or not ready yet: what it was asked for says nothing then.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Socket(_) | Self::Connection(_) | Self::Late => true,
            Self::Refused { code, message } => {
                *code == UNAVAILABLE || message.contains("server is not initialized yet")
            }
            Self::Garbled(_) => false,
        }
    }

    /// What containerd says, empty when it says nothing.
    pub fn message(&self) -> &str {
        match self {
            Self::Refused { message, .. } => message,
            _ => "",
        }
    }

    /// Whether what was asked about does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == NOT_FOUND)
    }
}

type Sender = SendRequest<Bytes>;

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    sender: Mutex<Option<Sender>>,
}

impl Shared {
    fn current(&self) -> Option<Sender> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.clone()
    }

    fn replace(&self, by: Option<Sender>) {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = by;
    }

    /// A connection that is good for one call as far as one can know.
    async fn ready(&self) -> Result<Sender, CallError> {
        if let Some(sender) = self.current() {
            match sender.ready().await {
                Ok(sender) => return Ok(sender),
                Err(_) => self.replace(None),
            }
        }
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = handshake(stream).await?;
        // How it ended is what the next call is told.
        tokio::spawn(async { drop(connection.await) });
        let sender = sender.ready().await?;
        self.replace(Some(sender.clone()));
        Ok(sender)
    }
}

/// Connections to one socket, one at a time.
#[derive(Debug)]
pub(super) struct Channel {
    shared: Arc<Shared>,
    handle: Handle,
    /// The thread that moves the bytes ends with this.
    _end: oneshot::Sender<()>,
}

impl Channel {
    /// A channel to this socket. Nobody needs to listen yet.
    pub(super) fn new(socket: &Path) -> Result<Self, CallError> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("cri".into())
            .spawn(move || runtime.block_on(async { drop(ended.await) }))?;
        let shared = Shared {
            socket: socket.to_owned(),
            sender: Mutex::new(None),
        };
        Ok(Self {
            shared: Arc::new(shared),
            handle,
            _end: end,
        })
    }

    /// Calls `method`, which is `Service/Name` in the package of CRI.
    pub(super) fn call<A: Message>(
        &self,
        method: &str,
        question: &impl Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        let body = frame(question)?;
        let shared = Arc::clone(&self.shared);
        let method = method.to_owned();
        let (say, hear) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            let exchanged = exchange(&shared, &method, body);
            let answer = timeout(limit, exchanged).await;
            // Whoever asked waits for it.
            let _ = say.send(answer.unwrap_or(Err(CallError::Late)));
        });
        let answer = hear.recv().unwrap_or(Err(CallError::Late))?;
        A::parse_from_bytes(&answer).map_err(|error| CallError::Garbled(error.to_string()))
    }
}

fn frame(message: &impl Message) -> Result<Bytes, CallError> {
    let bytes = message.write_to_bytes().map_err(io::Error::other)?;
    let mut frame = BytesMut::with_capacity(PREFIX + bytes.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(bytes.len()).map_err(io::Error::other)?);
    frame.put_slice(&bytes);
    Ok(frame.freeze())
}

async fn exchange(shared: &Shared, method: &str, body: Bytes) -> Result<Bytes, CallError> {
    let request = Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(io::Error::other)?;
    let mut sender = shared.ready().await?;
    let (response, mut stream) = sender.send_request(request, false)?;
    stream.send_data(body, true)?;
    let (head, mut body) = response.await?.into_parts();
    if head.status != StatusCode::OK {
        return Err(CallError::Garbled(format!("HTTP status {}", head.status)));
    }
    let mut answer = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        if answer.len() + chunk.len() > LARGEST {
            return Err(CallError::Garbled("it is too long".into()));
        }
        answer.extend_from_slice(&chunk);
    }
    // What is refused at once has trailers in the place of headers.
    check(&body.trailers().await?.unwrap_or(head.headers))?;
    unframe(answer.freeze())
}

fn check(trailers: &HeaderMap) -> Result<(), CallError> {
    let text = |name: &str| trailers.get(name).map(|value| value.as_bytes());
    let code = text("grpc-status").and_then(|code| str::from_utf8(code).ok()?.parse().ok());
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(CallError::Refused {
            code,
            message: decoded(text("grpc-message").unwrap_or_default()),
        }),
        None => Err(CallError::Garbled("it has no status".into())),
    }
}

fn unframe(mut answer: Bytes) -> Result<Bytes, CallError> {
    let bad = |why: &str| Err(CallError::Garbled(why.into()));
    let Some((&[compressed, a, b, c, d], rest)) = answer.split_first_chunk::<PREFIX>() else {
        return bad("it is cut short");
    };
    if compressed != 0 {
        return bad("it is compressed");
    }
    if rest.len() != u32::from_be_bytes([a, b, c, d]) as usize {
        return bad("it is not one message");
    }
    Ok(answer.split_off(PREFIX))
}

/// Messages are percent-encoded.
fn decoded(message: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(message.len());
    let mut rest = message;
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|hex| str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(value) if byte == b'%' => {
                bytes.push(value);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::proto::{VersionRequest, VersionResponse};

    #[test]
    fn messages_are_decoded() {
        assert_eq!(decoded(b"a%22b%22 100% %e2%82%ac"), "a\"b\" 100% \u{20ac}");
    }

    #[test]
    fn an_answer_is_one_whole_message() {
        let whole = Bytes::from_static(&[0, 0, 0, 0, 2, 7, 8]);
        assert_eq!(unframe(whole.clone()).unwrap(), &[7, 8][..]);
        for wrong in [whole.slice(..6), whole.slice(..4), whole.slice(1..)] {
            assert!(matches!(unframe(wrong), Err(CallError::Garbled(_))));
        }
    }

    #[test]
    fn codes_say_whether_containerd_is_away() {
        let mut trailers = HeaderMap::new();
        assert!(matches!(check(&trailers), Err(CallError::Garbled(_))));
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "not%20there".parse().unwrap());
        let error = check(&trailers).unwrap_err();
        assert_eq!(error.to_string(), "not there");
        assert!(error.is_not_found() && !error.is_away());
        trailers.insert("grpc-status", "14".parse().unwrap());
        assert!(check(&trailers).unwrap_err().is_away());
        trailers.insert("grpc-status", "0".parse().unwrap());
        check(&trailers).unwrap();
    }

    #[test]
    fn a_socket_that_nobody_listens_at_is_an_error_at_once() {
        let channel = Channel::new(Path::new("/nowhere/c.sock")).unwrap();
        let answer: Result<VersionResponse, _> = channel.call(
            "RuntimeService/Version",
            &VersionRequest::new(),
            Duration::from_secs(5),
        );
        assert!(matches!(answer, Err(CallError::Socket(_))));
    }
}
