//! Virtual CPUs: what they are told to be ([`cpuid`]), how the first one enters
//! the kernel ([`state`]), and the thread that runs each of them ([`thread`]).

pub mod cpuid;
pub mod state;
pub mod thread;
