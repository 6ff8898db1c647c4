//! The kinds that are kept, and what they are called.

/// One of the kinds that are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "they are Kubernetes' own names")]
pub enum Kind {
    Pod,
    RuntimeClass,
    ConfigMap,
    Secret,
    Namespace,
    Event,
    Node,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [
        Kind::Pod,
        Kind::RuntimeClass,
        Kind::ConfigMap,
        Kind::Secret,
        Kind::Namespace,
        Kind::Event,
        Kind::Node,
    ];

    /// As objects name it in `kind`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Pod => "Pod",
            Kind::RuntimeClass => "RuntimeClass",
            Kind::ConfigMap => "ConfigMap",
            Kind::Secret => "Secret",
            Kind::Namespace => "Namespace",
            Kind::Event => "Event",
            Kind::Node => "Node",
        }
    }

    /// As addresses and messages name it.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Pod => "pods",
            Kind::RuntimeClass => "runtimeclasses",
            Kind::ConfigMap => "configmaps",
            Kind::Secret => "secrets",
            Kind::Namespace => "namespaces",
            Kind::Event => "events",
            Kind::Node => "nodes",
        }
    }

    /// Its API group, empty for the first one.
    pub fn group(self) -> &'static str {
        match self {
            Kind::RuntimeClass => "node.k8s.io",
            _ => "",
        }
    }

    /// As objects name it in `apiVersion`.
    pub fn api_version(self) -> &'static str {
        match self {
            Kind::RuntimeClass => "node.k8s.io/v1",
            _ => "v1",
        }
    }

    /// Whether its objects belong to a namespace.
    pub fn namespaced(self) -> bool {
        matches!(
            self,
            Kind::Pod | Kind::ConfigMap | Kind::Secret | Kind::Event
        )
    }

    /// The kind of that plural name.
    pub fn of_plural(plural: &str) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| kind.plural() == plural)
    }
}
