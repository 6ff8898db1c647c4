//! Command lines of `pericarp-fs` that cannot work.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;

use pericarp_tests::parts::{Part, have};
use pericarp_tests::scratch::Scratch;

use crate::{Bad, assert_refused, bad, fault, faults};

/// In every argument `@` stands for the scratch directory, which holds: the
/// directories `dir` and `other`, `file`, the listening socket `live`, and
/// `link`, which leads to `nowhere`.
const TABLE: &[Bad] = &[
    bad("no argument", &[], &["--shared-dir"]),
    bad(
        "no directory",
        &["--socket-path=@/s", "--tag=t"],
        &["--shared-dir"],
    ),
    bad(
        "no tag",
        &["--socket-path=@/s", "--shared-dir=@/dir"],
        &["--tag"],
    ),
    bad(
        "no socket",
        &["--shared-dir=@/dir", "--tag=t"],
        &["--socket-path"],
    ),
    bad(
        "missing directory",
        &["--socket-path=@/s", "--shared-dir=@/no", "--tag=t"],
        &["--shared-dir", "@/no"],
    ),
    bad(
        "a file in place of a directory",
        &["--socket-path=@/s", "--shared-dir=@/file", "--tag=t"],
        &["--shared-dir", "@/file", "directory"],
    ),
    bad(
        "a socket in place of a directory",
        &["--socket-path=@/s", "--shared-dir=@/live", "--tag=t"],
        &["--shared-dir", "@/live", "directory"],
    ),
    bad(
        "a link that leads nowhere",
        &["--socket-path=@/s", "--shared-dir=@/link", "--tag=t"],
        &["--shared-dir", "@/link"],
    ),
    bad(
        "empty directory name",
        &["--socket-path=@/s", "--shared-dir=", "--tag=t"],
        &["--shared-dir"],
    ),
    bad(
        "empty tag",
        &["--socket-path=@/s", "--shared-dir=@/dir", "--tag="],
        &["--tag", "36"],
    ),
    bad(
        "tag of 37 bytes",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=1234567890123456789012345678901234567",
        ],
        &["--tag", "37", "36"],
    ),
    bad(
        "tag of 36 characters and 72 bytes",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=üüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüü",
        ],
        &["--tag", "72", "36"],
    ),
    bad(
        "live socket",
        &["--socket-path=@/live", "--shared-dir=@/dir", "--tag=t"],
        &["--socket-path", "@/live"],
    ),
    bad(
        "a file where the socket goes",
        &["--socket-path=@/file", "--shared-dir=@/dir", "--tag=t"],
        &["--socket-path", "@/file"],
    ),
    bad(
        "socket in a missing directory",
        &["--socket-path=@/no/s", "--shared-dir=@/dir", "--tag=t"],
        &["--socket-path", "@/no"],
    ),
    bad(
        "empty socket path",
        &["--socket-path=", "--shared-dir=@/dir", "--tag=t"],
        &["--socket-path"],
    ),
    bad(
        "zero queues",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--num-queues=0",
        ],
        &["--num-queues", "0"],
    ),
    bad(
        "65 queues",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--num-queues=65",
        ],
        &["--num-queues", "65", "64"],
    ),
    bad(
        "queue size 100",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--queue-size=100",
        ],
        &["--queue-size", "100", "power"],
    ),
    bad(
        "queue size 2048",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--queue-size=2048",
        ],
        &["--queue-size", "2048", "1024"],
    ),
    bad(
        "unknown cache mode",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--cache=metadata",
        ],
        &["--cache", "metadata", "never"],
    ),
    bad(
        "writeback without a cache",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--cache=never",
            "--writeback",
        ],
        &["--writeback", "never"],
    ),
    bad(
        "access control lists without extended attributes",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--posix-acl",
        ],
        &["--posix-acl", "xattr"],
    ),
    bad(
        "locks of nobody",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--locks=both",
        ],
        &["--locks", "both", "guest or host"],
    ),
    bad(
        "a rule of no kind",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--xattr",
            "--xattrmap=:okay:all:::",
        ],
        &["--xattrmap", "okay", "prefix"],
    ),
    bad(
        "a rule for nobody",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--xattr",
            "--xattrmap=:ok:both:::",
        ],
        &["--xattrmap", "both", "client"],
    ),
    bad(
        "half a rule",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--xattr",
            "--xattrmap=:ok:all:",
        ],
        &["--xattrmap", "too few"],
    ),
    bad(
        "a map without attributes",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--xattrmap=:map::user.a.:",
        ],
        &["--xattrmap", "xattr"],
    ),
    bad(
        "ids that are no ranges",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--uid-map=0:1:2",
        ],
        &["--uid-map", "0:1:2", ":GUEST:HOST:COUNT:"],
    ),
    bad(
        "half a range of ids",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--gid-map=:0:1:",
        ],
        &["--gid-map", ":0:1:"],
    ),
    bad(
        "an empty range of ids",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--uid-map=:0:1:0:",
        ],
        &["--uid-map", ":0:1:0:", "at least one"],
    ),
    bad(
        "ids beyond the last",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--gid-map=:0:4294967290:9:",
        ],
        &["--gid-map", "4294967290"],
    ),
    bad(
        "ids in two ranges",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--uid-map=:0:9:2:1:7:1:",
        ],
        &["--uid-map", "common"],
    ),
    bad(
        "a state file",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--state-file=@/dir",
        ],
        &["--state-file", "@/dir"],
    ),
    bad(
        "a file for requests in flight",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--inflight-file=@/flight",
        ],
        &["--inflight-file", "@/flight"],
    ),
    bad(
        "a disk",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--blk-file=@/file",
        ],
        &["--blk-file"],
    ),
    bad(
        "cache mode of a disk",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--cache=direct",
        ],
        &["--cache", "direct"],
    ),
    bad(
        "a take-over",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--take-over=@/live",
        ],
        &["--take-over"],
    ),
    bad(
        "unknown engine",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--io-engine=aio",
        ],
        &["--io-engine", "aio", "uring"],
    ),
    bad(
        "unknown log level",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--log-level=loud",
        ],
        &["--log-level", "loud"],
    ),
    bad(
        "zero workers",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--workers=0",
        ],
        &["--workers", "0"],
    ),
    bad(
        "CPU that is not there",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--cpus=1000",
        ],
        &["--cpus", "1000"],
    ),
    bad(
        "burst without a limit",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--iops-burst=5",
        ],
        &["--iops-burst", "5", "iops"],
    ),
    bad(
        "bandwidth with an unknown suffix",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--bandwidth=5T",
        ],
        &["--bandwidth", "5T"],
    ),
    bad(
        "option given twice",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--tag=u",
        ],
        &["--tag", "twice"],
    ),
    bad(
        "flag given twice",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--xattr",
            "--xattr",
        ],
        &["--xattr", "twice"],
    ),
    bad(
        "stray argument",
        &["--socket-path=@/s", "--shared-dir=@/dir", "--tag=t", "more"],
        &["more"],
    ),
    bad(
        "live control socket",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--control-path=@/live",
        ],
        &["--control-path", "@/live"],
    ),
    bad(
        "control socket in a missing directory",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--control-path=@/no/c",
        ],
        &["--control-path", "@/no"],
    ),
    bad(
        "control socket and device socket the same",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--control-path=@/s",
        ],
        &["--control-path", "@/s", "twice"],
    ),
    bad(
        "fd and socket path",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--fd=9",
        ],
        &["--fd", "--socket-path"],
    ),
    bad(
        "device and directory",
        &[
            "--socket-path=@/s",
            "--shared-dir=@/dir",
            "--tag=t",
            "--device=id=a,socket=@/t,dir=@/dir,tag=u",
        ],
        &["--device"],
    ),
    bad(
        "fd that is not open",
        &["--fd=77", "--shared-dir=@/dir", "--tag=t"],
        &["--fd", "77"],
    ),
    bad(
        "fd that is no socket",
        &["--fd=9", "--shared-dir=@/dir", "--tag=t"],
        &["--fd", "9"],
    ),
    bad(
        "device with an unknown key",
        &["--device=id=a,socket=@/s,dir=@/dir,tag=t,speed=9"],
        &["--device", "speed"],
    ),
    bad(
        "device without directory",
        &["--device=id=a,socket=@/s,tag=t"],
        &["--device", "dir"],
    ),
    bad(
        "device without tag",
        &["--device=id=a,socket=@/s,dir=@/dir"],
        &["--device", "tag"],
    ),
    bad(
        "device without socket",
        &["--device=id=a,dir=@/dir,tag=t"],
        &["--device", "socket"],
    ),
    bad(
        "device without id",
        &["--device=socket=@/s,dir=@/dir,tag=t"],
        &["--device", "id"],
    ),
    bad(
        "device with half a key",
        &["--device=id=a,socket,dir=@/dir,tag=t"],
        &["--device", "socket"],
    ),
    bad(
        "device that is read-only perhaps",
        &["--device=id=a,socket=@/s,dir=@/dir,tag=t,read-only=maybe"],
        &["read-only", "maybe"],
    ),
    bad(
        "device on a file",
        &["--device=id=a,socket=@/s,dir=@/file,tag=t"],
        &["--device dir", "@/file"],
    ),
    bad(
        "two devices with one id",
        &[
            "--device=id=a,socket=@/s,dir=@/dir,tag=t",
            "--device=id=a,socket=@/t,dir=@/other,tag=u",
        ],
        &["--device id", "a"],
    ),
    bad(
        "two devices on one socket",
        &[
            "--device=id=a,socket=@/s,dir=@/dir,tag=t",
            "--device=id=b,socket=@/s,dir=@/other,tag=u",
        ],
        &["--device", "@/s"],
    ),
    bad(
        "second device without its directory",
        &[
            "--device=id=a,socket=@/s,dir=@/dir,tag=t",
            "--device=id=b,socket=@/t,dir=@/nowhere,tag=u",
        ],
        &["--device dir", "@/nowhere"],
    ),
];

fn stage() -> (Scratch, UnixListener) {
    let scratch = Scratch::new();
    scratch.file("file", b"not a directory");
    fs::create_dir(scratch.path("dir")).unwrap();
    fs::create_dir(scratch.path("other")).unwrap();
    std::os::unix::fs::symlink(scratch.path("nowhere"), scratch.path("link")).unwrap();
    let live = UnixListener::bind(scratch.path("live")).unwrap();
    (scratch, live)
}

#[test]
fn bad_command_lines_are_refused_in_one_line() {
    let test = "bad_command_lines_are_refused_in_one_line";
    if !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    let (scratch, live) = stage();
    let faults = faults(Part::PERICARP_FS, scratch.dir(), TABLE);
    drop(live);
    assert_refused(&faults, TABLE.len());
}

#[test]
fn more_directories_than_fit_are_refused() {
    if !have(
        "more_directories_than_fit_are_refused",
        &[Part::PERICARP_FS],
    ) {
        return;
    }
    let (scratch, _live) = stage();
    let dir = scratch.dir().display();
    let device = |n| format!("--device=id={n},socket={dir}/{n},dir={dir}/dir,tag={n}");
    let args: Vec<String> = (0..65).map(device).collect();
    let named = ["--device".into(), "65".into(), "64".into()];
    let fault = fault(Part::PERICARP_FS, scratch.dir(), &args, &named);
    assert_eq!(fault, None);
}

#[test]
fn version_help_and_capabilities_go_to_stdout() {
    let test = "version_help_and_capabilities_go_to_stdout";
    if !have(test, &[Part::PERICARP_FS]) {
        return;
    }
    for (option, part) in [
        ("--version", "pericarp-fs"),
        ("--help", "--shared-dir"),
        ("--print-capabilities", "\"type\": \"fs\""),
    ] {
        let program = Part::PERICARP_FS.find().unwrap();
        let output = Command::new(program).arg(option).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{option}: {}", output.status);
        assert!(stdout.contains(part), "{option}: {stdout}");
        assert!(output.stderr.is_empty(), "{option} wrote to stderr");
    }
}
