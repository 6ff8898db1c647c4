//! A thin Kubernetes-shaped API over one containerd: what `pericarp node serve` is made of.
//!
//! `http` answers clients such as kubectl; what they create is checked by `objects` and kept by
//! `store`. `node` makes it so: it is the kubelet's half, which sees the store's changes and calls
//! containerd through `cri`. Both halves meet at the store alone; only `streams` asks `node` where a
//! container is. Nothing here schedules: there is one node, and it runs what it is given.

pub mod certificates;
pub mod cri;
mod failure;
pub mod http;
pub mod node;
pub mod objects;
mod patch;
pub mod store;
mod streams;
mod table;
