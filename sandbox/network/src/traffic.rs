//! Has the kernel pass every frame that arrives at one interface out of another: an ingress
//! qdisc, and a filter on it. Called by `attach` and `sweep`.
//!
//! What is ours is known by its priority and its handle, so that it can be undone without
//! knowing anything else, also by a successor of a process that was killed.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
        TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcHeader, TcMessage,
        TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};

use crate::{
    attach::AttachError,
    link::{Link, text},
    netlink::{Netlink, NetlinkError, after, attributes},
};

/// Late, so that filters of the network's own come first and may drop what they like.
const PRIORITY: u16 = 0x7065;
/// The number of our filter in its table, where the qdisc is ours, too.
const QDISC_OURS: u32 = 0x7e1;
/// The same where somebody else's qdisc was there.
const QDISC_THEIRS: u32 = 0x7e2;
/// Where filters for what arrives are, under an ingress qdisc as well as under clsact.
const ARRIVING: TcHandle = TcHandle {
    major: TcHandle::INGRESS.major,
    minor: TcHandle::MIN_INGRESS,
};

/// A filter that is there.
#[derive(Debug)]
struct Filter {
    priority: u16,
    handle: u32,
    kind: String,
}

impl Filter {
    /// The number in its table; 0 for the table itself.
    fn node(&self) -> u32 {
        self.handle & 0xfff
    }

    fn is_ours(&self) -> bool {
        let ours = [QDISC_OURS, QDISC_THEIRS].contains(&self.node());
        self.priority == PRIORITY && self.kind == TcFilterU32::KIND && ours
    }

    /// Somebody else's, at our priority.
    fn is_strange(&self) -> bool {
        self.priority == PRIORITY && !self.is_ours() && self.node() != 0
    }
}

/// Passes all frames that arrive at one on to the other. What a predecessor left there is
/// replaced.
pub(crate) fn redirect(netlink: &mut Netlink, from: &Link, to: &Link) -> Result<(), AttachError> {
    clear(netlink, from)?;
    let theirs = has_qdisc(netlink, from)?;
    if theirs {
        if filters(netlink, from)?.iter().any(Filter::is_strange) {
            return Err(AttachError::Priority {
                name: from.name.clone(),
                priority: PRIORITY,
            });
        }
    } else {
        let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc(from));
        netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL, || {
            format!("{}: an ingress qdisc", from.name)
        })?;
    }
    let node = if theirs { QDISC_THEIRS } else { QDISC_OURS };
    let message = RouteNetlinkMessage::NewTrafficFilter(filter(from, to, node));
    netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL, || {
        format!(
            "{}: a filter that passes its frames to {}",
            from.name, to.name
        )
    })?;
    Ok(())
}

/// Removes what is ours. It is no error when there is nothing, or when the interface goes
/// meanwhile.
pub(crate) fn clear(netlink: &mut Netlink, link: &Link) -> Result<(), NetlinkError> {
    if !has_qdisc(netlink, link)? {
        return Ok(());
    }
    let all = filters(netlink, link)?;
    let ours: Vec<_> = all.iter().filter(|filter| filter.is_ours()).collect();
    if ours.is_empty() {
        return Ok(());
    }
    // The whole priority, with the table; only our own entries if others are there.
    let handles = match all.iter().any(Filter::is_strange) {
        true => ours.iter().map(|filter| filter.handle).collect(),
        false => vec![0],
    };
    for handle in handles {
        let message = RouteNetlinkMessage::DelTrafficFilter(at_our_priority(link, handle));
        gone(netlink.ask(message, 0, || format!("{}: removing our filter", link.name)))?;
    }
    let alone = !all
        .iter()
        .any(|filter| filter.priority != PRIORITY || filter.is_strange());
    if alone && ours.iter().any(|filter| filter.node() == QDISC_OURS) {
        let message = RouteNetlinkMessage::DelQueueDiscipline(qdisc(link));
        gone(netlink.ask(message, 0, || {
            format!("{}: removing the ingress qdisc", link.name)
        }))?;
    }
    Ok(())
}

/// What was to be removed may be gone.
pub(crate) fn gone(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if matches!(error.number(), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// Whether there is one for filters to be on, ingress or clsact.
fn has_qdisc(netlink: &mut Netlink, link: &Link) -> Result<bool, NetlinkError> {
    let all = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let all = netlink.dump(all, "qdiscs")?;
    Ok(all.iter().any(|body| {
        let header = TcHeader::parse(body).unwrap_or_default();
        header.index == link.index as i32 && header.parent == TcHandle::INGRESS
    }))
}

fn filters(netlink: &mut Netlink, link: &Link) -> Result<Vec<Filter>, NetlinkError> {
    let mut message = TcMessage::with_index(link.index as i32);
    message.header.parent = ARRIVING;
    let all = RouteNetlinkMessage::GetTrafficFilter(message);
    let all = netlink.dump(all, &format!("filters of {}", link.name))?;
    Ok(all.iter().filter_map(|body| parse(body)).collect())
}

fn parse(body: &[u8]) -> Option<Filter> {
    let header = TcHeader::parse(body).ok()?;
    let mut all = attributes(after(&header, body));
    let kind = all.find(|attribute| attribute.kind() == libc::TCA_KIND);
    Some(Filter {
        priority: (header.info >> 16) as u16,
        handle: header.handle.into(),
        kind: kind.map(|kind| text(kind.value())).unwrap_or_default(),
    })
}

fn qdisc(link: &Link) -> TcMessage {
    let mut message = TcMessage::with_index(link.index as i32);
    message.header.handle.major = TcHandle::INGRESS.major;
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".into())];
    message
}

fn at_our_priority(link: &Link, handle: u32) -> TcMessage {
    let mut message = TcMessage::with_index(link.index as i32);
    message.header.handle = handle.into();
    message.header.parent = ARRIVING;
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(protocol);
    message
}

/// Everything matches: one key that compares no bit. u32 is in every kernel that has any
/// classifier, which cls_matchall is not.
fn filter(from: &Link, to: &Link, node: u32) -> TcMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to.index;
    let parameters = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![parameters]),
    ];
    let mut message = at_our_priority(from, node);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_has_both_marks_is_ours() {
        let filter = |priority, handle, kind: &str| Filter {
            priority,
            handle,
            kind: kind.into(),
        };
        assert!(filter(PRIORITY, 0x8010_07e1, "u32").is_ours());
        assert!(filter(PRIORITY, 0x8000_07e2, "u32").is_ours());
        let table = filter(PRIORITY, 0x8000_0000, "u32");
        assert!(!table.is_ours() && !table.is_strange());
        assert!(filter(PRIORITY, 1, "bpf").is_strange());
        assert!(filter(PRIORITY, 0x8000_0800, "u32").is_strange());
        let other = filter(1, 0x8000_07e1, "u32");
        assert!(!other.is_ours() && !other.is_strange());
    }

    proptest! {
        #[test]
        fn odd_filters_are_no_trouble(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            parse(&body);
        }
    }
}
