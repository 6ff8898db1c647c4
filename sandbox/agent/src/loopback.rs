//! Brings the loopback interface up, and lets containers ping.
//!
//! Called once. Network cards come later, with `Configure`.

use crate::error::{AgentError, during};

/// The groups that may send echo requests.
const PING_GROUPS: &str = "/proc/sys/net/ipv4/ping_group_range";

pub(crate) fn bring_up() -> Result<(), AgentError> {
    pericarp_network::loopback_up().map_err(during("the loopback interface"))?;
    // Without it ping needs a capability that containers do not get.
    std::fs::write(PING_GROUPS, "0 2147483647").map_err(during(PING_GROUPS))
}
