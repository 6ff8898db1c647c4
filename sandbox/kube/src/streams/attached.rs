//! A WebSocket with a container's streams, translated to containerd's SPDY.
//!
//! The client's channels are numbered: standard input, output, error output, how it ended, the size
//! of the terminal. In version 5 channel 255 ends one of them. containerd's streams have names.

use std::time::Duration;

use bytes::BytesMut;
use hyper::{Request, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::tcp::OwnedWriteHalf,
    sync::Mutex,
    time::timeout,
};

use super::{
    Wanted,
    spdy::{Encoder, Frame, decode},
    switching, upgraded,
    upstream::{self, Upstream},
    websocket::{self, Reader, Received, Writer},
};
use crate::{failure::Failure, http::Answer};

const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
/// The version of streams over SPDY in which the error stream holds a Status.
const OVER_SPDY: &str = "v4.channel.k8s.io";

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// A client says goodbye in this time, or is left.
const FAREWELL: Duration = Duration::from_secs(5);

/// A stream of containerd's, by the channel it is for the client.
fn number(channel: u8) -> u32 {
    // The first is the error stream, which containerd needs at once; ours are odd.
    let index = match channel {
        ERROR => 0,
        STDIN => 1,
        STDOUT => 2,
        STDERR => 3,
        _ => 4,
    };
    2 * index + 1
}

fn channel(stream: u32) -> Option<u8> {
    let all = [ERROR, STDOUT, STDERR];
    all.into_iter().find(|channel| number(*channel) == stream)
}

fn streams(wanted: &Wanted) -> impl Iterator<Item = (u8, &'static str)> {
    [
        (true, ERROR, "error"),
        (wanted.stdin, STDIN, "stdin"),
        (wanted.stdout, STDOUT, "stdout"),
        (wanted.stderr, STDERR, "stderr"),
        (wanted.tty, RESIZE, "resize"),
    ]
    .into_iter()
    .filter_map(|(is, channel, name)| is.then_some((channel, name)))
}

/// Joins a WebSocket with the streams at `url`.
pub(super) async fn attach(
    mut request: Request<Incoming>,
    url: &str,
    wanted: &Wanted,
) -> Result<Answer, Failure> {
    let (headers, version) = websocket::accept(request.headers(), &[V5, V4])?;
    let upstream = upstream::open(url, &[OVER_SPDY.to_owned()]).await?;
    if upstream.protocol.as_deref() != Some(OVER_SPDY) {
        return Err(Failure::internal(
            "containerd's streams are of another version",
        ));
    }
    let (client, place) = upgraded(&mut request);
    let wanted = *wanted;
    let ends = version == V5;
    tokio::spawn(async move {
        let _place = place;
        if let Ok(client) = client.await {
            carry(TokioIo::new(client), upstream, &wanted, ends).await;
        }
    });
    Ok(switching(&headers))
}

/// containerd's side, to which both directions write: pings are answered in between.
struct Server {
    to: Mutex<OwnedWriteHalf>,
    encoder: Encoder,
}

impl Server {
    async fn write(&self, frame: &[u8]) -> std::io::Result<()> {
        self.to.lock().await.write_all(frame).await
    }
}

async fn carry(
    client: impl AsyncRead + AsyncWrite + Send,
    upstream: Upstream,
    wanted: &Wanted,
    ends: bool,
) {
    let (from_client, to_client) = tokio::io::split(client);
    let (mut reader, writer) = websocket::halves(from_client, to_client);
    let (mut from_server, mut to_server) = upstream.stream.into_split();
    let mut encoder = Encoder::default();
    for (channel, name) in streams(wanted) {
        let frame = encoder.open(number(channel), name);
        if to_server.write_all(&frame).await.is_err() {
            return;
        }
    }
    let server = Server {
        to: Mutex::new(to_server),
        encoder,
    };
    let bytes = BytesMut::from(&upstream.first[..]);
    tokio::select! {
        () = down(&mut from_server, bytes, &writer, &server, wanted) => {
            writer.close().await;
            // What it still says is not of interest, but that it has seen the end is.
            let farewell = async { while let Ok(Received::Message(_)) = reader.next().await {} };
            let _ = timeout(FAREWELL, farewell).await;
        }
        () = up(&mut reader, &writer, &server, wanted, ends) => {}
    }
}

/// From containerd to the client, until all has been said.
async fn down<W: AsyncWrite + Unpin>(
    from: &mut (impl AsyncRead + Unpin),
    mut bytes: BytesMut,
    writer: &Writer<W>,
    server: &Server,
    wanted: &Wanted,
) {
    let mut open: Vec<u8> = streams(wanted)
        .map(|(channel, _)| channel)
        .filter(|channel| [STDOUT, STDERR, ERROR].contains(channel))
        .collect();
    let mut was_told = false;
    while !open.is_empty() {
        let frame = match decode(&mut bytes) {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                bytes.reserve(64 << 10);
                match from.read_buf(&mut bytes).await {
                    Ok(1..) => continue,
                    _ => break,
                }
            }
            Err(why) => {
                log::warn!("{why}");
                break;
            }
        };
        let (stream, ended) = match frame {
            Frame::Data(stream, data, last) => {
                let Some(channel) = channel(stream) else {
                    continue;
                };
                was_told |= channel == ERROR && !data.is_empty();
                let sent = data.is_empty() || writer.channel(channel, &data).await.is_ok();
                if !sent {
                    return;
                }
                (stream, last)
            }
            Frame::Reset(stream) => (stream, true),
            Frame::Ping(id) => {
                // Even ones are containerd's own.
                if id.is_multiple_of(2) && server.write(&server.encoder.ping(id)).await.is_err() {
                    break;
                }
                continue;
            }
            Frame::GoAway => break,
            Frame::Open(..) | Frame::Other => continue,
        };
        if ended {
            open.retain(|channel| number(*channel) != stream);
        }
    }
    if !was_told {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "reason": "InternalError", "code": 500,
            "message": "containerd ended the streams without saying how the command ended",
        });
        let _ = writer.channel(ERROR, status.to_string().as_bytes()).await;
    }
}

/// From the client to containerd, until it has gone.
async fn up<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: &mut Reader<R>,
    writer: &Writer<W>,
    server: &Server,
    wanted: &Wanted,
    ends: bool,
) {
    let mut stdin = wanted.stdin;
    loop {
        let message = match reader.next().await {
            Ok(Received::Message(message)) => message,
            Ok(Received::Ping(bytes)) => match writer.pong(&bytes).await {
                Ok(()) => continue,
                Err(_) => return,
            },
            Ok(Received::Close) | Err(_) => return,
        };
        let Some((channel, bytes)) = message.split_first() else {
            continue;
        };
        let frame = match (*channel, bytes) {
            (STDIN, bytes) if stdin && !bytes.is_empty() => {
                server.encoder.data(number(STDIN), bytes, false)
            }
            (RESIZE, bytes) if wanted.tty => server.encoder.data(number(RESIZE), bytes, false),
            (CLOSE, [STDIN]) if ends && stdin => {
                stdin = false;
                server.encoder.data(number(STDIN), &[], true)
            }
            // What nobody asked for is not passed on.
            _ => continue,
        };
        if server.write(&frame).await.is_err() {
            // How it ended is on its way in the other direction.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_and_streams_are_the_same_things() {
        for channel_of in [ERROR, STDOUT, STDERR] {
            assert_eq!(channel(number(channel_of)), Some(channel_of));
        }
        let wanted = Wanted {
            stdin: true,
            stdout: true,
            stderr: false,
            tty: true,
        };
        let names: Vec<&str> = streams(&wanted).map(|(_, name)| name).collect();
        assert_eq!(names, ["error", "stdin", "stdout", "resize"]);
    }
}
