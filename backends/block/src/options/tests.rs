//! The command line: defaults, and one line for each mistake.

use super::*;
use crate::CacheMode;

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
    let options = options("--socket-path /s --blk-file /d");
    let device = &options.devices[0];
    assert_eq!(device.socket, SocketOption::Path("/s".into()));
    assert_eq!(device.disk.file, PathBuf::from("/d"));
    assert_eq!(device.disk.cache, CacheMode::Direct);
    assert!(!device.disk.read_only);
    assert_eq!((device.queues, device.queue_size), (1, 1024));
    assert_eq!((options.workers, options.confine), (1, true));
    assert_eq!(options.log_level, LevelFilter::Warn);
    assert_eq!(options.poll_limit, Duration::from_micros(20));
    assert!(!options.register_memory);
}

#[test]
fn memory_is_registered_when_asked_for() {
    let one = "--socket-path /s --blk-file /d --register-memory";
    assert!(options(one).register_memory);
    assert!(options(&format!("{one} --io-engine uring")).register_memory);
}

#[test]
fn a_disk_is_polled_when_asked_for() {
    let polled = |args: &str| {
        let options = options(args);
        let disks = options.devices.iter().map(|d| d.disk.iopoll);
        disks.collect::<Vec<_>>()
    };
    let one = "--socket-path /s --blk-file /d";
    assert_eq!(polled(one), [false]);
    assert_eq!(polled(&format!("{one} --iopoll --cache direct")), [true]);
    let many =
        "--device id=a,socket=/a,file=/d,iopoll=on --device id=b,socket=/b,file=/e,iopoll=off";
    assert_eq!(polled(many), [true, false]);
}

#[test]
fn many_devices_share_a_process() {
    let options = options(
        "--device id=a,socket=/a,file=/x,,y,read-only=on,num-queues=3,cache=buffered \
         --device id=b,socket=/b,file=/z,queue-size=64,serial=S --cpus 0,2-3 --workers 2",
    );
    assert_eq!(options.devices.len(), 2);
    let a = &options.devices[0];
    assert_eq!(a.disk.file, PathBuf::from("/x,y"));
    assert!(a.disk.read_only);
    assert_eq!((a.queues, a.serial.as_str()), (3, "a"));
    assert_eq!(options.devices[1].queue_size, 64);
    assert_eq!(options.cpus, [0, 2, 3]);
    assert_eq!(options.workers, 2);
}

#[test]
fn limits_of_one_and_of_many_devices() {
    let limits = Limits {
        iops: 500,
        iops_burst: 2048,
        bandwidth: 3 << 20,
        bandwidth_burst: 1 << 30,
    };
    let single = "--socket-path /s --blk-file /d --iops 500 --iops-burst 2K --bandwidth 3M \
                  --bandwidth-burst=1G --control-path /c";
    assert_eq!(options(single).devices[0].limits, limits);
    assert_eq!(options(single).control, Some(PathBuf::from("/c")));
    let keys =
        "--device id=a,socket=/s,file=/d,iops=500,iops-burst=2K,bandwidth=3M,bandwidth-burst=1G";
    assert_eq!(options(keys).devices[0].limits, limits);
    let none = options("--socket-path /s --blk-file /d --iops 0");
    assert_eq!(none.devices[0].limits, Limits::default());
}

#[test]
fn equals_signs_and_information_requests() {
    assert_eq!(
        options("--socket-path=/s --blk-file=/d").devices[0].id,
        "disk"
    );
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
    let one = "--socket-path /s --blk-file /d";
    for (args, want) in [
        (
            "",
            "--blk-file: missing: say which disk to serve; see --help",
        ),
        (
            "--blk-file /d",
            "--socket-path: missing: say where to listen",
        ),
        (
            "--socket-path /s",
            "--blk-file: missing: say which disk to serve",
        ),
        (
            "--socket-path",
            "--socket-path: its value is missing; see --help",
        ),
        ("--bogus", "--bogus: unknown option; see --help"),
        ("-x", "-x: unknown option; see --help"),
        (
            "extra",
            "extra: not an option: every value belongs to one; see --help",
        ),
        (
            "--read-only --read-only",
            "--read-only: given twice: give it once",
        ),
        (
            "--num-queues 0",
            "--num-queues \"0\": not a number from 1 to 64",
        ),
        (
            "--num-queues 65",
            "--num-queues \"65\": not a number from 1 to 64",
        ),
        (
            "--num-queues -1",
            "--num-queues \"-1\": not a number from 1 to 64",
        ),
        (
            "--queue-size 100",
            "--queue-size 100: a queue size is a power of two: use 128",
        ),
        (
            "--queue-size 8",
            "--queue-size \"8\": not a number from 16 to 1024",
        ),
        (
            "--cache none",
            "--cache \"none\": unknown cache mode: use direct, buffered or dontcache",
        ),
        (
            "--serial 123456789012345678901",
            "--serial \"123456789012345678901\": a serial is at most 20 printable ASCII characters: shorten it",
        ),
        ("--fd 2", "--fd \"2\": not a number from 3 to 2147483647"),
        (
            "--socket-path /a --fd 5",
            "--fd 5: give either --socket-path or --fd, not both",
        ),
        ("--workers 0", "--workers \"0\": not a number from 1 to 64"),
        (
            "--cpus 3-1",
            "--cpus \"3-1\": a CPU list looks like 0,2-3, with CPUs below 1024",
        ),
        (
            "--poll-us 1001",
            "--poll-us \"1001\": not a number from 0 to 1000",
        ),
        (
            "--io-engine aio",
            "--io-engine \"aio\": unknown engine: use auto, uring or sync",
        ),
        (
            "--log-level loud",
            "--log-level \"loud\": unknown level: use error, warn, info, debug or off",
        ),
        (
            "--device id",
            "--device \"id\": not key=value; a comma in a value is written twice",
        ),
        (
            "--device size=1",
            "--device \"size\": unknown key: use id, socket, file, read-only, num-queues, queue-size, cache, iopoll, serial, iops, iops-burst, bandwidth or bandwidth-burst",
        ),
        (
            "--device id=a,id=b",
            "--device id b: given twice: give it once",
        ),
        (
            "--device socket=/s,file=/d",
            "--device id: missing: give the device a name",
        ),
        (
            "--device id=a,file=/d",
            "--device socket: missing: say where to listen",
        ),
        (
            "--device id=a,read-only=yes",
            "--device read-only \"yes\": say on or off",
        ),
        (
            "--device id=a,socket=/a,file=/d --device id=a,socket=/b,file=/d",
            "--device id a: used twice: give each device its own",
        ),
        (
            "--device id=a,socket=/a,file=/d --device id=b,socket=/a,file=/d",
            "--device socket /a: used twice: give each device its own",
        ),
    ] {
        assert_eq!(line(args).unwrap_err(), want, "{args}");
    }
    let rule = "not a number such as 500, 64K or 100M: use 0 for no limit";
    for bad in [
        "-1",
        "1.5",
        "K",
        "",
        "+5",
        "1k",
        "16777216T",
        "18446744073709551615K",
    ] {
        let got = line(&format!("{one} --iops={bad}")).unwrap_err();
        assert_eq!(got, format!("--iops {bad:?}: {rule}"));
    }
    for (args, want) in [
        (
            "--iops-burst 5",
            "--iops-burst 5: there is no limit that a burst could exceed: set iops, too",
        ),
        (
            "--bandwidth 0 --bandwidth-burst 1K",
            "--bandwidth-burst 1024: there is no limit that a burst could exceed: set bandwidth, too",
        ),
        (
            "--control-path=",
            "--control-path \"\": empty: give the path of a socket",
        ),
        (
            "--io-engine sync --register-memory",
            "--register-memory: there is nothing to register with in the sync engine: use auto or uring",
        ),
        (
            "--io-engine sync --iopoll",
            "--iopoll: the sync engine waits for each request instead: use auto or uring",
        ),
        (
            "--iopoll --cache buffered",
            "--iopoll: only direct I/O can be polled: leave it out, or use cache mode direct",
        ),
        (
            "--control-path /s",
            "--control-path /s: used twice: give the control socket its own",
        ),
    ] {
        assert_eq!(line(&format!("{one} {args}")).unwrap_err(), want);
    }
    let both = format!("{one} --device id=a,socket=/a,file=/d");
    assert_eq!(
        line(&both).unwrap_err(),
        "--device: give either --device or the options of a single device, not both"
    );
}

#[test]
fn a_device_survives_the_line_that_adds_it() {
    for keys in [
        "id=b,socket=/s,file=/d",
        "id=b,socket=/s,file=/x,,y,read-only=on,num-queues=3,queue-size=64,cache=buffered,\
         serial=S,iops=5,iops-burst=7,bandwidth=1K,bandwidth-burst=2K",
        "id=c,socket=s,file=d,cache=dontcache,serial=",
    ] {
        let command = line(&format!("--control-path /c --add-device {keys}")).unwrap();
        let Command::Ask {
            control,
            change: Change::Add(device),
        } = command
        else {
            panic!("{command:?}");
        };
        assert_eq!(control, PathBuf::from("/c"));
        let served = &options(&format!("--device {keys}")).devices[0];
        assert_eq!(*device, *served);
        let mut polled = device.to_members();
        polled.insert("iopoll".to_owned(), serde_json::json!(true));
        polled.insert("cache".to_owned(), serde_json::json!("direct"));
        let refused = DeviceOptions::from_members(&polled).unwrap_err();
        assert!(
            refused.to_string().contains("cannot be polled"),
            "{refused}"
        );
        let read = DeviceOptions::from_members(&device.to_members());
        assert_eq!(read.unwrap(), *device);
    }
    let change = Change::Remove {
        id: "b".to_owned(),
        force: true,
    };
    let control = PathBuf::from("/c");
    assert_eq!(
        line("--remove-device b --force --control-path /c").unwrap(),
        Command::Ask { control, change }
    );
    for (args, want) in [
        (
            "--remove-device b",
            "--remove-device: whom to ask is missing: give --control-path of the running program, too",
        ),
        (
            "--add-device id=b,socket=/b,file=/d,iopoll=on --control-path /c",
            "--add-device iopoll on: a disk that is added cannot be polled: leave it out, or start a process for the disk",
        ),
        (
            "--add-device id=b,file=/d --control-path /c",
            "--add-device socket: missing: say where to listen",
        ),
    ] {
        assert_eq!(line(args).unwrap_err(), want);
    }
}
