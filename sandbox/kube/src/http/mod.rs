//! The server: connections, who may speak, and what each request is for.
//!
//! Called by `pericarp node serve`. Every client shows a certificate of ours before it may say
//! anything; from then on it may do everything, since whoever may make pods on a node may do
//! everything there. What comes over the network is bounded all the same: connections, heads, bodies
//! and the time for each.

mod body;
mod discovery;
mod limits;
mod protobuf;
mod query;
mod route;
mod select;
mod sweep;
mod verbs;
mod watch;

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use hyper::{
    Method, Request,
    body::Incoming,
    header::{ACCEPT, CONTENT_TYPE, HeaderValue, USER_AGENT},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::{
    net::unix::pipe,
    runtime::Builder,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

pub(crate) use self::{
    body::{Answer, Body, answer},
    query::Query,
};
use self::{
    route::Route,
    verbs::{Asked, Shown},
};
use crate::{
    certificates::{CertificateError, Certificates},
    failure::Failure,
    node::Node,
    patch::Form,
    store::{Kind, Store, StoreError},
    streams,
};

/// The namespace of objects that name none.
const DEFAULT_NAMESPACE: &str = "default";
/// In which some commands send what they create.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
/// So many clients at once; a watch and an exec have one each.
const CONNECTIONS: usize = 1024;
/// One of these. A stream that began as a request has its connection's until it ends.
pub(crate) type Place = Arc<OwnedSemaphorePermit>;
/// For the first words of TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// For the head of a request. A connection on which nothing is asked ends after it, too.
const HEAD: Duration = Duration::from_secs(90);
/// The largest head: kubectl puts whole commands into it.
const HEAD_SIZE: usize = 128 << 10;

/// Why the server does not run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The address cannot be listened at.
    #[error("{address} cannot be listened at")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Threads or timers cannot be had.
    #[error("the server cannot be started")]
    Start(#[source] io::Error),
    /// What is kept cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are no certificates to show.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
}

/// What the server serves.
#[derive(Debug)]
pub struct Settings {
    /// The objects.
    pub store: Store,
    /// Who runs the pods.
    pub node: Node,
    /// This node's name.
    pub node_name: String,
    /// Handlers whose pods have machines of their own.
    pub machines: Vec<String>,
    /// Whom to show and whom to let in.
    pub certificates: Certificates,
}

/// What requests are answered with.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) node_name: String,
    pub(crate) node: Node,
    pub(crate) machines: Vec<String>,
}

/// A server that listens already, so that its address is known.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    settings: Settings,
}

impl Server {
    /// Listens, and makes what has to be there before the first client comes.
    ///
    /// # Errors
    /// When the address is taken; when the store cannot be written.
    pub fn bind(address: SocketAddr, settings: Settings) -> Result<Self, ServeError> {
        let listen = || {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|source| ServeError::Listen { address, source })?;
        if settings
            .store
            .get(Kind::Namespace, "", DEFAULT_NAMESPACE)
            .is_none()
        {
            let namespace = json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": DEFAULT_NAMESPACE,
                    "labels": {"kubernetes.io/metadata.name": DEFAULT_NAMESPACE},
                },
                "spec": {},
                "status": {"phase": "Active"},
            });
            settings.store.create(Kind::Namespace, namespace)?;
        }
        Ok(Self { listener, settings })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the other end of `stop` is closed. Pods go on after it.
    ///
    /// # Errors
    /// When threads or certificates cannot be had.
    pub fn run(self, stop: io::PipeReader) -> Result<(), ServeError> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("api")
            .enable_io()
            .enable_time()
            .build()
            .map_err(ServeError::Start)?;
        let acceptor = TlsAcceptor::from(self.settings.certificates.server()?);
        let api = Arc::new(Api {
            store: self.settings.store,
            node_name: self.settings.node_name,
            node: self.settings.node,
            machines: self.settings.machines,
        });
        let certificates = self.settings.certificates;
        let listener = self.listener;
        let served = runtime.block_on(async {
            let listener =
                tokio::net::TcpListener::from_std(listener).map_err(ServeError::Start)?;
            tokio::spawn(sweep::sweep(Arc::clone(&api)));
            tokio::spawn(certificates.renew());
            let stop = pipe::Receiver::from_owned_fd(stop.into()).map_err(ServeError::Start)?;
            tokio::select! {
                () = accept(listener, acceptor, api) => {}
                _ = stop.readable() => {}
            }
            Ok(())
        });
        // Watches and streams would be waited for for ever; they end with their threads.
        runtime.shutdown_timeout(Duration::from_secs(2));
        served
    }
}

async fn accept(listener: tokio::net::TcpListener, acceptor: TlsAcceptor, api: Arc<Api>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Such as too many open files, which takes a moment to pass.
                log::warn!("a connection cannot be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, api) = (acceptor.clone(), Arc::clone(&api));
        let place: Place = Arc::new(place);
        tokio::spawn(async move {
            limits::vanished_peers(&stream);
            // Who shows no certificate of ours is told so by TLS, and by nothing else.
            if let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await {
                let of_streams = Arc::clone(&place);
                let service = service_fn(move |mut request: Request<Incoming>| {
                    request.extensions_mut().insert(Arc::clone(&of_streams));
                    respond(Arc::clone(&api), request)
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD)
                    .max_buf_size(HEAD_SIZE)
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                if let Err(error) = connection.await {
                    log::debug!("a connection ended: {error}");
                }
            }
            drop(place);
        });
    }
}

async fn respond(api: Arc<Api>, request: Request<Incoming>) -> Result<Answer, Infallible> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let answer = route(api, request).await.unwrap_or_else(|failure| {
        log::debug!("{method} {path}: {}", failure.message());
        body::refusal(&failure)
    });
    Ok(answer)
}

/// Finds out what is asked and asks who knows.
async fn route(api: Arc<Api>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let route = Route::of(request.uri().path())?;
    let query = Query::parse(request.uri().query().unwrap_or_default())?;
    let accept = header(&request, &ACCEPT);
    let is_get = request.method() == Method::GET;
    match route {
        Route::Health if is_get => Ok(answer(200, "text/plain", Body::Whole(Some("ok".into())))),
        Route::About(path) if is_get && path == "openapi/v2" => {
            let body = Body::Whole(Some(discovery::OPENAPI_V2.into()));
            Ok(answer(200, discovery::OPENAPI_V2_TYPE, body))
        }
        Route::About(path) if is_get => {
            let found = discovery::about(&path).ok_or_else(Failure::no_such_address)?;
            Ok(body::json(200, &found))
        }
        Route::Health | Route::About(_) => Err(Failure::method_not_allowed("it can only be read")),
        Route::Part(namespace, pod, part) => {
            streams::part(api, request, query, (namespace, pod, part)).await
        }
        Route::Collection(kind, namespace) => {
            let asked = Asked {
                kind,
                namespace: namespace.clone().unwrap_or_default(),
                shown: Shown::of(&accept)?,
                query,
            };
            match *request.method() {
                Method::GET if asked.query.flag("watch")? => watch::watch(&api, asked, namespace),
                Method::GET => verbs::list(&api, &asked, namespace.as_deref()),
                Method::POST => {
                    let asked = asked.by(&header(&request, &USER_AGENT));
                    if kind.namespaced() && namespace.is_none() {
                        let why = "a new object goes to the address of its namespace";
                        return Err(Failure::method_not_allowed(why));
                    }
                    let as_protobuf = media_type(&request) == PROTOBUF;
                    let body = match as_protobuf {
                        true => body::read(request.into_body()).await?,
                        false => body_of(request).await?,
                    };
                    write(api, asked, move |api, asked| {
                        let object = match as_protobuf {
                            true => protobuf::read(asked.kind, &body)?,
                            false => verbs::parse(&body)?,
                        };
                        api.create(asked, object)
                    })
                    .await
                }
                Method::DELETE => {
                    let body = body_of(request).await?;
                    write(api, asked, move |api, asked| {
                        api.delete_all(asked, namespace.as_deref(), &body)
                    })
                    .await
                }
                _ => Err(Failure::method_not_allowed(
                    "a list can be read, added to and deleted",
                )),
            }
        }
        Route::Object(kind, namespace, name) => {
            let asked = Asked {
                kind,
                namespace,
                shown: Shown::of(&accept)?,
                query,
            };
            match *request.method() {
                Method::GET => verbs::get(&api, &asked, &name),
                Method::PUT => {
                    let body = body_of(request).await?;
                    write(api, asked, move |api, asked| {
                        api.replace(asked, &name, &body)
                    })
                    .await
                }
                Method::PATCH => {
                    let form = Form::of(&media_type(&request))?;
                    let body = body::read(request.into_body()).await?;
                    write(api, asked, move |api, asked| {
                        api.patch(asked, &name, form, &body)
                    })
                    .await
                }
                Method::DELETE => {
                    let body = body_of(request).await?;
                    write(api, asked, move |api, asked| {
                        api.delete(asked, &name, &body)
                    })
                    .await
                }
                _ => Err(Failure::method_not_allowed(
                    "an object can be read, replaced, patched and deleted",
                )),
            }
        }
    }
}

/// Changes something, on a thread that may wait for the disk.
async fn write(
    api: Arc<Api>,
    asked: Asked,
    change: impl FnOnce(&Api, &Asked) -> Result<(u16, Value, Vec<String>), Failure> + Send + 'static,
) -> Result<Answer, Failure> {
    let done = tokio::task::spawn_blocking(move || {
        let (status, object, warnings) = change(&api, &asked)?;
        // What was deleted may be answered as a Status, which has no row.
        let shown = match object["kind"] == asked.kind.name() {
            true => asked.shown.one(asked.kind, &object, &asked.query),
            false => object,
        };
        Ok::<_, Failure>((status, shown, warnings))
    });
    let done = done
        .await
        .map_err(|_| Failure::internal("the request failed"))?;
    let (status, object, warnings) = done?;
    let mut answer = body::json(status, &object);
    for warning in warnings {
        let text = warning.replace('\\', "\\\\").replace('"', "\\\"");
        let text = format!("299 - \"{text}\"");
        if let Ok(value) = HeaderValue::from_str(&text) {
            answer.headers_mut().append("warning", value);
        }
    }
    Ok(answer)
}

fn header(request: &Request<Incoming>, name: &hyper::header::HeaderName) -> String {
    let value = request.headers().get(name).map(|value| value.to_str());
    value.and_then(Result::ok).unwrap_or_default().to_owned()
}

fn media_type(request: &Request<Incoming>) -> String {
    let value = header(request, &CONTENT_TYPE);
    let value = value.split(';').next().unwrap_or_default();
    value.trim().to_ascii_lowercase()
}

/// The body of a request that is JSON, as kubectl's are.
async fn body_of(request: Request<Incoming>) -> Result<bytes::Bytes, Failure> {
    let media_type = media_type(&request);
    // Old clients do not say it.
    if !["", "application/json"].contains(&media_type.as_str()) {
        return Err(Failure::media_type(format!(
            "the body has to be application/json, and not \"{}\"",
            media_type.escape_debug()
        )));
    }
    body::read(request.into_body()).await
}
