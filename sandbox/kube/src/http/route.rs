//! What an address is for.

use super::query::decode;
use crate::{failure::Failure, store::Kind};

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// What the interface itself is: `discovery` answers.
    About(String),
    /// Whether the server is well.
    Health,
    /// The objects of a kind, of one namespace or of all.
    Collection(Kind, Option<String>),
    /// One object; the namespace is empty for what belongs to none.
    Object(Kind, String, String),
    /// Something of a pod: its log, its streams.
    Part(String, String, String),
}

impl Route {
    pub(crate) fn of(path: &str) -> Result<Self, Failure> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        let parts: Vec<String> = parts.map(decode).collect::<Result<_, _>>()?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, rest) = match parts[..] {
            ["healthz" | "livez" | "readyz", ..] => return Ok(Route::Health),
            ["api", "v1", ref rest @ ..] if !rest.is_empty() => ("", rest),
            ["apis", group, "v1", ref rest @ ..] if !rest.is_empty() => (group, rest),
            _ => return Ok(Route::About(parts.join("/"))),
        };
        let kind = |plural: &str, namespaced: bool| {
            Kind::of_plural(plural)
                .filter(|kind| kind.group() == group && kind.namespaced() == namespaced)
                .ok_or_else(Failure::no_such_address)
        };
        let own = |text: &str| text.to_owned();
        Ok(match *rest {
            ["namespaces", namespace, plural] => {
                Route::Collection(kind(plural, true)?, Some(own(namespace)))
            }
            ["namespaces", namespace, plural, name] => {
                Route::Object(kind(plural, true)?, own(namespace), own(name))
            }
            ["namespaces", namespace, "pods", name, part] if group.is_empty() => {
                Route::Part(own(namespace), own(name), own(part))
            }
            [plural] => match Kind::of_plural(plural) {
                Some(kind) if kind.group() == group => Route::Collection(kind, None),
                _ => return Err(Failure::no_such_address()),
            },
            [plural, name] => Route::Object(kind(plural, false)?, String::new(), own(name)),
            _ => return Err(Failure::no_such_address()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        let own = |text: &str| text.to_owned();
        for (path, route) in [
            ("/api", Route::About(own("api"))),
            (
                "/apis/node.k8s.io/v1",
                Route::About(own("apis/node.k8s.io/v1")),
            ),
            ("/readyz", Route::Health),
            ("/api/v1/pods", Route::Collection(Kind::Pod, None)),
            (
                "/api/v1/namespaces",
                Route::Collection(Kind::Namespace, None),
            ),
            (
                "/api/v1/namespaces/a",
                Route::Object(Kind::Namespace, own(""), own("a")),
            ),
            (
                "/api/v1/namespaces/a/pods",
                Route::Collection(Kind::Pod, Some(own("a"))),
            ),
            (
                "/api/v1/namespaces/a/secrets/b%2Fc",
                Route::Object(Kind::Secret, own("a"), own("b/c")),
            ),
            (
                "/api/v1/namespaces/a/pods/b/log",
                Route::Part(own("a"), own("b"), own("log")),
            ),
            (
                "/apis/node.k8s.io/v1/runtimeclasses/kata",
                Route::Object(Kind::RuntimeClass, own(""), own("kata")),
            ),
        ] {
            assert_eq!(Route::of(path).unwrap(), route, "{path}");
        }
        for bad in [
            "/api/v1/runtimeclasses",
            "/apis/node.k8s.io/v1/pods",
            "/api/v1/pods/a",
            "/api/v1/namespaces/a/nodes",
            "/api/v1/nodes/a/b/c",
            "/api/v1/%zz",
        ] {
            assert!(Route::of(bad).is_err(), "{bad}");
        }
    }
}
