//! What a network is, in plain data: read by `survey`, sent to the guest by whoever attaches
//! it, put in place there by `apply`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

/// All of a namespace's network that a guest can have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// In the order of their numbers in the namespace.
    pub interfaces: Vec<Interface>,
    /// In an order in which they can be added one by one.
    pub routes: Vec<Route>,
    /// The permanent entries, by interface and address.
    pub neighbours: Vec<Neighbour>,
    /// A sentence for each thing that is in the namespace and not here.
    pub left_out: Vec<String>,
}

/// An interface with Ethernet addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name, in the guest, too.
    pub name: String,
    /// Its Ethernet address, which is the guest's, too.
    pub mac: [u8; 6],
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// In the order in which they were added.
    pub addresses: Vec<Address>,
}

/// An address of an interface. The routes that the kernel makes of addresses by itself are
/// among the [`Network::routes`], as far as they are there: some networks take them away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// How many of its bits are the network's.
    pub prefix: u8,
    /// The address at the other end, if the link has but one.
    pub peer: Option<IpAddr>,
    /// The broadcast address, if one is set.
    pub broadcast: Option<Ipv4Addr>,
    /// As the kernel counts: 0 is the world, 253 the link, 254 the host.
    pub scope: u8,
}

/// A route to one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The interface's name.
    pub interface: String,
    /// Address and prefix; the default route is all zeros with prefix 0.
    pub destination: (IpAddr, u8),
    /// Where to send the packets; of the other family in networks where IPv6 routers carry
    /// IPv4. Without one, the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The source address of packets that have none.
    pub source: Option<IpAddr>,
    /// As the kernel counts: 0 is the world, 253 the link.
    pub scope: u8,
    /// The lowest wins.
    pub metric: Option<u32>,
    /// The largest packet on this route, in bytes.
    pub mtu: Option<u32>,
    /// The gateway is on the link, whatever the other routes say.
    pub onlink: bool,
}

/// An address of the network whose Ethernet address is fixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's name.
    pub interface: String,
    /// The neighbour's address.
    pub ip: IpAddr,
    /// The neighbour's Ethernet address.
    pub mac: [u8; 6],
}

/// As `ip address` has it.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "{} peer {peer}/{}", self.ip, self.prefix),
            None => write!(f, "{}/{}", self.ip, self.prefix),
        }
    }
}

/// As `ip route` has it, without what is rare.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (to, prefix) = self.destination;
        write!(f, "{to}/{prefix}")?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.interface)
    }
}

/// As people write an Ethernet address.
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_messages_call_things() {
        let mut address = Address {
            ip: [10, 0, 0, 2].into(),
            prefix: 24,
            peer: None,
            broadcast: None,
            scope: 0,
        };
        assert_eq!(address.to_string(), "10.0.0.2/24");
        address.peer = Some([10, 0, 0, 1].into());
        assert_eq!(address.to_string(), "10.0.0.2 peer 10.0.0.1/24");
        let route = Route {
            interface: "eth0".into(),
            destination: ([0; 4].into(), 0),
            gateway: Some([169, 254, 1, 1].into()),
            source: None,
            scope: 0,
            metric: None,
            mtu: None,
            onlink: true,
        };
        assert_eq!(route.to_string(), "0.0.0.0/0 via 169.254.1.1 dev eth0");
        assert_eq!(Mac([2, 0, 0, 0, 0, 0xab]).to_string(), "02:00:00:00:00:ab");
    }
}
