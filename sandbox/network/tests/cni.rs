//! The rules of CNI, with plugins that are shell scripts and write down what they get.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use pericarp_network::cni::{CniError, Invocation, List, PortMapping, Protocol, find};
use serde_json::{Value, json};

/// One test at a time: a program that another thread is about to start has a copy of each
/// descriptor for a moment, and a script that somebody has open for writing is not run.
static TURN: Mutex<()> = Mutex::new(());

/// A directory with plugins, configurations and what the plugins have written down.
struct Node {
    dir: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Node {
    fn new(test: &str) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = format!("pericarp-cni-{}-{test}", std::process::id());
        let dir = std::env::temp_dir().join(dir);
        for part in ["bin", "net.d", "log"] {
            fs::create_dir_all(dir.join(part)).expect("a directory");
        }
        Self { dir, _turn: turn }
    }

    /// A plugin that does this after it has written down what it gets.
    fn plugin(&self, name: &str, then: &str) {
        let log = self.dir.join("log").display().to_string();
        let script = format!(
            "#!/bin/sh\nin=$(cat)\necho {name} $CNI_COMMAND >> {log}/order\n\
             printf %s \"$in\" > {log}/{name}.$CNI_COMMAND\nenv > {log}/{name}.env\n{then}\n"
        );
        let path = self.dir.join("bin").join(name);
        fs::write(&path, script).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a program");
    }

    fn config(&self, file: &str, config: &Value) {
        fs::write(self.dir.join("net.d").join(file), config.to_string()).expect("a configuration");
    }

    fn find(&self, name: &str) -> Result<List, CniError> {
        find(&self.dir.join("net.d"), name)
    }

    /// A network of these plugins; the last forwards ports.
    fn list(&self, plugins: &[&str]) -> List {
        let last = plugins.len() - 1;
        let plugins = plugins.iter().enumerate().map(|(place, name)| {
            let ports = place == last;
            json!({"type": name, "key": place, "capabilities": {"portMappings": ports}})
        });
        let plugins: Vec<_> = plugins.collect();
        let config = json!({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins});
        self.config("10-pods.conflist", &config);
        self.find("pods").expect("a network")
    }

    fn invocation(&self) -> Invocation {
        Invocation {
            plugin_dirs: vec![PathBuf::from("/nowhere"), self.dir.join("bin")],
            ..Invocation::new("pod-1", "/run/netns/pod-1")
        }
    }

    fn order(&self) -> Vec<String> {
        let order = fs::read_to_string(self.dir.join("log/order")).unwrap_or_default();
        order.lines().map(str::to_owned).collect()
    }

    fn input(&self, name: &str) -> Value {
        let input = fs::read_to_string(self.dir.join("log").join(name));
        serde_json::from_str(&input.expect("an input")).expect("JSON")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn http() -> PortMapping {
    PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: Protocol::Tcp,
        host_ip: Some([127, 0, 0, 1].into()),
    }
}

#[test]
fn plugins_are_run_in_order_and_back() {
    let node = Node::new("order");
    node.plugin("first", "echo '{\"ips\": [], \"from\": \"first\"}'");
    node.plugin(
        "second",
        "echo '{\"ips\": [{\"address\": \"10.1.0.5/16\"}], \"dns\": {\"nameservers\": [\"10.1.0.1\"]}}'",
    );
    let list = node.list(&["first", "second"]);
    let invocation = Invocation {
        port_mappings: vec![http()],
        ..node.invocation()
    };
    let outcome = list.add(&invocation).unwrap();
    assert_eq!(outcome.addresses, [([10, 1, 0, 5].into(), 16)]);
    assert_eq!(outcome.dns.nameservers, ["10.1.0.1"]);
    assert_eq!(
        node.input("first.ADD"),
        json!({
            "type": "first", "key": 0, "capabilities": {"portMappings": false},
            "name": "pods", "cniVersion": "0.4.0",
        })
    );
    let ports =
        json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]);
    assert_eq!(
        node.input("second.ADD"),
        json!({
            "type": "second", "key": 1, "capabilities": {"portMappings": true},
            "name": "pods", "cniVersion": "0.4.0",
            "prevResult": {"ips": [], "from": "first"},
            "runtimeConfig": {"portMappings": ports},
        })
    );
    list.delete(&invocation, Some(&outcome.raw)).unwrap();
    list.delete(&invocation, Some(&outcome.raw)).unwrap();
    let down = ["second DEL", "first DEL"];
    assert_eq!(
        node.order(),
        [["first ADD", "second ADD"], down, down].concat()
    );
    assert_eq!(node.input("first.DEL")["prevResult"], outcome.raw);
    assert_eq!(node.input("second.DEL")["prevResult"], outcome.raw);
    let ports = &node.input("second.DEL")["runtimeConfig"]["portMappings"];
    assert_eq!(ports[0]["hostPort"], 8080);
    // The shell adds some of its own.
    let env = fs::read_to_string(node.dir.join("log/first.env")).unwrap();
    let mut env: Vec<_> = env
        .lines()
        .filter(|line| !line.starts_with("PATH="))
        .collect();
    env.retain(|line| {
        !["PWD=", "SHLVL=", "_=", "OLDPWD="]
            .iter()
            .any(|own| line.starts_with(own))
    });
    env.sort_unstable();
    let path = format!("CNI_PATH=/nowhere:{}/bin", node.dir.display());
    let expected = [
        "CNI_COMMAND=DEL",
        "CNI_CONTAINERID=pod-1",
        "CNI_IFNAME=eth0",
        "CNI_NETNS=/run/netns/pod-1",
        path.as_str(),
    ];
    assert_eq!(env, expected);
}

#[test]
fn a_failure_takes_all_down_again() {
    let node = Node::new("failure");
    let refuse = "[ $CNI_COMMAND = DEL ] || { printf %s '{\"code\": 11, \"msg\": \"no address\\nleft\", \
                  \"details\": \"in 10.1.0.0/16\"}'; exit 1; }";
    node.plugin("first", "echo '{\"from\": \"first\"}'");
    node.plugin("second", refuse);
    node.plugin("third", "echo '{}'");
    let list = node.list(&["first", "second", "third"]);
    let refused = list.add(&node.invocation()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the CNI plugin second refuses ADD: no address left; in 10.1.0.0/16 (code 11)"
    );
    let expected = [
        "first ADD",
        "second ADD",
        "third DEL",
        "second DEL",
        "first DEL",
    ];
    assert_eq!(node.order(), expected);
    assert_eq!(
        node.input("first.DEL")["prevResult"],
        json!({"from": "first"})
    );
}

#[test]
fn every_plugin_is_asked_to_delete() {
    let node = Node::new("delete");
    node.plugin("first", "");
    node.plugin("second", "echo it burns >&2; exit 3");
    let failed = node
        .list(&["first", "second"])
        .delete(&node.invocation(), None);
    assert_eq!(
        failed.unwrap_err().to_string(),
        "the CNI plugin second fails with DEL: exit status: 3: it burns"
    );
    assert_eq!(node.order(), ["second DEL", "first DEL"]);
    assert_eq!(node.input("first.DEL").get("prevResult"), None);
}

#[test]
fn what_is_no_result_is_refused() {
    let node = Node::new("result");
    for printed in ["", "[1]", "hello"] {
        node.plugin("odd", &format!("echo '{printed}'"));
        let failed = node.list(&["odd"]).add(&node.invocation());
        assert!(matches!(failed, Err(CniError::Failed { .. })), "{failed:?}");
    }
    node.plugin("odd", "yes | head -c 2000000");
    let failed = node.list(&["odd"]).add(&node.invocation()).unwrap_err();
    assert!(
        failed.to_string().contains("more than 1048576 bytes"),
        "{failed}"
    );
}

#[test]
fn plugins_have_a_time_limit() {
    let node = Node::new("time");
    let file = node.dir.join("log/late");
    node.plugin(
        "slow",
        &format!("(sleep 2; touch {}) & wait", file.display()),
    );
    let list = node.list(&["slow"]);
    let invocation = Invocation {
        time_limit: Duration::from_millis(200),
        ..node.invocation()
    };
    let begin = Instant::now();
    let failed = list.add(&invocation).unwrap_err();
    assert!(matches!(failed, CniError::TimeLimit { .. }), "{failed}");
    assert!(
        failed.to_string().contains("within 0.2 seconds"),
        "{failed}"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    // What it has started ends with it.
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!file.exists());
}

#[test]
fn a_plugin_is_stopped_when_nobody_wants_it_any_more() {
    let node = Node::new("stop");
    let started = node.dir.join("log/started");
    let sleeps = format!(
        "[ $CNI_COMMAND = DEL ] || {{ touch {}; sleep 60; }}",
        started.display()
    );
    node.plugin("first", "echo '{}'");
    node.plugin("slow", &sleeps);
    let list = node.list(&["first", "slow"]);
    let begin = Instant::now();
    let stopped = list.add_until(&node.invocation(), &mut || started.exists());
    assert_eq!(
        stopped.unwrap_err().to_string(),
        "the CNI plugin slow was stopped while it did ADD"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    let down = ["slow DEL", "first DEL"];
    assert_eq!(node.order(), [["first ADD", "slow ADD"], down].concat());
    // Taking it down has an end, too. Those whose turn has not come are not begun.
    node.plugin("slow", "sleep 60");
    let begin = Instant::now();
    let stopped = list.delete_until(&node.invocation(), None, &mut || true);
    assert!(
        matches!(stopped, Err(CniError::Stopped { .. })),
        "{stopped:?}"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    assert!(!node.order()[4..].contains(&"first DEL".to_owned()));
}

#[test]
fn a_fifo_among_the_configurations_holds_nobody_up() {
    let node = Node::new("fifo");
    let config = |name: &str| json!({"cniVersion": "1.0.0", "name": name, "type": "t"});
    let directory = node.dir.join("net.d");
    let fifo = directory.join("05-pipe.conf");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    fs::create_dir(directory.join("06-directory.conf")).unwrap();
    node.config("10-b.conf", &config("b"));
    let (sender, receiver) = std::sync::mpsc::channel();
    // One that hangs is left behind.
    std::thread::spawn(move || {
        let found = ["b", "c"].map(|name| find(&directory, name).map_err(|e| e.to_string()));
        let _ = sender.send(found);
    });
    let found = receiver.recv_timeout(Duration::from_secs(20));
    let [b, c] = found.expect("an answer, FIFO or not");
    assert!(b.is_ok(), "{b:?}");
    let none = c.unwrap_err();
    for part in [
        "05-pipe.conf is none: is no regular file",
        "06-directory.conf is none: ",
    ] {
        assert!(none.contains(part), "{none}");
    }
}

#[test]
fn what_a_plugin_leaves_running_does_not_keep_us() {
    let node = Node::new("daemon");
    node.plugin("dhcp", "sleep 3 & echo '{}'");
    let begin = Instant::now();
    node.list(&["dhcp"]).add(&node.invocation()).unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_large_configuration_is_read_by_some_and_not_by_others() {
    let node = Node::new("large");
    let plugin = |name: &str| json!({"type": name, "text": "x".repeat(300_000)});
    let config =
        json!({"cniVersion": "1.0.0", "name": "large", "plugins": [plugin("all"), plugin("none")]});
    node.config("large.conflist", &config);
    node.plugin("all", "echo '{}'");
    let path = node.dir.join("bin/none");
    fs::write(&path, "#!/bin/sh\nexec 0<&-\necho '{\"from\": \"none\"}'\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let outcome = node.find("large").unwrap().add(&node.invocation()).unwrap();
    assert_eq!(outcome.raw, json!({"from": "none"}));
    assert_eq!(
        node.input("all.ADD")["text"].as_str().unwrap().len(),
        300_000
    );
}

#[test]
fn nothing_is_run_when_something_is_missing() {
    let node = Node::new("missing");
    node.plugin("first", "echo '{}'");
    let list = node.list(&["first", "absent"]);
    let missing = list.add(&node.invocation()).unwrap_err().to_string();
    let dirs = format!("in none of /nowhere, {}/bin: ", node.dir.display());
    assert!(
        missing.contains(&dirs) && missing.contains("containernetworking-plugins"),
        "{missing}"
    );
    // Nor when it is the one that the plugin asks for addresses.
    let config = json!({"type": "first", "ipam": {"type": "nobody"}});
    let config = json!({"cniVersion": "1.0.0", "name": "addresses", "plugins": [config]});
    node.config("15-addresses.conflist", &config);
    let list = node.find("addresses").unwrap();
    let missing = list.add(&node.invocation()).unwrap_err().to_string();
    assert!(
        missing.starts_with("the CNI plugin nobody is in none of /nowhere, "),
        "{missing}"
    );
    node.plugin("nobody", "");
    list.installed(&node.invocation().plugin_dirs).unwrap();
    // A single configuration, without capabilities.
    node.config(
        "20-single.conf",
        &json!({"cniVersion": "1.0.0", "name": "single", "type": "first"}),
    );
    let invocation = Invocation {
        port_mappings: vec![http()],
        ..node.invocation()
    };
    let refused = node.find("single").unwrap().add(&invocation).unwrap_err();
    assert!(
        matches!(refused, CniError::NoPortMappings { .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("20-single.conf"), "{refused}");
    let invocation = Invocation {
        interface: "a/b".to_owned(),
        ..node.invocation()
    };
    let refused = node.find("single").unwrap().add(&invocation);
    assert!(matches!(refused, Err(CniError::Argument { .. })));
    assert_eq!(node.order(), [""; 0]);
}

#[test]
fn the_first_file_with_the_name_wins() {
    let node = Node::new("find");
    let single =
        |name: &str, key| json!({"cniVersion": "1.0.0", "name": name, "type": "t", "key": key});
    node.config("30-b.conf", &single("b", 30));
    node.config("20-b.json", &single("b", 20));
    node.config("10-b.txt", &single("b", 10));
    node.config(
        "40-a.conflist",
        &json!({"cniVersion": "1.0.0", "name": "a", "plugins": []}),
    );
    node.config(
        "50-old.conf",
        &json!({"cniVersion": "0.2.0", "name": "old", "type": "t"}),
    );
    node.config(
        "60-path.conf",
        &json!({"cniVersion": "1.0.0", "name": "path", "type": "../sh"}),
    );
    fs::write(node.dir.join("net.d/05-broken.conf"), "{").unwrap();
    assert_eq!(
        node.find("b").unwrap().file,
        node.dir.join("net.d/20-b.json")
    );
    let why = |name| node.find(name).unwrap_err().to_string();
    assert!(
        why("a").contains("40-a.conflist: is no CNI configuration: has no plugins"),
        "{}",
        why("a")
    );
    assert!(
        why("old").contains("0.2.0") && why("old").contains("50-old.conf"),
        "{}",
        why("old")
    );
    assert!(why("path").contains("\"../sh\""), "{}", why("path"));
    let none = why("c");
    for part in [
        "name c;",
        "called b, b, a, old, path",
        "05-broken.conf is none: ",
    ] {
        assert!(none.contains(part), "{none}");
    }
    let nowhere = find(Path::new("/nowhere"), "a");
    assert!(matches!(nowhere, Err(CniError::Directory { .. })));
}
