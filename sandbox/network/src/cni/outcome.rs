//! What the plugins say that they have made: the result of the last of them.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

/// The end of a successful `add`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// The pod's addresses, with their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// For the pod's `resolv.conf`.
    pub dns: Dns,
    /// The whole result, which `delete` wants back.
    pub raw: Value,
}

/// How the pod finds names, as far as the network says so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of servers, the first is asked first.
    pub nameservers: Vec<String>,
    /// The pod's own domain.
    pub domain: String,
    /// Domains to complete short names with.
    pub search: Vec<String>,
    /// As resolv.conf(5) has them.
    pub options: Vec<String>,
}

impl Outcome {
    /// What is missing or odd is as good as absent: the interfaces are there in any case, and
    /// are looked at, not believed.
    pub(super) fn of(raw: Value) -> Self {
        let dns = raw.get("dns").cloned().unwrap_or_default();
        let addresses = raw.get("ips").and_then(Value::as_array);
        let addresses = addresses.into_iter().flatten().filter_map(|ip| {
            let (address, prefix) = ip.get("address")?.as_str()?.split_once('/')?;
            Some((address.parse().ok()?, prefix.parse().ok()?))
        });
        Self {
            addresses: addresses.collect(),
            dns: serde_json::from_value(dns).unwrap_or_default(),
            raw,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_result_is_read() {
        let outcome = Outcome::of(json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [
                {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0},
                {"address": "fd00::5/64"},
                {"address": "nonsense"},
            ],
            "dns": {"nameservers": ["10.1.0.1"], "search": ["example.org"]},
        }));
        let addresses = [([10, 1, 0, 5].into(), 16), ("fd00::5".parse().unwrap(), 64)];
        assert_eq!(outcome.addresses, addresses);
        assert_eq!(outcome.dns.nameservers, ["10.1.0.1"]);
        assert_eq!(outcome.dns.search, ["example.org"]);
        assert_eq!(outcome.dns.domain, "");
        for odd in [json!(null), json!(3), json!({"ips": 1, "dns": []})] {
            let read = Outcome::of(odd);
            assert!(read.addresses.is_empty());
        }
    }
}
