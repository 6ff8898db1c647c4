//! The table of operations: names, what they do, and the lines that go in and
//! out of them.
//!
//! Each program adds its own to `version` and `metrics`, which all have.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::{Map, Value, json};

/// The members of a request beside `op`.
pub type Arguments = Map<String, Value>;

/// What an operation answers: the members beside `ok`, or the text of `error`.
pub type Answer = Result<Map<String, Value>, String>;

/// What an errand answers: the members beside `ok`, or why there are none.
pub type Outcome = Result<Map<String, Value>, Refused>;

/// An errand that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The text of `error`.
    pub error: String,
    /// The peer's to mend, as opposed to a failure or a bad moment.
    pub mistake: bool,
}

impl From<String> for Refused {
    fn from(error: String) -> Self {
        let mistake = true;
        Self { error, mistake }
    }
}

pub(crate) type Errand = dyn Fn(&Arguments, Vec<OwnedFd>) -> Outcome + Send + Sync;
type Operation = Box<dyn FnMut(&Arguments) -> Answer + Send>;
type Adoption = Box<dyn FnMut(&Arguments, UnixStream) -> Result<(), String> + Send>;
type Metrics = Box<dyn FnMut() -> String + Send>;

/// What one program can be asked.
pub struct Operations {
    named: Vec<(&'static str, Operation)>,
    adoptions: Vec<(&'static str, Adoption)>,
    errands: Vec<(&'static str, Arc<Errand>)>,
    metrics: Metrics,
    version: Map<String, Value>,
}

impl Operations {
    /// A table with `version` and `metrics`; the latter is what `metrics`
    /// returns, in Prometheus' text format.
    pub fn new(
        program: &str,
        version: &str,
        metrics: impl FnMut() -> String + Send + 'static,
    ) -> Self {
        let mut about = Map::new();
        about.insert("program".to_owned(), json!(program));
        about.insert("version".to_owned(), json!(version));
        Self {
            named: Vec::new(),
            adoptions: Vec::new(),
            errands: Vec::new(),
            metrics: Box::new(metrics),
            version: about,
        }
    }

    /// Adds an operation. It must not block: all peers wait for it.
    #[must_use]
    pub fn with(
        mut self,
        name: &'static str,
        operation: impl FnMut(&Arguments) -> Answer + Send + 'static,
    ) -> Self {
        self.named.push((name, Box::new(operation)));
        self
    }

    /// Has the operations with these names go through `around`, which calls what
    /// it is given or answers in its place.
    #[must_use]
    pub fn around(
        mut self,
        names: &[&str],
        around: impl Fn(&mut dyn FnMut() -> Answer) -> Answer + Clone + Send + 'static,
    ) -> Self {
        for (name, operation) in &mut self.named {
            if names.contains(name) {
                let around = around.clone();
                let mut inner = std::mem::replace(operation, Box::new(|_| Ok(Map::new())));
                *operation = Box::new(move |arguments| around(&mut || inner(arguments)));
            }
        }
        self
    }

    /// Adds an operation that takes the connection over and goes on with it by
    /// itself, unless it refuses. It must not block either.
    #[must_use]
    pub fn with_adoption(
        mut self,
        name: &'static str,
        adoption: impl FnMut(&Arguments, UnixStream) -> Result<(), String> + Send + 'static,
    ) -> Self {
        self.adoptions.push((name, Box::new(adoption)));
        self
    }

    /// Adds an operation that may take its time, and takes descriptors: it runs
    /// on a thread of its own, and only the peer that asked waits for it.
    #[must_use]
    pub fn with_errand(
        mut self,
        name: &'static str,
        errand: impl Fn(&Arguments, Vec<OwnedFd>) -> Outcome + Send + Sync + 'static,
    ) -> Self {
        self.errands.push((name, Arc::new(errand)));
        self
    }

    /// The errand that the line asks for, if it asks for one.
    pub(crate) fn errand(&self, line: &[u8]) -> Option<(Arc<Errand>, Arguments)> {
        if self.errands.is_empty() {
            return None;
        }
        let mut arguments: Arguments = serde_json::from_slice(line).ok()?;
        let name = arguments.remove("op")?;
        let (_, errand) = self.errands.iter().find(|(known, _)| name == *known)?;
        Some((Arc::clone(errand), arguments))
    }

    /// Whether the line is an operation that takes the connection over, and how
    /// it went then.
    pub(crate) fn adopt(&mut self, line: &[u8], stream: &UnixStream) -> Option<Result<(), String>> {
        if self.adoptions.is_empty() {
            return None;
        }
        let mut arguments: Arguments = serde_json::from_slice(line).ok()?;
        let name = arguments.remove("op")?;
        let (_, adoption) = self
            .adoptions
            .iter_mut()
            .find(|(known, _)| name == *known)?;
        Some(match stream.try_clone() {
            Ok(stream) => adoption(&arguments, stream),
            Err(e) => Err(e.to_string()),
        })
    }

    /// The answer to one line, without its line end.
    pub(crate) fn answer(&mut self, line: &[u8]) -> String {
        object_of(
            self.call(line)
                .map_err(|error| vec![("error", json!(error))]),
        )
    }

    /// The text of `/metrics`.
    pub(crate) fn metrics(&mut self) -> String {
        (self.metrics)()
    }

    fn call(&mut self, line: &[u8]) -> Answer {
        let request = match serde_json::from_slice(line) {
            Ok(Value::Object(members)) => members,
            Ok(_) => return Err(r#"not an object: send {"op":"NAME"}"#.to_owned()),
            Err(e) => return Err(format!(r#"not JSON ({e}): send {{"op":"NAME"}}"#)),
        };
        let mut arguments = request;
        let Some(Value::String(name)) = arguments.remove("op") else {
            return Err(format!("op: missing or no string: use {}", self.names()));
        };
        match name.as_str() {
            "version" => {
                only(&arguments, &[])?;
                Ok(self.version.clone())
            }
            "metrics" => {
                only(&arguments, &[])?;
                let mut members = Map::new();
                members.insert("metrics".to_owned(), json!(self.metrics()));
                Ok(members)
            }
            _ => match self.named.iter_mut().find(|(known, _)| *known == name) {
                Some((_, operation)) => operation(&arguments),
                None => Err(format!("unknown op {name:?}: use {}", self.names())),
            },
        }
    }

    fn names(&self) -> String {
        let mut names = vec!["version", "metrics"];
        names.extend(self.named.iter().map(|(name, _)| *name));
        names.extend(self.errands.iter().map(|(name, _)| *name));
        names.extend(self.adoptions.iter().map(|(name, _)| *name));
        let last = names.pop().unwrap_or_default();
        format!("{} or {last}", names.join(", "))
    }
}

fn object_of(answer: Result<Map<String, Value>, Vec<(&str, Value)>>) -> String {
    let mut object = Map::new();
    object.insert("ok".to_owned(), json!(answer.is_ok()));
    match answer {
        Ok(members) => object.extend(members),
        Err(members) => object.extend(members.into_iter().map(|(k, v)| (k.to_owned(), v))),
    }
    Value::Object(object).to_string()
}

/// The answer to an errand's line, without its line end.
pub(crate) fn answer_of(outcome: Outcome) -> String {
    object_of(outcome.map_err(|refused| {
        vec![
            ("error", json!(refused.error)),
            ("mistake", json!(refused.mistake)),
        ]
    }))
}

impl std::fmt::Debug for Operations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Operations").field(&self.names()).finish()
    }
}

/// Refuses arguments other than the known ones, for an operation to begin with.
///
/// # Errors
/// The answer that names the first one.
pub fn only(arguments: &Arguments, known: &[&str]) -> Result<(), String> {
    match arguments.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) if known.is_empty() => Err(format!("{key}: unknown argument: leave it out")),
        Some(key) => Err(format!("{key}: unknown argument: use {}", known.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Operations {
        Operations::new("prog", "1.2", || "# text\n".to_owned()).with("echo", |arguments| {
            arguments
                .get("text")
                .map(|text| Map::from_iter([("text".to_owned(), text.clone())]))
                .ok_or_else(|| "text: missing".to_owned())
        })
    }

    #[test]
    fn answers_are_objects_with_ok_first_to_be_looked_at() {
        for (line, want) in [
            (
                r#"{"op":"version"}"#,
                json!({"ok":true,"program":"prog","version":"1.2"}),
            ),
            (
                r#"{"op":"metrics"}"#,
                json!({"ok":true,"metrics":"# text\n"}),
            ),
            (r#"{"op":"echo","text":[1]}"#, json!({"ok":true,"text":[1]})),
            (
                r#"{"op":"echo"}"#,
                json!({"ok":false,"error":"text: missing"}),
            ),
            (
                r#"{"op":"fly"}"#,
                json!({"ok":false,"error":"unknown op \"fly\": use version, metrics or echo"}),
            ),
            (
                r#"{"op":7}"#,
                json!({"ok":false,"error":"op: missing or no string: use version, metrics or echo"}),
            ),
            (
                r#"{"op":"version","x":1}"#,
                json!({"ok":false,"error":"x: unknown argument: leave it out"}),
            ),
            (
                "[]",
                json!({"ok":false,"error":"not an object: send {\"op\":\"NAME\"}"}),
            ),
        ] {
            let answer = table().answer(line.as_bytes());
            assert_eq!(serde_json::from_str::<Value>(&answer).unwrap(), want);
            assert!(!answer.contains('\n'));
        }
    }

    #[test]
    fn what_goes_around_an_operation_may_answer_for_it() {
        let around = |refuse: bool| {
            let table = table().around(&["echo"], move |operation| {
                if refuse {
                    Err("not now".to_owned())
                } else {
                    operation()
                }
            });
            let answer = { table }.answer(br#"{"op":"echo","text":1}"#);
            serde_json::from_str::<Value>(&answer).unwrap()
        };
        assert_eq!(around(false), json!({"ok":true,"text":1}));
        assert_eq!(around(true), json!({"ok":false,"error":"not now"}));
    }

    #[test]
    fn noise_and_depth_are_errors() {
        let deep = "[".repeat(10_000);
        for line in [&b"\xff\xfe"[..], b"{", b"", deep.as_bytes()] {
            let answer = table().answer(line);
            assert!(answer.contains("not JSON"), "{answer}");
        }
    }
}
