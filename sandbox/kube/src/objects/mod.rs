//! What objects have to be: checked and completed once, before they are kept.
//!
//! Called by `http` for whatever a client wants to keep. What passes here is what `node` may rely
//! on: names are names, types are types, and what cannot be honoured is not there. Every fault is one
//! line that says where, what and what should be there.

mod names;
mod others;
mod pod;
pub mod quantity;
pub(crate) mod shape;
#[cfg(test)]
mod tests;
mod volumes;

use serde_json::{Value, json};

pub(crate) use self::others::base64;
use crate::{
    failure::{Cause, Failure},
    store::{Kind, Store},
};

/// A larger object is refused, as etcd refuses it.
const LARGEST: usize = 1 << 20;

/// What is done about fields that the kind does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    Ignored,
    Warned,
    Refused,
}

/// Who asks for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    pub(crate) store: &'a Store,
    /// The name of this node.
    pub(crate) node: &'a str,
    /// Handlers whose pods have machines of their own.
    pub(crate) machines: &'a [String],
    pub(crate) unknown: Unknown,
}

/// What is wrong with one object, collected.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<Cause>);

impl Faults {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        // A manifest of a thousand mistakes is not read further.
        if self.0.len() < 20 {
            self.0.push(Cause {
                field: field.into(),
                message: message.into(),
            });
        }
    }

    fn check(&mut self, field: impl Into<String>, result: Result<(), String>) {
        if let Err(message) = result {
            self.add(field, message);
        }
    }

    fn refuse_if_any(self, kind: Kind, name: &str) -> Result<(), Failure> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(Failure::invalid(kind, name, &self.0)),
        }
    }
}

/// A new object: what it becomes, and warnings.
pub(crate) fn admit(
    context: &Context<'_>,
    kind: Kind,
    namespace: &str,
    mut object: Value,
) -> Result<(Value, Vec<String>), Failure> {
    let warnings = form(context, kind, &object)?;
    prepare(kind, namespace, &mut object)?;
    // What an object was saved with that was on its way out.
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("deletionTimestamp");
        metadata.remove("deletionGracePeriodSeconds");
    }
    let name = names::printable(&name_of(&object));
    let mut faults = Faults::default();
    metadata(kind, &object, &mut faults);
    match kind {
        Kind::Pod => pod::complete(context.node, &mut object),
        _ => others::complete(kind, &mut object),
    }
    match kind {
        Kind::Pod => pod::check(&object, &mut faults),
        _ => others::check(kind, &object, &mut faults),
    }
    faults.refuse_if_any(kind, &name)?;
    // From here on it is a name.
    if kind.namespaced() {
        belongs(context.store, kind, namespace, &name)?;
    }
    if kind == Kind::Pod {
        pod::place(context, &mut object)?;
    }
    size(kind, &name, &object)?;
    Ok((object, warnings))
}

/// A change of an object: what it becomes, and warnings.
pub(crate) fn admit_change(
    context: &Context<'_>,
    kind: Kind,
    old: &Value,
    mut object: Value,
) -> Result<(Value, Vec<String>), Failure> {
    let warnings = form(context, kind, &object)?;
    let name = name_of(old);
    let namespace = old["metadata"]["namespace"].as_str().unwrap_or_default();
    prepare(kind, namespace, &mut object)?;
    let sent = &object["metadata"];
    if sent["name"] != old["metadata"]["name"] {
        let message = "the name of the object is not the one in the address";
        return Err(Failure::bad_request(message));
    }
    let differs = |field: &str| {
        let sent = sent[field].as_str().unwrap_or_default();
        !sent.is_empty() && Some(sent) != old["metadata"][field].as_str()
    };
    if differs("uid") {
        let why = "it is another one of that name, its uid differs";
        return Err(Failure::conflict(kind, &name, why));
    }
    if differs("resourceVersion") {
        let why = "the object has been modified; please apply your changes to the latest version \
                   and try again";
        return Err(Failure::conflict(kind, &name, why));
    }
    let mut faults = Faults::default();
    metadata(kind, &object, &mut faults);
    // What the server says of an object is not the client's to change.
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
        copy(&old["metadata"], &mut object["metadata"], field);
    }
    match kind {
        Kind::Pod => pod::complete_change(old, &mut object),
        _ => others::complete(kind, &mut object),
    }
    if kind != Kind::Event {
        copy(old, &mut object, "status");
    }
    match kind {
        Kind::Pod => pod::check_change(old, &object, &mut faults),
        _ => {
            others::check(kind, &object, &mut faults);
            others::check_change(kind, old, &object, &mut faults);
        }
    }
    faults.refuse_if_any(kind, &name)?;
    size(kind, &name, &object)?;
    Ok((object, warnings))
}

/// Fields and types.
fn form(context: &Context<'_>, kind: Kind, object: &Value) -> Result<Vec<String>, Failure> {
    let name = kind.name();
    let version = kind.api_version();
    if !object.is_object() {
        return Err(Failure::bad_request("the body is not an object"));
    }
    let whose = (&object["apiVersion"], &object["kind"]);
    let fits = |said: &Value, known: &str| said.is_null() || said == known;
    if !fits(whose.0, version) || !fits(whose.1, name) {
        return Err(Failure::bad_request(format!(
            "the object is a {} of {}, and the address is for a {name} of {version}",
            shape::shown(whose.1),
            shape::shown(whose.0),
        )));
    }
    let faults = shape::check(shape::of(kind), object);
    let refuse = |what: &str, list: &[String]| {
        let list = list.join(", ");
        Failure::bad_request(format!(
            "{name} in version \"{version}\" cannot be handled as a {name}: {what}{list}"
        ))
    };
    if !faults.wrong.is_empty() {
        return Err(refuse("", &faults.wrong));
    }
    match context.unknown {
        Unknown::Refused if !faults.unknown.is_empty() => {
            Err(refuse("strict decoding error: ", &faults.unknown))
        }
        Unknown::Ignored => Ok(Vec::new()),
        Unknown::Refused | Unknown::Warned => Ok(faults.unknown),
    }
}

/// What all objects have.
fn prepare(kind: Kind, namespace: &str, object: &mut Value) -> Result<(), Failure> {
    without_nulls(object);
    object["apiVersion"] = json!(kind.api_version());
    object["kind"] = json!(kind.name());
    if object["metadata"].is_null() {
        object["metadata"] = json!({});
    }
    let metadata = &mut object["metadata"];
    for field in ["managedFields", "selfLink"] {
        remove(metadata, field);
    }
    if kind.namespaced() {
        match metadata["namespace"].as_str() {
            None | Some("") => metadata["namespace"] = json!(namespace),
            Some(said) if said == namespace => {}
            Some(_) => {
                return Err(Failure::bad_request(
                    "the namespace of the provided object does not match the namespace sent on \
                     the request",
                ));
            }
        }
    } else {
        remove(metadata, "namespace");
    }
    if metadata["name"].as_str().unwrap_or_default().is_empty()
        && let Some(prefix) = metadata["generateName"].as_str()
        && !prefix.is_empty()
    {
        let uid = crate::store::new_uid()?;
        let tail = uid.get(..5).unwrap_or_default();
        metadata["name"] = json!(format!("{prefix}{tail}"));
    }
    Ok(())
}

fn metadata(kind: Kind, object: &Value, faults: &mut Faults) {
    let metadata = &object["metadata"];
    match metadata["name"].as_str() {
        None | Some("") => faults.add("metadata.name", "is missing; give the object a name"),
        Some(name) => {
            let good = match kind {
                Kind::Namespace => names::label(name),
                _ => names::subdomain(name),
            };
            faults.check("metadata.name", good);
        }
    }
    for (key, value) in entries(&metadata["labels"]) {
        faults.check("metadata.labels", names::qualified(key));
        let value = value.as_str().unwrap_or_default();
        faults.check(format!("metadata.labels[{key}]"), names::label_value(value));
    }
    for (key, _) in entries(&metadata["annotations"]) {
        let lower = key.to_lowercase();
        faults.check("metadata.annotations", names::qualified(&lower));
    }
    for field in ["finalizers", "ownerReferences"] {
        if metadata[field]
            .as_array()
            .is_some_and(|list| !list.is_empty())
        {
            let message = "nothing here acts on it, so an object would stay for ever; leave it out";
            faults.add(format!("metadata.{field}"), message);
        }
    }
}

/// Its namespace has to be there, and to stay.
fn belongs(store: &Store, kind: Kind, namespace: &str, name: &str) -> Result<(), Failure> {
    let Some(found) = store.get(Kind::Namespace, "", namespace) else {
        return Err(Failure::not_found(Kind::Namespace, namespace));
    };
    if !found["metadata"]["deletionTimestamp"].is_null() && kind != Kind::Event {
        let why = format!("namespace {namespace} is being deleted");
        return Err(Failure::forbidden(kind, name, &why));
    }
    Ok(())
}

fn size(kind: Kind, name: &str, object: &Value) -> Result<(), Failure> {
    let size = object.to_string().len();
    if size <= LARGEST {
        return Ok(());
    }
    let cause = Cause {
        field: "metadata".to_owned(),
        message: format!("the object has {size} bytes, and may have {LARGEST}"),
    };
    Err(Failure::invalid(kind, name, &[cause]))
}

/// Whether this may be the key of a label.
pub(crate) fn is_label(key: &str) -> bool {
    names::qualified(key).is_ok()
}

/// Its name, empty if it has none.
pub(crate) fn name_of(object: &Value) -> String {
    let name = object["metadata"]["name"].as_str();
    name.unwrap_or_default().to_owned()
}

/// A field without a value is no field.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

fn remove(value: &mut Value, field: &str) {
    if let Some(fields) = value.as_object_mut() {
        fields.remove(field);
    }
}

fn copy(from: &Value, to: &mut Value, field: &str) {
    match from.get(field) {
        Some(value) => to[field] = value.clone(),
        None => remove(to, field),
    }
}

/// Sets what is not there.
fn default(value: &mut Value, field: &str, to: impl Into<Value>) {
    if let Some(fields) = value.as_object_mut()
        && fields.get(field).is_none_or(|found| *found == "")
    {
        fields.insert(field.to_owned(), to.into());
    }
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn items(value: &Value) -> impl Iterator<Item = (usize, &Value)> {
    value.as_array().into_iter().flatten().enumerate()
}

fn items_mut(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_array_mut().into_iter().flatten()
}
