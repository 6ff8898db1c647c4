//! The machine's network, as the host describes it: checked, and given to the kernel.
//!
//! Called by `pod` once, before there are containers, which all share it.

use std::{
    fs::{self, Permissions},
    net::IpAddr,
    os::unix::fs::PermissionsExt,
};

use pericarp_api::{
    RESOLV_CONF, agent,
    network::{MAX_ADDRESSES, MAX_INTERFACES, MAX_RESOLV_CONF, MAX_ROUTES, address, is_name},
};
use pericarp_network::{Address, Interface, Neighbour, Network, Route, apply};

use crate::error::{RequestError, trying};

/// Makes the network what the host says.
pub(crate) fn configure(wanted: &agent::Network) -> Result<(), RequestError> {
    if wanted.resolv_conf.len() > MAX_RESOLV_CONF {
        return Err(invalid("a resolver's configuration is too long"));
    }
    let network = read(wanted)?;
    apply(&network).map_err(|error| RequestError::Network(error.to_string()))?;
    if !wanted.resolv_conf.is_empty() {
        // Every user of a container reads it.
        fs::write(RESOLV_CONF, &wanted.resolv_conf)
            .and_then(|()| fs::set_permissions(RESOLV_CONF, Permissions::from_mode(0o644)))
            .map_err(trying("the resolver's configuration"))?;
    }
    Ok(())
}

fn invalid(what: impl Into<String>) -> RequestError {
    RequestError::Invalid(what.into())
}

fn read(wanted: &agent::Network) -> Result<Network, RequestError> {
    if wanted.interfaces.len() > MAX_INTERFACES
        || wanted.routes.len() > MAX_ROUTES
        || wanted.neighbours.len() > MAX_ROUTES
    {
        return Err(invalid("a network has too many parts"));
    }
    let interfaces: Vec<Interface> = wanted
        .interfaces
        .iter()
        .map(interface)
        .collect::<Result<_, _>>()?;
    let known = |name: &str| match interfaces.iter().any(|one| one.name == name) {
        true => Ok(name.to_owned()),
        false => Err(invalid(format!("there is no interface {name:?}"))),
    };
    let route = |route: &agent::Route| {
        let destination = ip(&route.destination)?;
        Ok(Route {
            interface: known(&route.interface)?,
            destination: (destination, prefix(destination, route.prefix)?),
            gateway: maybe_ip(&route.gateway)?,
            source: maybe_ip(&route.source)?,
            scope: scope(route.scope)?,
            metric: (route.metric > 0).then_some(route.metric),
            mtu: (route.mtu > 0).then_some(route.mtu),
            onlink: route.on_link,
        })
    };
    let neighbour = |neighbour: &agent::Neighbour| {
        Ok(Neighbour {
            interface: known(&neighbour.interface)?,
            ip: ip(&neighbour.ip)?,
            mac: mac(&neighbour.mac)?,
        })
    };
    let routes = wanted.routes.iter().map(route);
    let routes = routes.collect::<Result<_, RequestError>>()?;
    let neighbours = wanted.neighbours.iter().map(neighbour);
    let neighbours = neighbours.collect::<Result<_, RequestError>>()?;
    Ok(Network {
        interfaces,
        routes,
        neighbours,
        ..Network::default()
    })
}

fn interface(wanted: &agent::Interface) -> Result<Interface, RequestError> {
    if !is_name(&wanted.name) {
        return Err(invalid(format!(
            "{:?} is no name of an interface",
            wanted.name
        )));
    }
    if wanted.addresses.len() > MAX_ADDRESSES {
        return Err(invalid(format!("{} has too many addresses", wanted.name)));
    }
    let one = |wanted: &agent::Address| {
        let own = ip(&wanted.ip)?;
        let broadcast = match maybe_ip(&wanted.broadcast)? {
            None => None,
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            Some(IpAddr::V6(_)) => return Err(invalid("IPv6 has no broadcast addresses")),
        };
        Ok(Address {
            ip: own,
            prefix: prefix(own, wanted.prefix)?,
            peer: maybe_ip(&wanted.peer)?,
            broadcast,
            scope: scope(wanted.scope)?,
        })
    };
    let addresses = wanted.addresses.iter().map(one);
    Ok(Interface {
        name: wanted.name.clone(),
        mac: mac(&wanted.mac)?,
        mtu: wanted.mtu,
        addresses: addresses.collect::<Result<_, _>>()?,
    })
}

fn maybe_ip(bytes: &[u8]) -> Result<Option<IpAddr>, RequestError> {
    address(bytes).map_err(|count| invalid(format!("{count} bytes are no IP address")))
}

fn ip(bytes: &[u8]) -> Result<IpAddr, RequestError> {
    maybe_ip(bytes)?.ok_or_else(|| invalid("an IP address is missing"))
}

fn prefix(of: IpAddr, prefix: u32) -> Result<u8, RequestError> {
    let most = if of.is_ipv4() { 32 } else { 128 };
    let prefix = u8::try_from(prefix).ok().filter(|prefix| *prefix <= most);
    prefix.ok_or_else(|| invalid(format!("a prefix of {of} has at most {most} bits")))
}

fn scope(scope: u32) -> Result<u8, RequestError> {
    u8::try_from(scope).map_err(|_| invalid(format!("{scope} is no scope of an address")))
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], RequestError> {
    let mac = <[u8; 6]>::try_from(bytes);
    mac.map_err(|_| invalid(format!("{} bytes are no Ethernet address", bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> agent::Network {
        agent::Network {
            interfaces: vec![agent::Interface {
                name: "eth0".into(),
                mac: vec![2, 0, 0, 0, 0, 1],
                mtu: 1400,
                addresses: vec![agent::Address {
                    ip: vec![10, 0, 0, 2],
                    prefix: 24,
                    ..Default::default()
                }],
                ..Default::default()
            }],
            routes: vec![agent::Route {
                interface: "eth0".into(),
                destination: vec![0; 4],
                gateway: vec![10, 0, 0, 1],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn what_the_host_says_is_read() {
        let network = read(&sample()).unwrap();
        let route = &network.routes[0];
        assert_eq!(route.destination, ("0.0.0.0".parse().unwrap(), 0));
        assert_eq!((route.metric, route.mtu), (None, None));
        assert_eq!(network.interfaces[0].mtu, 1400);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        type Spoil = fn(&mut agent::Network);
        let cases: [(Spoil, &str); 8] = [
            (|n| n.interfaces[0].name = "a/b".into(), "no name"),
            (|n| n.interfaces[0].mac = vec![1], "1 bytes are no Ethernet"),
            (|n| n.interfaces[0].addresses[0].ip = vec![], "is missing"),
            (|n| n.interfaces[0].addresses[0].ip = vec![1; 5], "5 bytes"),
            (|n| n.interfaces[0].addresses[0].prefix = 33, "at most 32"),
            (|n| n.routes[0].interface = "eth1".into(), "no interface"),
            (|n| n.routes[0].scope = 256, "256 is no scope"),
            (
                |n| n.interfaces = vec![n.interfaces[0].clone(); 9],
                "too many parts",
            ),
        ];
        for (spoil, what) in cases {
            let mut network = sample();
            spoil(&mut network);
            let error = read(&network).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
