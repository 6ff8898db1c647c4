//! What is read from and written to a running container: logs, exec, attach, ports.
//!
//! Called by `http`. containerd has a server for streams of its own on this machine; a client that
//! speaks SPDY is joined to it byte by byte (`joined`). A WebSocket with a container's streams is
//! translated (`attached`). Ports of a pod that has a machine are forwarded here (`ports`).

mod attached;
mod frames;
mod headers;
mod joined;
mod logs;
mod ports;
mod spdy;
mod upstream;
mod websocket;

use std::{net::IpAddr, sync::Arc};

use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONNECTION, HeaderValue, UPGRADE},
    upgrade::OnUpgrade,
};
use serde_json::Value;

use crate::{
    cri::{Client, Streams},
    failure::Failure,
    http::{Answer, Api, Body, Place, Query},
    node::Node,
    objects::name_of,
    store::Kind,
};

/// How the client wants to go on after HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Spdy,
    WebSocket,
}

/// A request for a part of a pod.
pub(crate) async fn part(
    api: Arc<Api>,
    request: Request<Incoming>,
    query: Query,
    (namespace, name, part): (String, String, String),
) -> Result<Answer, Failure> {
    if part == "ephemeralcontainers" {
        let message = "ephemeral containers are not supported here; use `kubectl exec`";
        return Err(Failure::method_not_allowed(message));
    }
    if !["log", "exec", "attach", "portforward"].contains(&part.as_str()) {
        return Err(Failure::no_such_address());
    }
    let pod = api.store.get(Kind::Pod, &namespace, &name);
    let pod = pod.ok_or_else(|| Failure::not_found(Kind::Pod, &name))?;
    if part == "log" {
        return match *request.method() {
            Method::GET => logs::answer_log(&api, &pod, &query).await,
            _ => Err(Failure::method_not_allowed("a log can only be read")),
        };
    }
    if ![Method::GET, Method::POST].contains(request.method()) {
        return Err(Failure::method_not_allowed(
            "streams begin with GET or POST",
        ));
    }
    let protocol = protocol(request.headers())?;
    if part == "portforward"
        && let Some(address) = machine(&api, &pod)?
    {
        return match protocol {
            Protocol::Spdy => joined::serve(request, address),
            Protocol::WebSocket => joined::serve_tunnel(request, address),
        };
    }
    let url = match part.as_str() {
        "portforward" => ports_of(&api, &pod).await?,
        part => container(&api, &pod, &query, part == "exec").await?,
    };
    match (protocol, part.as_str()) {
        (Protocol::Spdy, _) => joined::join(request, &url).await,
        (Protocol::WebSocket, "portforward") => joined::tunnel(request, &url).await,
        (Protocol::WebSocket, _) => attached::attach(request, &url, &Wanted::of(&query)?).await,
    }
}

/// What a client wants of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Wanted {
    fn of(query: &Query) -> Result<Self, Failure> {
        let tty = query.flag("tty")?;
        let wanted = Self {
            stdin: query.flag("stdin")?,
            stdout: query.flag("stdout")?,
            // A terminal has one output.
            stderr: query.flag("stderr")? && !tty,
            tty,
        };
        match wanted.stdin || wanted.stdout || wanted.stderr {
            true => Ok(wanted),
            false => Err(Failure::bad_request(
                "you must specify at least 1 of stdin, stdout, stderr",
            )),
        }
    }
}

fn protocol(headers: &HeaderMap) -> Result<Protocol, Failure> {
    let has = |name, word: &str| {
        let values = headers.get_all(name).iter();
        let mut words = values.filter_map(|value: &HeaderValue| value.to_str().ok());
        words.any(|value| {
            value
                .split(',')
                .any(|one| one.trim().eq_ignore_ascii_case(word))
        })
    };
    match (
        has(CONNECTION, "upgrade"),
        has(UPGRADE, "SPDY/3.1"),
        has(UPGRADE, "websocket"),
    ) {
        (true, true, _) => Ok(Protocol::Spdy),
        (true, _, true) => Ok(Protocol::WebSocket),
        _ => Err(Failure::bad_request(
            "Upgrade request required: streams need SPDY/3.1 or a WebSocket",
        )),
    }
}

/// The container that is meant: the only one, if none is named.
fn container_of(pod: &Value, query: &Query) -> Result<String, Failure> {
    let names: Vec<&str> = ["initContainers", "containers"]
        .iter()
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
        .filter_map(|container| container["name"].as_str())
        .collect();
    let list = || names.join(", ");
    let pod = name_of(pod);
    match (query.get("container"), &names[..]) {
        (Some(name), _) if names.contains(&name) => Ok(name.to_owned()),
        (Some(name), _) => Err(Failure::bad_request(format!(
            "container \"{}\" is not valid for pod {pod}; it has {}",
            name.escape_debug(),
            list()
        ))),
        (None, [name]) => Ok((*name).to_owned()),
        (None, _) => Err(Failure::bad_request(format!(
            "a container name must be specified for pod {pod}, choose one of: [{}]",
            list()
        ))),
    }
}

/// Asks containerd for something, on a thread that may wait.
async fn ask<T: Send + 'static>(
    api: &Arc<Api>,
    question: impl FnOnce(&Client) -> Result<T, crate::cri::CallError> + Send + 'static,
) -> Result<T, Failure> {
    let api = Arc::clone(api);
    let asked = tokio::task::spawn_blocking(move || question(api.node.client()));
    let answered = asked
        .await
        .map_err(|_| Failure::internal("the request failed"))?;
    answered.map_err(|error| Failure::internal(format!("containerd: {error}")))
}

/// What the node knows of a pod. It may ask containerd, on a thread that may wait for that.
async fn of_node<T: Send + 'static>(
    api: &Arc<Api>,
    question: impl FnOnce(&Node) -> T + Send + 'static,
) -> Result<T, Failure> {
    let api = Arc::clone(api);
    let asked = tokio::task::spawn_blocking(move || question(&api.node));
    asked
        .await
        .map_err(|_| Failure::internal("the request failed"))
}

/// Where containerd streams a container's standard streams.
async fn container(
    api: &Arc<Api>,
    pod: &Value,
    query: &Query,
    is_exec: bool,
) -> Result<String, Failure> {
    let wanted = Wanted::of(query)?;
    let name = container_of(pod, query)?;
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let id = of_node(api, {
        let (namespace, pod, name) = (namespace.to_owned(), name_of(pod), name.clone());
        move |node| node.container_id(&namespace, &pod, &name)
    });
    let Some(id) = id.await? else {
        let pod = name_of(pod);
        return Err(Failure::bad_request(format!(
            "container \"{name}\" of pod \"{pod}\" is not running"
        )));
    };
    let streams = Streams {
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        tty: wanted.tty,
    };
    if !is_exec {
        return ask(api, move |client| client.attach(&id, streams)).await;
    }
    let command = query.all("command").into_iter().map(str::to_owned);
    let command: Vec<String> = command.collect();
    if command.is_empty() {
        return Err(Failure::bad_request("you must specify a command"));
    }
    ask(api, move |client| client.exec(&id, &command, streams)).await
}

/// The address of a pod that has a machine of its own.
fn machine(api: &Api, pod: &Value) -> Result<Option<IpAddr>, Failure> {
    let class = pod["spec"]["runtimeClassName"].as_str();
    let class = class.and_then(|class| api.store.get(Kind::RuntimeClass, "", class));
    let handler = class.as_ref().and_then(|class| class["handler"].as_str());
    if !handler.is_some_and(|handler| api.machines.iter().any(|one| one == handler)) {
        return Ok(None);
    }
    let address = pod["status"]["podIP"].as_str();
    let address = address.and_then(|address| address.parse().ok());
    match address {
        Some(address) => Ok(Some(address)),
        None => Err(Failure::bad_request(format!(
            "pod \"{}\" has no address yet",
            name_of(pod)
        ))),
    }
}

/// Where containerd streams a pod's ports.
async fn ports_of(api: &Arc<Api>, pod: &Value) -> Result<String, Failure> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let name = name_of(pod);
    let id = of_node(api, {
        let (namespace, name) = (namespace.to_owned(), name.clone());
        move |node| node.sandbox_id(&namespace, &name)
    });
    let Some(id) = id.await? else {
        return Err(Failure::bad_request(format!(
            "pod \"{name}\" is not running"
        )));
    };
    ask(api, move |client| client.port_forward(&id, &[])).await
}

/// The answer after which a connection is not HTTP's any more.
fn switching(headers: &[(&'static str, String)]) -> Answer {
    let mut answer = Response::new(Body::Whole(None));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            answer.headers_mut().append(*name, value);
        }
    }
    answer
}

/// What becomes of the connection after the answer, and its place among all, which it has until it
/// ends.
fn upgraded(request: &mut Request<Incoming>) -> (OnUpgrade, Option<Place>) {
    let place = request.extensions_mut().remove();
    (hyper::upgrade::on(request), place)
}
