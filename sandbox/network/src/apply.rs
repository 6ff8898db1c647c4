//! Gives a guest its network: names, addresses, routes and neighbours. Called by the guest
//! agent, once, in the namespace that the containers will be in.

use std::{
    net::IpAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::LinkAttribute,
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol,
        RouteType, RouteVia,
    },
};
use thiserror::Error;

use crate::{
    link::{Link, links},
    netlink::{Netlink, NetlinkError},
    network::{Address, Interface, Mac, Neighbour, Network, Route},
};

/// How long a card may take to appear after the machine has it.
const APPEARS: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);
const TABLE_MAIN: u8 = 254;

/// Why the guest does not have the network. What came before the failure stays.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// No card with that address.
    #[error("{name}: there is no card with the Ethernet address {mac}; there is {there}")]
    Missing {
        /// The interface that it was to be.
        name: String,
        /// Its address.
        mac: String,
        /// Those that are there.
        there: String,
    },
    /// A route or neighbour of an interface that is not in the list.
    #[error("{what}: the network has no interface {name}")]
    Unknown {
        /// The route or the neighbour.
        what: String,
        /// The interface.
        name: String,
    },
    /// Somebody else has the name.
    #[error("{name}: another interface of the guest has this name")]
    Taken {
        /// The name.
        name: String,
    },
    /// The kernel has refused a step.
    #[error(transparent)]
    Kernel(#[from] NetlinkError),
}

/// Puts the network in place in the namespace that the calling thread is in. The cards are
/// found by their Ethernet addresses, and may have other names.
///
/// # Errors
/// [`ApplyError`].
pub fn apply(network: &Network) -> Result<(), ApplyError> {
    let mut netlink = Netlink::open()?;
    let cards = find(&mut netlink, &network.interfaces)?;
    let cards = rename(&mut netlink, cards, &network.interfaces)?;
    for (interface, card) in network.interfaces.iter().zip(&cards) {
        let mtu = interface.mtu;
        card.set(
            &mut netlink,
            vec![LinkAttribute::Mtu(mtu)],
            &format!("an MTU of {mtu}"),
        )?;
        for address in &interface.addresses {
            add_address(&mut netlink, card, address)?;
        }
        card.bring(&mut netlink, true)?;
    }
    let card = |name: &str, what: &str| {
        let found = cards.iter().find(|card| card.name == name);
        found.ok_or_else(|| ApplyError::Unknown {
            what: what.to_owned(),
            name: name.to_owned(),
        })
    };
    for route in &network.routes {
        let what = format!("the route {route}");
        add_route(&mut netlink, card(&route.interface, &what)?, route, what)?;
    }
    for neighbour in &network.neighbours {
        let what = format!("the neighbour {}", neighbour.ip);
        add_neighbour(
            &mut netlink,
            card(&neighbour.interface, &what)?,
            neighbour,
            what,
        )?;
    }
    Ok(())
}

/// The card of each interface, in their order. Waits for those that are not there yet.
fn find(netlink: &mut Netlink, interfaces: &[Interface]) -> Result<Vec<Link>, ApplyError> {
    let begin = Instant::now();
    loop {
        let all = links(netlink)?;
        let of = |interface: &Interface| all.iter().find(|link| link.mac == Some(interface.mac));
        let Some(missing) = interfaces.iter().find(|&interface| of(interface).is_none()) else {
            return Ok(interfaces.iter().filter_map(of).cloned().collect());
        };
        if begin.elapsed() > APPEARS {
            let there: Vec<_> = all
                .iter()
                .filter(|link| !link.loopback)
                .map(Link::described)
                .collect();
            return Err(ApplyError::Missing {
                name: missing.name.clone(),
                mac: Mac(missing.mac).to_string(),
                there: match there.is_empty() {
                    true => "none at all".to_owned(),
                    false => there.join(", "),
                },
            });
        }
        sleep(PAUSE);
    }
}

/// Gives each card its name.
fn rename(
    netlink: &mut Netlink,
    mut cards: Vec<Link>,
    interfaces: &[Interface],
) -> Result<Vec<Link>, ApplyError> {
    let all = links(netlink)?;
    let wrong: Vec<usize> = (0..cards.len())
        .filter(|&place| cards[place].name != interfaces[place].name)
        .collect();
    let mut swap = false;
    for &place in &wrong {
        let name = &interfaces[place].name;
        let Some(holder) = all.iter().find(|link| link.name == *name) else {
            continue;
        };
        if !wrong
            .iter()
            .any(|&other| cards[other].index == holder.index)
        {
            return Err(ApplyError::Taken { name: name.clone() });
        }
        swap = true;
    }
    for &place in &wrong {
        // The kernel renames only what is down.
        if cards[place].up {
            cards[place].bring(netlink, false)?;
        }
        if swap {
            let aside = format!("aside{}", cards[place].index);
            call(netlink, &mut cards[place], &aside)?;
        }
    }
    for &place in &wrong {
        call(netlink, &mut cards[place], &interfaces[place].name)?;
    }
    Ok(cards)
}

fn call(netlink: &mut Netlink, card: &mut Link, name: &str) -> Result<(), NetlinkError> {
    let attributes = vec![LinkAttribute::IfName(name.to_owned())];
    card.set(netlink, attributes, &format!("the name {name}"))?;
    card.name = name.to_owned();
    Ok(())
}

/// Without the route that the kernel would make of it: the network's routes are complete.
pub(crate) fn add_address(
    netlink: &mut Netlink,
    card: &Link,
    address: &Address,
) -> Result<(), NetlinkError> {
    let mut flags = AddressFlags::Noprefixroute;
    if address.ip.is_ipv6() {
        // The pod's interface has found out already that nobody else has it.
        flags |= AddressFlags::Nodad;
    }
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = card.index;
    message.attributes = vec![
        AddressAttribute::Local(address.ip),
        AddressAttribute::Address(address.peer.unwrap_or(address.ip)),
        AddressAttribute::Flags(flags),
    ];
    if let Some(broadcast) = address.broadcast {
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    let message = RouteNetlinkMessage::NewAddress(message);
    netlink.ask(message, NLM_F_CREATE | NLM_F_REPLACE, || {
        format!("{}: the address {address}", card.name)
    })
}

fn add_route(
    netlink: &mut Netlink,
    card: &Link,
    route: &Route,
    what: String,
) -> Result<(), NetlinkError> {
    let (to, prefix) = route.destination;
    let mut message = RouteMessage::default();
    message.header.address_family = family(to);
    message.header.destination_prefix_length = prefix;
    message.header.table = TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = route.scope.into();
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(card.index));
    if prefix > 0 {
        let to = RouteAttribute::Destination(RouteAddress::from(to));
        message.attributes.push(to);
    }
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    if let Some(gateway) = route.gateway {
        message
            .attributes
            .push(match family(gateway) == family(to) {
                true => RouteAttribute::Gateway(gateway.into()),
                false => RouteAttribute::Via(RouteVia::from(gateway)),
            });
    }
    if let Some(source) = route.source {
        message
            .attributes
            .push(RouteAttribute::PrefSource(source.into()));
    }
    if let Some(metric) = route.metric {
        message.attributes.push(RouteAttribute::Priority(metric));
    }
    if let Some(mtu) = route.mtu {
        let mtu = vec![RouteMetric::Mtu(mtu)];
        message.attributes.push(RouteAttribute::Metrics(mtu));
    }
    let message = RouteNetlinkMessage::NewRoute(message);
    // After those that are there: among routes to the same place, the first counts.
    match netlink.ask(message, NLM_F_CREATE | NLM_F_APPEND, || what) {
        // The very same.
        Err(error) if error.number() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

fn add_neighbour(
    netlink: &mut Netlink,
    card: &Link,
    neighbour: &Neighbour,
    what: String,
) -> Result<(), NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = card.index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour.ip.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    let message = RouteNetlinkMessage::NewNeighbour(message);
    netlink.ask(message, NLM_F_CREATE | NLM_F_REPLACE, || {
        format!("{}: {what}", card.name)
    })
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
