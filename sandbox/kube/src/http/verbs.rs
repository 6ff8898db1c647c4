//! What can be done with objects: get, list, create, replace, patch, delete.
//!
//! Writing waits for the disk and so is done on threads that may wait. A change is checked under the
//! store's lock: what is checked is what is kept.

use serde_json::{Value, json};

use super::{
    Api,
    body::{Answer, json as answer_json},
    discovery,
    query::Query,
    select::Selector,
};
use crate::{
    failure::Failure,
    objects::{self, Context, Unknown, shape},
    patch::Form,
    store::{self, Kind, StoreError},
    table::{self, Include},
};

/// The form in which a client wants objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Object,
    Table,
    /// The metadata alone.
    Metadata,
}

/// What all verbs are told.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    /// Empty for what belongs to none.
    pub(crate) namespace: String,
    pub(crate) query: Query,
    pub(crate) shown: Shown,
}

impl Asked {
    /// The same by this client. kubectl before 1.27 does not say what is to become of unknown fields:
    /// it checks them itself, against a description of them that is not here, and refuses them.
    pub(crate) fn by(self, agent: &str) -> Self {
        let usual = is_old_kubectl(agent).then_some("Strict");
        Self {
            query: self.query.with_usual(VALIDATION, usual),
            ..self
        }
    }
}

fn is_old_kubectl(agent: &str) -> bool {
    let version = agent.strip_prefix("kubectl/v1.");
    let minor = version.and_then(|rest| rest.split('.').next());
    minor.is_some_and(|minor| minor.parse::<u32>().is_ok_and(|minor| minor < 27))
}

/// The object after a verb, and what the client is warned of.
type Done = Result<(u16, Value, Vec<String>), Failure>;

impl Shown {
    /// The first form of a header's that we have.
    pub(crate) fn of(accept: &str) -> Result<Self, Failure> {
        if accept.trim().is_empty() {
            return Ok(Shown::Object);
        }
        for clause in accept.split(',') {
            let mut words = clause.split(';').map(str::trim);
            let media_type = words.next().unwrap_or_default();
            let form = words.find_map(|word| word.strip_prefix("as="));
            match (media_type, form) {
                ("application/json", Some("Table")) => return Ok(Shown::Table),
                (
                    "application/json",
                    Some("PartialObjectMetadata" | "PartialObjectMetadataList"),
                ) => return Ok(Shown::Metadata),
                ("application/json" | "application/*" | "*/*", None) => return Ok(Shown::Object),
                _ => {}
            }
        }
        Err(Failure::not_acceptable())
    }

    /// One object.
    pub(crate) fn one(self, kind: Kind, object: &Value, query: &Query) -> Value {
        match self {
            Shown::Object => object.clone(),
            Shown::Metadata => metadata_of(object),
            Shown::Table => {
                let version = object["metadata"]["resourceVersion"].as_str();
                let version = version.unwrap_or_default();
                table::of(kind, std::iter::once(object), version, include(query), true)
            }
        }
    }
}

/// What a table's rows are to hold beside their cells.
pub(crate) fn include(query: &Query) -> Include {
    match query.get("includeObject") {
        Some("None") => Include::Nothing,
        Some("Object") => Include::Object,
        _ => Include::Metadata,
    }
}

pub(crate) fn metadata_of(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

/// GET of one object.
pub(crate) fn get(api: &Api, asked: &Asked, name: &str) -> Result<Answer, Failure> {
    let object = api.store.get(asked.kind, &asked.namespace, name);
    let object = object.ok_or_else(|| Failure::not_found(asked.kind, name))?;
    Ok(answer_json(
        200,
        &asked.shown.one(asked.kind, &object, &asked.query),
    ))
}

/// GET of a collection.
pub(crate) fn list(api: &Api, asked: &Asked, namespace: Option<&str>) -> Result<Answer, Failure> {
    let selector = Selector::of(asked.kind, &asked.query)?;
    let (all, version) = api.store.list(asked.kind, namespace);
    let objects = all.iter().map(|object| &**object);
    let objects = objects.filter(|object| selector.matches(object));
    let version = version.to_string();
    let list = match asked.shown {
        Shown::Table => table::of(asked.kind, objects, &version, include(&asked.query), true),
        Shown::Object => json!({
            "kind": format!("{}List", asked.kind.name()),
            "apiVersion": asked.kind.api_version(),
            "metadata": {"resourceVersion": version},
            "items": objects.collect::<Vec<_>>(),
        }),
        Shown::Metadata => json!({
            "kind": "PartialObjectMetadataList",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": {"resourceVersion": version},
            "items": objects.map(metadata_of).collect::<Vec<_>>(),
        }),
    };
    Ok(answer_json(200, &list))
}

/// Whether this is only tried.
fn dry(query: &Query) -> Result<bool, Failure> {
    match query.get("dryRun") {
        None => Ok(false),
        Some("All") => Ok(true),
        Some(_) => Err(Failure::bad_request("dryRun: may be \"All\" only")),
    }
}

/// The parameter that says what becomes of unknown fields.
const VALIDATION: &str = "fieldValidation";

fn unknown(query: &Query) -> Result<Unknown, Failure> {
    match query.get(VALIDATION) {
        Some("Strict") => Ok(Unknown::Refused),
        None | Some("Warn") => Ok(Unknown::Warned),
        Some("Ignore") => Ok(Unknown::Ignored),
        Some(_) => Err(Failure::bad_request(
            "fieldValidation: is none of Strict, Warn and Ignore",
        )),
    }
}

fn allow(kind: Kind, verb: &str) -> Result<(), Failure> {
    match discovery::verbs(kind).contains(&verb) {
        true => Ok(()),
        false => Err(Failure::method_not_allowed(&format!(
            "{} cannot be made or deleted: there is one node, and it is this one",
            kind.plural()
        ))),
    }
}

pub(crate) fn parse(body: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::bad_request(format!("the body is not JSON: {error}")))
}

impl Api {
    fn context(&self, query: &Query) -> Result<Context<'_>, Failure> {
        Ok(Context {
            store: &self.store,
            node: &self.node_name,
            machines: &self.machines,
            unknown: unknown(query)?,
        })
    }

    /// POST to a collection.
    pub(crate) fn create(&self, asked: &Asked, sent: Value) -> Done {
        allow(asked.kind, "create")?;
        let context = self.context(&asked.query)?;
        let (mut object, warnings) = objects::admit(&context, asked.kind, &asked.namespace, sent)?;
        if dry(&asked.query)? {
            let name = objects::name_of(&object);
            let kind = asked.kind;
            if self.store.get(kind, &asked.namespace, &name).is_some() {
                return Err(StoreError::AlreadyExists { kind, name }.into());
            }
            object["metadata"]["uid"] = json!(store::new_uid()?);
            object["metadata"]["creationTimestamp"] = json!(store::now());
            return Ok((201, object, warnings));
        }
        let object = self.store.create(asked.kind, object)?;
        Ok((201, (*object).clone(), warnings))
    }

    /// PUT of an object.
    pub(crate) fn replace(&self, asked: &Asked, name: &str, body: &[u8]) -> Done {
        let sent = parse(body)?;
        self.change(asked, name, &|_| Ok(sent.clone()))
    }

    /// PATCH of an object.
    pub(crate) fn patch(&self, asked: &Asked, name: &str, form: Form, body: &[u8]) -> Done {
        let patch = parse(body)?;
        let shape = shape::of(asked.kind);
        self.change(asked, name, &|old| form.apply(shape, old, &patch))
    }

    /// Makes another object of one, if it may become that.
    fn change(
        &self,
        asked: &Asked,
        name: &str,
        to: &dyn Fn(&Value) -> Result<Value, Failure>,
    ) -> Done {
        let context = self.context(&asked.query)?;
        let kind = asked.kind;
        if dry(&asked.query)? {
            let old = self.store.get(kind, &asked.namespace, name);
            let old = old.ok_or_else(|| Failure::not_found(kind, name))?;
            let (new, warnings) = objects::admit_change(&context, kind, &old, to(&old)?)?;
            return Ok((200, new, warnings));
        }
        let mut warned = Vec::new();
        let object = self.update(kind, &asked.namespace, name, &mut |object| {
            let (new, warnings) = objects::admit_change(&context, kind, object, to(object)?)?;
            warned = warnings;
            *object = new;
            Ok(())
        })?;
        Ok((200, object, warned))
    }

    /// [`store::Store::update`] with our own refusals.
    fn update(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        change: &mut dyn FnMut(&mut Value) -> Result<(), Failure>,
    ) -> Result<Value, Failure> {
        let mut refused = None;
        let updated = self.store.update(kind, namespace, name, &mut |object| {
            change(object).map_err(|failure| {
                let message = failure.message().to_owned();
                refused = Some(failure);
                StoreError::Forbidden(message)
            })
        });
        match (refused, updated) {
            (Some(failure), _) => Err(failure),
            (None, Ok(object)) => Ok((*object).clone()),
            (None, Err(error)) => Err(error.into()),
        }
    }

    /// DELETE of an object. A pod is stopped first, and a namespace emptied; then they go.
    pub(crate) fn delete(&self, asked: &Asked, name: &str, body: &[u8]) -> Done {
        allow(asked.kind, "delete")?;
        let options = if body.is_empty() {
            json!({})
        } else {
            parse(body)?
        };
        let dry = dry(&asked.query)? || options["dryRun"] == json!(["All"]);
        let (kind, namespace) = (asked.kind, asked.namespace.as_str());
        let conditions = &options["preconditions"];
        let check = |object: &Value| {
            for field in ["uid", "resourceVersion"] {
                let wanted = &conditions[field];
                if !wanted.is_null() && *wanted != object["metadata"][field] {
                    let why = format!("the precondition on its {field} does not hold");
                    return Err(Failure::conflict(kind, name, &why));
                }
            }
            if kind == Kind::Namespace && name == super::DEFAULT_NAMESPACE {
                let why = "it is where objects go that name no namespace";
                return Err(Failure::forbidden(kind, name, why));
            }
            Ok(())
        };
        if dry {
            let object = self.store.get(kind, namespace, name);
            let object = object.ok_or_else(|| Failure::not_found(kind, name))?;
            check(&object)?;
            return Ok((200, (*object).clone(), Vec::new()));
        }
        let grace = match options["gracePeriodSeconds"].as_i64() {
            Some(seconds) => Some(seconds),
            None => {
                let given = asked.query.number("gracePeriodSeconds")?;
                given.map(|seconds| i64::try_from(seconds).unwrap_or(i64::MAX))
            }
        };
        if grace.is_some_and(|seconds| seconds < 0) {
            return Err(Failure::bad_request("gracePeriodSeconds: is negative"));
        }
        match kind {
            Kind::Pod => {
                let object = self.update(kind, namespace, name, &mut |object| {
                    check(object)?;
                    end_pod(object, grace);
                    Ok(())
                })?;
                Ok((200, object, Vec::new()))
            }
            Kind::Namespace => {
                let object = self.update(kind, namespace, name, &mut |object| {
                    check(object)?;
                    if object["metadata"]["deletionTimestamp"].is_null() {
                        object["metadata"]["deletionTimestamp"] = json!(store::now());
                    }
                    object["status"]["phase"] = json!("Terminating");
                    Ok(())
                })?;
                Ok((200, object, Vec::new()))
            }
            _ => {
                let mut refused = None;
                let removed = self.store.remove_if(kind, namespace, name, &mut |object| {
                    check(object).map_err(|failure| {
                        let message = failure.message().to_owned();
                        refused = Some(failure);
                        StoreError::Forbidden(message)
                    })
                });
                if let Some(failure) = refused {
                    return Err(failure);
                }
                let removed = removed?;
                let status = json!({
                    "kind": "Status",
                    "apiVersion": "v1",
                    "metadata": {},
                    "status": "Success",
                    "details": {
                        "name": name,
                        "group": kind.group(),
                        "kind": kind.plural(),
                        "uid": removed["metadata"]["uid"],
                    },
                });
                Ok((200, status, Vec::new()))
            }
        }
    }

    /// DELETE of a collection: of each object that is selected.
    pub(crate) fn delete_all(&self, asked: &Asked, namespace: Option<&str>, body: &[u8]) -> Done {
        allow(asked.kind, "deletecollection")?;
        let selector = Selector::of(asked.kind, &asked.query)?;
        let (all, version) = self.store.list(asked.kind, namespace);
        let mut deleted = Vec::new();
        for object in all.iter().filter(|object| selector.matches(object)) {
            let namespace = object["metadata"]["namespace"].as_str();
            let one = Asked {
                kind: asked.kind,
                namespace: namespace.unwrap_or_default().to_owned(),
                query: Query::default(),
                shown: Shown::Object,
            };
            let name = objects::name_of(object);
            if dry(&asked.query)? {
                deleted.push((**object).clone());
                continue;
            }
            match self.delete(&one, &name, body) {
                Ok(_) => deleted.push((**object).clone()),
                // Somebody else was faster.
                Err(failure) if failure.code == 404 => {}
                Err(failure) => return Err(failure),
            }
        }
        let list = json!({
            "kind": format!("{}List", asked.kind.name()),
            "apiVersion": asked.kind.api_version(),
            "metadata": {"resourceVersion": version.to_string()},
            "items": deleted,
        });
        Ok((200, list, Vec::new()))
    }
}

/// Marks a pod for its end. A later request may only shorten the time it has.
pub(super) fn end_pod(pod: &mut Value, grace: Option<i64>) {
    let usual = pod["spec"]["terminationGracePeriodSeconds"].as_i64();
    let grace = grace.or(usual).unwrap_or(30);
    let metadata = &mut pod["metadata"];
    let left = metadata["deletionGracePeriodSeconds"].as_i64();
    if !metadata["deletionTimestamp"].is_null() && left.is_none_or(|left| left <= grace) {
        return;
    }
    let seconds = u64::try_from(grace).unwrap_or_default().min(1 << 31);
    let end = std::time::SystemTime::now() + std::time::Duration::from_secs(seconds);
    let end = humantime::format_rfc3339_seconds(end).to_string();
    metadata["deletionTimestamp"] = json!(end);
    metadata["deletionGracePeriodSeconds"] = json!(grace);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_form_that_is_there_is_taken() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        for (accept, shown) in [
            ("", Shown::Object),
            ("*/*", Shown::Object),
            ("application/json", Shown::Object),
            (kubectl, Shown::Table),
            (
                "application/vnd.kubernetes.protobuf, application/json",
                Shown::Object,
            ),
            (
                "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
                Shown::Metadata,
            ),
        ] {
            assert_eq!(Shown::of(accept).unwrap(), shown, "{accept}");
        }
        assert_eq!(
            Shown::of("application/vnd.kubernetes.protobuf")
                .unwrap_err()
                .code,
            406
        );
    }

    #[test]
    fn old_clients_of_kubernetes_refuse_unknown_fields() {
        for (agent, old) in [
            ("kubectl/v1.20.2 (linux/amd64) kubernetes/faecb19", true),
            ("kubectl/v1.26.0 (linux/amd64) kubernetes/b46a3f8", true),
            ("kubectl/v1.32.4 (linux/amd64) kubernetes/59526cd", false),
            ("kubectl/v2.0.0", false),
            ("curl/7.88.1", false),
            ("", false),
        ] {
            assert_eq!(is_old_kubectl(agent), old, "{agent}");
        }
    }

    #[test]
    fn a_pods_end_is_only_brought_nearer() {
        let mut pod = json!({"metadata": {}, "spec": {"terminationGracePeriodSeconds": 5}});
        end_pod(&mut pod, None);
        assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 5);
        let first = pod.clone();
        end_pod(&mut pod, Some(60));
        assert_eq!(pod, first);
        end_pod(&mut pod, Some(0));
        assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 0);
    }
}
