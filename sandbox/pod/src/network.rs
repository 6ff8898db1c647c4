//! What the guest is told of a namespace's network.

use std::net::IpAddr;

use pericarp_api::{agent, network::bytes};
use pericarp_network::Network;

/// All of it but the resolver's configuration.
#[must_use]
pub fn message(network: &Network) -> agent::Network {
    let interfaces = network.interfaces.iter().map(|one| agent::Interface {
        name: one.name.clone(),
        mac: one.mac.to_vec(),
        mtu: one.mtu,
        addresses: one
            .addresses
            .iter()
            .map(|address| agent::Address {
                ip: bytes(Some(address.ip)),
                prefix: address.prefix.into(),
                peer: bytes(address.peer),
                broadcast: bytes(address.broadcast.map(IpAddr::V4)),
                scope: address.scope.into(),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    });
    let routes = network.routes.iter().map(|route| agent::Route {
        interface: route.interface.clone(),
        destination: bytes(Some(route.destination.0)),
        prefix: route.destination.1.into(),
        gateway: bytes(route.gateway),
        source: bytes(route.source),
        scope: route.scope.into(),
        metric: route.metric.unwrap_or(0),
        mtu: route.mtu.unwrap_or(0),
        on_link: route.onlink,
        ..Default::default()
    });
    let neighbours = network.neighbours.iter().map(|one| agent::Neighbour {
        interface: one.interface.clone(),
        ip: bytes(Some(one.ip)),
        mac: one.mac.to_vec(),
        ..Default::default()
    });
    agent::Network {
        interfaces: interfaces.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        ..Default::default()
    }
}
