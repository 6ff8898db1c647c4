//! A process in a guest, as this program sees it: started through the agent, its streams joined
//! to ours, its end awaited.
//!
//! Used for the container's own process by `vm` and for further ones by `commands::exec`. Nothing
//! here knows how the machine came to be.

pub(crate) mod calls;
pub(crate) mod session;
