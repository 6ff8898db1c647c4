//! Roots that are disks: what snapshotters such as blockfile and devmapper make. Debian's containerd
//! has none that works here, so the shim is asked as containerd would ask it: for a container
//! without a pod whose root is an image with ext4.

use std::fs;
use std::process::{Command, Stdio};

use containerd_shim_protos::TaskClient;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest,
};
use pericarp_tests::oci;
use pericarp_tests::parts::{Part, beside_us, have};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::context::{Context, with_timeout};

use crate::blocks::read;
use crate::stage::{Stage, script};

const ID: &str = "rooted";

fn limit() -> Context {
    with_timeout(200_000_000_000)
}

pub(crate) fn a_root_may_be_a_disk(stage: &mut Stage) {
    if !have("a_root_may_be_a_disk", &[Part::MkfsExt4]) {
        return;
    }
    let scratch = stage.node.scratch();
    let (tree, image) = (scratch.path("root-tree"), scratch.path("root.img"));
    oci::busybox(&tree, oci::ALL_TOOLS);
    let made = Command::new(Part::MkfsExt4.find().unwrap())
        .args(["-q", "-F", "-d"])
        .args([&tree, &image])
        .arg("64M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let config = scratch.path("rooted.toml");
    let text = "[profiles.pericarp]\nsizing = \"aks-ga\"\nboot-timeout = 200\nrootfs = \"block\"\n";
    fs::write(&config, text).unwrap();

    let work = "head -n 1 /proc/mounts > /out; echo words > /file; exit 7";
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": script(work), "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": namespaces},
    });
    let bundle = scratch.path("bundle");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();

    let shim = beside_us().join("containerd-shim-pericarp-v2");
    let started = stage
        .node
        .command(shim.as_os_str())
        .args(["-namespace", "k8s.io", "-id", ID, "-address", "", "-bundle"])
        .arg(&bundle)
        .arg("start")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(started.status.success(), "{started:?}");
    let address = String::from_utf8(started.stdout).unwrap();
    let path = address.trim().strip_prefix("unix://").unwrap();
    let path = stage.node.root().join(path.strip_prefix('/').unwrap());
    let client = ttrpc::Client::connect(&format!("unix://{}", path.display())).unwrap();
    let client = TaskClient::new(client);

    // ConfigPath of runtimeoptions.v1.Options.
    let config = config.display().to_string();
    let mut options = vec![0x12, u8::try_from(config.len()).unwrap()];
    assert!(config.len() < 128, "{config}");
    options.extend(config.as_bytes());
    let root = Mount {
        type_: "ext4".into(),
        source: image.display().to_string(),
        options: vec!["rw".into(), "loop".into()],
        ..Mount::default()
    };
    let create = CreateTaskRequest {
        id: ID.into(),
        bundle: bundle.display().to_string(),
        rootfs: vec![root],
        options: MessageField::some(Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: options,
            ..Any::default()
        }),
        ..CreateTaskRequest::default()
    };
    client.create(limit(), &create).unwrap();
    let start = StartRequest {
        id: ID.into(),
        ..StartRequest::default()
    };
    client.start(limit(), &start).unwrap();
    let wait = WaitRequest {
        id: ID.into(),
        ..WaitRequest::default()
    };
    assert_eq!(client.wait(limit(), &wait).unwrap().exit_status, 7);
    // Nobody on the host has it mounted, nor has it become a loop device.
    let mut list = Command::new("losetup");
    let list = list.arg("--associated").arg(&image).output().unwrap();
    assert!(list.stdout.is_empty(), "{list:?}");
    let delete = DeleteRequest {
        id: ID.into(),
        ..DeleteRequest::default()
    };
    client.delete(limit(), &delete).unwrap();
    // It leaves, and may not come to answer.
    let _ = client.shutdown(limit(), &ShutdownRequest::default());
    // The guest has mounted it, and has written everything back.
    let out = read(&image, "out");
    assert!(
        out.starts_with("/dev/vd") && out.contains(" / ext4 rw,"),
        "{out}"
    );
    assert_eq!(read(&image, "file"), "words\n");
}
