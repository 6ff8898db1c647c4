//! Asks a container something, or tells it: by a command in it, over HTTP, or by a connection.
//! Called by `probes` and for hooks.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use super::spec::{Container, Handler, HttpGet, TcpSocket};
use crate::cri::Client;

/// So much of an answer is looked at, and told to people.
const SHOWN: usize = 1024;

/// Why the answer is not that all is well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It is not, as this says.
    Bad(String),
    /// Nobody knows: containerd is away.
    Unknown,
}

impl From<String> for Wrong {
    fn from(words: String) -> Self {
        Self::Bad(words)
    }
}

/// Whom to ask.
#[derive(Clone, Debug)]
pub(super) struct Whom<'a> {
    pub(super) client: &'a Client,
    pub(super) container: &'a Container,
    pub(super) id: &'a str,
    /// The pod's address.
    pub(super) ip: &'a str,
}

impl Whom<'_> {
    /// Asks, and waits so long for an answer.
    pub(super) fn ask(&self, how: &Handler, limit: Duration) -> Result<(), Wrong> {
        if let Some(exec) = &how.exec {
            self.exec(&exec.command, limit)
        } else if let Some(get) = &how.http_get {
            Ok(self.get(get, limit)?)
        } else if let Some(tcp) = &how.tcp_socket {
            Ok(self.connect(tcp, limit)?)
        } else if let Some(sleep) = &how.sleep {
            let seconds = u64::try_from(sleep.seconds).unwrap_or_default();
            std::thread::sleep(Duration::from_secs(seconds).min(limit));
            Ok(())
        } else {
            Ok(())
        }
    }

    fn exec(&self, command: &[String], limit: Duration) -> Result<(), Wrong> {
        let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).max(1);
        let output = self.client.exec_sync(self.id, command, seconds);
        let output = output.map_err(|error| match error.is_away() {
            true => Wrong::Unknown,
            false => Wrong::Bad(format!("command {command:?}: {error}")),
        })?;
        if output.code == 0 {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said[..said.len().min(SHOWN)]).into_owned();
        match said.trim() {
            "" => Err(format!("command {command:?} exited with {}", output.code).into()),
            said => Err(said.to_owned().into()),
        }
    }

    fn dial(&self, host: &str, port: u16, limit: Duration) -> io::Result<TcpStream> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, limit) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connect(&self, tcp: &TcpSocket, limit: Duration) -> Result<(), String> {
        let port = self.container.port(&tcp.port);
        let port = port.ok_or_else(|| format!("couldn't find port: {:?}", tcp.port))?;
        let host = tcp.host.as_deref().unwrap_or(self.ip);
        let dialed = self.dial(host, port, limit);
        dialed
            .map(drop)
            .map_err(|error| format!("dial tcp {host}:{port}: {error}"))
    }

    fn get(&self, get: &HttpGet, limit: Duration) -> Result<(), String> {
        let port = self.container.port(&get.port);
        let port = port.ok_or_else(|| format!("couldn't find port: {:?}", get.port))?;
        let host = get.host.as_deref().filter(|host| !host.is_empty());
        let host = host.unwrap_or(self.ip);
        let request = request(get, host, port);
        let place = format!("http://{host}:{port}{}", path(get));
        let answer = self.dial(host, port, limit).and_then(|mut stream| {
            stream.write_all(request.as_bytes())?;
            head(&mut stream, Instant::now() + limit)
        });
        let head = answer.map_err(|error| format!("Get \"{place}\": {error}"))?;
        match code(&head) {
            Some(200..400) => Ok(()),
            Some(code) => Err(format!("HTTP probe failed with statuscode: {code}")),
            None => Err(format!("Get \"{place}\": malformed HTTP response")),
        }
    }
}

fn path(get: &HttpGet) -> String {
    let said = get.path.as_deref().unwrap_or_default();
    match said.starts_with('/') {
        true => said.to_owned(),
        false => format!("/{said}"),
    }
}

fn request(get: &HttpGet, host: &str, port: u16) -> String {
    let plain = |text: &str| text.replace(['\r', '\n'], " ");
    let mut request = format!("GET {} HTTP/1.1\r\n", plain(&path(get)).replace(' ', "%20"));
    let said = |name: &str| {
        let mut all = get.http_headers.iter();
        all.any(|one| one.name.eq_ignore_ascii_case(name))
    };
    if !said("host") {
        let _ = write!(request, "Host: {host}:{port}\r\n");
    }
    if !said("user-agent") {
        request.push_str("User-Agent: kube-probe/1.32\r\n");
    }
    if !said("accept") {
        request.push_str("Accept: */*\r\n");
    }
    for header in &get.http_headers {
        let _ = write!(
            request,
            "{}: {}\r\n",
            plain(&header.name),
            plain(&header.value)
        );
    }
    request.push_str("Connection: close\r\n\r\n");
    request
}

/// The first line of an answer, as far as it comes in time.
fn head(stream: &mut TcpStream, end: Instant) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut part = [0; 256];
    while head.len() < SHOWN && !head.contains(&b'\n') {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(read) => head.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}

fn code(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let line = str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("HTTP/1.")?;
    rest.split(' ').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::spec::{NameValue, PortName};
    use std::net::TcpListener;
    use std::path::Path;

    fn ask(how: &Handler) -> Result<(), String> {
        let words = |wrong| match wrong {
            Wrong::Bad(words) => words,
            Wrong::Unknown => "unknown".into(),
        };
        asked(how).map_err(words)
    }

    fn asked(how: &Handler) -> Result<(), Wrong> {
        let client = Client::connect(Path::new("/nowhere")).unwrap();
        let container = Container::default();
        let whom = Whom {
            client: &client,
            container: &container,
            id: "id",
            ip: "127.0.0.1",
        };
        whom.ask(how, Duration::from_secs(2))
    }

    fn get(answer: &'static str) -> (Result<(), String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut byte = [0];
            while !asked.ends_with(b"\r\n\r\n") {
                stream.read_exact(&mut byte).unwrap();
                asked.push(byte[0]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(asked).unwrap()
        });
        let header = NameValue {
            name: "X-A".into(),
            value: "b\r\nX: c".into(),
        };
        let get = HttpGet {
            path: Some("health?a b".into()),
            port: PortName::Number(port),
            http_headers: vec![header],
            ..HttpGet::default()
        };
        let how = Handler {
            http_get: Some(get),
            ..Handler::default()
        };
        let answer = ask(&how);
        (answer, server.join().unwrap())
    }

    #[test]
    fn answers_over_http() {
        let (answer, asked) = get("HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(answer, Ok(()));
        assert!(
            asked.starts_with("GET /health?a%20b HTTP/1.1\r\nHost: 127.0.0.1:"),
            "{asked}"
        );
        assert!(asked.contains("\r\nX-A: b  X: c\r\n"), "{asked}");
        let bad = get("HTTP/1.0 503 No\r\n\r\n").0.unwrap_err();
        assert_eq!(bad, "HTTP probe failed with statuscode: 503");
        assert!(
            get("SSH-2.0\r\n")
                .0
                .unwrap_err()
                .ends_with("malformed HTTP response")
        );
    }

    #[test]
    fn nobody_is_blamed_while_containerd_is_away() {
        let exec = super::super::spec::ExecAction {
            command: vec!["true".into()],
        };
        let how = Handler {
            exec: Some(exec),
            ..Handler::default()
        };
        assert_eq!(asked(&how), Err(Wrong::Unknown));
    }

    #[test]
    fn connections() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = PortName::Number(listener.local_addr().unwrap().port());
        let tcp = Some(TcpSocket { port, host: None });
        let how = Handler {
            tcp_socket: tcp,
            ..Handler::default()
        };
        assert_eq!(ask(&how), Ok(()));
        drop(listener);
        assert!(ask(&how).unwrap_err().starts_with("dial tcp 127.0.0.1:"));
    }
}
