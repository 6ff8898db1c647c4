//! Pods under I/O that is verified, while their processes are killed or for a long time. Called by
//! `pericarp-endure`, and in short by the suite `endure`.
//!
//! ```text
//! store    blocks on a volume, as the guest's writer keeps them
//! ledger   what the writers have said, and whether a volume still has it
//! tenant   a pod and its volumes, which outlive it
//! site     the node that they are on
//! kills    processes killed at random, and what came of each
//! soak     what processes hold as time goes by, and whether it grows
//! echo     the other end of the pods' network
//! ```

mod echo;
pub mod kills;
mod ledger;
mod site;
pub mod soak;
pub mod store;
mod tenant;

pub use ledger::Ledger;
pub use site::{PARTS, Site};
pub use tenant::{Kind, Tenant};
