//! A guest that means harm, seen from the host: stands in the place of
//! `pericarp-vsock`, with its command line and its sockets, and plays an agent
//! that does one thing wrong. No virtual machine is needed behind it.
//!
//! `PERICARP_HOSTILE` says which thing. Used by `tests/hostile_agent.rs`.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        arguments[at.unwrap() + 1].clone()
    };
    let deed = std::env::var("PERICARP_HOSTILE").unwrap();
    let _front = UnixListener::bind(value("--socket-path")).unwrap();
    let host_side = value("--uds-path");
    let listener = UnixListener::bind(&host_side).unwrap();
    let greeting_deed = deed.clone();
    thread::spawn(move || greet(&format!("{host_side}_1024"), &greeting_deed));
    for connection in listener.incoming() {
        let deed = deed.clone();
        thread::spawn(move || serve(connection.unwrap(), &deed));
    }
}

/// The agent's greeting. The program under test listens once it is ready.
fn greet(path: &str, deed: &str) {
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut greeting = Vec::from(*b"PRCP");
    let version = match deed {
        "version" => 77,
        _ => pericarp_api::VERSION,
    };
    for number in [version, u32::MAX, 1] {
        greeting.extend(number.to_be_bytes());
    }
    match deed {
        "garbage" => greeting = b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        "half" => greeting.truncate(11),
        "silent" => loop {
            thread::park();
        },
        _ => {}
    }
    stream.write_all(&greeting).unwrap();
    match deed {
        "words" => {
            thread::sleep(Duration::from_millis(300));
            let mut words = b"the end\x1b]0;title\x07\n".to_vec();
            words.resize(10 << 20, b'x');
            let _ = stream.write_all(&words);
            return;
        }
        "half" => return,
        _ => {}
    }
    loop {
        thread::park();
    }
}

/// A connection of the host to a port of the guest.
fn serve(mut stream: UnixStream, deed: &str) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        line.push(byte[0]);
    }
    if deed == "handshake" {
        // No end to the answer.
        let _ = std::io::copy(&mut std::io::repeat(b'O'), &mut stream);
        return;
    }
    if stream.write_all(b"OK 1\n").is_err() {
        return;
    }
    match line.as_slice() {
        b"CONNECT 1024\n" => answer_calls(stream, deed),
        b"CONNECT 1025\n" => be_a_stream(stream, deed),
        other => panic!("{other:?}"),
    }
}

/// A ttrpc server of few words: an empty answer is a good one to every call.
fn answer_calls(mut stream: UnixStream, deed: &str) {
    let mut header = [0; 10];
    while stream.read_exact(&mut header).is_ok() {
        let length = u32::from_be_bytes(header[..4].try_into().unwrap());
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).unwrap();
        let is = |method: &[u8]| body.windows(method.len()).any(|window| window == method);
        let mut answer = header;
        answer[..4].copy_from_slice(&0u32.to_be_bytes());
        answer[8] = 2;
        let sent = match deed {
            "huge" => {
                answer[..4].copy_from_slice(&u32::MAX.to_be_bytes());
                let _ = stream.write_all(&answer);
                std::io::copy(&mut std::io::repeat(0), &mut stream).map(drop)
            }
            "flood" => loop {
                // Answers to questions that nobody asked, as large as they may be.
                answer[..4].copy_from_slice(&(4u32 << 20).to_be_bytes());
                answer[4..8].copy_from_slice(&999u32.to_be_bytes());
                let sent = stream
                    .write_all(&answer)
                    .and_then(|()| stream.write_all(&vec![0; 4 << 20]));
                if sent.is_err() {
                    return;
                }
            },
            "mute" => Ok(()),
            "error" if is(b"CreateContainer") => {
                // status { code: 13, message: ... }
                let text = format!("\x1b[2Jno\nway {}", "y".repeat(1 << 20));
                let mut message = vec![0x12];
                varint(text.len(), &mut message);
                message.extend(text.as_bytes());
                let mut status = vec![0x08, 13];
                status.extend(message);
                let mut response = vec![0x0a];
                varint(status.len(), &mut response);
                response.extend(status);
                let length = u32::try_from(response.len()).unwrap();
                answer[..4].copy_from_slice(&length.to_be_bytes());
                stream
                    .write_all(&answer)
                    .and_then(|()| stream.write_all(&response))
            }
            "no-power-off" if is(b"PowerOff") => Ok(()),
            _ => stream.write_all(&answer),
        };
        if sent.is_err() {
            return;
        }
    }
}

fn varint(mut number: usize, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn be_a_stream(mut stream: UnixStream, deed: &str) {
    let mut kind = [0; 2];
    stream.read_exact(&mut kind).unwrap();
    let mut rest = vec![0; usize::from(kind[1]) + 1];
    stream.read_exact(&mut rest).unwrap();
    stream.write_all(&[0]).unwrap();
    match (kind[0], deed) {
        // Standard input that is never read.
        (0, _) => {}
        (1, "endless") => {
            let _ = std::io::copy(&mut std::io::repeat(b'x'), &mut stream);
        }
        // Outputs that stay open after the end.
        (1 | 2, "open") => {}
        (1 | 2, "deaf" | "endless") => {}
        (1 | 2, _) => return,
        (3, "report") => {
            let _ = stream.write_all(&[9, 9, 9]);
        }
        (3, "half-report") => {
            let _ = stream.write_all(&[0]);
        }
        (3, "vanish") => return,
        (3, "open" | "no-power-off") => {
            let _ = stream.write_all(&[0, 5, 0]);
        }
        _ => {}
    }
    loop {
        thread::park();
    }
}
