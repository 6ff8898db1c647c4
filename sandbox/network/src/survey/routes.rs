//! Routes, rules and neighbours, out of the kernel's answers. Called by the survey.

use std::{collections::BTreeMap, net::IpAddr};

use netlink_packet_route::{
    AddressFamily,
    neighbour::{NeighbourFlags, NeighbourHeader, NeighbourState},
    route::{RouteFlags, RouteHeader, RouteProtocol, RouteType},
    rule::{RuleAction, RuleFlags, RuleHeader},
};

use super::ip;
use crate::{
    link::{mac, number},
    netlink::{Body, after, attributes},
    network::{Neighbour, Route},
};

const TABLE_DEFAULT: u32 = 253;
const TABLE_MAIN: u32 = 254;
const TABLE_LOCAL: u32 = 255;
// linux/rtnetlink.h, where libc has them for some platforms only.
const RTA_VIA: u16 = 18;
const RTA_ENCAP_TYPE: u16 = 21;
const RTAX_MTU: u16 = 2;
/// What the numbers in RTA_METRICS mean, from 1.
const METRICS: [&str; 17] = [
    "lock",
    "mtu",
    "window",
    "rtt",
    "rttvar",
    "ssthresh",
    "cwnd",
    "advmss",
    "reordering",
    "hoplimit",
    "initcwnd",
    "features",
    "rto_min",
    "initrwnd",
    "quickack",
    "congctl",
    "fastopen_no_cookie",
];
// linux/fib_rules.h.
const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_IFGROUP: u16 = 13;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PAD: u16 = 18;
const FRA_PROTOCOL: u16 = 21;

/// The routes of the main table to these interfaces, those on the link first, because those
/// through a gateway need them.
pub(super) fn routes(
    bodies: &[Body],
    names: &BTreeMap<u32, &str>,
    left_out: &mut Vec<String>,
) -> Vec<Route> {
    let mut routes: Vec<Route> = bodies
        .iter()
        .filter_map(|body| route(body, names, left_out))
        .collect();
    // Stable: among routes to the same place, the order decides.
    routes.sort_by_key(|route| route.gateway.is_some());
    routes
}

fn route(body: &[u8], names: &BTreeMap<u32, &str>, left_out: &mut Vec<String>) -> Option<Route> {
    let header = RouteHeader::parse(body).ok()?;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => [0; 4].into(),
        AddressFamily::Inet6 => [0; 16].into(),
        _ => return None,
    };
    let mut route = Route {
        interface: String::new(),
        destination: (any, header.destination_prefix_length),
        gateway: None,
        source: None,
        scope: header.scope.into(),
        metric: None,
        mtu: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    let mut table = u32::from(header.table);
    let mut output = None;
    let mut other = String::new();
    let mut refused = None;
    for attribute in attributes(after(&header, body)) {
        let value = attribute.value();
        match attribute.kind() {
            libc::RTA_DST => route.destination.0 = ip(value)?,
            libc::RTA_OIF => output = number(value),
            libc::RTA_GATEWAY => route.gateway = ip(value),
            // The family, in two bytes, and the address.
            RTA_VIA => route.gateway = value.get(2..).and_then(ip),
            libc::RTA_PREFSRC => route.source = ip(value),
            libc::RTA_PRIORITY => route.metric = number(value),
            libc::RTA_TABLE => table = number(value)?,
            libc::RTA_METRICS => (route.mtu, other) = metrics(value),
            libc::RTA_MULTIPATH => refused = Some("has several gateways"),
            RTA_ENCAP_TYPE => refused = Some("puts packets into others"),
            _ => {}
        }
    }
    if header.tos != 0 {
        refused = Some("is for one type of service only");
    } else if header.source_prefix_length != 0 {
        refused = Some("is for some source addresses only");
    }
    let (to, prefix) = route.destination;
    let kernel = header.protocol == RouteProtocol::Kernel;
    let cached = header.flags.contains(RouteFlags::Cloned);
    // The guest's kernel makes these for itself.
    let link_local = match to {
        IpAddr::V6(to) => kernel && prefix >= 10 && to.segments()[0] & 0xffc0 == 0xfe80,
        IpAddr::V4(_) => false,
    };
    if cached || link_local || table == TABLE_LOCAL {
        return None;
    }
    let mut leave = |why: &str| {
        left_out.push(format!("the route to {to}/{prefix}: {why}"));
        None
    };
    if table != TABLE_MAIN {
        return leave(&format!("is in table {table}"));
    }
    if header.kind != RouteType::Unicast {
        return match kernel {
            true => None,
            false => {
                let kind = format!("{:?}", header.kind).to_lowercase();
                leave(&format!("is of type {kind}"))
            }
        };
    }
    if let Some(refused) = refused {
        return leave(refused);
    }
    let Some(name) = output.and_then(|index| names.get(&index)) else {
        // With its interface goes what the kernel made for it.
        return match kernel {
            true => None,
            false => leave("is through an interface that the guest does not have"),
        };
    };
    if !other.is_empty() {
        left_out.push(format!(
            "the route to {to}/{prefix}: is without its {other}"
        ));
    }
    route.interface = (*name).to_owned();
    Some(route)
}

/// The MTU, and the names of all others.
fn metrics(value: &[u8]) -> (Option<u32>, String) {
    let mut mtu = None;
    let mut others = Vec::new();
    for metric in attributes(value) {
        match metric.kind() {
            RTAX_MTU => mtu = number(metric.value()),
            kind => others.push(match METRICS.get(usize::from(kind).wrapping_sub(1)) {
                Some(name) => (*name).to_owned(),
                None => format!("metric {kind}"),
            }),
        }
    }
    (mtu, others.join(", "))
}

/// A sentence for each rule beside those that every namespace has.
pub(super) fn rules(bodies: &[Body]) -> Vec<String> {
    bodies.iter().filter_map(|body| rule(body)).collect()
}

fn rule(body: &[u8]) -> Option<String> {
    let header = RuleHeader::parse(body).ok()?;
    let family = match header.family {
        AddressFamily::Inet => "IPv4",
        AddressFamily::Inet6 => "IPv6",
        _ => return None,
    };
    let (mut priority, mut table) = (0, u32::from(header.table));
    let mut plain = header.action == RuleAction::ToTable
        && (header.dst_len, header.src_len, header.tos) == (0, 0, 0)
        && !header.flags.contains(RuleFlags::Invert);
    for attribute in attributes(after(&header, body)) {
        match attribute.kind() {
            FRA_PRIORITY => priority = number(attribute.value())?,
            FRA_TABLE => table = number(attribute.value())?,
            // All ones, in every rule that has none.
            FRA_SUPPRESS_IFGROUP | FRA_SUPPRESS_PREFIXLEN => {
                plain &= number(attribute.value()) == Some(u32::MAX);
            }
            FRA_PAD | FRA_PROTOCOL => {}
            _ => plain = false,
        }
    }
    let usual = [
        (0, TABLE_LOCAL),
        (32766, TABLE_MAIN),
        (32767, TABLE_DEFAULT),
    ];
    let known = plain && usual.contains(&(priority, table));
    (!known).then(|| {
        format!("the {family} rule with priority {priority}: the guest has the default rules only")
    })
}

/// The permanent neighbours on these interfaces.
pub(super) fn neighbours(bodies: &[Body], names: &BTreeMap<u32, &str>) -> Vec<Neighbour> {
    let mut found: Vec<Neighbour> = bodies
        .iter()
        .filter_map(|body| neighbour(body, names))
        .collect();
    found.sort_by(|a, b| (&a.interface, a.ip).cmp(&(&b.interface, b.ip)));
    found
}

fn neighbour(body: &[u8], names: &BTreeMap<u32, &str>) -> Option<Neighbour> {
    let header = NeighbourHeader::parse(body).ok()?;
    let inet = matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6);
    if !inet
        || header.state != NeighbourState::Permanent
        || header.flags.contains(NeighbourFlags::Proxy)
    {
        return None;
    }
    let (mut address, mut station) = (None, None);
    for attribute in attributes(after(&header, body)) {
        match attribute.kind() {
            libc::NDA_DST => address = ip(attribute.value()),
            libc::NDA_LLADDR => station = mac(attribute.value()),
            _ => {}
        }
    }
    Some(Neighbour {
        interface: (*names.get(&header.ifindex)?).to_owned(),
        ip: address?,
        mac: station?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;
    use netlink_packet_route::{
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteNextHop},
        rule::{RuleAttribute, RuleMessage},
    };

    fn emitted(message: &impl Emitable) -> Body {
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        body
    }

    fn to(last: u8, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 32;
        message.header.table = 254;
        message.header.kind = RouteType::Unicast;
        let destination = IpAddr::from([10, 0, 0, last]);
        message.attributes = vec![
            RouteAttribute::Destination(destination.into()),
            RouteAttribute::Oif(3),
        ];
        message.attributes.extend(attributes);
        message
    }

    #[test]
    fn links_come_before_gateways_and_the_odd_is_named() {
        let gateway = IpAddr::from([10, 0, 0, 1]);
        let via = RouteAttribute::Gateway(gateway.into());
        let metrics = vec![RouteMetric::Mtu(1400), RouteMetric::InitCwnd(20)];
        let paths = vec![RouteNextHop::default(), RouteNextHop::default()];
        let mut blackhole = to(6, Vec::new());
        blackhole.header.kind = RouteType::BlackHole;
        let mut table = to(7, vec![RouteAttribute::Table(1000)]);
        table.header.table = 252;
        let bodies = [
            emitted(&to(2, vec![via, RouteAttribute::Metrics(metrics)])),
            emitted(&to(1, vec![RouteAttribute::Priority(9)])),
            emitted(&to(3, vec![RouteAttribute::MultiPath(paths)])),
            emitted(&to(4, vec![RouteAttribute::Oif(9)])),
            emitted(&blackhole),
            emitted(&table),
        ];
        let mut left_out = Vec::new();
        let found = routes(&bodies, &BTreeMap::from([(3, "eth0")]), &mut left_out);
        let short: Vec<_> = found
            .iter()
            .map(|route| (route.to_string(), route.metric, route.mtu))
            .collect();
        let expected = [
            ("10.0.0.1/32 dev eth0".to_owned(), Some(9), None),
            (
                "10.0.0.2/32 via 10.0.0.1 dev eth0".to_owned(),
                None,
                Some(1400),
            ),
        ];
        assert_eq!(short, expected);
        let expected = [
            "the route to 10.0.0.2/32: is without its initcwnd",
            "the route to 10.0.0.3/32: has several gateways",
            "the route to 10.0.0.4/32: is through an interface that the guest does not have",
            "the route to 10.0.0.6/32: is of type blackhole",
            "the route to 10.0.0.7/32: is in table 1000",
        ];
        assert_eq!(left_out, expected);
    }

    #[test]
    fn only_rules_of_somebody_are_named() {
        let rule = |priority, table, more: Vec<RuleAttribute>| {
            let mut message = RuleMessage::default();
            message.header.family = AddressFamily::Inet;
            message.header.action = RuleAction::ToTable;
            message.header.table = table;
            message.attributes = vec![RuleAttribute::Priority(priority)];
            message.attributes.extend(more);
            emitted(&message)
        };
        let own = vec![RuleAttribute::SuppressPrefixLen(u32::MAX)];
        let bodies = [
            rule(0, 255, own),
            rule(32766, 254, Vec::new()),
            rule(100, 254, Vec::new()),
            rule(32766, 254, vec![RuleAttribute::FwMark(1)]),
        ];
        let found = rules(&bodies);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("priority 100"));
    }
}
