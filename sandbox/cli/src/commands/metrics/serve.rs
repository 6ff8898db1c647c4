//! The metrics over HTTP: one document, for whoever scrapes it.
//!
//! Everything is bounded: clients at once, the length of a request, the time of each. What several ask
//! for at a time is looked at by one after the other. A client is told nothing about this machine but
//! the metrics.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::text;
use crate::{
    commands::Refusal,
    failure::{Failure, during},
    input::problem::Problem,
    observe,
};

/// Clients at once; more are turned away.
const MOST: usize = 8;
/// The longest request, with its headers.
const LONGEST: usize = 8 << 10;
/// For a request to come, and for each part of an answer to be taken.
const LIMIT: Duration = Duration::from_secs(5);
/// When there are no descriptors or threads.
const MOMENT: Duration = Duration::from_millis(100);

/// What is scraped.
type Source = dyn Fn() -> Result<String, Failure> + Send + Sync;

/// Serves until the process is ended.
pub(super) fn serve(address: SocketAddr) -> Result<(), Refusal> {
    let listener = TcpListener::bind(address).map_err(|error| {
        let rule = format!("cannot be listened at: {error}");
        Problem::new("--listen", address.to_string(), rule, "give another one")
    })?;
    let bound = listener.local_addr().map_err(during("the socket"))?;
    eprintln!("pericarp metrics: listens at http://{bound}/metrics");
    let one_at_a_time = Mutex::new(());
    let source = move || {
        let _turn = one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        observe::look(true).map(|pods| text::text(&pods))
    };
    accept(&listener, &(Arc::new(source) as Arc<Source>));
    Ok(())
}

fn accept(listener: &TcpListener, source: &Arc<Source>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(MOMENT);
            continue;
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MOST {
            clients.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (source, of_thread) = (Arc::clone(source), Arc::clone(&clients));
        let answer = move || {
            // Who does not ask properly, or does not listen, is let go.
            let _ = answer(stream, &*source);
            of_thread.fetch_sub(1, Ordering::Relaxed);
        };
        if thread::Builder::new().spawn(answer).is_err() {
            clients.fetch_sub(1, Ordering::Relaxed);
            thread::sleep(MOMENT);
        }
    }
}

fn answer(mut stream: TcpStream, source: &Source) -> io::Result<()> {
    stream.set_write_timeout(Some(LIMIT))?;
    let request = request(&mut stream)?;
    let (status, kind, body) = match parse(&request) {
        Some(("GET" | "HEAD", "/metrics")) => match source() {
            Ok(text) => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text),
            Err(error) => (
                "500 Internal Server Error",
                "text/plain",
                format!("{error}\n"),
            ),
        },
        Some(("GET" | "HEAD", _)) => {
            let cure = "metrics are at /metrics\n";
            ("404 Not Found", "text/plain", cure.to_owned())
        }
        Some(_) => {
            let rule = "only GET is known here\n";
            ("405 Method Not Allowed", "text/plain", rule.to_owned())
        }
        None => (
            "400 Bad Request",
            "text/plain",
            "this is no request\n".to_owned(),
        ),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    if !request.starts_with(b"HEAD ") {
        stream.write_all(body.as_bytes())?;
    }
    Ok(())
}

/// All up to the empty line that ends the headers.
fn request(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + LIMIT;
    let mut request = Vec::new();
    let mut bytes = [0; 1024];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => request.extend_from_slice(&bytes[..count]),
        }
    }
    Ok(request)
}

/// Method and path, without what follows a question mark.
fn parse(request: &[u8]) -> Option<(&str, &str)> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let path = target.split('?').next()?;
    (version.starts_with("HTTP/1.") && words.next().is_none()).then_some((method, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let source: Arc<Source> = Arc::new(|| Ok("pericarp_pods 1\n".to_owned()));
        thread::spawn(move || accept(&listener, &source));
        address
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn who_asks_is_answered() {
        let address = served();
        let answer = ask(address, "GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("Content-Length: 16\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\npericarp_pods 1\n"), "{answer}");
        let answer = ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.ends_with("Connection: close\r\n\r\n"), "{answer}");
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("noise\r\n\r\n", "400"),
        ] {
            let answer = ask(address, request);
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer}"
            );
        }
    }

    #[test]
    fn the_silent_and_the_endless_keep_nobody_out() {
        let address = served();
        let silent: Vec<_> = (0..MOST - 1)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        // Longer than any request may be: the connection ends without an answer.
        let mut endless = TcpStream::connect(address).unwrap();
        let _ = endless.write_all(&vec![b'x'; 4 * LONGEST]);
        let mut rest = Vec::new();
        let _ = endless.read_to_end(&mut rest);
        assert!(rest.is_empty());
        drop(endless);
        let answer = loop {
            let mut stream = TcpStream::connect(address).unwrap();
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
            let mut answer = String::new();
            // The thread of the one before may still be ending.
            if stream.read_to_string(&mut answer).is_ok() && !answer.is_empty() {
                break answer;
            }
        };
        assert!(answer.contains(" 200 "), "{answer}");
        drop(silent);
    }
}
