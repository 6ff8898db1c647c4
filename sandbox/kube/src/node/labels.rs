//! The labels by which what is containerd's is known as a pod's. Called by `seen`, `sandbox` and
//! `container`. All but the first are those of a kubelet, which shims and tools know.

/// Which node's: one containerd may serve several.
pub(super) const NODE: &str = "io.pericarp.node";
/// The pod's name.
pub(super) const POD: &str = "io.kubernetes.pod.name";
/// The pod's namespace.
pub(super) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// The pod itself.
pub(super) const UID: &str = "io.kubernetes.pod.uid";
/// The container's name.
pub(super) const CONTAINER: &str = "io.kubernetes.container.name";
