//! Why a request is refused, as Kubernetes says it: an object of kind Status.
//!
//! kubectl prints the message as it is, for what is invalid a line for each cause.

use serde_json::{Value, json};

use crate::store::{Kind, StoreError};

/// One thing that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cause {
    /// Where, such as `spec.containers[0].image`.
    pub(crate) field: String,
    /// What, and what should be there.
    pub(crate) message: String,
}

/// A refused request.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) code: u16,
    reason: &'static str,
    message: String,
    details: Value,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: json!({}),
        }
    }

    fn about(mut self, kind: Kind, name: &str) -> Self {
        self.details = json!({"name": name, "group": kind.group(), "kind": kind.plural()});
        self
    }

    /// It makes no sense.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// There is nothing at that address.
    pub(crate) fn no_such_address() -> Self {
        let message = "the server could not find the requested resource";
        Self::new(404, "NotFound", message)
    }

    /// There is no object of that name.
    pub(crate) fn not_found(kind: Kind, name: &str) -> Self {
        let name = name.to_owned();
        StoreError::NotFound { kind, name }.into()
    }

    /// It is there, and this cannot be done with it.
    pub(crate) fn method_not_allowed(what: &str) -> Self {
        Self::new(405, "MethodNotAllowed", what)
    }

    /// It is well formed, and not wanted.
    pub(crate) fn forbidden(kind: Kind, name: &str, why: &str) -> Self {
        let message = format!("{} \"{name}\" is forbidden: {why}", kind.plural());
        Self::new(403, "Forbidden", message).about(kind, name)
    }

    /// It is not what the client believes it is.
    pub(crate) fn conflict(kind: Kind, name: &str, why: &str) -> Self {
        let plural = kind.plural();
        let message = format!("Operation cannot be fulfilled on {plural} \"{name}\": {why}");
        Self::new(409, "Conflict", message).about(kind, name)
    }

    /// It is not what such an object has to be.
    pub(crate) fn invalid(kind: Kind, name: &str, causes: &[Cause]) -> Self {
        let lines: Vec<String> = causes
            .iter()
            .map(|cause| format!("{}: {}", cause.field, cause.message))
            .collect();
        let message = format!(
            "{} \"{name}\" is invalid: {}",
            kind.name(),
            lines.join(", ")
        );
        let list = causes.iter().map(|cause| {
            json!({"reason": "FieldValueInvalid", "message": cause.message, "field": cause.field})
        });
        Self {
            code: 422,
            reason: "Invalid",
            message,
            details: json!({
                "name": name,
                "group": kind.group(),
                "kind": kind.name(),
                "causes": list.collect::<Vec<_>>(),
            }),
        }
    }

    /// A request that another version of the interface would understand.
    pub(crate) fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(422, "Invalid", message)
    }

    /// It is said in a form that is not understood here.
    pub(crate) fn media_type(message: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// It is wanted in a form that we do not have.
    pub(crate) fn not_acceptable() -> Self {
        let message = "only application/json is there, as objects or as a Table";
        Self::new(406, "NotAcceptable", message)
    }

    /// It is too large.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// What was remembered of changes does not reach back so far.
    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// It took too long.
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(408, "Timeout", message)
    }

    /// Something of ours does not work, or containerd does not.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// The object that is answered.
    pub(crate) fn status(&self) -> Value {
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        })
    }

    /// In words.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::AlreadyExists { kind, name } => {
                Self::new(409, "AlreadyExists", message).about(kind, &name)
            }
            StoreError::NotFound { kind, name } => {
                Self::new(404, "NotFound", message).about(kind, &name)
            }
            StoreError::Conflict { kind, name } => {
                Self::new(409, "Conflict", message).about(kind, &name)
            }
            StoreError::Gone { .. } => Self::expired(message),
            StoreError::Invalid(_) => Self::new(422, "Invalid", message),
            StoreError::Forbidden(_) => Self::new(403, "Forbidden", message),
            StoreError::Disk(source) => {
                // The client is told that it is our disk, the log what it has.
                log::error!("the store cannot be used: {source}");
                Self::internal(format!("{message}: {source}"))
            }
            StoreError::Garbled { .. } => Self::internal(message),
        }
    }
}
