//! gRPC over a unix socket: one question, one answer. Called by `client`. It is synchronous
//! outside; a channel may be used by several threads at once, and each call has its time.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{SendRequest, handshake};
use http::{HeaderMap, Request, StatusCode};
use protobuf::Message;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// Before every message: one byte that says whether it is compressed, four of length.
const PREFIX: usize = 5;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// The socket is not there, or nobody listens.
    #[error("the socket cannot be used")]
    Socket(#[from] io::Error),
    /// The other side speaks no HTTP/2, or went away.
    #[error("the connection failed")]
    Connection(#[from] h2::Error),
    /// It was answered with an error.
    #[error("code {code}: {message}")]
    Refused {
        /// One of gRPC's, such as 5 for what was not found.
        code: u32,
        /// In words.
        message: String,
    },
    /// It was not answered in time.
    #[error("no answer in time")]
    Late,
    /// The answer is none.
    #[error("the answer makes no sense: {0}")]
    Garbled(String),
}

impl CallError {
    /// What the other side says, empty when it says nothing.
    pub fn message(&self) -> &str {
        match self {
            CallError::Refused { message, .. } => message,
            _ => "",
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Channel {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
}

impl Channel {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens, or not in HTTP/2.
    pub fn dial(socket: &Path) -> Result<Self, CallError> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let sender = runtime.block_on(async {
            let stream = UnixStream::connect(socket).await?;
            let (sender, connection) = handshake(stream).await?;
            // How it ended is what the next call is told.
            tokio::spawn(async { drop(connection.await) });
            Ok::<_, CallError>(sender)
        })?;
        Ok(Self { runtime, sender })
    }

    /// Calls `method`, which is `Service/Name` in the package of CRI.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn call<A: Message>(
        &self,
        method: &str,
        question: &impl Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        let body = frame(question)?;
        let exchanged = exchange(self.sender.clone(), method, body);
        let answer = self
            .runtime
            .block_on(async { timeout(limit, exchanged).await })
            .map_err(|_| CallError::Late)??;
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

async fn exchange(
    sender: SendRequest<Bytes>,
    method: &str,
    body: Bytes,
) -> Result<Bytes, CallError> {
    let request = Request::post(format!("http://localhost/runtime.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(io::Error::other)?;
    let (response, mut stream) = sender.ready().await?.send_request(request, false)?;
    stream.send_data(body, true)?;
    let (head, mut body) = response.await?.into_parts();
    if head.status != StatusCode::OK {
        return Err(CallError::Garbled(format!("HTTP status {}", head.status)));
    }
    let mut answer = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
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
    fn what_has_no_status_is_no_answer() {
        let mut trailers = HeaderMap::new();
        assert!(matches!(check(&trailers), Err(CallError::Garbled(_))));
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert("grpc-message", "not%20there".parse().unwrap());
        let error = check(&trailers).unwrap_err();
        assert_eq!(error.to_string(), "code 5: not there");
        trailers.insert("grpc-status", "0".parse().unwrap());
        check(&trailers).unwrap();
    }
}
