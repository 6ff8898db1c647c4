//! containerd's server for streams, on this machine: asks it to go on without HTTP.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::failure::Failure;

/// For its answer: an exec may have to wait for a busy container.
const TIME: Duration = Duration::from_secs(60);
/// A larger head is none of containerd's.
const HEAD: usize = 16 << 10;

/// A connection that has switched.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) stream: TcpStream,
    /// What came with the answer's head.
    pub(super) first: Bytes,
    /// The protocol for streams that was chosen, if one was.
    pub(super) protocol: Option<String>,
}

/// Asks for SPDY at `url`, with these protocols for streams to choose from.
pub(super) async fn open(url: &str, protocols: &[String]) -> Result<Upstream, Failure> {
    match timeout(TIME, ask(url, protocols)).await {
        Ok(done) => done,
        Err(_) => Err(Failure::internal("containerd's streams do not answer")),
    }
}

async fn ask(url: &str, protocols: &[String]) -> Result<Upstream, Failure> {
    let (host, path) = parts(url)?;
    let away = |error: std::io::Error| {
        Failure::internal(format!("containerd's streams at {host}: {error}"))
    };
    let mut stream = TcpStream::connect(host).await.map_err(away)?;
    stream.set_nodelay(true).map_err(away)?;
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         Content-Length: 0\r\n"
    );
    for protocol in protocols {
        // They are a client's words.
        if protocol.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            head.push_str(&format!("X-Stream-Protocol-Version: {protocol}\r\n"));
        }
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.map_err(away)?;
    let mut bytes = BytesMut::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if bytes.len() > HEAD {
            return Err(Failure::internal("containerd's streams answer too much"));
        }
        if stream.read_buf(&mut bytes).await.map_err(away)? == 0 {
            return Err(Failure::internal("containerd's streams hang up"));
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let rest = bytes.split_off(end + 4);
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    let protocol = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let found = name.eq_ignore_ascii_case("x-stream-protocol-version");
        found.then(|| value.trim().to_owned())
    });
    if status.split(' ').nth(1) == Some("101") {
        return Ok(Upstream {
            stream,
            first: rest.freeze(),
            protocol,
        });
    }
    // Its words say why, such as that the token is used up.
    let mut rest = rest;
    while rest.len() < HEAD && stream.read_buf(&mut rest).await.map_err(away)? > 0 {}
    let words = String::from_utf8_lossy(&rest[..rest.len().min(512)]).into_owned();
    Err(Failure::internal(format!(
        "containerd's streams answer {}: {}",
        status.escape_debug(),
        words.trim().escape_debug()
    )))
}

/// Host and path of containerd's address.
fn parts(url: &str) -> Result<(&str, &str), Failure> {
    let odd = || {
        Failure::internal(format!(
            "containerd streams at {}; only plain HTTP on this machine is understood: leave \
             enable_tls_streaming off",
            url.escape_debug()
        ))
    };
    let rest = url.strip_prefix("http://").ok_or_else(odd)?;
    let slash = rest.find('/').ok_or_else(odd)?;
    let (host, path) = rest.split_at(slash);
    let plain = |text: &str| text.bytes().all(|byte| (b'!'..=b'~').contains(&byte));
    match plain(host) && plain(path) {
        true => Ok((host, path)),
        false => Err(odd()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_addresses_are_read() {
        let (host, path) = parts("http://127.0.0.1:41/exec/abc").unwrap();
        assert_eq!((host, path), ("127.0.0.1:41", "/exec/abc"));
        for bad in ["https://a/b", "http://a", "http://a/b c", "http://a/\r\nb"] {
            assert!(parts(bad).is_err(), "{bad}");
        }
    }
}
