//! Reads what a namespace's network is. `attach` begins with it, and so does whoever wants to
//! know what a guest would get.
//!
//! What a guest cannot have is left out with a sentence that says so, as long as it can do
//! without. Link kinds are not asked for: what has Ethernet addresses can be passed on.

mod routes;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressFlags, AddressHeader, AddressMessage},
    neighbour::NeighbourMessage,
    route::RouteMessage,
    rule::RuleMessage,
};
use thiserror::Error;

use crate::{
    link::{self, Link},
    netlink::{Body, Netlink, NetlinkError, after, attributes},
    network::{Address, Interface, Mac, Network},
    tap,
};

/// RT_SCOPE_LINK: from here on, an address is of no use beyond its link.
pub(crate) const SCOPE_LINK: u8 = 253;

/// Why a guest cannot have this network.
#[derive(Debug, Error)]
pub enum SurveyError {
    /// An interface that carries packets and no frames.
    #[error(
        "{name}: has addresses, but no Ethernet addresses (a tun, or a netkit in layer 3 mode), and a guest's \
         card needs one: have the network make it with Ethernet headers (veth, netkit in layer 2 mode)"
    )]
    NoEthernet {
        /// The interface.
        name: String,
    },
    /// The guest tells its cards apart by their Ethernet addresses.
    #[error("{name}: has the same Ethernet address as {other} ({mac}): give it one of its own")]
    SameMac {
        /// The interface.
        name: String,
        /// Another.
        other: String,
        /// What both have.
        mac: String,
    },
    /// The kernel does not say.
    #[error(transparent)]
    Kernel(#[from] NetlinkError),
}

/// Reads the network of the namespace that the calling thread is in.
///
/// # Errors
/// [`SurveyError`].
pub fn survey() -> Result<Network, SurveyError> {
    let mut netlink = Netlink::open()?;
    Ok(Answers::ask(&mut netlink)?.network()?.0)
}

/// All that the kernel says.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    links: Vec<Body>,
    addresses: Vec<Body>,
    routes: Vec<Body>,
    rules: Vec<Body>,
    neighbours: Vec<Body>,
}

impl Answers {
    pub(crate) fn ask(netlink: &mut Netlink) -> Result<Self, NetlinkError> {
        use RouteNetlinkMessage::{GetAddress, GetLink, GetNeighbour, GetRoute, GetRule};
        let mut answers = Self {
            links: netlink.dump(GetLink(Default::default()), "interfaces")?,
            addresses: netlink.dump(GetAddress(AddressMessage::default()), "addresses")?,
            neighbours: netlink.dump(GetNeighbour(NeighbourMessage::default()), "neighbours")?,
            ..Self::default()
        };
        // Without IPv6, the kernel answers with IPv4 or not at all.
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut route = RouteMessage::default();
            route.header.address_family = family;
            answers
                .routes
                .extend(present(netlink.dump(GetRoute(route), "routes"))?);
            let mut rule = RuleMessage::default();
            rule.header.family = family;
            answers
                .rules
                .extend(present(netlink.dump(GetRule(rule), "rules"))?);
        }
        Ok(answers)
    }

    /// Makes sense of it. The numbers of the interfaces come with them.
    pub(crate) fn network(&self) -> Result<(Network, Vec<u32>), SurveyError> {
        let mut left_out = Vec::new();
        let all = link::parse(&self.links);
        let mut addresses = addresses(&self.addresses, &all, &mut left_out);
        let mut carried: Vec<&Link> = Vec::new();
        let mut interfaces = Vec::new();
        for link in &all {
            if !link.up || link.loopback || tap::is_ours(link) {
                continue;
            }
            let named = |index| all.iter().find(|other| other.index == index && other.up);
            if let Some(master) = link.master.and_then(named) {
                left_out.push(format!(
                    "{}: is a port of {}, which has its frames",
                    link.name, master.name
                ));
                continue;
            }
            // The ends of a pair name each other; a VLAN's parent does not name the VLAN.
            let parent = link.lower.and_then(named);
            let parent = parent.filter(|lower| lower.lower != Some(link.index));
            if let Some(parent) = parent.filter(|parent| parent.mac.is_some()) {
                left_out.push(format!(
                    "{}: stands on {}, whose frames all go to the guest: have the guest make it",
                    link.name, parent.name
                ));
                continue;
            }
            let addresses = addresses.remove(&link.index).unwrap_or_default();
            let Some(mac) = link.mac else {
                if addresses.iter().any(|address| address.scope < SCOPE_LINK) {
                    let name = link.name.clone();
                    return Err(SurveyError::NoEthernet { name });
                }
                left_out.push(format!(
                    "{}: has no Ethernet addresses, and no others for the guest",
                    link.name
                ));
                continue;
            };
            if let Some(other) = carried.iter().find(|other| other.mac == Some(mac)) {
                return Err(SurveyError::SameMac {
                    name: link.name.clone(),
                    other: other.name.clone(),
                    mac: Mac(mac).to_string(),
                });
            }
            carried.push(link);
            interfaces.push(Interface {
                name: link.name.clone(),
                mac,
                mtu: link.mtu,
                addresses,
            });
        }
        let indexes = carried.iter().map(|link| link.index).collect();
        let names = carried.iter().map(|link| (link.index, link.name.as_str()));
        let names: BTreeMap<u32, &str> = names.collect();
        let network = Network {
            interfaces,
            routes: routes::routes(&self.routes, &names, &mut left_out),
            neighbours: routes::neighbours(&self.neighbours, &names),
            left_out: {
                left_out.extend(routes::rules(&self.rules));
                left_out
            },
        };
        Ok((network, indexes))
    }
}

/// No answer is as good as an empty one, where a kernel lacks a family.
fn present(answer: Result<Vec<Body>, NetlinkError>) -> Result<Vec<Body>, NetlinkError> {
    match answer {
        Err(error) if matches!(error.number(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
            Ok(Vec::new())
        }
        other => other,
    }
}

/// The addresses of each interface, by its number, in the order in which they were added.
fn addresses(
    bodies: &[Body],
    links: &[Link],
    left_out: &mut Vec<String>,
) -> BTreeMap<u32, Vec<Address>> {
    let mut found: BTreeMap<u32, Vec<Address>> = BTreeMap::new();
    for (index, address, failed) in bodies.iter().filter_map(|body| address(body)) {
        let Some(link) = links.iter().find(|link| link.index == index) else {
            continue;
        };
        // The guest makes the same one of the same Ethernet address.
        if link.mac.is_some_and(|mac| address.ip == own(mac)) {
            continue;
        }
        if failed {
            left_out.push(format!("{}: {address} is somebody else's, too", link.name));
            continue;
        }
        found.entry(index).or_default().push(address);
    }
    for addresses in found.values_mut() {
        // The kernel has the IPv6 addresses of a scope in the opposite order.
        let (four, mut six): (Vec<_>, Vec<_>) = addresses.drain(..).partition(|a| a.ip.is_ipv4());
        six.reverse();
        addresses.extend(four.into_iter().chain(six));
    }
    found
}

/// An address, of which interface, and whether the kernel has found it to be in use.
fn address(body: &[u8]) -> Option<(u32, Address, bool)> {
    let header = AddressHeader::parse(body).ok()?;
    let mut flags = u32::from(header.flags.bits());
    let (mut local, mut remote, mut broadcast) = (None, None, None);
    for attribute in attributes(after(&header, body)) {
        let value = attribute.value();
        match attribute.kind() {
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => remote = ip(value),
            libc::IFA_BROADCAST => broadcast = ip(value),
            libc::IFA_FLAGS => flags = link::number(value)?,
            _ => {}
        }
    }
    let address = Address {
        ip: local.or(remote)?,
        prefix: header.prefix_len,
        peer: remote.filter(|&remote| local.is_some_and(|local| local != remote)),
        broadcast: match broadcast {
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            _ => None,
        },
        scope: header.scope.into(),
    };
    let failed = flags & AddressFlags::Dadfailed.bits() != 0;
    Some((header.index, address, failed))
}

pub(crate) fn ip(value: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(value).map(|four| Ipv4Addr::from(four).into());
    let six = || <[u8; 16]>::try_from(value).map(|six| Ipv6Addr::from(six).into());
    four.or_else(|_| six()).ok()
}

/// The link-local address that the kernel makes of an Ethernet address (RFC 4291, appendix A).
fn own(mac: [u8; 6]) -> IpAddr {
    let [a, b, c, d, e, f] = mac;
    let mut address = [0; 16];
    address[0] = 0xfe;
    address[1] = 0x80;
    address[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    address.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_own_address_is_known() {
        let expected: IpAddr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        assert_eq!(own([0x52, 0x54, 0, 0x12, 0x34, 0x56]), expected);
    }

    fn odd() -> impl Strategy<Value = Vec<Body>> {
        // Headers that are mostly good ones, and attributes that are mostly not.
        let header = (0u8..12, proptest::collection::vec(0u8..4, 19)).prop_map(|(family, rest)| {
            let mut header = vec![family];
            header.extend(rest);
            header
        });
        let attribute = (
            0u16..30,
            proptest::collection::vec(any::<u8>(), 0..20),
            any::<u8>(),
        );
        let attribute = attribute.prop_map(|(kind, value, lie)| {
            let length = 4 + value.len() as u16 + u16::from(lie == 0);
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(&value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        });
        let body = (
            header,
            proptest::collection::vec(attribute, 0..8),
            8usize..20,
        );
        let body = body.prop_map(|(mut header, attributes, length)| {
            header.truncate(length);
            header.extend(attributes.concat());
            header
        });
        proptest::collection::vec(body, 0..6)
    }

    proptest! {
        #[test]
        fn odd_answers_are_no_trouble(
            links in odd(), addresses in odd(), routes in odd(), rules in odd(), neighbours in odd(),
        ) {
            let answers = Answers { links, addresses, routes, rules, neighbours };
            let _ = answers.network();
        }
    }
}
