//! The node's own API on port 10250: logs, exec, attach, port-forward, pods, metrics and health.
//!
//! In: TLS connections with a client certificate the cluster's CA has signed, or with a bearer token. Out: answers
//! built from what [`Host`] tells of the pods on this node. It never changes a pod and keeps no state of its own: everything
//! it knows of pods comes through [`Host`], which the pod machinery implements.

mod access;
pub(crate) mod exposition;
pub(crate) mod health;
mod http;
mod kube;
mod logs;
mod netns;
mod portforward;
mod remote;
mod stream;
mod summary;
mod syslogs;
#[cfg(test)]
mod tests;
mod tls;

use std::{convert::Infallible, net::SocketAddr, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use ::http::Request;
use futures::future::BoxFuture;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub(crate) use self::http::{accept_forward, accept_remote, read_all};
pub use self::{
    kube::summary as pod_summary,
    netns::{Error as NetNsError, connect_loopback},
    tls::Error as TlsError,
    tls::Identity,
};
use crate::accept;

/// A pod as a client names it. Static pods are found by their name with the node's suffix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID, when the client gave one; it then has to match (for static pods either UID does).
    pub uid: Option<String>,
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}", self.name, self.namespace)
    }
}

/// Why the pod machinery cannot do what a client asked; the text goes to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// No such pod or container on this node (404).
    #[error("{0}")]
    NotFound(String),
    /// The request does not fit the pod's state or spec, such as the logs of a container that waits to start (400).
    #[error("{0}")]
    BadRequest(String),
    /// Anything else (500).
    #[error("{0}")]
    Internal(String),
}

/// Where the log of one container instance is.
#[derive(Debug, Clone)]
pub struct LogSource {
    /// The CRI log file being written (`/var/log/pods/NS_NAME_UID/CONTAINER/N.log`). Rotated files lie beside it.
    pub path: PathBuf,
    /// Becomes true when the container has ended and its last output is in the file; a dropped sender means the same.
    pub ended: watch::Receiver<bool>,
}

/// A command to run in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Pod.
    pub pod: PodRef,
    /// Container name.
    pub container: String,
    /// Command and arguments, never empty.
    pub command: Vec<String>,
    /// Which streams the client wants.
    pub stdio: Stdio,
}

/// A wish to join a running container's own streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// Pod.
    pub pod: PodRef,
    /// Container name.
    pub container: String,
    /// Which streams the client wants.
    pub stdio: Stdio,
}

/// The streams of an exec or attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stdio {
    /// Client sends input.
    pub stdin: bool,
    /// Client wants output.
    pub stdout: bool,
    /// Client wants the error stream; never together with `tty`.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The client's side of a process's streams. The descriptors are pipe ends or duplicates of a pty's master (with a terminal
/// `stdin` and `stdout` are two duplicates of it); the server makes them non-blocking. Closing `stdin` is end of input;
/// `stdout`/`stderr` end by end-of-file (EIO on a pty) when the last writer is gone.
pub struct Session {
    /// Write end of the input, when asked for.
    pub stdin: Option<OwnedFd>,
    /// Read end of the output, when asked for.
    pub stdout: Option<OwnedFd>,
    /// Read end of the error stream, when asked for.
    pub stderr: Option<OwnedFd>,
    /// New terminal sizes go here; the receiver may be dropped when there is no terminal.
    pub resize: mpsc::Sender<TerminalSize>,
    /// Resolves with the exit code when the process (for attach: the container) ends. Dropped early when the client has gone:
    /// an exec'ed process is then to be killed, a container is not.
    pub exit: BoxFuture<'static, Result<i32, HostError>>,
}

/// The network namespace a pod's ports are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetNs {
    /// The host's (hostNetwork pods).
    Host,
    /// A pinned namespace.
    Path(PathBuf),
}

/// What the server needs of the pod machinery.
pub trait Host: Send + Sync + 'static {
    /// Every pod of this node as a complete v1 Pod with its current status.
    fn pods(&self) -> Vec<Arc<Value>> {
        Vec::new()
    }

    /// One of them.
    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let named = |p: &Arc<Value>| p["metadata"]["namespace"] == namespace && p["metadata"]["name"] == name;
        self.pods().into_iter().find(named)
    }

    /// Where a container's log is; `previous` asks for the instance before the current one. Containers that have not started
    /// yet answer [`HostError::BadRequest`] with upstream's text (`container "c" in pod "p" is waiting to start: REASON`).
    fn log_source(&self, _pod: &PodRef, container: &str, _previous: bool) -> Result<LogSource, HostError> {
        Err(HostError::NotFound(format!("container {container:?} has no log here")))
    }

    /// Starts a command in a running container.
    fn exec(&self, request: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>>;

    /// Joins a running container's streams.
    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>>;

    /// Where the pod's ports are.
    fn network_namespace(&self, pod: &PodRef) -> Result<NetNs, HostError> {
        Err(HostError::NotFound(format!("pod {pod} not found")))
    }

    /// Whose bearer token this is; `None` when it is nobody's. An error is why nobody can tell.
    fn authenticate<'a>(&'a self, _token: &'a str) -> BoxFuture<'a, Result<Option<Identity>, String>> {
        Box::pin(async { Ok(None) })
    }

    /// Whether `who` may do `verb` (`get`, `create`, ...) on a subresource of this node.
    fn allowed<'a>(
        &'a self,
        _who: &'a Identity,
        _verb: &'a str,
        _subresource: &'a str,
    ) -> BoxFuture<'a, Result<bool, String>> {
        Box::pin(async { Ok(false) })
    }

    /// Whether logs, exec, attach, port-forward and run are served at all.
    fn debugging(&self) -> bool {
        true
    }

    /// Whether callers without credentials are let in as `system:anonymous`.
    fn anonymous(&self) -> bool {
        false
    }

    /// The Summary object of /stats/summary; `brief` is cpu and memory only.
    fn stats(&self, _brief: bool) -> BoxFuture<'_, Value> {
        Box::pin(async { serde_json::json!({ "node": {}, "pods": [] }) })
    }

    /// Pods with a container that runs.
    fn running_pods(&self) -> Vec<Arc<Value>> {
        self.pods()
    }

    /// This machine as a Node.
    fn node(&self) -> Value {
        serde_json::json!({})
    }

    /// What was told last, newest at the end, as Events.
    fn events(&self) -> Vec<Value> {
        Vec::new()
    }

    /// The directory of /logs, and whether services can be asked for by name; `None` when it is not served.
    fn system_logs(&self) -> Option<(PathBuf, bool)> {
        None
    }

    /// The text of /metrics.
    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async { String::new() })
    }

    /// Counts a request, by the first part of its path.
    fn asked(&self, _method: &str, _path: &str) {}

    /// Counts an upgrade to WebSocket.
    fn websocket(&self, _subresource: &str) {}

    /// Counts an answered request, by the first part of its path; also one whose client has gone.
    fn answered(&self, _method: &str, _path: &str, _took: Duration) {}

    /// The text of /metrics/cadvisor.
    fn cadvisor(&self) -> BoxFuture<'_, String> {
        Box::pin(async { String::new() })
    }

    /// The text of /metrics/probes.
    fn probes(&self) -> String {
        String::new()
    }

    /// The effective configuration as a KubeletConfiguration, for /configz.
    fn configuration(&self) -> Value {
        serde_json::json!({})
    }

    /// `Err` with the reason when the node machinery is not well, for /healthz.
    fn healthy(&self) -> Result<(), String> {
        Ok(())
    }
}

/// How the server runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens, usually port 10250 of all addresses.
    pub bind: SocketAddr,
    /// Its certificate (PEM).
    pub cert: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// The CA of its clients (PEM).
    pub client_ca: PathBuf,
    /// No version before TLS 1.3.
    pub only_tls13: bool,
    /// Cipher suites by their IANA names; empty is the library's choice.
    pub cipher_suites: Vec<String>,
}

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certificates.
    #[error("TLS of the node server")]
    Tls(#[from] TlsError),
    /// The address.
    #[error("listen on {address}: {source}")]
    Bind {
        /// What was tried.
        address: SocketAddr,
        /// Cause.
        source: std::io::Error,
    },
}

/// How long connections may take to finish after the stop.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a client may take for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A server that has its port but does not answer yet.
pub struct Bound {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Bound {
    /// Takes the port and reads the certificates.
    pub async fn new(config: &Config) -> Result<Self, Error> {
        let tls = tls::server_config(config)?;
        let listener =
            TcpListener::bind(config.bind).await.map_err(|source| Error::Bind { address: config.bind, source })?;
        Ok(Self { listener, acceptor: TlsAcceptor::from(tls) })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stop`, then gives connections a moment to finish.
    pub async fn serve(self, host: Arc<dyn Host>, stop: CancellationToken) {
        let server = http::Server { host };
        let answer = |stream| connection(server.clone(), self.acceptor.clone(), stream, stop.clone());
        let mut open = accept::connections(|| self.listener.accept(), &stop, answer).await;
        let drained = async { while open.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::debug!("connections were still open at the stop");
        }
    }
}

async fn connection(server: http::Server, acceptor: TlsAcceptor, stream: TcpStream, stop: CancellationToken) {
    // Small answers must not wait for each other; a socket that cannot be told so works all the same.
    let _ = stream.set_nodelay(true);
    let tls = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake");
            return;
        }
        Err(_) => return,
    };
    let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let identity = Arc::new(certificate.and_then(|der| Identity::from_certificate(der)));
    let service = service_fn(move |request: Request<Incoming>| {
        let (server, identity) = (server.clone(), identity.clone());
        async move { Ok::<_, Infallible>(server.handle(Option::as_ref(&identity), request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).max_buf_size(64 << 10);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(250);
    let served = builder.serve_connection_with_upgrades(TokioIo::new(tls), service);
    tokio::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection");
    }
}
