//! Command lines of `pericarp-block` that cannot work.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use pericarp_tests::parts::{Part, have, skip};
use pericarp_tests::scratch::Scratch;

use crate::{Bad, assert_refused, bad, fault, faults};

/// In every argument `@` stands for the scratch directory, which holds: `disk`
/// (1 MiB), `odd` (1 MiB and one byte), `empty`, the directory `dir`, the
/// listening socket `live`, the file `file.sock`.
const TABLE: &[Bad] = &[
    bad("no argument", &[], &["--blk-file"]),
    bad("no disk", &["--socket-path=@/s"], &["--blk-file"]),
    bad("no socket", &["--blk-file=@/disk"], &["--socket-path"]),
    bad(
        "take-over from nothing",
        &[
            "--socket-path=@/live",
            "--blk-file=@/disk",
            "--control-path=@/nobody",
            "--take-over=@/nobody",
        ],
        &["--take-over", "@/nobody", "running program"],
    ),
    bad(
        "take-over without a control socket",
        &[
            "--socket-path=@/live",
            "--blk-file=@/disk",
            "--take-over=@/live",
        ],
        &["--take-over", "@/live", "--control-path"],
    ),
    bad(
        "take-over of another control socket",
        &[
            "--socket-path=@/live",
            "--blk-file=@/disk",
            "--control-path=@/file.sock",
            "--take-over=@/live",
        ],
        &["--take-over", "@/live", "--control-path"],
    ),
    bad(
        "take-over from a file",
        &[
            "--socket-path=@/live",
            "--blk-file=@/disk",
            "--control-path=@/file.sock",
            "--take-over=@/file.sock",
        ],
        &["--take-over", "@/file.sock", "control socket"],
    ),
    bad(
        "take-over of a socket that is not there",
        &[
            "--socket-path=@/nowhere",
            "--blk-file=@/disk",
            "--control-path=@/live",
            "--take-over=@/live",
        ],
        &["--take-over", "@/live", "@/nowhere"],
    ),
    bad(
        "take-over without a path",
        &["--socket-path=@/s", "--blk-file=@/disk", "--take-over="],
        &["--take-over", "empty"],
    ),
    bad(
        "polling what goes through the page cache",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--cache=buffered",
            "--iopoll",
        ],
        &["--iopoll", "direct"],
    ),
    bad(
        "missing disk",
        &["--socket-path=@/s", "--blk-file=@/nowhere"],
        &["--blk-file", "@/nowhere"],
    ),
    bad(
        "disk in a missing directory",
        &["--socket-path=@/s", "--blk-file=@/no/disk"],
        &["--blk-file", "@/no/disk"],
    ),
    bad(
        "directory as disk",
        &["--socket-path=@/s", "--blk-file=@/dir"],
        &["--blk-file", "@/dir", "directory"],
    ),
    bad(
        "character device as disk",
        &["--socket-path=@/s", "--blk-file=/dev/null"],
        &["--blk-file", "/dev/null"],
    ),
    bad(
        "socket as disk",
        &["--socket-path=@/s", "--blk-file=@/live"],
        &["--blk-file", "@/live"],
    ),
    bad(
        "size that is no multiple of 512",
        &["--socket-path=@/s", "--blk-file=@/odd"],
        &["--blk-file", "@/odd", "512"],
    ),
    bad(
        "empty disk",
        &["--socket-path=@/s", "--blk-file=@/empty"],
        &["--blk-file", "@/empty"],
    ),
    bad(
        "live socket",
        &["--socket-path=@/live", "--blk-file=@/disk"],
        &["--socket-path", "@/live"],
    ),
    bad(
        "a file where the socket goes",
        &["--socket-path=@/file.sock", "--blk-file=@/disk"],
        &["--socket-path", "@/file.sock"],
    ),
    bad(
        "a directory where the socket goes",
        &["--socket-path=@/dir", "--blk-file=@/disk"],
        &["--socket-path", "@/dir"],
    ),
    bad(
        "socket in a missing directory",
        &["--socket-path=@/no/s", "--blk-file=@/disk"],
        &["--socket-path", "@/no"],
    ),
    bad(
        "socket path of 140 bytes",
        &[
            "--socket-path=@/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
            "--blk-file=@/disk",
        ],
        &["--socket-path", "xxxx", "10"],
    ),
    bad(
        "empty socket path",
        &["--socket-path=", "--blk-file=@/disk"],
        &["--socket-path"],
    ),
    bad(
        "zero queues",
        &["--socket-path=@/s", "--blk-file=@/disk", "--num-queues=0"],
        &["--num-queues", "0"],
    ),
    bad(
        "65 queues",
        &["--socket-path=@/s", "--blk-file=@/disk", "--num-queues=65"],
        &["--num-queues", "65", "64"],
    ),
    bad(
        "queues that are no number",
        &["--socket-path=@/s", "--blk-file=@/disk", "--num-queues=two"],
        &["--num-queues", "two"],
    ),
    bad(
        "minus one queue",
        &["--socket-path=@/s", "--blk-file=@/disk", "--num-queues=-1"],
        &["--num-queues", "-1"],
    ),
    bad(
        "queue size zero",
        &["--socket-path=@/s", "--blk-file=@/disk", "--queue-size=0"],
        &["--queue-size", "0"],
    ),
    bad(
        "queue size 100",
        &["--socket-path=@/s", "--blk-file=@/disk", "--queue-size=100"],
        &["--queue-size", "100", "power"],
    ),
    bad(
        "queue size 65536",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--queue-size=65536",
        ],
        &["--queue-size", "65536"],
    ),
    bad(
        "unknown option",
        &["--socket-path=@/s", "--blk-file=@/disk", "--fast"],
        &["--fast"],
    ),
    bad("unknown short option", &["-z"], &["-z"]),
    bad(
        "stray argument",
        &["--socket-path=@/s", "--blk-file=@/disk", "more"],
        &["more"],
    ),
    bad(
        "missing value",
        &["--socket-path=@/s", "--blk-file"],
        &["--blk-file"],
    ),
    bad(
        "option given twice",
        &["--socket-path=@/s", "--blk-file=@/disk", "--blk-file=@/odd"],
        &["--blk-file", "twice"],
    ),
    bad(
        "unknown cache mode",
        &["--socket-path=@/s", "--blk-file=@/disk", "--cache=none"],
        &["--cache", "none", "direct"],
    ),
    bad(
        "empty file for requests in flight",
        &["--socket-path=@/s", "--blk-file=@/disk", "--inflight-file="],
        &["--inflight-file"],
    ),
    bad(
        "the disk as file for requests in flight",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--inflight-file=@/disk",
        ],
        &["--inflight-file", "@/disk"],
    ),
    bad(
        "unknown engine",
        &["--socket-path=@/s", "--blk-file=@/disk", "--io-engine=aio"],
        &["--io-engine", "aio", "uring"],
    ),
    bad(
        "unknown log level",
        &["--socket-path=@/s", "--blk-file=@/disk", "--log-level=loud"],
        &["--log-level", "loud"],
    ),
    bad(
        "serial of 21 bytes",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--serial=123456789012345678901",
        ],
        &["--serial", "20"],
    ),
    bad(
        "zero workers",
        &["--socket-path=@/s", "--blk-file=@/disk", "--workers=0"],
        &["--workers", "0"],
    ),
    bad(
        "CPUs that are no list",
        &["--socket-path=@/s", "--blk-file=@/disk", "--cpus=a-b"],
        &["--cpus", "a-b"],
    ),
    bad(
        "CPU that is not there",
        &["--socket-path=@/s", "--blk-file=@/disk", "--cpus=1000"],
        &["--cpus", "1000"],
    ),
    bad(
        "iops that are no number",
        &["--socket-path=@/s", "--blk-file=@/disk", "--iops=fast"],
        &["--iops", "fast", "64K"],
    ),
    bad(
        "minus one iops",
        &["--socket-path=@/s", "--blk-file=@/disk", "--iops=-1"],
        &["--iops", "-1"],
    ),
    bad(
        "bandwidth beyond 64 bits",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--bandwidth=99999999999G",
        ],
        &["--bandwidth", "99999999999G"],
    ),
    bad(
        "bandwidth with an unknown suffix",
        &["--socket-path=@/s", "--blk-file=@/disk", "--bandwidth=5T"],
        &["--bandwidth", "5T"],
    ),
    bad(
        "burst without a limit",
        &["--socket-path=@/s", "--blk-file=@/disk", "--iops-burst=5"],
        &["--iops-burst", "5", "iops"],
    ),
    bad(
        "bandwidth burst without a limit",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--bandwidth=0",
            "--bandwidth-burst=1M",
        ],
        &["--bandwidth-burst", "bandwidth"],
    ),
    bad(
        "limit given twice",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--iops=1",
            "--iops=2",
        ],
        &["--iops", "twice"],
    ),
    bad(
        "live control socket",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--control-path=@/live",
        ],
        &["--control-path", "@/live"],
    ),
    bad(
        "a file where the control socket goes",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--control-path=@/file.sock",
        ],
        &["--control-path", "@/file.sock"],
    ),
    bad(
        "control socket in a missing directory",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--control-path=@/no/c",
        ],
        &["--control-path", "@/no"],
    ),
    bad(
        "empty control path",
        &["--socket-path=@/s", "--blk-file=@/disk", "--control-path="],
        &["--control-path"],
    ),
    bad(
        "control socket and device socket the same",
        &[
            "--socket-path=@/s",
            "--blk-file=@/disk",
            "--control-path=@/s",
        ],
        &["--control-path", "@/s", "twice"],
    ),
    bad(
        "device with a limit that is no number",
        &["--device=id=a,socket=@/s,file=@/disk,iops=x"],
        &["--device", "iops", "x"],
    ),
    bad(
        "device with a burst without a limit",
        &["--device=id=a,socket=@/s,file=@/disk,bandwidth-burst=1M"],
        &["--device", "bandwidth-burst"],
    ),
    bad(
        "fd that is no number",
        &["--fd=three", "--blk-file=@/disk"],
        &["--fd", "three"],
    ),
    bad(
        "fd that is not open",
        &["--fd=77", "--blk-file=@/disk"],
        &["--fd", "77"],
    ),
    bad(
        "fd that is no socket",
        &["--fd=9", "--blk-file=@/disk"],
        &["--fd", "9"],
    ),
    bad(
        "fd and socket path",
        &["--fd=9", "--socket-path=@/s", "--blk-file=@/disk"],
        &["--fd", "--socket-path"],
    ),
    bad(
        "device and disk",
        &["--device=id=a,socket=@/s,file=@/disk", "--blk-file=@/disk"],
        &["--device"],
    ),
    bad(
        "device with an unknown key",
        &["--device=id=a,socket=@/s,file=@/disk,speed=9"],
        &["--device", "speed"],
    ),
    bad(
        "device without file",
        &["--device=id=a,socket=@/s"],
        &["--device", "file"],
    ),
    bad(
        "device without socket",
        &["--device=id=a,file=@/disk"],
        &["--device", "socket"],
    ),
    bad(
        "device without id",
        &["--device=socket=@/s,file=@/disk"],
        &["--device", "id"],
    ),
    bad(
        "device that is read-only perhaps",
        &["--device=id=a,socket=@/s,file=@/disk,read-only=maybe"],
        &["read-only", "maybe"],
    ),
    bad(
        "device with a key without value",
        &["--device=id=a,socket,file=@/disk"],
        &["--device", "socket"],
    ),
    bad(
        "two devices with one id",
        &[
            "--device=id=a,socket=@/s,file=@/disk",
            "--device=id=a,socket=@/t,file=@/disk",
        ],
        &["--device", "id", "a"],
    ),
    bad(
        "two devices on one socket",
        &[
            "--device=id=a,socket=@/s,file=@/disk",
            "--device=id=b,socket=@/s,file=@/disk",
        ],
        &["--device", "@/s"],
    ),
    bad(
        "second device without a disk",
        &[
            "--device=id=a,socket=@/s,file=@/disk",
            "--device=id=b,socket=@/t,file=@/nowhere",
        ],
        &["--device", "@/nowhere"],
    ),
];

fn stage() -> (Scratch, UnixListener) {
    let scratch = Scratch::new();
    scratch.file("disk", &[0x5a; 1 << 20]);
    scratch.file("odd", &[0; (1 << 20) + 1]);
    scratch.file("empty", &[]);
    scratch.file("file.sock", b"not a socket");
    fs::create_dir(scratch.path("dir")).unwrap();
    let live = UnixListener::bind(scratch.path("live")).unwrap();
    (scratch, live)
}

#[test]
fn bad_command_lines_are_refused_in_one_line() {
    if !have(
        "bad_command_lines_are_refused_in_one_line",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    let (scratch, live) = stage();
    let faults = faults(Part::PERICARP_BLOCK, scratch.dir(), TABLE);
    drop(live);
    assert_refused(&faults, TABLE.len());
}

#[test]
fn a_disk_that_may_not_be_written_needs_read_only() {
    let test = "a_disk_that_may_not_be_written_needs_read_only";
    if !have(test, &[Part::PERICARP_BLOCK, Part::Chattr]) {
        return;
    }
    let (scratch, _live) = stage();
    let disk = scratch.path("disk");
    let chattr = |flag: &str| {
        let chattr = Part::Chattr.find().unwrap();
        Command::new(chattr)
            .arg(flag)
            .arg(&disk)
            .output()
            .unwrap()
            .status
            .success()
    };
    // Permission bits do not stop root; this flag does.
    if !chattr("+i") {
        skip(
            test,
            "chattr +i is not possible here (needs root and a disk file system)",
        );
        return;
    }
    let dir = scratch.dir().display();
    let args = [
        format!("--socket-path={dir}/s"),
        format!("--blk-file={dir}/disk"),
    ];
    let fault = fault(
        Part::PERICARP_BLOCK,
        scratch.dir(),
        &args,
        &["--blk-file".into(), "read-only".into()],
    );
    assert!(chattr("-i"));
    assert_eq!(fault, None);
}

#[test]
fn a_dead_socket_is_replaced_and_removed_at_the_end() {
    use pericarp_tests::peer::{Backend, Kind, Options};
    if !Kind::Pericarp.usable("a_dead_socket_is_replaced_and_removed_at_the_end") {
        return;
    }
    let (scratch, live) = stage();
    drop(live);
    let socket = scratch.path("live");
    assert!(socket.exists(), "std leaves the name behind");
    let extra = vec![format!(
        "--device=id=a,socket={},file={}",
        socket.display(),
        scratch.path("disk").display()
    )];
    let mut child = pericarp_tests::process::Process::start(
        pericarp_tests::process::command(&Part::PERICARP_BLOCK.find().unwrap()).args(&extra),
        Duration::from_secs(20),
    )
    .unwrap();
    let stream = pericarp_tests::peer::connect(&socket).unwrap();
    drop(stream);
    child.signal(rustix::process::Signal::TERM);
    let status = child
        .wait(Duration::from_secs(10))
        .expect("it ends on SIGTERM");
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists());
    // And a second process on a live socket of the first is refused: the table
    // has a foreign listener, this is one of our own.
    let disk = scratch.path("disk");
    let first = Backend::start(Kind::Pericarp, &scratch, &disk, &Options::default()).unwrap();
    let args = [
        format!("--socket-path={}", first.socket().display()),
        format!("--blk-file={}", disk.display()),
    ];
    let named = ["--socket-path".into()];
    let fault = fault(Part::PERICARP_BLOCK, scratch.dir(), &args, &named);
    assert_eq!(fault, None);
}

#[test]
fn version_help_and_capabilities_go_to_stdout() {
    if !have(
        "version_help_and_capabilities_go_to_stdout",
        &[Part::PERICARP_BLOCK],
    ) {
        return;
    }
    for (option, part) in [
        ("--version", "pericarp-block"),
        ("--help", "--blk-file"),
        ("--print-capabilities", "\"block\""),
    ] {
        let program = Part::PERICARP_BLOCK.find().unwrap();
        let output = Command::new(program).arg(option).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{option}: {}", output.status);
        assert!(stdout.contains(part), "{option}: {stdout}");
        assert!(output.stderr.is_empty(), "{option} wrote to stderr");
    }
}
