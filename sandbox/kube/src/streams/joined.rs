//! A client that speaks SPDY, joined to containerd byte by byte: nothing here knows what they say.
//!
//! `kubectl port-forward` has its SPDY in a WebSocket, which is taken off first.

use std::net::IpAddr;

use hyper::{Request, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional_with_sizes,
};

use super::{
    ports, switching, upgraded, upstream,
    websocket::{self, Received},
};
use crate::{failure::Failure, http::Answer};

/// What is carried at once, in each direction.
const PIECE: usize = 64 << 10;
const PROTOCOL: &str = "x-stream-protocol-version";
/// How SPDY in a WebSocket is called, and what is in it.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const IN_TUNNEL: &str = "portforward.k8s.io";

/// Joins a client's SPDY with containerd's.
pub(super) async fn join(mut request: Request<Incoming>, url: &str) -> Result<Answer, Failure> {
    let offered = request.headers().get_all(PROTOCOL).iter();
    let offered = offered.filter_map(|value| value.to_str().ok());
    let offered: Vec<String> = offered
        .flat_map(|value| value.split(','))
        .map(|value| value.trim().to_owned())
        .collect();
    let mut upstream = upstream::open(url, &offered).await?;
    let mut headers = vec![
        ("connection", "Upgrade".to_owned()),
        ("upgrade", "SPDY/3.1".to_owned()),
    ];
    headers.extend(upstream.protocol.take().map(|chosen| (PROTOCOL, chosen)));
    let (client, place) = upgraded(&mut request);
    tokio::spawn(async move {
        let _place = place;
        let Ok(client) = client.await else {
            return;
        };
        let mut client = TokioIo::new(client);
        if client.write_all(&upstream.first).await.is_ok() {
            // How it ends is seen by both sides.
            let _ = copy_bidirectional_with_sizes(&mut client, &mut upstream.stream, PIECE, PIECE)
                .await;
        }
    });
    Ok(switching(&headers))
}

/// The same for SPDY in a WebSocket.
pub(super) async fn tunnel(mut request: Request<Incoming>, url: &str) -> Result<Answer, Failure> {
    let headers = websocket::accept(request.headers(), &[TUNNEL])?.0;
    let mut upstream = upstream::open(url, &[IN_TUNNEL.to_owned()]).await?;
    let (client, place) = upgraded(&mut request);
    tokio::spawn(async move {
        let _place = place;
        if let Ok(client) = client.await {
            let first = upstream.first;
            carry(TokioIo::new(client), &mut upstream.stream, &first).await;
        }
    });
    Ok(switching(&headers))
}

/// Serves a client's ports here, at the pod's address.
pub(super) fn serve(mut request: Request<Incoming>, address: IpAddr) -> Result<Answer, Failure> {
    let offered = request.headers().get_all(PROTOCOL).iter();
    let mut offered = offered.filter_map(|value| value.to_str().ok());
    if !offered.any(|value| value.split(',').any(|one| one.trim() == IN_TUNNEL)) {
        let message = format!("the protocol of ports has to be {IN_TUNNEL}");
        return Err(Failure::bad_request(message));
    }
    let (client, place) = upgraded(&mut request);
    tokio::spawn(async move {
        let _place = place;
        if let Ok(client) = client.await {
            ports::serve(TokioIo::new(client), address).await;
        }
    });
    Ok(switching(&[
        ("connection", "Upgrade".to_owned()),
        ("upgrade", "SPDY/3.1".to_owned()),
        (PROTOCOL, IN_TUNNEL.to_owned()),
    ]))
}

/// The same for SPDY in a WebSocket.
pub(super) fn serve_tunnel(
    mut request: Request<Incoming>,
    address: IpAddr,
) -> Result<Answer, Failure> {
    let headers = websocket::accept(request.headers(), &[TUNNEL])?.0;
    let (client, place) = upgraded(&mut request);
    tokio::spawn(async move {
        let _place = place;
        if let Ok(client) = client.await {
            let (mut near, far) = tokio::io::duplex(PIECE);
            tokio::join!(
                async {
                    carry(TokioIo::new(client), &mut near, &[]).await;
                    drop(near);
                },
                ports::serve(far, address)
            );
        }
    });
    Ok(switching(&headers))
}

/// Carries bytes between a client's WebSocket and whoever understands them.
async fn carry(
    client: impl AsyncRead + AsyncWrite,
    server: &mut (impl AsyncRead + AsyncWrite + Unpin),
    first: &[u8],
) {
    let (from_client, to_client) = tokio::io::split(client);
    let (mut reader, writer) = websocket::halves(from_client, to_client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let down = async {
        if !first.is_empty() && writer.binary(first).await.is_err() {
            return;
        }
        let mut piece = vec![0; PIECE];
        while let Ok(count @ 1..) = from_server.read(&mut piece).await {
            if writer.binary(&piece[..count]).await.is_err() {
                return;
            }
        }
        writer.close().await;
    };
    let up = async {
        while let Ok(received) = reader.next().await {
            let done = match received {
                Received::Message(bytes) => to_server.write_all(&bytes).await.is_err(),
                Received::Ping(bytes) => writer.pong(&bytes).await.is_err(),
                Received::Close => true,
            };
            if done {
                return;
            }
        }
    };
    tokio::select! {
        () = down => {}
        () = up => {}
    }
}
