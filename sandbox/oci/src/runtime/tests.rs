//! Tests of the descriptions; the last one gives them to runc.

use std::process::Command;

use super::*;
use crate::{
    config::{self, Wishes},
    image::Defaults,
    testing::{Dir, is_root, program_is_there, skip},
};

fn process(command: &[&str]) -> Process {
    let wishes = Wishes {
        command: command.iter().map(|&word| word.to_owned()).collect(),
        hostname: "pericarp".to_owned(),
        ..Wishes::default()
    };
    config::merge(&Defaults::default(), &wishes).unwrap()
}

fn container(process: &Process) -> Container<'_> {
    Container {
        process,
        run_as: RunAs::Later(""),
        root: None,
        read_only: false,
        binds: &[],
        hostname: "pericarp",
        limits: Limits::default(),
        cgroups: Cgroups::V2,
        cgroups_path: None,
        network: Network::Own,
    }
}

fn names<'a>(list: &'a Value, key: &str) -> Vec<&'a str> {
    let list = list.as_array().unwrap();
    list.iter().map(|it| it[key].as_str().unwrap()).collect()
}

#[test]
fn directories_of_the_host_come_last() {
    let process = process(&["sh"]);
    let binds = [("/srv/a", "/a", false), ("/srv/b", "/a/b", true)];
    let binds = binds.map(|(source, destination, read_only)| Bind {
        source: Path::new(source),
        destination,
        read_only,
    });
    let config = config(&Container {
        read_only: true,
        binds: &binds,
        ..container(&process)
    });
    let mounts = config["mounts"].as_array().unwrap();
    assert_eq!(
        mounts[mounts.len() - 2..],
        [
            json!({
                "destination": "/a", "type": "bind", "source": "/srv/a",
                "options": ["rbind", "rprivate", "nodev", "rw"],
            }),
            json!({
                "destination": "/a/b", "type": "bind", "source": "/srv/b",
                "options": ["rbind", "rprivate", "nodev", "ro", "rro"],
            }),
        ]
    );
}

#[test]
fn limits_are_in_the_description_and_absent_without() {
    let process = process(&["sh"]);
    let mut container = container(&process);
    let plain = config(&container);
    assert_eq!(
        plain["linux"]["resources"],
        json!({"devices": [{"allow": false, "access": "rwm"}]})
    );
    assert!(plain["linux"].get("cgroupsPath").is_none() && plain["root"].get("path").is_none());
    container.limits = Limits {
        milli_cpus: Some(500),
        memory: Some(64 << 20),
    };
    container.cgroups = Cgroups::V1;
    container.cgroups_path = Some("/x");
    let resources = &config(&container)["linux"]["resources"];
    assert_eq!(resources["cpu"], json!({"quota": 50000, "period": 100_000}));
    assert_eq!(resources["memory"], json!({"limit": 64 << 20}));
    assert!(resources.get("unified").is_none());
    container.limits.milli_cpus = Some(1);
    assert_eq!(
        config(&container)["linux"]["resources"]["cpu"]["quota"],
        1000
    );
}

#[test]
fn mounts_and_namespaces_follow_the_choices() {
    let process = process(&["sh"]);
    let mut container = container(&process);
    let config = config(&container);
    let places = names(&config["mounts"], "destination");
    assert!(places.contains(&"/sys/fs/cgroup"));
    assert!(!places.contains(&"/tmp") && !places.contains(&"/run"));
    assert!(names(&config["linux"]["namespaces"], "type").contains(&"cgroup"));
    container.cgroups = Cgroups::V1;
    container.read_only = true;
    container.network = Network::Shared;
    let config = super::config(&container);
    let places = names(&config["mounts"], "destination");
    assert!(!places.contains(&"/sys/fs/cgroup"));
    assert!(
        ["/tmp", "/run", "/var/tmp"]
            .iter()
            .all(|it| places.contains(it))
    );
    assert_eq!(
        names(&config["linux"]["namespaces"], "type"),
        ["pid", "ipc", "uts", "mount"]
    );
    assert_eq!(config["root"]["readonly"], true);
}

#[test]
fn only_root_gets_capabilities() {
    let process = process(&["sh"]);
    let mut container = container(&process);
    let user = User {
        uid: 7,
        gid: 8,
        additional_gids: vec![9],
    };
    let root = User::default();
    for (run_as, some) in [
        (RunAs::Later(""), true),
        (RunAs::Later("root"), true),
        (RunAs::Later("0:5"), true),
        (RunAs::Later("app"), false),
        (RunAs::Numbers(&root), true),
        (RunAs::Numbers(&user), false),
    ] {
        container.run_as = run_as.clone();
        let capabilities = &config(&container)["process"]["capabilities"];
        let effective = capabilities["effective"].as_array().unwrap();
        assert_eq!(!effective.is_empty(), some, "{run_as:?}");
        assert_eq!(capabilities["bounding"].as_array().unwrap().len(), 11);
    }
    assert_eq!(
        config(&container)["process"]["user"],
        json!({"uid": 7, "gid": 8, "additionalGids": [9]})
    );
}

#[test]
fn a_further_process_takes_over_what_it_does_not_say() {
    let own = process(&["sh"]);
    let mut container = container(&own);
    container.run_as = RunAs::Later("app");
    let config = config(&container);
    let args = ["id".to_owned()];
    let process = exec_process(
        &config,
        &Exec {
            args: &args,
            ..Exec::default()
        },
    )
    .unwrap();
    assert_eq!(process["args"], json!(["id"]));
    for same in ["env", "cwd", "capabilities", "noNewPrivileges"] {
        assert_eq!(process[same], config["process"][same], "{same}");
    }
    assert!(process.get("user").is_none());
    let env = ["HOSTNAME=other".to_owned(), "NEW=1".to_owned()];
    let exec = Exec {
        args: &args,
        env: &env,
        cwd: Some("/srv"),
        user: Some(RunAs::Later("root")),
        terminal: true,
    };
    let process = exec_process(&config, &exec).unwrap();
    assert_eq!(
        process["env"],
        json!([
            format!("PATH={}", config::DEFAULT_PATH),
            "container=pericarp",
            "HOSTNAME=other",
            "TERM=xterm",
            "NEW=1"
        ])
    );
    assert_eq!(
        (&process["cwd"], &process["terminal"]),
        (&json!("/srv"), &json!(true))
    );
    assert_eq!(
        process["capabilities"]["effective"]
            .as_array()
            .unwrap()
            .len(),
        11
    );
    assert!(exec_process(&json!({}), &exec).is_err());
}

/// A root of one program is enough for runc to say what it thinks of the description.
#[test]
fn runc_starts_what_is_described() {
    const NAME: &str = "runc_starts_what_is_described";
    if !is_root() {
        return skip(NAME, "starting a container needs root");
    }
    if !program_is_there(NAME, "runc", "runc")
        || !program_is_there(NAME, "busybox", "busybox-static")
    {
        return;
    }
    let cgroups = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Cgroups::V2
    } else {
        Cgroups::V1
    };
    for read_only in [false, true] {
        let dir = Dir::new("runc");
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        let process = process(&[
            "/bin/busybox",
            "sh",
            "-c",
            "echo $(/bin/busybox id -u) $PWD $HOSTNAME $container; exit 7",
        ]);
        let id = format!("pericarp-oci-{}-{read_only}", std::process::id());
        let user = User {
            uid: 5,
            ..User::default()
        };
        let container = Container {
            run_as: RunAs::Numbers(&user),
            root: Some(&root),
            read_only,
            cgroups,
            cgroups_path: Some(&id),
            ..container(&process)
        };
        std::fs::write(
            dir.path().join("config.json"),
            config(&container).to_string(),
        )
        .unwrap();
        let output = Command::new("runc")
            .arg("--root")
            .arg(dir.path().join("state"))
            .args(["run", "--bundle"])
            .arg(dir.path())
            .arg(&id)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            "5 / pericarp pericarp",
            "{errors}"
        );
        assert_eq!(output.status.code(), Some(7), "{errors}");
    }
}
