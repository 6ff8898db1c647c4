//! What the fields of objects are called and what they hold.
//!
//! One table says it for all who ask: `check` finds unknown fields and wrong types, `patch` which
//! lists are merged by which key. The names and keys are those of Kubernetes 1.32.

mod check;
mod others;
mod pod;

use crate::store::Kind;

pub(crate) use self::check::{check, shown};

/// The fields of an object.
pub(crate) type Shape = &'static [(&'static str, Type)];

/// What a field holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Type {
    /// A string.
    Text,
    /// A whole number.
    Whole,
    /// True or false.
    Flag,
    /// An amount, such as `100m` or `1Gi`; a number or a string.
    Quantity,
    /// A port or a share: a number or a string.
    NumberOrText,
    /// A string of base64.
    Base64,
    /// Whatever it is.
    Any,
    /// Names of any kind, each with such a value.
    Map(&'static Type),
    /// A list that a patch replaces as a whole.
    List(&'static Type),
    /// A list of strings to which a patch adds.
    Set,
    /// A list of objects that a patch merges, by the field that tells them apart.
    Keyed(&'static str, Shape),
    /// An object.
    Object(Shape),
}

/// The fields of a kind's objects.
pub(crate) fn of(kind: Kind) -> Shape {
    match kind {
        Kind::Pod => pod::POD,
        Kind::RuntimeClass => others::RUNTIME_CLASS,
        Kind::ConfigMap => others::CONFIG_MAP,
        Kind::Secret => others::SECRET,
        Kind::Namespace => others::NAMESPACE,
        Kind::Event => others::EVENT,
        Kind::Node => others::NODE,
    }
}

/// What such a field holds, if there is one.
pub(crate) fn field(shape: Shape, name: &str) -> Option<Type> {
    let found = shape.iter().find(|(known, _)| *known == name);
    found.map(|(_, of)| *of)
}

/// Text for each name.
const TEXTS: Type = Type::Map(&Type::Text);
/// Amounts for each name.
const QUANTITIES: Type = Type::Map(&Type::Quantity);

/// What all objects have in `metadata`.
const METADATA: Shape = &[
    ("name", Type::Text),
    ("generateName", Type::Text),
    ("namespace", Type::Text),
    ("selfLink", Type::Text),
    ("uid", Type::Text),
    ("resourceVersion", Type::Text),
    ("generation", Type::Whole),
    ("creationTimestamp", Type::Text),
    ("deletionTimestamp", Type::Text),
    ("deletionGracePeriodSeconds", Type::Whole),
    ("labels", TEXTS),
    ("annotations", TEXTS),
    (
        "ownerReferences",
        Type::Keyed(
            "uid",
            &[
                ("apiVersion", Type::Text),
                ("kind", Type::Text),
                ("name", Type::Text),
                ("uid", Type::Text),
                ("controller", Type::Flag),
                ("blockOwnerDeletion", Type::Flag),
            ],
        ),
    ),
    ("finalizers", Type::Set),
    ("managedFields", Type::List(&Type::Any)),
];
