//! The server's half of a WebSocket: the handshake, messages, pings.

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};
use hyper::{HeaderMap, header::HeaderValue};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::Mutex,
};

use super::frames::{Opcode, head, head_of, unmask};
use crate::{failure::Failure, objects::base64};

/// RFC 6455, 1.3.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The largest message of several frames.
const LARGEST: usize = 4 << 20;

/// The headers of an answer.
pub(super) type Handshake = Vec<(&'static str, String)>;

/// Checks a client's handshake; the headers of the answer, and the protocol that both know.
pub(super) fn accept(
    headers: &HeaderMap,
    known: &[&'static str],
) -> Result<(Handshake, &'static str), Failure> {
    let get = |name: &str| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    if get("sec-websocket-version") != Some("13") {
        return Err(Failure::bad_request(
            "only version 13 of WebSockets is there",
        ));
    }
    let key = get("sec-websocket-key").unwrap_or_default();
    if key.len() != 24 {
        return Err(Failure::bad_request("the WebSocket's key is not one"));
    }
    let offered: Vec<&str> = headers
        .get_all("sec-websocket-protocol")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    let chosen = offered
        .iter()
        .find_map(|offered| known.iter().find(|known| *known == offered));
    let Some(chosen) = chosen else {
        let known = known.join(", ");
        return Err(Failure::bad_request(format!(
            "the WebSocket's protocol has to be one of {known}"
        )));
    };
    let proof = digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}{GUID}").as_bytes());
    let headers = vec![
        ("connection", "Upgrade".to_owned()),
        ("upgrade", "websocket".to_owned()),
        ("sec-websocket-accept", base64(proof.as_ref())),
        ("sec-websocket-protocol", (*chosen).to_owned()),
    ];
    Ok((headers, chosen))
}

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    Message(Bytes),
    /// It wants the same back.
    Ping(Bytes),
    Close,
}

/// What comes from a client.
#[derive(Debug)]
pub(super) struct Reader<R> {
    from: R,
    bytes: BytesMut,
    /// A message of which further frames are to come.
    begun: Option<BytesMut>,
}

/// What goes to it. Several tasks may write; messages stay whole.
#[derive(Debug)]
pub(super) struct Writer<W>(Mutex<W>);

/// Both directions of a connection that has switched.
pub(super) fn halves<R: AsyncRead, W: AsyncWrite>(from: R, to: W) -> (Reader<R>, Writer<W>) {
    let reader = Reader {
        from,
        bytes: BytesMut::new(),
        begun: None,
    };
    (reader, Writer(Mutex::new(to)))
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// The next of what it sends.
    ///
    /// # Errors
    /// When the connection ends without a word, or the client breaks the protocol.
    pub(super) async fn next(&mut self) -> io::Result<Received> {
        loop {
            let (last, opcode, payload) = self.frame().await?;
            match opcode {
                Opcode::Close => return Ok(Received::Close),
                Opcode::Ping => return Ok(Received::Ping(payload.freeze())),
                Opcode::Pong => {}
                Opcode::Text | Opcode::Binary | Opcode::Continuation => {
                    let continues = opcode == Opcode::Continuation;
                    let message = match (continues, self.begun.take()) {
                        (true, Some(mut begun)) if begun.len() + payload.len() <= LARGEST => {
                            begun.extend_from_slice(&payload);
                            begun
                        }
                        (false, None) => payload,
                        _ => return Err(io::ErrorKind::InvalidData.into()),
                    };
                    if last {
                        return Ok(Received::Message(message.freeze()));
                    }
                    self.begun = Some(message);
                }
            }
        }
    }

    async fn frame(&mut self) -> io::Result<(bool, Opcode, BytesMut)> {
        loop {
            let found = head(&self.bytes).map_err(io::Error::other)?;
            if let Some(found) = found
                && self.bytes.len() - found.size >= found.length
            {
                self.bytes.advance(found.size);
                let mut payload = self.bytes.split_to(found.length);
                unmask(&mut payload, found.mask);
                return Ok((found.last, found.opcode, payload));
            }
            self.bytes.reserve(32 << 10);
            if self.from.read_buf(&mut self.bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    async fn write(&self, opcode: Opcode, parts: &[&[u8]]) -> io::Result<()> {
        let length = parts.iter().map(|part| part.len()).sum();
        let mut to = self.0.lock().await;
        let mut bytes = head_of(opcode, length);
        for part in parts {
            bytes.extend_from_slice(part);
        }
        to.write_all(&bytes).await?;
        to.flush().await
    }

    /// A message of bytes.
    pub(super) async fn binary(&self, bytes: &[u8]) -> io::Result<()> {
        self.write(Opcode::Binary, &[bytes]).await
    }

    /// A message of one of Kubernetes' channels.
    pub(super) async fn channel(&self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        self.write(Opcode::Binary, &[&[channel], bytes]).await
    }

    /// The answer to a ping.
    pub(super) async fn pong(&self, bytes: &[u8]) -> io::Result<()> {
        self.write(Opcode::Pong, &[bytes]).await
    }

    /// The end, as it should be. Who has gone does not mind.
    pub(super) async fn close(&self) {
        let normal = 1000_u16.to_be_bytes();
        let _ = self.write(Opcode::Close, &[&normal]).await;
        let _ = self.0.lock().await.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_is_proved() {
        let mut headers = HeaderMap::new();
        let mut set = |name, value: &'static str| {
            headers.insert(name, HeaderValue::from_static(value));
        };
        set("sec-websocket-version", "13");
        set("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        set("sec-websocket-protocol", "v9.x, v4.channel.k8s.io");
        let (answer, chosen) = accept(&headers, &["v5.x", "v4.channel.k8s.io"]).unwrap();
        assert_eq!(chosen, "v4.channel.k8s.io");
        // The example of RFC 6455, 1.3.
        assert_eq!(answer[2].1, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(accept(&headers, &["v5.x"]).is_err());
    }

    #[test]
    fn messages_are_put_together() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let frames: &[u8] = &[
            0x02, 0x82, 0, 0, 0, 0, 1, 2, // The beginning of a message,
            0x89, 0x81, 0, 0, 0, 0, 9, // a ping,
            0x80, 0x81, 0, 0, 0, 0, 3, // its end,
            0x88, 0x80, 0, 0, 0, 0, // and the end.
            0x80, 0x80, 0, 0, 0, 0, // The continuation of nothing.
        ];
        let (mut reader, _) = halves(frames, tokio::io::sink());
        runtime.block_on(async {
            let ping = Received::Ping(Bytes::from_static(&[9]));
            assert_eq!(reader.next().await.unwrap(), ping);
            let message = Received::Message(Bytes::from_static(&[1, 2, 3]));
            assert_eq!(reader.next().await.unwrap(), message);
            assert_eq!(reader.next().await.unwrap(), Received::Close);
            assert!(reader.next().await.is_err());
            assert!(reader.next().await.is_err());
        });
    }
}
