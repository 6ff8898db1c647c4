//! The metrics over HTTP: one document, for whoever scrapes it.
//!
//! Everything is bounded: clients at once, the length of a request, the time of each and of its answer.
//! What several ask for at a time is looked at once, and kept for a moment: clients in a loop do not
//! have the kernel go through all pods' memory all the time. A client is told nothing about this machine
//! but the metrics.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::text;
use crate::{
    commands::Refusal,
    failure::during,
    input::problem::Problem,
    observe::{self, Kept},
};

/// Clients at once; more are turned away.
const MOST: usize = 8;
/// The longest request, with its headers.
const LONGEST: usize = 8 << 10;
/// For a request to come, for those that look before it, and for its whole answer to be taken.
const LIMIT: Duration = Duration::from_secs(5);
/// For how long what was seen is told to others.
const FRESH: Duration = Duration::from_secs(1);
/// Between two tries to be the one who looks.
const TURN: Duration = Duration::from_millis(10);
/// When there are no descriptors or threads.
const MOMENT: Duration = Duration::from_millis(100);

/// What is scraped; none where others did not come to an end in time.
type Source = dyn Fn() -> Option<String> + Send + Sync;

/// What was seen last.
#[derive(Default)]
struct Seen {
    text: Option<(Instant, String)>,
    kept: Kept,
}

impl Seen {
    /// The last text, or a new one where that has become old.
    fn text(&mut self, look: impl FnOnce(&mut Kept) -> String) -> String {
        if let Some((at, text)) = &self.text
            && at.elapsed() < FRESH
        {
            return text.clone();
        }
        let text = look(&mut self.kept);
        self.text = Some((Instant::now(), text.clone()));
        text
    }
}

/// Serves until the process is ended.
pub(super) fn serve(address: SocketAddr) -> Result<(), Refusal> {
    let listener = TcpListener::bind(address).map_err(|error| {
        let rule = format!("cannot be listened at: {error}");
        Problem::new("--listen", address.to_string(), rule, "give another one")
    })?;
    let bound = listener.local_addr().map_err(during("the socket"))?;
    eprintln!("pericarp metrics: listens at http://{bound}/metrics");
    let one_at_a_time = Mutex::new(Seen::default());
    let source = move || {
        let mut seen = lock_within(&one_at_a_time, LIMIT)?;
        Some(seen.text(|kept| text::text(&observe::look(Some(kept)))))
    };
    accept(&listener, &(Arc::new(source) as Arc<Source>));
    Ok(())
}

fn lock_within<T>(one_at_a_time: &Mutex<T>, limit: Duration) -> Option<MutexGuard<'_, T>> {
    let end = Instant::now() + limit;
    loop {
        match one_at_a_time.try_lock() {
            Ok(locked) => return Some(locked),
            Err(TryLockError::Poisoned(error)) => return Some(error.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(TURN),
            Err(TryLockError::WouldBlock) => return None,
        }
    }
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
    let request = request(&mut stream)?;
    let (status, kind, body) = match parse(&request) {
        Some(("GET" | "HEAD", "/metrics")) => match source() {
            Some(text) => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text),
            None => {
                let rule = "others are being answered\n";
                ("503 Service Unavailable", "text/plain", rule.to_owned())
            }
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
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    if !request.starts_with(b"HEAD ") {
        answer += &body;
    }
    write_within(&mut stream, answer.as_bytes(), LIMIT)
}

/// Writes all of it, or gives up a client that does not take it in this time.
fn write_within(stream: &mut TcpStream, mut rest: &[u8], limit: Duration) -> io::Result<()> {
    let end = Instant::now() + limit;
    while !rest.is_empty() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
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

    fn served(text: Option<&'static str>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let source: Arc<Source> = Arc::new(move || text.map(str::to_owned));
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
        let address = served(Some("pericarp_pods 1\n"));
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
    fn who_would_wait_too_long_is_told_so() {
        let answer = ask(served(None), "GET /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        let mutex = Mutex::new(7);
        let held = lock_within(&mutex, LIMIT).unwrap();
        assert!(lock_within(&mutex, Duration::ZERO).is_none());
        drop(held);
        assert_eq!(lock_within(&mutex, Duration::ZERO).as_deref(), Some(&7));
    }

    #[test]
    fn what_was_seen_just_now_is_not_looked_for_again() {
        let mut seen = Seen {
            // Of the future, however slow this is.
            text: Some((Instant::now() + 60 * FRESH, "one".into())),
            ..Seen::default()
        };
        assert_eq!(seen.text(|_| "two".into()), "one");
        seen.text = None;
        assert_eq!(seen.text(|_| "two".into()), "two");
        assert_eq!(seen.text.map(|(_, text)| text).as_deref(), Some("two"));
    }

    #[test]
    fn who_does_not_take_an_answer_is_left() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_deaf, _) = listener.accept().unwrap();
        // More than the kernel keeps for the two.
        let long = vec![b'x'; 64 << 20];
        write_within(&mut client, &long, TURN).unwrap_err();
        write_within(&mut client, b"", Duration::ZERO).unwrap();
    }

    #[test]
    fn the_silent_and_the_endless_keep_nobody_out() {
        let address = served(Some("pericarp_pods 1\n"));
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
