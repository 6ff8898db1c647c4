//! What is not done, and what the host is told then.

use pericarp_api::agent::{CreateContainerRequest, RootFs, Share};
use pericarp_api::host::ConnectError;
use pericarp_api::{ExitReport, StreamKind, StreamTarget};
use ttrpc::Code;

use crate::conversation::Wish;
use crate::rig::{Machine, limited};

/// The code and the message of a refusal.
pub(crate) fn refused<T>(outcome: ttrpc::Result<T>) -> (Code, String) {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(ttrpc::Error::RpcStatus(status)) => {
            (status.code.enum_value_or_default(), status.message)
        }
        Err(other) => panic!("{other}"),
    }
}

pub(crate) fn missing_programs_are_told(machine: &Machine) {
    let main = machine
        .create("programs", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    let cases: [(&[&str], &str, Code, &str); 7] = [
        (
            &["nope"],
            "/",
            Code::NOT_FOUND,
            "'nope': no such program in the container",
        ),
        (
            &["/bin/nope"],
            "/",
            Code::NOT_FOUND,
            "'/bin/nope': no such program",
        ),
        (
            &["/nowhere/nope"],
            "/",
            Code::NOT_FOUND,
            "'/nowhere/nope': no such program",
        ),
        (
            &["/etc/not-executable"],
            "/",
            Code::PERMISSION_DENIED,
            "'/etc/not-executable'",
        ),
        (&["/etc"], "/", Code::PERMISSION_DENIED, "'/etc'"),
        (
            &["true"],
            "/nowhere",
            Code::INVALID_ARGUMENT,
            "working directory",
        ),
        (
            &["true"],
            "/etc/passwd",
            Code::INVALID_ARGUMENT,
            "working directory",
        ),
    ];
    let mut wrong = Vec::new();
    for (number, (args, cwd, code, message)) in cases.into_iter().enumerate() {
        let wish = Wish {
            cwd,
            ..Wish::run(args)
        };
        let process = machine
            .exec("programs", &format!("p{number}"), &wish)
            .unwrap();
        let seen = refused(process.start());
        if seen.0 != code || !seen.1.contains(message) {
            wrong.push(format!("exec {args:?} in {cwd}: {seen:?}"));
        }
        // All of its streams end, without a report.
        let mut process = process;
        assert!(ExitReport::read(&mut process.exit).is_err());
    }
    // What only the kernel finds out, crun tells as the process, as it does under podman.
    for (program, reason) in [
        ("/etc/no-interpreter", "No such file or directory"),
        ("/etc/no-format", "Exec format error"),
    ] {
        let ended = machine.run_in("programs", "late", &Wish::run(&[program]));
        assert_eq!(ended.report, ExitReport::Code(1));
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(said.contains(reason), "{said}");
    }
    machine.remove("programs");
    for (args, cwd, code, message) in cases {
        if cwd == "/nowhere" {
            // Is made.
            continue;
        }
        let process = machine
            .create(
                "program",
                &Wish {
                    cwd,
                    ..Wish::run(args)
                },
            )
            .unwrap();
        let seen = refused(process.start());
        if seen.0 != code || !seen.1.contains(message) {
            wrong.push(format!("run {args:?} in {cwd}: {seen:?}"));
        }
        machine.remove("program");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

pub(crate) fn nonsense_is_refused(machine: &Machine) {
    let request = |container: &str, spec: &str, disk: &str, kind: &str| CreateContainerRequest {
        container: container.into(),
        spec: spec.as_bytes().to_vec(),
        root: Some(RootFs {
            source: disk.into(),
            fs_type: kind.into(),
            read_only: true,
            ..RootFs::default()
        })
        .into(),
        ..CreateContainerRequest::default()
    };
    let good = r#"{"process":{"args":["true"],"cwd":"/"}}"#;
    for (container, spec, disk, kind, code) in [
        ("../up", good, "root", "erofs", Code::INVALID_ARGUMENT),
        ("", good, "root", "erofs", Code::INVALID_ARGUMENT),
        ("bad", "{", "root", "erofs", Code::INVALID_ARGUMENT),
        ("bad", "{}", "root", "erofs", Code::INVALID_ARGUMENT),
        (
            "bad",
            r#"{"process":{"args":[]}}"#,
            "root",
            "erofs",
            Code::INVALID_ARGUMENT,
        ),
        ("bad", good, "root", "ext4", Code::INVALID_ARGUMENT),
        ("bad", good, "data", "erofs", Code::INVALID_ARGUMENT),
        ("bad", good, "root", "proc", Code::INVALID_ARGUMENT),
        ("bad", good, "", "erofs", Code::INVALID_ARGUMENT),
        // Not below a layer.
        ("bad", good, "data", "virtiofs", Code::INVALID_ARGUMENT),
    ] {
        let wanted = request(container, spec, disk, kind);
        let (seen, message) = refused(machine.client().create_container(limited(), &wanted));
        assert_eq!(seen, code, "{container} {spec} {disk} {kind}: {message}");
    }
    for (tag, code) in [
        ("../up", Code::INVALID_ARGUMENT),
        ("", Code::INVALID_ARGUMENT),
        ("data,lowerdir=/", Code::INVALID_ARGUMENT),
        // The serial of a disk is no tag; this machine has no such device.
        ("root", Code::NOT_FOUND),
    ] {
        let mut wanted = request("bad", good, tag, "virtiofs");
        if let Some(root) = wanted.root.as_mut() {
            root.writable_layer = true;
        }
        let (seen, message) = refused(machine.client().create_container(limited(), &wanted));
        assert_eq!(seen, code, "root {tag}: {message}");
    }
    for (tag, path, code) in [
        ("../up", "/data", Code::INVALID_ARGUMENT),
        ("data", "data", Code::INVALID_ARGUMENT),
        ("data", "/data/../proc", Code::INVALID_ARGUMENT),
        ("data", "/sys/data", Code::INVALID_ARGUMENT),
        // This machine has no such device.
        ("data", "/data", Code::NOT_FOUND),
    ] {
        let mut wanted = request("bad", good, "root", "erofs");
        wanted.shares = vec![Share {
            tag: tag.into(),
            path: path.into(),
            ..Share::default()
        }];
        let (seen, message) = refused(machine.client().create_container(limited(), &wanted));
        assert_eq!(seen, code, "share {tag} {path}: {message}");
    }
    // What failed is not there, and a good one takes its place.
    let process = machine.create("bad", &Wish::run(&["true"])).unwrap();
    let (code, _) = refused(machine.create("bad", &Wish::run(&["true"])).map(drop));
    assert_eq!(code, Code::ALREADY_EXISTS);
    let (code, _) = refused(machine.exec("bad", "p", &Wish::run(&["true"])).map(drop));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    process.start().unwrap();
    assert_eq!(refused(process.start()).0, Code::FAILED_PRECONDITION);
    assert_eq!(refused(process.resize(80, 25)).0, Code::INVALID_ARGUMENT);
    process.finish(b"");
    machine.remove("bad");
    let gone = machine.exec("bad", "p", &Wish::run(&["true"]));
    assert_eq!(refused(gone.map(drop)).0, Code::NOT_FOUND);
}

pub(crate) fn streams_are_attached_once(machine: &Machine) {
    let target = |kind, container: &str, process: &str| StreamTarget {
        kind,
        container: container.into(),
        process: process.into(),
    };
    let attach = |kind, container, process| machine.guest.attach(&target(kind, container, process));
    let none = attach(StreamKind::Stdin, "nobody", "");
    assert!(matches!(none, Err(ConnectError::NoSuchStream)), "{none:?}");
    let mut process = machine
        .create(
            "once",
            &Wish {
                terminal: true,
                ..Wish::run(&["sleep", "1000"])
            },
        )
        .unwrap();
    let second = attach(StreamKind::Stdout, "once", "");
    assert!(matches!(second, Err(ConnectError::Taken)), "{second:?}");
    let none = attach(StreamKind::Stderr, "once", "");
    assert!(matches!(none, Err(ConnectError::NoSuchStream)), "{none:?}");
    let second = attach(StreamKind::Exit, "once", "");
    assert!(matches!(second, Err(ConnectError::Taken)), "{second:?}");
    process.start().unwrap();
    process.signal(9, false).unwrap();
    process.report();
    let none = attach(StreamKind::Exit, "once", "");
    assert!(matches!(none, Err(ConnectError::NoSuchStream)), "{none:?}");
    machine.remove("once");
    // A connection that says nothing keeps nobody from attaching.
    let silent: Vec<_> = (0..20)
        .map(|_| {
            use std::io::Write;
            let mut stream =
                std::os::unix::net::UnixStream::connect(machine.scratch.path("vsock")).unwrap();
            stream.write_all(b"CONNECT 1025\n").unwrap();
            stream
        })
        .collect();
    assert_eq!(
        machine.run("loud", &Wish::run(&["echo", "heard"])).text(),
        "heard\n"
    );
    drop(silent);
}
