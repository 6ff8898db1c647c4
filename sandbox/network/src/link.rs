//! The interfaces of a namespace as the kernel lists them, and changes to one of them. The
//! survey, the taps and the guest's side all begin with this list.

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkHeader, LinkMessage},
};

use crate::{
    netlink::{Body, Netlink, NetlinkError, after, attributes},
    network::Mac,
};

/// ARPHRD_ETHER, as the message has it.
const ETHER: u16 = 1;

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
    pub(crate) loopback: bool,
    /// None for what has no Ethernet header, and for what has one for show: the all-zero
    /// address of a netkit in its layer 3 mode.
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) mtu: u32,
    /// As `ip -d link` calls it. Empty for hardware.
    pub(crate) kind: String,
    /// The bridge or bond that it is a port of.
    pub(crate) master: Option<u32>,
    /// In the same namespace, what it stands on, or the other end of a pair.
    pub(crate) lower: Option<u32>,
}

/// All interfaces, by number.
pub(crate) fn links(netlink: &mut Netlink) -> Result<Vec<Link>, NetlinkError> {
    let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
    Ok(parse(&netlink.dump(all, "interfaces")?))
}

pub(crate) fn parse(bodies: &[Body]) -> Vec<Link> {
    let mut links: Vec<Link> = bodies.iter().filter_map(|body| one(body)).collect();
    links.sort_by_key(|link| link.index);
    links
}

fn one(body: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(body).ok()?;
    let mut link = Link {
        index: header.index,
        name: String::new(),
        up: header.flags.contains(LinkFlags::Up),
        loopback: header.flags.contains(LinkFlags::Loopback),
        mac: None,
        mtu: 0,
        kind: String::new(),
        master: None,
        lower: None,
    };
    let mut elsewhere = false;
    for attribute in attributes(after(&header, body)) {
        let value = attribute.value();
        match attribute.kind() {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_MTU => link.mtu = number(value)?,
            libc::IFLA_MASTER => link.master = number(value),
            libc::IFLA_LINK => link.lower = number(value).filter(|&index| index != 0),
            libc::IFLA_LINK_NETNSID => elsewhere = true,
            libc::IFLA_ADDRESS if u16::from(header.link_layer_type) == ETHER => {
                link.mac = mac(value);
            }
            libc::IFLA_LINKINFO => {
                let mut inner = attributes(value);
                let kind = inner.find(|inner| inner.kind() == libc::IFLA_INFO_KIND);
                link.kind = kind.map(|kind| text(kind.value())).unwrap_or_default();
            }
            _ => {}
        }
    }
    if elsewhere {
        link.lower = None;
    }
    (!link.name.is_empty()).then_some(link)
}

/// The address of one station, not of a group and not of nobody.
pub(crate) fn mac(value: &[u8]) -> Option<[u8; 6]> {
    let mac: [u8; 6] = value.try_into().ok()?;
    (mac != [0; 6] && mac[0] & 1 == 0).then_some(mac)
}

pub(crate) fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

impl Link {
    /// Changes what these attributes say.
    pub(crate) fn set(
        &self,
        netlink: &mut Netlink,
        attributes: Vec<LinkAttribute>,
        tried: &str,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes = attributes;
        let message = RouteNetlinkMessage::SetLink(message);
        netlink.ask(message, 0, || format!("{}: {tried}", self.name))
    }

    /// Brings it up or down.
    pub(crate) fn bring(&self, netlink: &mut Netlink, up: bool) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.change_mask = LinkFlags::Up;
        if up {
            message.header.flags = LinkFlags::Up;
        }
        let message = RouteNetlinkMessage::SetLink(message);
        let which = if up { "up" } else { "down" };
        netlink.ask(message, 0, || format!("{}: bringing it {which}", self.name))
    }

    /// Removes it, whoever has it open.
    pub(crate) fn remove(&self, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        let message = RouteNetlinkMessage::DelLink(message);
        netlink.ask(message, 0, || format!("{}: removing it", self.name))
    }

    /// How a message names it to somebody who has to find it.
    pub(crate) fn described(&self) -> String {
        match self.mac {
            Some(mac) => format!("{} ({})", self.name, Mac(mac)),
            None => self.name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;
    use netlink_packet_route::link::{InfoKind, LinkInfo, LinkLayerType};
    use proptest::prelude::*;

    fn body(kind: LinkLayerType, address: &[u8]) -> Body {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.link_layer_type = kind;
        message.attributes = vec![
            LinkAttribute::IfName("eth0".into()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::Address(address.to_vec()),
            LinkAttribute::Link(3),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ];
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        body
    }

    #[test]
    fn a_link_is_read() {
        let links = parse(&[body(LinkLayerType::Ether, &[2, 0, 0, 0, 0, 1])]);
        let expected = Link {
            index: 7,
            name: "eth0".into(),
            up: false,
            loopback: false,
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            kind: "veth".into(),
            master: None,
            lower: Some(3),
        };
        assert_eq!(links, [expected]);
    }

    #[test]
    fn not_every_address_is_ethernet() {
        let mac = |kind, address: &[u8]| parse(&[body(kind, address)])[0].mac;
        assert_eq!(mac(LinkLayerType::Ether, &[0; 6]), None);
        assert_eq!(mac(LinkLayerType::Ether, &[1, 0, 0, 0, 0, 1]), None);
        assert_eq!(mac(LinkLayerType::Ether, &[2; 20]), None);
        assert_eq!(mac(LinkLayerType::None, &[2; 6]), None);
    }

    proptest! {
        #[test]
        fn odd_links_are_no_trouble(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&[body]);
        }
    }
}
