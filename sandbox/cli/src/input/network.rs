//! The network that the command gets: read from the command line, and compared with the host.
//!
//! Called by `check`. A namespace is opened and a configuration read; no plugin is run yet.

use std::{env, net::IpAddr, path::PathBuf};

use pericarp_network::{
    Namespace,
    cni::{self, PLUGIN_DIRS, PortMapping, Protocol},
};

use crate::input::{options::Runtime, problem::Problem};

pub(crate) const OPTION: &str = "--network";
pub(crate) const PUBLISH: &str = "--publish";
/// No network.
pub(crate) const NONE: &str = "none";
const FORMS: &str = "use none, cni:NAME or netns:PATH";
const PORTS: &str = "write [IP:]PORT:PORT, such as 8080:80 or 127.0.0.1:5300:53/udp";
/// Most ports of a run.
const MAX_PORTS: usize = 256;

/// What the command reaches.
#[derive(Debug)]
pub(crate) enum NetworkPlan {
    /// Itself.
    None,
    /// Whatever is in a namespace that somebody else made.
    Namespace(Namespace, PathBuf),
    /// What these plugins make.
    Cni(CniPlan),
}

/// A network of plugins.
#[derive(Debug)]
pub(crate) struct CniPlan {
    pub(crate) list: cni::List,
    pub(crate) ports: Vec<PortMapping>,
    pub(crate) places: Places,
}

/// Where networks are described, and where their plugins are.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) config: PathBuf,
    pub(crate) plugins: Vec<PathBuf>,
}

impl Places {
    /// As `cnitool` takes them from the environment; without that, containerd's place for the
    /// one, and containerd's and Debian's for the other.
    pub(crate) fn of_this_host() -> Self {
        let config = env::var_os("NETCONFPATH").filter(|path| !path.is_empty());
        let plugins = env::var_os("CNI_PATH").filter(|path| !path.is_empty());
        let usual = || PLUGIN_DIRS.map(PathBuf::from).to_vec();
        let config = config.map_or_else(|| "/etc/cni/net.d".into(), PathBuf::from);
        let plugins = plugins.map_or_else(usual, |paths| env::split_paths(&paths).collect());
        // They are looked at again when the run is over, wherever that is then.
        let absolute = |path: &PathBuf| std::path::absolute(path).ok();
        Self {
            config: absolute(&config).unwrap_or(config),
            plugins: plugins.iter().filter_map(absolute).collect(),
        }
    }
}

/// Reads and checks what `--network` and `--publish` say.
pub(crate) fn check(
    network: Option<&str>,
    publish: &[String],
    runtime: Runtime,
    places: &Places,
    problems: &mut Vec<Problem>,
) -> NetworkPlan {
    let mut ports = Vec::new();
    for text in publish {
        match port(text) {
            Ok(port) => ports.push(port),
            Err((rule, cure)) => {
                problems.push(Problem::new(PUBLISH, text.clone(), rule, cure));
            }
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let key = |port: &PortMapping| (port.host_port, port.protocol, port.host_ip);
        if ports[..index].iter().any(|other| key(other) == key(port)) {
            let rule = "is published twice";
            let port = port.host_port.to_string();
            problems.push(Problem::new(PUBLISH, port, rule, "leave one out"));
        }
    }
    if ports.len() > MAX_PORTS {
        let rule = format!("there are {}, and a run takes {MAX_PORTS}", ports.len());
        problems.push(Problem::new(PUBLISH, None, rule, "use fewer"));
    }
    let text = network.unwrap_or(NONE);
    let plan = plan(text, ports, runtime, places);
    let plan = plan.map_err(|problem| problems.push(problem));
    let plan = plan.unwrap_or(NetworkPlan::None);
    if !publish.is_empty() && !text.starts_with("cni:") {
        let rule = "needs a network that passes ports on";
        let cure = "add --network cni:NAME, of a network with the portmap plugin";
        problems.push(Problem::new(PUBLISH, publish[0].clone(), rule, cure));
    }
    plan
}

fn plan(
    text: &str,
    ports: Vec<PortMapping>,
    runtime: Runtime,
    places: &Places,
) -> Result<NetworkPlan, Problem> {
    let problem = |rule: String, cure: &str| Problem::new(OPTION, text.to_owned(), rule, cure);
    let (kind, name) = text.split_once(':').unwrap_or((text, ""));
    match (kind, name) {
        (NONE, "") if text == NONE => return Ok(NetworkPlan::None),
        ("host", "") => {
            let rule = match runtime {
                Runtime::Vm => "a virtual machine cannot have this host's own network",
                Runtime::Runc => "a run has no part in this host's own network",
            };
            return Err(problem(rule.into(), FORMS));
        }
        ("cni" | "netns", "") => return Err(problem("names nothing".into(), FORMS)),
        ("cni" | "netns", _) => {}
        _ => return Err(problem("no such network".into(), FORMS)),
    }
    if !rustix::process::geteuid().is_root() {
        let rule = "needs root, for its namespace and taps";
        return Err(problem(rule.into(), "run as root, or use none"));
    }
    if kind == "netns" {
        let path = std::path::absolute(name).unwrap_or_else(|_| name.into());
        let namespace = Namespace::open(&path).map_err(|error| {
            let cure = "name one, such as /run/netns/NAME after `ip netns add NAME`";
            problem(error.to_string(), cure)
        })?;
        return Ok(NetworkPlan::Namespace(namespace, path));
    }
    let found = cni::find(&places.config, name);
    let list = found.map_err(|error| Problem::whole(OPTION, &error.to_string()))?;
    list.installed(&places.plugins)
        .map_err(|error| Problem::whole(OPTION, &error.to_string()))?;
    if !ports.is_empty() && !list.maps_ports() {
        let rule = format!("the network '{name}' has no plugin that passes ports on");
        let cure = "add portmap with the capability portMappings to its list";
        return Err(Problem::new(PUBLISH, None, rule, cure));
    }
    Ok(NetworkPlan::Cni(CniPlan {
        list,
        ports,
        places: places.clone(),
    }))
}

/// `[IP:]PORT:PORT[/PROTOCOL]`; an IPv6 address is in brackets.
fn port(text: &str) -> Result<PortMapping, (String, &'static str)> {
    let form = || ("is no pair of ports".to_owned(), PORTS);
    let (ports, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((ports, "sctp")) => (ports, Protocol::Sctp),
        Some((_, other)) => {
            let rule = format!("has the unknown protocol '{other}'");
            return Err((rule, "use tcp, udp or sctp"));
        }
    };
    let (rest, inside) = ports.rsplit_once(':').ok_or_else(form)?;
    let (ip, outside) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((ip, outside)) => (Some(ip), outside),
    };
    let ip = ip.map(|ip| {
        let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
        let parsed = bare.unwrap_or(ip).parse::<IpAddr>();
        parsed.map_err(|_| (format!("has no IP address in '{ip}'"), PORTS))
    });
    let number = |text: &str| match text.parse::<u16>() {
        Ok(number @ 1..) => Ok(number),
        _ => Err((format!("has no port in '{text}'"), "ports are 1 to 65535")),
    };
    Ok(PortMapping {
        host_port: number(outside)?,
        container_port: number(inside)?,
        protocol,
        host_ip: ip.transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(network: Option<&str>, publish: &[&str]) -> Vec<String> {
        let publish: Vec<String> = publish.iter().map(|text| (*text).to_owned()).collect();
        let mut problems = Vec::new();
        let places = Places {
            config: "/nonexistent".into(),
            plugins: Vec::new(),
        };
        check(network, &publish, Runtime::Vm, &places, &mut problems);
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ports_are_read_as_podman_writes_them() {
        let mapping = |text| port(text).unwrap();
        assert_eq!(
            mapping("8080:80"),
            PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
                host_ip: None,
            }
        );
        let local = mapping("127.0.0.1:5300:53/udp");
        assert_eq!(local.protocol, Protocol::Udp);
        assert_eq!(local.host_ip, Some("127.0.0.1".parse().unwrap()));
        let six = mapping("[::1]:1:2/sctp");
        assert_eq!(six.host_ip, Some("::1".parse().unwrap()));
    }

    #[test]
    fn each_mistake_is_one_line() {
        let cases: [(Option<&str>, &[&str], &str); 8] = [
            (
                Some("bridge"),
                &[],
                "--network 'bridge': no such network; use none, cni:NAME or netns:PATH",
            ),
            (
                Some("host"),
                &[],
                "--network 'host': a virtual machine cannot have this host's own network; use \
                 none, cni:NAME or netns:PATH",
            ),
            (
                Some("cni:"),
                &[],
                "--network 'cni:': names nothing; use none, cni:NAME or netns:PATH",
            ),
            (
                Some("none:x"),
                &[],
                "--network 'none:x': no such network; use none, cni:NAME or netns:PATH",
            ),
            (
                None,
                &["80:80"],
                "--publish '80:80': needs a network that passes ports on; add --network \
                 cni:NAME, of a network with the portmap plugin",
            ),
            (
                None,
                &["80"],
                "--publish '80': is no pair of ports; write [IP:]PORT:PORT, such as 8080:80 or \
                 127.0.0.1:5300:53/udp",
            ),
            (
                None,
                &["0:80"],
                "--publish '0:80': has no port in '0'; ports are 1 to 65535",
            ),
            (
                None,
                &["1:2/icmp"],
                "--publish '1:2/icmp': has the unknown protocol 'icmp'; use tcp, udp or sctp",
            ),
        ];
        for (network, publish, line) in cases {
            assert_eq!(refused(network, publish)[0], line);
        }
    }
}
