//! Watches: what changes of the objects a client is interested in, as lines, while it listens.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc::Sender,
    time::{Instant, timeout_at},
};

use super::{
    Api,
    body::{Answer, Body, answer},
    select::Selector,
    verbs::{Asked, Shown, include, metadata_of},
};
use crate::{
    failure::Failure,
    store::{Change, Watch, What},
    table,
};

/// When a client says no time, it has to come again after this one.
const USUAL: Duration = Duration::from_secs(45 * 60);
/// A client is told the version it has seen this often, so that it can come again with it.
const BOOKMARK: Duration = Duration::from_secs(60);

/// A client that listens.
struct Listener {
    asked: Asked,
    namespace: Option<String>,
    selector: Selector,
    /// A table's columns are sent once.
    with_columns: bool,
    sender: Sender<Bytes>,
}

/// GET of a collection with `watch`.
pub(crate) fn watch(
    api: &Arc<Api>,
    asked: Asked,
    namespace: Option<String>,
) -> Result<Answer, Failure> {
    let selector = Selector::of(asked.kind, &asked.query)?;
    if asked.query.flag("sendInitialEvents")? {
        // Clients that ask for it list instead when it is refused in this way.
        return Err(Failure::unprocessable(
            "sendInitialEvents: is not supported here",
        ));
    }
    let (initial, version) = match asked.query.get("resourceVersion") {
        None | Some("0") => {
            let (all, version) = api.store.list(asked.kind, namespace.as_deref());
            (all, version)
        }
        Some(text) => {
            let version = text.parse();
            let bad = |_| Failure::bad_request("resourceVersion: is no version of ours");
            (Vec::new(), version.map_err(bad)?)
        }
    };
    let changes = api.store.watch(asked.kind, version)?;
    let time = asked
        .query
        .number("timeoutSeconds")?
        .map(Duration::from_secs);
    let end = Instant::now() + time.unwrap_or(USUAL).min(USUAL);
    let bookmarks = asked.query.flag("allowWatchBookmarks")?;
    let (sender, body) = Body::pieces();
    let mut listener = Listener {
        asked,
        namespace,
        selector,
        with_columns: true,
        sender,
    };
    tokio::spawn(async move {
        for object in initial {
            if listener.selector.matches(&object) && listener.say("ADDED", &object).await.is_none()
            {
                return;
            }
        }
        listener.listen(changes, end, bookmarks).await;
    });
    Ok(answer(200, "application/json", body))
}

impl Listener {
    async fn listen(&mut self, mut changes: Watch, end: Instant, bookmarks: bool) {
        let mut bookmark = Instant::now() + BOOKMARK;
        loop {
            let until = if bookmarks { bookmark.min(end) } else { end };
            let change = tokio::select! {
                change = timeout_at(until, changes.changed()) => change,
                () = self.sender.closed() => return,
            };
            let told = match change {
                Ok(Ok(change)) => self.tell(&change).await,
                Ok(Err(error)) => {
                    let status = Failure::from(error).status();
                    self.send("ERROR", &status).await;
                    return;
                }
                Err(_) if Instant::now() >= end => return,
                Err(_) => {
                    bookmark = Instant::now() + BOOKMARK;
                    let version = changes.version().to_string();
                    let object = json!({
                        "kind": self.asked.kind.name(),
                        "apiVersion": self.asked.kind.api_version(),
                        "metadata": {"resourceVersion": version},
                    });
                    self.say("BOOKMARK", &object).await
                }
            };
            if told.is_none() {
                return;
            }
        }
    }

    /// Says what happened, as far as this client sees it: what does not match any more is gone, for
    /// who asked for what matches. `None` when the client has gone.
    async fn tell(&mut self, change: &Change) -> Option<()> {
        let own = |object: &Value| {
            let namespace = object["metadata"]["namespace"].as_str();
            let inside = self.namespace.is_none() || namespace == self.namespace.as_deref();
            inside && self.selector.matches(object)
        };
        let before = change.before.as_ref().is_some_and(|before| own(before));
        let now = change.what != What::Deleted && own(&change.object);
        let word = match (before, now) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return Some(()),
        };
        self.say(word, &change.object).await
    }

    async fn say(&mut self, word: &str, object: &Value) -> Option<()> {
        let object = self.shown(object);
        self.send(word, &object).await
    }

    fn shown(&mut self, object: &Value) -> Value {
        let kind = self.asked.kind;
        match self.asked.shown {
            Shown::Object => object.clone(),
            Shown::Metadata => metadata_of(object),
            Shown::Table => {
                let version = object["metadata"]["resourceVersion"].as_str();
                let version = version.unwrap_or_default();
                let include = include(&self.asked.query);
                let one = std::iter::once(object);
                let with_columns = std::mem::take(&mut self.with_columns);
                table::of(kind, one, version, include, with_columns)
            }
        }
    }

    async fn send(&self, word: &str, object: &Value) -> Option<()> {
        let mut line = json!({"type": word, "object": object}).to_string();
        line.push('\n');
        self.sender.send(Bytes::from(line)).await.ok()
    }
}
