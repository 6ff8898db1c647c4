//! Command lines and files, and all their mistakes.

use pericarp_tests::scratch::Scratch;

use super::*;

fn run(words: &[&str]) -> Result<Options, Vec<String>> {
    match parse(words.iter().map(OsString::from)) {
        Ok(Command::Run(options)) => Ok(*options),
        Ok(other) => panic!("{other:?}"),
        Err(mistakes) => Err(mistakes.iter().map(ToString::to_string).collect()),
    }
}

#[test]
fn flags_describe_a_machine() {
    let options = run(&[
        "--kernel",
        "/k",
        "--cpus",
        "4",
        "--memory",
        "1G",
        "--cmdline",
        "a b",
        "--disk",
        "id=root,socket=/d,,1,queues=2,queue-size=128",
        "--fs",
        "id=data,socket=/f,tag=t",
        "--net",
        "id=n,socket=/n,mac=02:00:00:00:00:0a",
        "--vsock",
        "id=v,socket=/v,cid=9",
        "--device",
        "id=r,socket=/r,type=4,queues=1",
        "--serial",
        "null",
        "--no-reboot",
        "--huge-pages",
        "--prefault",
        "2",
        "--kernel-cache",
        "none",
    ])
    .unwrap();
    assert_eq!((options.cpus, options.memory), (4, 1 << 30));
    assert_eq!(options.devices.len(), 5);
    let disk = &options.devices[0];
    assert_eq!(disk.socket, Path::new("/d,1"));
    assert_eq!((disk.queues, disk.queue_size), (Some(2), 128));
    assert_eq!(options.devices[1].queue_size, 1024);
    let mac = Some([2, 0, 0, 0, 0, 10]);
    assert_eq!(options.devices[2].kind, Kind::Net { mac });
    assert!(options.no_reboot && options.backing.huge_pages && options.confine);
    assert_eq!(options.kernel_cache, None);
    assert_eq!(options.serial, SerialOut::Null);
}

#[test]
fn a_file_says_the_same() {
    let scratch = Scratch::new();
    let file = scratch.path("vm.json");
    fs::write(
        &file,
        r#"{"kernel": "/k", "cpus": 4, "memory": "1G", "no-reboot": true,
            "disk": [{"id": "root", "socket": "/d,1", "queues": 2}],
            "fs": {"id": "data", "socket": "/f", "tag": "t"}}"#,
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let from_file = run(&["--config", file]).unwrap();
    let from_flags = run(&[
        "--kernel",
        "/k",
        "--cpus",
        "4",
        "--memory",
        "1G",
        "--no-reboot",
        "--disk",
        "id=root,socket=/d,,1,queues=2",
        "--fs",
        "id=data,socket=/f,tag=t",
    ]);
    assert_eq!(from_file, from_flags.unwrap());
    let more = run(&["--config", file, "--vsock", "id=v,socket=/v"]).unwrap();
    assert_eq!(more.devices.len(), 3);
}

#[test]
fn every_mistake_is_told() {
    let mistakes = run(&[
        "--cpus",
        "0",
        "--memory",
        "3",
        "--disk",
        "id=a",
        "--fs",
        "id=b,socket=/s,tag=",
        "--net",
        "id=a b,socket=/n",
        "--nonsense",
        "1",
    ])
    .unwrap_err();
    let wanted = [
        "--cpus",
        "--memory",
        "--disk socket",
        "--fs tag",
        "--net id",
        "--nonsense",
        "--kernel",
    ];
    assert_eq!(mistakes.len(), wanted.len(), "{mistakes:#?}");
    for (mistake, wanted) in mistakes.iter().zip(wanted) {
        assert!(mistake.starts_with(wanted), "{mistake}");
    }
}

#[test]
fn devices_are_apart() {
    let mistakes = run(&[
        "--kernel",
        "/k",
        "--disk",
        "id=a,socket=/s",
        "--fs",
        "id=a,socket=/s",
    ])
    .unwrap_err();
    assert_eq!(mistakes.len(), 2, "{mistakes:?}");
    for (flag, value) in [
        ("--net", "id=a,socket=/s,mac=01:00:00:00:00:00"),
        ("--net", "id=a,socket=/s,mac=2:0:0:0:0:0"),
        ("--disk", "id=a,socket=/s,tag=x"),
        ("--disk", "id=a,socket=/s,queue-size=3"),
        ("--vsock", "id=a,socket=/s,cid=2"),
        ("--device", "id=a,socket=/s"),
    ] {
        assert_eq!(run(&["--kernel", "/k", flag, value]).unwrap_err().len(), 1);
    }
}

#[test]
fn files_that_are_none_are_told() {
    let scratch = Scratch::new();
    let file = scratch.path("vm.json");
    for text in [
        "",
        "[]",
        "{\"kernel\": [\"a\"]}",
        "{\"disk\": [{\"id\": {}}]}",
    ] {
        fs::write(&file, text).unwrap();
        assert!(
            run(&["--config", file.to_str().unwrap()]).is_err(),
            "{text}"
        );
    }
    assert!(run(&["--config", "/nowhere"]).is_err());
}

#[test]
fn a_device_may_come_by_request() {
    let Value::Object(members) = serde_json::json!({"kind": "disk", "id": "d", "socket": "/d"})
    else {
        panic!();
    };
    assert_eq!(device_of(&members).unwrap().kind, Kind::Disk);
    let mut wrong = members.clone();
    wrong.insert("kind".into(), "floppy".into());
    assert!(device_of(&wrong).is_err());
}
