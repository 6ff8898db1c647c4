//! Ports of a pod that has a machine of its own.
//!
//! containerd forwards to the loopback interface of a pod's network namespace, where a machine does
//! not listen. So the client's SPDY ends here, and each of its connections is made to the pod's
//! address. What listens on the guest's loopback interface alone is not reached, and the client is
//! told that nobody answers.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc::{Receiver, Sender, channel},
    task::JoinSet,
    time::timeout,
};

use super::{
    headers::Headers,
    spdy::{Encoder, Frame, decode},
};

/// For a connection to the pod.
const CONNECT: Duration = Duration::from_secs(10);
/// So many at once for one client.
const CONNECTIONS: usize = 256;
/// Pieces that wait for a slow pod, and for a slow client.
const WAITING: usize = 16;
const PIECE: usize = 32 << 10;

/// One connection, which has two streams; either may come first.
struct Half {
    port: u16,
    error: Option<u32>,
    data: Option<(u32, Receiver<Bytes>)>,
}

/// A client's connections.
struct Forward {
    address: IpAddr,
    headers: Headers,
    encoder: Encoder,
    halves: HashMap<String, Half>,
    /// What the client sends, by its stream.
    streams: HashMap<u32, Sender<Bytes>>,
    connections: JoinSet<()>,
    to: Sender<Vec<u8>>,
}

/// Serves a client that speaks SPDY until it has gone.
pub(super) async fn serve(client: impl AsyncRead + AsyncWrite, address: IpAddr) {
    let (mut from, mut to) = tokio::io::split(client);
    let (sender, mut frames) = channel::<Vec<u8>>(WAITING);
    let write = async {
        while let Some(frame) = frames.recv().await {
            if to.write_all(&frame).await.is_err() || to.flush().await.is_err() {
                return;
            }
        }
    };
    let mut forward = Forward {
        address,
        headers: Headers::new(),
        encoder: Encoder::default(),
        halves: HashMap::new(),
        streams: HashMap::new(),
        connections: JoinSet::new(),
        to: sender,
    };
    tokio::select! {
        ended = forward.read(&mut from) => {
            if let Err(error) = ended {
                log::debug!("a client that forwards ports: {error}");
            }
        }
        () = write => {}
    }
}

impl Forward {
    async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let mut bytes = BytesMut::new();
        loop {
            while let Some(frame) = decode(&mut bytes).map_err(io::Error::other)? {
                match frame {
                    Frame::Open(stream, block) => self.open(stream, &block).await?,
                    Frame::Data(stream, data, last) => {
                        if let Some(to) = self.streams.get(&stream)
                            && !data.is_empty()
                        {
                            // Who does not listen any more has said so.
                            let _ = to.send(data).await;
                        }
                        if last {
                            self.streams.remove(&stream);
                        }
                    }
                    Frame::Reset(stream) => drop(self.streams.remove(&stream)),
                    // The client's own have odd numbers.
                    Frame::Ping(id) if !id.is_multiple_of(2) => {
                        self.say(self.encoder.ping(id)).await?;
                    }
                    Frame::GoAway => return Ok(()),
                    Frame::Ping(_) | Frame::Other => {}
                }
            }
            while self.connections.try_join_next().is_some() {}
            bytes.reserve(PIECE);
            if from.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn say(&self, frame: Vec<u8>) -> io::Result<()> {
        let sent = self.to.send(frame).await;
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    async fn open(&mut self, stream: u32, block: &[u8]) -> io::Result<()> {
        let headers = self.headers.read(block).map_err(io::Error::other)?;
        let get = |name: &str| {
            let found = headers.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.as_str()).unwrap_or_default()
        };
        let port = get("port").parse().ok().filter(|port| *port != 0);
        let (request, of) = (get("requestid"), get("streamtype"));
        let full = self.connections.len() + self.halves.len() >= CONNECTIONS;
        let Some(port) = port.filter(|_| !full && ["error", "data"].contains(&of)) else {
            return self.say(self.encoder.refuse(stream)).await;
        };
        let half = self.halves.entry(request.to_owned()).or_insert(Half {
            port,
            error: None,
            data: None,
        });
        if of == "error" {
            half.error = Some(stream);
        } else {
            let (sender, receiver) = channel(WAITING);
            half.data = Some((stream, receiver));
            self.streams.insert(stream, sender);
        }
        let whole = half.error.is_some() && half.data.is_some();
        let reply = self.encoder.reply(stream);
        self.say(reply).await?;
        if whole
            && let Some(half) = self.halves.remove(request)
            && let (Some(error), Some((data, received))) = (half.error, half.data)
        {
            let address = SocketAddr::new(self.address, half.port);
            let to = self.to.clone();
            let streams = (error, data);
            self.connections
                .spawn(connect(address, streams, received, to));
        }
        Ok(())
    }
}

/// One connection, from its beginning to its end.
async fn connect(
    address: SocketAddr,
    (error, data): (u32, u32),
    mut received: Receiver<Bytes>,
    to: Sender<Vec<u8>>,
) {
    // These frames have no headers, of which an encoder knows the state.
    let encoder = Encoder::default();
    let connected = timeout(CONNECT, TcpStream::connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let stream = match connected {
        Ok(stream) => stream,
        Err(why) => {
            let words = format!("{address}: {why}");
            let _ = to.send(encoder.data(error, words.as_bytes(), true)).await;
            let _ = to.send(encoder.data(data, &[], true)).await;
            return;
        }
    };
    let _ = stream.set_nodelay(true);
    let (mut from_pod, mut to_pod) = stream.into_split();
    let up = async {
        while let Some(bytes) = received.recv().await {
            if to_pod.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to_pod.shutdown().await;
    };
    let down = async {
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = from_pod.read(&mut piece).await {
            let frame = encoder.data(data, &piece[..count], false);
            if to.send(frame).await.is_err() {
                return;
            }
        }
        let _ = to.send(encoder.data(data, &[], true)).await;
        let _ = to.send(encoder.data(error, &[], true)).await;
    };
    tokio::join!(up, down);
}
