//! A command in a container with its streams, as `kubectl exec -it` has it: a WebSocket
//! (RFC 6455) with Kubernetes' protocol v4.channel.k8s.io on it, where the first byte of a message
//! says which stream it is of. That protocol cannot close the input alone.
//!
//! Called by `pod`. The socket is connected by the caller, since the address that CRI gives is
//! one of the node's own network.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::Output;

const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const ERROR: u8 = 2;
/// How the command ended, as Kubernetes' Status.
const STATUS: u8 = 3;
const SIZE: u8 = 4;

/// Opcodes of frames.
const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// Longer than anything takes here to say its next word.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than one message may have.
const MOST: u64 = 16 << 20;

/// A command that has not ended.
#[derive(Debug)]
pub struct Exec {
    reader: BufReader<TcpStream>,
    seen: Output,
    status: Option<Value>,
}

impl Exec {
    /// Starts the command that `path` of the address stands for.
    ///
    /// # Errors
    /// When the other side does not agree to the protocol.
    pub fn start(mut stream: TcpStream, path: &str) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // The key is for caches between the two.
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: cGVyaWNhcnAtdGVzdHMtMQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                break;
            }
        }
        if !head.starts_with("HTTP/1.1 101 ") || !head.contains("v4.channel.k8s.io") {
            return Err(io::Error::other(format!("no such streams: {head}")));
        }
        let seen = Output {
            code: -1,
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        Ok(Self {
            reader,
            seen,
            status: None,
        })
    }

    /// Writes to its input.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(16 << 10) {
            self.send(BINARY, INPUT, part)?;
        }
        Ok(())
    }

    /// Says how large the terminal is.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn resize(&mut self, columns: u16, rows: u16) -> io::Result<()> {
        let size = json!({"Width": columns, "Height": rows}).to_string();
        self.send(BINARY, SIZE, size.as_bytes())
    }

    /// Reads until its output has this text in it; all of the output up to now.
    ///
    /// # Errors
    /// When it ends before, or is silent for too long.
    pub fn wait_for(&mut self, text: &str) -> io::Result<String> {
        loop {
            let seen = String::from_utf8_lossy(&self.seen.stdout).into_owned();
            if seen.contains(text) {
                return Ok(seen);
            }
            if !self.read()? {
                return Err(io::Error::other(format!("it ended after {seen:?}")));
            }
        }
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// When the connection ends without a word on how the command did.
    pub fn wait(mut self) -> io::Result<Output> {
        while self.read()? {}
        let status = self.status.unwrap_or_default();
        let causes = status["details"]["causes"].as_array();
        let code = causes
            .into_iter()
            .flatten()
            .find(|cause| cause["reason"] == "ExitCode")
            .and_then(|cause| cause["message"].as_str()?.parse().ok());
        self.seen.code = match (status["status"].as_str(), code) {
            (Some("Success"), _) => 0,
            (_, Some(code)) => code,
            _ => return Err(io::Error::other(format!("it ended with {status}"))),
        };
        Ok(self.seen)
    }

    /// Takes one frame. False is the end.
    fn read(&mut self) -> io::Result<bool> {
        let mut head = [0; 2];
        match self.reader.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        let len = match head[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes(self.array()?)),
            127 => u64::from_be_bytes(self.array()?),
            short => u64::from(short),
        };
        if head[1] & 0x80 != 0 || len > MOST {
            return Err(io::Error::other(format!("no frame of a server: {head:?}")));
        }
        let mut message = vec![0; len as usize];
        self.reader.read_exact(&mut message)?;
        let Some((channel, bytes)) = message.split_first() else {
            return Ok(head[0] & 0xf != CLOSE);
        };
        match (head[0] & 0xf, *channel) {
            (CLOSE, _) => return Ok(false),
            (BINARY, OUTPUT) => self.seen.stdout.extend(bytes),
            (BINARY, ERROR) => self.seen.stderr.extend(bytes),
            // Empty at first, to say that it is there.
            (BINARY, STATUS) if !bytes.is_empty() => {
                self.status = Some(serde_json::from_slice(bytes)?);
            }
            _ => {}
        }
        Ok(true)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// One frame. A client has to mask what it sends; with zeros it stays as it is.
    fn send(&mut self, opcode: u8, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let len = u16::try_from(bytes.len() + 1).map_err(io::Error::other)?;
        let mut frame = vec![0x80 | opcode, 0x80 | 126];
        frame.extend(len.to_be_bytes());
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.reader.get_mut().write_all(&frame)
    }
}
