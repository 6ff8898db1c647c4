//! The command line: defaults, and one line for each mistake.

use std::time::Duration;

use log::LevelFilter;
use pericarp_uring::EngineKind;

use super::*;
use crate::Cache;

const ONE: &str = "--socket-path /s --shared-dir /d --tag t";

fn line(args: &str) -> Result<Command, String> {
    parse(args.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())
}

fn options(args: &str) -> Options {
    match line(args).unwrap() {
        Command::Serve(options) => *options,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_device_with_defaults() {
    let Options {
        devices,
        descriptors,
        process,
        state_file,
        take_over,
    } = options(ONE);
    assert_eq!((descriptors, state_file, take_over), (None, None, None));
    let device = DeviceOptions {
        keys: Keys::Options,
        id: "fs".to_owned(),
        socket: SocketOption::Path("/s".into()),
        dir: "/d".into(),
        tag: "t".to_owned(),
        settings: Settings {
            cache: Cache::Auto,
            writeback: false,
            dont_cache: false,
            alone: false,
            later_mounts: false,
        },
        read_only: false,
        direct_io: false,
        xattr: false,
        xattr_map: None,
        posix_acl: false,
        file_handles: true,
        locks: false,
        uid_map: IdMap::default(),
        gid_map: IdMap::default(),
        queues: 1,
        queue_size: 1024,
        limits: Limits::default(),
    };
    assert_eq!(devices, [device]);
    let defaults = Process {
        workers: 1,
        cpus: Vec::new(),
        engine: EngineKind::Auto,
        poll_limit: Duration::from_micros(20),
        inflight_file: None,
        control: None,
        log_level: LevelFilter::Warn,
        confine: true,
    };
    assert_eq!(process, defaults);
}

#[test]
fn options_and_keys_mean_the_same() {
    let single = options(
        "--fd 5 --shared-dir /d --tag t --read-only --cache always --writeback --dont-cache \
         --allow-direct-io --num-queues 3 --queue-size 64 --xattr --posix-acl --no-submounts \
         --no-file-handles --xattrmap :map::user.vm.: --locks host --uid-map :0:100000:1000:1000:5:1: --gid-map=:0:7:1: --iops 500 \
         --iops-burst 2K --bandwidth 3M --bandwidth-burst 1G",
    );
    let keys = options(
        "--device id=fs,socket=/s,dir=/d,tag=t,read-only=on,cache=always,writeback=on,\
         dont-cache=on,allow-direct-io=on,num-queues=3,queue-size=64,xattr=on,posix-acl=on,\
         submounts=off,file-handles=off,xattrmap=:map::user.vm.:,locks=host,uid-map=:0:100000:1000:1000:5:1:,gid-map=:0:7:1:,iops=500,\
         iops-burst=2K,bandwidth=3M,bandwidth-burst=1G",
    );
    let [single] = &single.devices[..] else {
        panic!("{single:?}");
    };
    assert_eq!(single.socket, SocketOption::Descriptor(5));
    assert_eq!(single.settings.cache, Cache::Always);
    assert!(single.settings.writeback && single.settings.dont_cache && single.settings.alone);
    assert!(single.read_only && single.direct_io && single.xattr && single.posix_acl);
    assert!(!single.file_handles && single.locks && single.xattr_map.is_some());
    assert_eq!((single.queues, single.queue_size), (3, 64));
    assert_eq!(single.uid_map.to_host(999), Some(100_999));
    assert_eq!(single.uid_map.to_host(1000), Some(5));
    assert_eq!(single.gid_map.to_host(0), Some(7));
    assert_eq!(single.gid_map.to_host(1), None);
    assert_eq!(single.limits.iops_burst, 2048);
    let as_keys = DeviceOptions {
        keys: Keys::Of("--device"),
        socket: SocketOption::Path("/s".into()),
        ..single.clone()
    };
    assert_eq!(keys.devices, [as_keys]);
}

#[test]
fn many_devices_share_a_process() {
    let options = options(
        "--device id=a,socket=/a,dir=/x,,y,tag=t,num-queues=2 \
         --device id=b,socket=/b,dir=/z,tag=t,xattr=off,file-handles=on \
         --workers 2 --cpus 0,2-3 --poll-us 0 --io-engine sync --control-path /c \
         --log-level debug --no-confine --rlimit-nofile 4096",
    );
    assert_eq!(options.devices.len(), 2);
    assert_eq!(options.descriptors, Some(4096));
    assert_eq!(options.devices[0].dir, PathBuf::from("/x,y"));
    assert!(options.devices[1].file_handles);
    let process = Process {
        workers: 2,
        cpus: vec![0, 2, 3],
        engine: EngineKind::Sync,
        poll_limit: Duration::ZERO,
        inflight_file: None,
        control: Some("/c".into()),
        log_level: LevelFilter::Debug,
        confine: false,
    };
    assert_eq!(options.process, process);
}

#[test]
fn information_requests() {
    for (args, command) in [
        ("--help", Command::Help),
        ("-h", Command::Help),
        ("--version", Command::Version),
        ("--print-capabilities", Command::Capabilities),
    ] {
        assert_eq!(line(args), Ok(command));
    }
}

#[test]
fn every_mistake_names_option_value_rule_and_cure() {
    let ranges = "ranges look like :GUEST:HOST:COUNT:, such as :0:100000:65536:";
    for (args, want) in [
        (
            "",
            "--shared-dir: missing: say which directory to serve; see --help",
        ),
        (
            "--workers 2",
            "--shared-dir: missing: say which directory to serve; see --help",
        ),
        (
            "--shared-dir /d --tag t",
            "--socket-path: missing: say where to listen",
        ),
        (
            "--socket-path /s --tag t",
            "--shared-dir: missing: say which directory to serve",
        ),
        (
            "--socket-path /s --shared-dir /d",
            "--tag: missing: say what the guest mounts it by",
        ),
        (
            "--shared-dir=",
            "--shared-dir \"\": empty: give the path of a directory",
        ),
        (
            "--tag=",
            "--tag \"\": a tag has 1 to 36 bytes, and this has 0: choose another",
        ),
        (
            "--tag 1234567890123456789012345678901234567",
            "--tag \"1234567890123456789012345678901234567\": a tag has 1 to 36 bytes, and this has 37: choose another",
        ),
        ("--tag", "--tag: its value is missing; see --help"),
        ("--bogus", "--bogus: unknown option; see --help"),
        (
            "--file-handles",
            "--file-handles: unknown option; see --help",
        ),
        ("--id a", "--id: unknown option; see --help"),
        (
            "--add-device id=a",
            "--add-device: unknown option; see --help",
        ),
        (
            "--rlimit-nofile 100",
            "--rlimit-nofile \"100\": not a number from 512 to 1048576",
        ),
        ("--xattr --xattr", "--xattr: given twice: give it once"),
        (
            "--num-queues 65",
            "--num-queues \"65\": not a number from 1 to 64",
        ),
        (
            "--queue-size 100",
            "--queue-size 100: a queue size is a power of two: use 128",
        ),
        (
            "--cache direct",
            "--cache \"direct\": unknown cache mode: use never, auto or always",
        ),
        (
            "--device id=a,dir=/d,tag=t",
            "--device socket: missing: say where to listen",
        ),
        (
            "--device id=a,socket=/s,tag=t",
            "--device dir: missing: say which directory to serve",
        ),
        (
            "--device id=a,socket=/s,dir=/d",
            "--device tag: missing: say what the guest mounts it by",
        ),
        (
            "--device socket=/s,dir=/d,tag=t",
            "--device id: missing: give the device a name",
        ),
        (
            "--device id=a,xattr=yes",
            "--device xattr \"yes\": say on or off",
        ),
        (
            "--device shared-dir=/d",
            "--device \"shared-dir\": unknown key: use id, socket, dir, tag, read-only, cache, writeback, dont-cache, allow-direct-io, num-queues, queue-size, xattr, posix-acl, xattrmap, file-handles, submounts, later-mounts, uid-map, gid-map, locks, iops, iops-burst, bandwidth or bandwidth-burst",
        ),
        (
            "--device id=a,socket=/s,dir=/d,tag=t,writeback=on,cache=never",
            "--device writeback: with cache mode never nothing is kept: leave it out, or use auto or always",
        ),
        (
            "--device id=a,socket=/s,dir=/d,tag=t,later-mounts=on,submounts=off",
            "--device later-mounts: what is mounted below the directory is left out: leave one of them out",
        ),
        (
            "--socket-path /s --shared-dir /d --tag t --later-mounts --read-only",
            "--later-mounts: what is mounted later is as writable as the host makes it: leave one of them out",
        ),
        (
            "--device id=a,socket=/a,dir=/d,tag=t --device id=a,socket=/b,dir=/d,tag=u",
            "--device id a: used twice: give each device its own",
        ),
        (
            "--device id=a,socket=/a,dir=/d,tag=t --device id=b,socket=/a,dir=/d,tag=u",
            "--device socket /a: used twice: give each device its own",
        ),
    ] {
        assert_eq!(line(args).unwrap_err(), want, "{args}");
    }
    for (args, want) in [
        (
            "--posix-acl",
            "--posix-acl: access control lists are extended attributes: turn on xattr, too"
                .to_owned(),
        ),
        (
            "--locks yes",
            "--locks \"yes\": locks are kept by the guest or by the host: use guest or host"
                .to_owned(),
        ),
        (
            "--xattrmap :map::user.vm.:",
            "--xattrmap: it maps extended attributes: turn on xattr, too".to_owned(),
        ),
        (
            "--xattr --xattrmap :okay:all:::",
            "--xattrmap \":okay:all:::\": rule 1 has the type \"okay\": use prefix, ok, bad, \
             unsupported or map: give rules such as :map::user.virtiofs.:"
                .to_owned(),
        ),
        (
            "--writeback --cache never",
            "--writeback: with cache mode never nothing is kept: leave it out, or use auto or always"
                .to_owned(),
        ),
        (
            "--device id=a,socket=/a,dir=/d,tag=t",
            "--device: give either --device or the options of a single device, not both".to_owned(),
        ),
        (
            "--control-path /s",
            "--control-path /s: used twice: give the control socket its own".to_owned(),
        ),
        (
            "--iops-burst 5",
            "--iops-burst 5: there is no limit that a burst could exceed: set iops, too".to_owned(),
        ),
        (
            "--inflight-file /f",
            "--inflight-file /f: requests are done again on files that --state-file keeps: \
             give that, too"
                .to_owned(),
        ),
        (
            "--inflight-file /f --state-file /f",
            "--state-file /f: used twice: give --inflight-file another".to_owned(),
        ),
        (
            "--take-over /c",
            "--take-over /c: the running program has a control socket: give --control-path, too"
                .to_owned(),
        ),
        ("--uid-map 0:1:2", format!("--uid-map \"0:1:2\": {ranges}")),
        ("--uid-map ::", format!("--uid-map \"::\": {ranges}")),
        ("--uid-map :", format!("--uid-map \":\": {ranges}")),
        ("--gid-map :0:1:", format!("--gid-map \":0:1:\": {ranges}")),
        (
            "--gid-map :0:+1:1:",
            format!("--gid-map \":0:+1:1:\": {ranges}"),
        ),
        (
            "--uid-map :0:0:4294967296:",
            format!("--uid-map \":0:0:4294967296:\": {ranges}"),
        ),
        (
            "--uid-map :0:5:0:",
            "--uid-map \":0:5:0:\": a range must have at least one id and end below 4294967295: correct the ranges"
                .to_owned(),
        ),
        (
            "--uid-map :0:5:2:1:9:1:",
            "--uid-map \":0:5:2:1:9:1:\": two ranges have an id in common: correct the ranges"
                .to_owned(),
        ),
    ] {
        assert_eq!(line(&format!("{ONE} {args}")).unwrap_err(), want);
    }
}

#[test]
fn a_process_has_room_for_64_directories() {
    let many = |count: usize| -> String {
        (0..count)
            .map(|n| format!("--device id={n},socket=/{n},dir=/d,tag={n} "))
            .collect()
    };
    assert_eq!(options(&many(64)).devices.len(), 64);
    assert_eq!(
        line(&many(65)).unwrap_err(),
        "--device 65: at most 64 devices fit one process: start another"
    );
}
