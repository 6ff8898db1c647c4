//! Takes down what plugins have made for a pod whose namespace is gone, as that of a run is which
//! was killed.
//!
//! Some (ptp and bridge with `ipMasq`) learn from the pod's interface which rules they have made,
//! and leave them where they find no namespace. So there is one again for them, for a moment, with
//! an interface of that name and the addresses that were given. It is half of a pair whose other
//! half stays: whatever a plugin does with it, it goes with the namespace.

use std::path::PathBuf;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use serde_json::Value;

use super::{CniError, Invocation, List, Outcome};
use crate::{
    apply::add_address,
    link::links,
    namespace::Namespace,
    netlink::{Netlink, NetlinkError},
    network::Address,
};

impl List {
    /// As [`List::delete`], where the namespace is gone with its interfaces. What
    /// `invocation` says of it is not looked at.
    ///
    /// # Errors
    /// As [`List::delete`].
    pub fn delete_gone(
        &self,
        invocation: &Invocation,
        previous: Option<&Value>,
    ) -> Result<(), CniError> {
        let given = previous.map(|result| Outcome::of(result.clone()).addresses);
        let addresses: Vec<Address> = given.into_iter().flatten().map(plain).collect();
        if !addresses.is_empty() {
            match stand_in(&invocation.interface, &addresses) {
                Ok(namespace) => {
                    let there = Invocation {
                        namespace: namespace.path().to_owned(),
                        ..invocation.clone()
                    };
                    // One that wants the very interface back says no here, and is asked again.
                    if let Err(error) = self.delete(&there, previous) {
                        log::debug!("for a pod that is gone: {error}");
                    }
                }
                Err(error) => log::warn!("rules may stay: {error}"),
            }
        }
        let nowhere = Invocation {
            namespace: PathBuf::new(),
            ..invocation.clone()
        };
        self.delete(&nowhere, previous)
    }
}

fn plain((ip, prefix): (std::net::IpAddr, u8)) -> Address {
    Address {
        ip,
        prefix,
        peer: None,
        broadcast: None,
        scope: 0,
    }
}

/// A namespace without a name, with this interface.
fn stand_in(interface: &str, addresses: &[Address]) -> Result<Namespace, String> {
    let namespace = Namespace::unnamed().map_err(|error| error.to_string())?;
    let made = namespace.run(|| make(interface, addresses));
    let made = made.map_err(|error| error.to_string())?;
    made.map_err(|error| error.to_string())?;
    Ok(namespace)
}

fn make(interface: &str, addresses: &[Address]) -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open()?;
    let mut message = LinkMessage::default();
    message.attributes.extend([
        LinkAttribute::IfName(interface.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
    ]);
    let message = RouteNetlinkMessage::NewLink(message);
    netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL, || {
        format!("{interface}: making it")
    })?;
    let all = links(&mut netlink)?;
    for link in all.iter().filter(|link| link.name == interface) {
        for address in addresses {
            add_address(&mut netlink, link, address)?;
        }
    }
    Ok(())
}
