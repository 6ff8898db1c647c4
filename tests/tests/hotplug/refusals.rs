//! What is refused: by the client before it makes anything, and by the running
//! program whatever a peer sends. Each is one line, and nothing has changed.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use pericarp_tests::bounded::poll;
use pericarp_tests::frontend::Op;
use serde_json::{Value, json};

use crate::rig::{Rig, SOON, exchange};

#[test]
fn bad_input_makes_no_socket() {
    let Some(rig) = Rig::start("bad_input_makes_no_socket", &[]) else {
        return;
    };
    let path = |name: &str| rig.scratch.path(name).display().to_string();
    std::fs::write(rig.scratch.path("odd"), [0; 100]).unwrap();
    let b = path("b");
    let socket = path("b.sock");
    for (keys, words) in [
        (
            format!("id=b,file={},socket={socket}", path("none")),
            &["--add-device file", "no such file"][..],
        ),
        (
            format!("id=b,file={},socket={socket}", path("odd")),
            &["--add-device file", "multiple"],
        ),
        (
            format!("id=b,file=/,socket={socket}"),
            &["--add-device file", "directory"],
        ),
        (
            format!("id=b,file={b},socket={}", path("a.sock")),
            &["--add-device socket", "live program"],
        ),
        (
            format!("id=b,file={b},socket={}", path("a")),
            &["--add-device socket", "not a socket"],
        ),
        (
            format!("file={b},socket={socket}"),
            &["--add-device id", "missing"],
        ),
        (
            format!("id=b,file={b},socket={socket},size=3"),
            &["--add-device", "unknown key"],
        ),
        (
            format!("id=b,file={b},socket={socket},cache=none"),
            &["--add-device cache", "unknown cache mode"],
        ),
        (
            format!("id=a,file={b},socket={socket}"),
            &["--add-device id a", "used already"],
        ),
        (
            format!("id=b,file={b},socket={}", path("control")),
            &["--control-path", "used twice"],
        ),
    ] {
        rig.client(&["--add-device", &keys]).is_refused(2, words);
        assert!(!rig.socket("b").exists(), "{keys}");
        assert_eq!(rig.ids(), ["a"]);
    }
    let add = format!("--add-device=id=b,file={b},socket={socket}");
    for (options, words) in [
        (
            &["--remove-device=z"][..],
            &["--remove-device z", "no device has this id"][..],
        ),
        (&["--force"], &["--force", "--remove-device"]),
        (&[&add, "--force"], &["--force", "leave it out"]),
        (&[&add, "--remove-device=b"], &["--remove-device", "either"]),
        (&[&add, "--workers=2"], &["--workers", "leave it out"]),
        (
            &[&add, "--device=id=x,file=/f,socket=/s"],
            &["--device", "leave it out"],
        ),
    ] {
        rig.client(options).is_refused(2, words);
    }
    assert!(!rig.socket("b").exists());
    // Nobody there to ask.
    std::fs::remove_file(rig.control()).unwrap();
    rig.client(&[&add])
        .is_refused(2, &["--control-path", "nobody answers"]);
    assert!(!rig.socket("b").exists());
}

#[test]
fn a_process_has_room_for_so_many() {
    let Some(rig) = Rig::start("a_process_has_room_for_so_many", &[]) else {
        return;
    };
    let add = |id: &str| {
        let keys = format!(
            "--add-device=id={id},file={},socket={},num-queues=64,cache=buffered",
            rig.scratch.path("b").display(),
            rig.socket(id).display(),
        );
        rig.client(&[&keys])
    };
    let mut count = 0;
    let refused = loop {
        let said = add(&format!("x{count}"));
        if said.code != Some(0) {
            break said;
        }
        count += 1;
        assert!(count <= 256, "no end");
    };
    refused.is_refused(2, &["its queues do not fit", "start another"]);
    assert!(count >= 1, "{refused:?}");
    assert!(!rig.socket(&format!("x{count}")).exists());
    assert_eq!(rig.ids().len(), count + 1);
    // Every queue of the last one has its place in the workers' tables.
    let last = rig.socket(&format!("x{}", count - 1));
    let mut client = pericarp_tests::client::Client::connect(&last, 64, 2).unwrap();
    (0..64).for_each(|queue| client.flush(queue).unwrap());
    drop(client);
    // One that left makes room.
    assert!(poll(SOON, || (rig.remove("x0").code == Some(0)).then_some(())).is_some());
    let said = add("x0");
    said.is_done();
    rig.connect("a").request(0, &Op::Flush).unwrap();
}

#[test]
fn two_hundred_and_fifty_six_are_the_most() {
    let Some(rig) = Rig::start("two_hundred_and_fifty_six_are_the_most", &[]) else {
        return;
    };
    let peer = rig.peer();
    let given = Given::new(&rig);
    let mut sockets = Vec::new();
    for count in 1..=256 {
        let path = rig.scratch.path(&format!("{count}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let file = named(&path);
        let line = json!({
            "op": "add-device", "id": format!("d{count}"), "file": "b", "cache": "buffered",
            "socket": path,
        });
        let answer = exchange(
            &peer,
            &line,
            &[given.disk.as_fd(), listener.as_fd(), file.as_fd()],
        );
        let fits = count < 256;
        assert_eq!(answer["ok"], fits, "{count}: {answer}");
        if !fits {
            assert!(
                answer["error"]
                    .as_str()
                    .unwrap()
                    .contains("the most of one process")
            );
        }
        sockets.push(path);
    }
    let mut last = pericarp_tests::client::Client::connect(&sockets[254], 1, 2).unwrap();
    last.flush(0).unwrap();
}

/// The descriptors of a sound line.
struct Given {
    disk: OwnedFd,
    listener: UnixListener,
    file: OwnedFd,
}

fn named(path: &std::path::Path) -> OwnedFd {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc_o_path());
    options.open(path).unwrap().into()
}

/// O_PATH.
fn libc_o_path() -> i32 {
    rustix::fs::OFlags::PATH.bits() as i32
}

impl Given {
    fn new(rig: &Rig) -> Self {
        let path = rig.socket("given");
        let listener = UnixListener::bind(&path).unwrap();
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .open(rig.scratch.path("b"));
        Self {
            disk: disk.unwrap().into(),
            listener,
            file: named(&path),
        }
    }

    fn all(&self) -> [BorrowedFd<'_>; 3] {
        [self.disk.as_fd(), self.listener.as_fd(), self.file.as_fd()]
    }
}

fn line(changes: &Value) -> Value {
    let mut line = json!({
        "op": "add-device", "id": "b", "file": "b", "socket": "given.sock", "cache": "buffered",
    });
    for (key, value) in changes.as_object().unwrap() {
        line[key] = value.clone();
    }
    line
}

#[test]
fn descriptors_of_every_wrong_kind_are_refused_and_closed() {
    let test = "descriptors_of_every_wrong_kind_are_refused_and_closed";
    let Some(rig) = Rig::start(test, &[]) else {
        return;
    };
    let given = Given::new(&rig);
    let [disk, listener, file] = given.all();
    let (pipe, _end) = std::io::pipe().unwrap();
    let (pair, _other) = UnixStream::pair().unwrap();
    let read_only = File::open(rig.scratch.path("b")).unwrap();
    let append = OpenOptions::new()
        .read(true)
        .append(true)
        .open(rig.scratch.path("b"))
        .unwrap();
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let directory = File::open(rig.scratch.dir()).unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = named(&rig.socket("a"));
    let none = json!({});
    let before = rig.settled();
    let five = [disk, listener, file, disk, disk];
    let many = [disk; 60];
    for (changes, descriptors, words) in [
        (&none, &[][..], "0 descriptors came with it: send three"),
        (&none, &[disk, listener], "2 descriptors came with it"),
        (
            &none,
            &[disk, listener, file, disk],
            "4 descriptors came with it",
        ),
        (&none, &five, "at most 4 descriptors"),
        (&none, &many, "at most 4 descriptors"),
        (&none, &[listener, disk, file], "not a unix stream socket"),
        (&none, &[pipe.as_fd(), listener, file], "it is a fifo"),
        (
            &none,
            &[null.as_fd(), listener, file],
            "it is a character device",
        ),
        (
            &none,
            &[directory.as_fd(), listener, file],
            "it is a directory",
        ),
        (&none, &[listener, listener, file], "it is a socket"),
        (&none, &[file, listener, file], "it is a socket"),
        (
            &none,
            &[read_only.as_fd(), listener, file],
            "not open for reading and writing",
        ),
        (&none, &[append.as_fd(), listener, file], "O_APPEND"),
        (&json!({"read-only": true}), &given.all(), "can write"),
        (
            &json!({"cache": "direct"}),
            &given.all(),
            "without O_DIRECT",
        ),
        (&none, &[disk, pair.as_fd(), file], "does not listen"),
        (
            &none,
            &[disk, tcp.as_fd(), file],
            "not a unix stream socket",
        ),
        (&none, &[disk, disk, file], "not a unix stream socket"),
        (&none, &[disk, listener, disk], "not a socket"),
        (
            &none,
            &[disk, listener, busy.as_fd()],
            "another device listens there",
        ),
        (&json!({"num-queues": 65}), &given.all(), "num-queues"),
        (
            &json!({"num-queues": [1]}),
            &given.all(),
            "num-queues [1]: not a string",
        ),
        (&json!({"id": ""}), &given.all(), "an id has 1 to 64"),
        (&json!({"id": "a"}), &given.all(), "used already"),
        (
            &json!({"size": 3}),
            &given.all(),
            "key \"size\": unknown key",
        ),
        (&json!({"iops-burst": 3}), &given.all(), "iops-burst"),
        (
            &json!({"discard-granularity": 3}),
            &given.all(),
            "discard-granularity",
        ),
        (
            &json!({"op": "remove-device"}),
            &given.all(),
            "this line takes none",
        ),
        (
            &json!({"op": "stats"}),
            &given.all(),
            "this line takes none",
        ),
        (
            &json!({"op": "hand-over"}),
            &given.all(),
            "this line takes none",
        ),
        (&json!({"op": "fly"}), &given.all(), "this line takes none"),
    ] {
        let answer = rig.send(&line(changes), descriptors);
        assert_eq!(answer["ok"], false, "{words}: {answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    // Descriptors without a line, by the hundred.
    for _ in 0..20 {
        let stream = rig.peer();
        for _ in 0..100 {
            pericarp_tests::wire::send(&stream, b" ", &given.all()).unwrap();
        }
    }
    let closed = poll(SOON, || (rig.holds().0 == before.0).then_some(()));
    assert!(closed.is_some(), "{before:?} -> {:?}", rig.holds());
    assert_eq!(rig.ids(), ["a"]);
    // A sound one is taken, on a connection that goes on after it.
    let stream = rig.peer();
    let answer = exchange(&stream, &line(&none), &given.all());
    assert_eq!(answer["ok"], true, "{answer}");
    let version = exchange(&stream, &json!({"op": "version"}), &[]);
    assert_eq!(version["ok"], true, "{version}");
    drop(given);
    let mut client = pericarp_tests::client::Client::connect(&rig.socket("given"), 1, 2).unwrap();
    client.write(0, 0, &[5; 512]).unwrap();
    rig.connect("a").request(0, &Op::Flush).unwrap();
}

/// The file for requests in flight has places for the devices that it was made
/// for.
#[test]
fn a_file_for_requests_in_flight_forbids_it() {
    let test = "a_file_for_requests_in_flight_forbids_it";
    let directory = pericarp_tests::scratch::Scratch::new();
    let option = format!("--inflight-file={}", directory.path("record").display());
    let Some(rig) = Rig::start(test, &[&option]) else {
        return;
    };
    rig.add("b", "").is_refused(2, &["--inflight-file"]);
    assert!(!rig.socket("b").exists());
    rig.remove("a").is_refused(2, &["--inflight-file"]);
    rig.connect("a").request(0, &Op::Flush).unwrap();
}
