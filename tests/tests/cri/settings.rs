//! How a container is run: what its image and its pod say, as whom, with which rights, and what it
//! shares with others.

use pericarp_tests::cri::proto::{Int64Value, KeyValue, NamespaceMode};
use pericarp_tests::cri::{Container, Pod, container, pod};
use protobuf::MessageField;

use crate::stage::{IDLE, Stage, script};

fn number(value: i64) -> MessageField<Int64Value> {
    let mut number = Int64Value::new();
    number.value = value;
    MessageField::some(number)
}

pub(crate) fn the_image_and_the_pod_say_how_a_container_is_run(stage: &mut Stage) {
    let pod = stage.pod("words");
    let said = |name: &str, command: &[&str], args: &[&str]| {
        let mut config = container(name, command);
        config.args = args.iter().map(|word| (*word).to_owned()).collect();
        let one = pod.start(&config).unwrap();
        assert_eq!(one.ended().exit_code, 0);
        let log = one.log_until(|log| !log.is_empty());
        log[0].text.clone()
    };
    assert_eq!(said("image", &[], &[]), "of the image");
    assert_eq!(said("args", &[], &["of", "the pod"]), "of the pod");
    assert_eq!(said("command", &["/bin/printf", "%s."], &["x y"]), "x y.");

    let mut config = container("own", &IDLE);
    let one = pod.start(&config).unwrap();
    assert_eq!(
        one.shell("pwd; echo $GREETING; echo $PATH"),
        "/home/ada\nhello\n/bin"
    );
    let variable = |key: &str, value: &str| {
        let mut one = KeyValue::new();
        one.key = key.into();
        one.value = value.into();
        one
    };
    config.envs = vec![variable("GREETING", "bye = now"), variable("EMPTY", "")];
    config.working_dir = "/made/here".into();
    config.metadata.mut_or_insert_default().name = "other".into();
    let other = pod.start(&config).unwrap();
    let seen = other.shell("pwd; echo $GREETING; echo ${EMPTY-unset}; echo ${HOME}");
    assert_eq!(seen, "/made/here\nbye = now\n\n/root");
    // What the pod has for all.
    assert_eq!(other.shell("hostname; cat /etc/hostname"), "words\nwords");
    assert_eq!(
        other.shell("cat /etc/resolv.conf"),
        "search pods.test\nnameserver 10.88.0.1"
    );
}

pub(crate) fn users_groups_and_capabilities(stage: &mut Stage) {
    let pod = stage.pod("users");
    let mut config = container("number", &IDLE);
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    security.run_as_user = number(4000);
    security.run_as_group = number(5000);
    security.supplemental_groups = vec![6000, 77];
    security.no_new_privs = true;
    let one = pod.start(&config).unwrap();
    assert_eq!(one.shell("id -u; id -g"), "4000\n5000");
    let groups = one.shell("id -G");
    let mut groups: Vec<&str> = groups.split(' ').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["5000", "6000", "77"]);
    let status = "sed -n 's/^\\(CapEff\\|NoNewPrivs\\):.//p' /proc/self/status";
    assert_eq!(one.shell(status), "0000000000000000\n1");
    one.shell("test ! -w /etc/passwd");

    let mut config = container("name", &IDLE);
    let linux = config.linux.mut_or_insert_default();
    linux
        .security_context
        .mut_or_insert_default()
        .run_as_username = "ada".into();
    let ada = pod.start(&config).unwrap();
    assert_eq!(
        ada.shell("id -un; id -g; touch ~/x; stat -c %u:%g ~/x"),
        "ada\n1235\n1234:1235"
    );

    // Root's rights, but for one, and one more.
    let mut config = container("rights", &IDLE);
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    let capabilities = security.capabilities.mut_or_insert_default();
    capabilities.drop_capabilities = vec!["CHOWN".into()];
    capabilities.add_capabilities = vec!["NET_ADMIN".into()];
    let rights = pod.start(&config).unwrap();
    let seen = rights.shell("sed -n 's/^CapEff:.//p' /proc/self/status");
    let seen = u64::from_str_radix(&seen, 16).unwrap();
    let (chown, kill, net_admin, sys_admin) = (1 << 0, 1 << 5, 1 << 12, 1 << 21);
    assert_eq!(
        seen & (chown | kill | net_admin | sys_admin),
        kill | net_admin
    );
    let output = rights
        .exec(&["ip", "link", "set", "lo", "mtu", "1500"])
        .unwrap();
    assert_eq!(output.code, 0, "{}", output.error());
}

pub(crate) fn a_root_may_be_read_only(stage: &mut Stage) {
    let pod = stage.pod("still");
    let mut config = container("still", &IDLE);
    let linux = config.linux.mut_or_insert_default();
    linux
        .security_context
        .mut_or_insert_default()
        .readonly_rootfs = true;
    let still = pod.start(&config).unwrap();
    let output = still.exec(&["touch", "/x"]).unwrap();
    assert_eq!(output.code, 1);
    assert!(
        output.error().contains("Read-only file system"),
        "{}",
        output.error()
    );
    still.shell("echo x > /dev/shm/x");
    // Another is not, and neither sees what the other writes.
    let free = pod.start(&container("free", &IDLE)).unwrap();
    free.shell("echo y > /x && rm /bin/yes");
    still.shell("test ! -e /x && test -e /bin/yes");
}

pub(crate) fn containers_of_a_pod_share_what_they_should(stage: &mut Stage) {
    let mut config = pod("shared");
    let linux = config.linux.mut_or_insert_default();
    linux
        .sysctls
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    let security = linux.security_context.mut_or_insert_default();
    let namespaces = security.namespace_options.mut_or_insert_default();
    namespaces.pid = NamespaceMode::POD.into();
    let pod = stage.node.run_pod(config, stage.subject.name).unwrap();
    let with = |name: &str, text: &str, mode: NamespaceMode| {
        let mut config = container(name, &script(text));
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        let namespaces = security.namespace_options.mut_or_insert_default();
        namespaces.pid = mode.into();
        pod.start(&config).unwrap()
    };
    let serve =
        "mkdir /w && echo found > /w/page && echo ready && exec httpd -f -p 127.0.0.1:80 -h /w";
    let server = with("server", serve, NamespaceMode::POD);
    let client = with("client", IDLE[2], NamespaceMode::POD);
    let apart = with("apart", IDLE[2], NamespaceMode::CONTAINER);
    server.log_until(|log| !log.is_empty());
    let page = "until wget -q -O - http://127.0.0.1/page 2>/dev/null; do :; done";
    assert_eq!(client.shell(page), "found");
    // Addresses, names and shared memory, but not files.
    assert_eq!(client.shell("hostname"), server.shell("hostname"));
    assert_eq!(client.shell("ip -o -4 addr"), apart.shell("ip -o -4 addr"));
    client.shell("echo x > /dev/shm/x && test ! -e /w");
    assert_eq!(server.shell("cat /dev/shm/x"), "x");
    // Processes where both want to.
    client.shell("ps -o args | grep -q '^httpd -f'");
    apart.shell("ps -o args | grep -q '^httpd -f' && exit 1 || true");
    assert_eq!(apart.shell("cat /proc/1/comm"), "sh");
    // The first of them is the pod's.
    if stage.subject.own_kernel {
        the_first_process_has_nothing(&pod, &client);
    } else {
        client.shell("test $(readlink /proc/1/ns/net) = $(readlink /proc/self/ns/net)");
    }
    client.shell("test $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start) = 80");
    // And one that dies takes nobody with it.
    client.shell("kill -9 $(ps -o pid,args | awk '/[h]ttpd -f/ {print $1}')");
    assert_eq!(server.ended().exit_code, 137);
    assert_eq!(client.shell("echo here"), "here");
}

/// The first process of containers that share theirs has no rights and nothing to show, not even to
/// root.
fn the_first_process_has_nothing(pod: &Pod<'_>, root: &Container<'_>) {
    let rights = "sed -n 's/^\\(Uid\\|Gid\\|Groups\\|CapPrm\\|CapBnd\\|NoNewPrivs\\):.//p' \
                  /proc/1/status";
    let seen = root.shell(rights);
    let words: Vec<&str> = seen.split_whitespace().collect();
    let (nobody, none) = (["65534"; 4], "0000000000000000");
    let wanted = [&nobody[..], &nobody, &[none, none, "1"]].concat();
    assert_eq!(words, wanted);
    root.shell("test -z \"$(ls -A /proc/1/root/ 2>/dev/null)\"");
    root.shell("! readlink /proc/1/ns/net");
    // Who may trace it finds an empty root, and a program that stays as it is.
    let mut config = container("tracer", &IDLE);
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    let capabilities = security.capabilities.mut_or_insert_default();
    capabilities.add_capabilities = vec!["SYS_PTRACE".into()];
    let namespaces = security.namespace_options.mut_or_insert_default();
    namespaces.pid = NamespaceMode::POD.into();
    let tracer = pod.start(&config).unwrap();
    let open = tracer.shell("ls -A /proc/1/root/ && ls /proc/1/fd");
    assert_eq!(open, "0\n1\n2");
    let changed = tracer.exec(&["touch", "/proc/1/exe"]).unwrap();
    assert!(changed.error().contains("Read-only"), "{}", changed.error());
}
