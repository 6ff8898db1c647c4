//! Logs, exec, attach, cp and port-forward, over SPDY and over WebSockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;

use pericarp_tests::cri::node::STEP;

use crate::stage::{Said, Stage, idle, pod, until, write};
use crate::terminal::{a_shell_is_typed_at, files_are_copied};

/// As many at once as one node has to bear.
const WATCHES: usize = 100;
const EXECS: usize = 50;

/// kubectl tries WebSockets first; this has it not try them.
pub(crate) const SPDY: [(&str, &str); 2] = [
    ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false"),
    ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false"),
];
pub(crate) const WEBSOCKETS: [(&str, &str); 2] = [
    ("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "true"),
    ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "true"),
];

/// A command with something at its standard input.
fn with_input(command: &mut Command, input: &[u8]) -> Said {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join();
    output.into()
}

pub(crate) fn a_container_is_spoken_to(stage: &mut Stage) {
    let script = "echo first; sleep 1; echo second >&2; trap 'exit 0' TERM; \
                  while read -r line; do echo \"heard $line\"; done; sleep 100000 & wait";
    let manifest = pod("spoken", script).replace("    image:", "    stdin: true\n    image:");
    stage.apply(&manifest);
    stage.ready("spoken");
    until("both lines are there", || {
        stage.kubectl(&["logs", "spoken"]) == "first\nsecond\n"
    });
    assert_eq!(stage.kubectl(&["logs", "spoken", "--tail=1"]), "second\n");
    let stamped = stage.kubectl(&["logs", "spoken", "--timestamps", "--limit-bytes=10"]);
    assert!(
        stamped.starts_with("20") && stamped.len() == 10,
        "{stamped}"
    );
    let said = stage.refused(&["logs", "spoken", "-c", "other"]);
    assert!(
        said.contains("container other is not valid") || said.contains("\"other\""),
        "{said}"
    );
    let said = stage.refused(&["logs", "spoken", "--previous"]);
    assert!(
        said.contains("previous terminated container \"main\""),
        "{said}"
    );
    for transport in [WEBSOCKETS, SPDY] {
        let exec = |arguments: &[&str], input: &[u8]| {
            let mut all = vec!["exec"];
            all.extend(arguments);
            with_input(stage.kubectl_command(&all).envs(transport), input)
        };
        let said = exec(
            &["spoken", "--", "sh", "-c", "echo out; echo err >&2; exit 3"],
            b"",
        );
        assert_eq!(
            (said.out.as_str(), said.code),
            ("out\n", Some(3)),
            "{said:?}"
        );
        assert!(said.err.starts_with("err\n"), "{said:?}");
        // The end of the input arrives, and all before it.
        let much: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let said = exec(
            &["-i", "spoken", "--", "sh", "-c", "wc -c; echo done"],
            &much,
        );
        assert_eq!(
            said.out.split_whitespace().collect::<Vec<_>>(),
            ["3000000", "done"],
            "{said:?}"
        );
        let said = exec(&["spoken", "--", "/no/such/thing"], b"");
        assert_ne!(said.code, Some(0), "{said:?}");
        // What is copied in and out is the same.
        let name = format!("copy-{}", transport[0].1);
        let path = write(stage, &name, &much);
        let copied = |arguments: &[&str]| {
            let said: Said = stage
                .kubectl_command(arguments)
                .envs(transport)
                .output()
                .unwrap()
                .into();
            assert_eq!(said.code, Some(0), "{said:?}");
        };
        copied(&["cp", &name, "spoken:/tmp/there"]);
        copied(&["cp", "spoken:/tmp/there", "back"]);
        assert_eq!(
            std::fs::read(stage.node.scratch().path("back")).unwrap(),
            much
        );
        std::fs::remove_file(path).unwrap();
        // Attached, one speaks with the container's first process.
        let mut attached = stage
            .kubectl_command(&["attach", "-i", "spoken"])
            .envs(transport)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let line = format!("hello {}\n", transport[0].1);
        attached
            .stdin
            .as_mut()
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
        let heard = BufReader::new(attached.stdout.take().unwrap()).lines();
        let heard: Vec<String> = heard.map_while(Result::ok).take(1).collect();
        assert_eq!(heard, [format!("heard {}", line.trim_end())]);
        attached.kill().unwrap();
        attached.wait().unwrap();
    }
    // A log is followed to the container's end.
    let follow = stage
        .kubectl_command(&["logs", "-f", "spoken"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    stage.kubectl(&["delete", "pod", "spoken", "--now"]);
    let output = follow.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.starts_with("first\nsecond\nheard hello true\n"),
        "{text}"
    );
}

pub(crate) fn ports_are_forwarded(stage: &mut Stage) {
    stage.apply(&pod("web", "while :; do echo hello | nc -l -p 8080; done"));
    stage.ready("web");
    for transport in [WEBSOCKETS, SPDY] {
        let mut forward = stage
            .kubectl_command(&["port-forward", "pod/web", ":8080"])
            .envs(transport)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        let port = line
            .split(" -> ")
            .next()
            .unwrap()
            .rsplit(':')
            .next()
            .unwrap();
        let address: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
        until("the port answers", || {
            let mut text = String::new();
            let stream = stage.node.connect(address);
            let read = stream.and_then(|mut stream| stream.read_to_string(&mut text));
            read.is_ok() && text == "hello\n"
        });
        forward.kill().unwrap();
        forward.wait().unwrap();
    }
}

pub(crate) fn a_terminal_and_files(stage: &mut Stage) {
    stage.apply(&idle("typed"));
    stage.ready("typed");
    a_shell_is_typed_at(stage, "typed");
    files_are_copied(stage, "typed");
}

/// One end of a watch: a connection of its own, by way of `kubectl proxy`, which has a certificate.
fn watch(stage: &Stage, proxy: SocketAddr) -> BufReader<TcpStream> {
    let mut stream = stage.node.connect(proxy).unwrap();
    stream.set_read_timeout(Some(STEP * 2)).unwrap();
    let request = "GET /api/v1/namespaces/default/configmaps?watch=true HTTP/1.1\r\nHost: \
                   localhost\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200 "), "{line}");
    lines
}

/// A hundred watches and fifty commands at once.
pub(crate) fn many_at_once(stage: &mut Stage) {
    stage.apply(&idle("busy"));
    stage.ready("busy");
    let mut proxy = stage
        .kubectl_command(&["proxy", "--port=0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(proxy.stdout.take().unwrap());
    said.read_line(&mut line).unwrap();
    let address: SocketAddr = line.trim().rsplit(' ').next().unwrap().parse().unwrap();
    let watches: Vec<_> = (0..WATCHES).map(|_| watch(stage, address)).collect();
    let stage_ref = &*stage;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..EXECS)
            .map(|n| {
                let word = n.to_string();
                scope.spawn(move || {
                    let said = stage_ref.kubectl(&["exec", "busy", "--", "echo", &word]);
                    assert_eq!(said.trim_end(), word);
                })
            })
            .collect();
        stage_ref.kubectl(&["create", "configmap", "seen"]);
        threads.into_iter().for_each(|one| one.join().unwrap());
    });
    for watch in watches {
        let mut lines = watch.lines().map(Result::unwrap);
        let seen = lines.any(|line| line.contains("\"ADDED\"") && line.contains("\"seen\""));
        assert!(seen);
    }
    proxy.kill().unwrap();
    proxy.wait().unwrap();
    stage.kubectl(&["delete", "configmap", "seen"]);
}
