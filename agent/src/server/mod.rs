//! The node's own API on port 10250: logs, exec, attach, port-forward, pods, metrics and health.
//!
//! In: TLS connections whose client certificate the cluster's CA has signed (in practice the API server's). Out: answers
//! built from what [`Host`] tells of the pods on this node. It never changes a pod and keeps no state of its own: everything
//! it knows of pods comes through [`Host`], which the pod machinery implements.

use std::{os::fd::OwnedFd, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;
use serde_json::Value;
use tokio::sync::{mpsc, watch};

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
    fn pods(&self) -> Vec<Arc<Value>>;

    /// Where a container's log is; `previous` asks for the instance before the current one. Containers that have not started
    /// yet answer [`HostError::BadRequest`] with upstream's text (`container "c" in pod "p" is waiting to start: REASON`).
    fn log_source(&self, pod: &PodRef, container: &str, previous: bool) -> Result<LogSource, HostError>;

    /// Starts a command in a running container.
    fn exec(&self, request: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>>;

    /// Joins a running container's streams.
    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>>;

    /// Where the pod's ports are.
    fn network_namespace(&self, pod: &PodRef) -> Result<NetNs, HostError>;

    /// The Summary object of /stats/summary.
    fn stats(&self) -> BoxFuture<'_, Value> {
        Box::pin(async { serde_json::json!({ "node": {}, "pods": [] }) })
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
