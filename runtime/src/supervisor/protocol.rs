//! The wire protocol between the agent and a pod's supervisor.
//!
//! One `SOCK_SEQPACKET` unix socket per pod at `DIR/supervisor.sock`; one JSON document per packet, file descriptors
//! beside it as `SCM_RIGHTS`. A client sends [`Request`]s and receives one [`Reply`] for each, in order; after
//! [`Op::Subscribe`] the connection also carries [`Message::Event`]s. Large things travel by path: the OCI
//! `config.json` of a container is read from its bundle directory.
//!
//! `DIR` is the pod's run directory. It holds `pod.json` ([`PodConfig`], written by the agent before it executes
//! `isopod-runtime supervise DIR`), `supervisor.sock`, `supervisor.pid`, and per container `containers/ID/` with
//! `status.json` ([`ContainerStatus`], replaced atomically and synced before an exit is reported).

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Version of this protocol. A supervisor answers [`Op::Hello`] with the highest it shares with the caller and sends nothing
/// younger from then on. Fields that one end does not know are passed over, operations it does not know fail alone.
pub const VERSION: u32 = 1;
/// The oldest version still spoken. [`Op::Hello`] and [`Op::Shutdown`] are in every version: what is too old can be ended.
pub const OLDEST: u32 = 1;

/// Whose PID namespace containers get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PidMode {
    /// One namespace per container (the default).
    Container,
    /// One for the pod; the supervisor keeps a minimal reaping PID 1 in it.
    Pod,
    /// The host's.
    Host,
}

/// What a supervisor needs to know of its pod before the first container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodConfig {
    /// Protocol version of the writer.
    pub version: u32,
    /// Pod UID.
    pub uid: String,
    /// Namespace, for messages.
    pub namespace: String,
    /// Name, for messages.
    pub name: String,
    /// Path of a pinned network namespace that the supervisor and so all containers enter; `None` is the host's.
    pub netns: Option<PathBuf>,
    /// Hostname set in a new UTS namespace; `None` keeps the host's namespace.
    pub hostname: Option<String>,
    /// Whether the pod stays in the host's IPC namespace.
    pub host_ipc: bool,
    /// PID namespace mode.
    pub pid: PidMode,
    /// Sysctls written after the namespaces are entered.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// The pod's cgroup, relative to each hierarchy's mount point (`isopod/burstable/podUID`); already created by the
    /// agent. The supervisor puts itself in the child `supervisor` of it.
    pub cgroup: String,
    /// Log rotation: bytes per file, 0 is never.
    pub log_max_size: u64,
    /// Log rotation: files kept.
    pub log_max_files: u32,
}

/// How a container's root file system comes to be. Mounted inside the container's own mount namespace, so nothing
/// shows in the host's mount table and nothing is left when the container ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Rootfs {
    /// A plain directory (`root.path` of config.json).
    Directory,
    /// Overlay: `lower` uppermost first; upper and work directories exist.
    #[serde(rename_all = "camelCase")]
    Overlay {
        /// Read-only layers, uppermost first.
        lower: Vec<PathBuf>,
        /// Writable directory.
        upper: PathBuf,
        /// Work directory on the same file system.
        work: PathBuf,
    },
}

/// A request; `id` is echoed in the reply.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// Chosen by the client.
    pub id: u64,
    /// What to do.
    pub op: Op,
}

/// Terminal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WinSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Operations.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Op {
    /// Agree on a version. Answer: [`Answer::Hello`].
    Hello {
        /// Highest version the client speaks.
        version: u32,
    },
    /// Create a container (namespaces, mounts, cgroup done; process waits). Answer: [`Answer::Created`].
    Create {
        /// Container id (unique within the node).
        container: String,
        /// Directory holding config.json.
        bundle: PathBuf,
        /// Root file system.
        rootfs: Rootfs,
        /// CRI log file; `None` discards output.
        log_path: Option<PathBuf>,
        /// Keep a stdin pipe open for attach (`stdin: true` of the pod spec); else /dev/null.
        stdin: bool,
        /// Close stdin after the first attached client leaves.
        stdin_once: bool,
        /// Id of a running container of this pod whose PID namespace this one joins (an ephemeral container's target).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid_of: Option<String>,
    },
    /// Run the created container's process. Answer: [`Answer::Started`].
    Start {
        /// Container id.
        container: String,
    },
    /// Send a signal. Answer: [`Answer::Done`]; a container that has exited is not an error.
    Kill {
        /// Container id.
        container: String,
        /// Signal number.
        signal: i32,
        /// All processes of the container's cgroup instead of its init.
        all: bool,
    },
    /// Forget an exited (or never started) container and remove its cgroup and state. Idempotent.
    Delete {
        /// Container id.
        container: String,
    },
    /// Run a process in a container. With `process.terminal` the reply carries the pty master as its only descriptor;
    /// otherwise the request carries the process's stdio ends, in order, for those marked. Answer: [`Answer::Started`];
    /// the end is told by [`Event::ExecExited`] on this connection (no subscription needed).
    Exec {
        /// Container id.
        container: String,
        /// Exec id chosen by the client.
        exec: String,
        /// OCI process (`oci_spec::runtime::Process` as JSON).
        process: serde_json::Value,
        /// A descriptor for stdin is passed.
        stdin: bool,
        /// A descriptor for stdout is passed.
        stdout: bool,
        /// A descriptor for stderr is passed.
        stderr: bool,
    },
    /// Signal an exec'ed process.
    KillExec {
        /// Exec id.
        exec: String,
        /// Signal number.
        signal: i32,
    },
    /// Attach to a running container: the request carries the client's ends, in order, for those marked (read end for
    /// stdin, write ends for stdout and stderr). A client that does not drain is detached, never waited for.
    Attach {
        /// Container id.
        container: String,
        /// A descriptor to read stdin from is passed.
        stdin: bool,
        /// A descriptor for stdout is passed.
        stdout: bool,
        /// A descriptor for stderr is passed (not with a terminal).
        stderr: bool,
    },
    /// Resize a container's or an exec's terminal.
    Resize {
        /// Container id or exec id.
        target: String,
        /// New size.
        size: WinSize,
    },
    /// Change resource limits (`oci_spec::runtime::LinuxResources` as JSON).
    Update {
        /// Container id.
        container: String,
        /// New resources.
        resources: serde_json::Value,
    },
    /// Close and reopen the log file (after an outside rotation).
    ReopenLog {
        /// Container id.
        container: String,
    },
    /// All containers. Answer: [`Answer::List`].
    List,
    /// Send [`Event`]s of all containers on this connection from now on. Answer: [`Answer::List`], the state at that
    /// instant, so that nothing falls between.
    Subscribe,
    /// Kill everything, remove cgroups, answer, exit.
    Shutdown,
}

/// What a supervisor sends.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Message {
    /// The reply to one request.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// The reply to request `id`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reply {
    /// Echo of the request's id.
    pub id: u64,
    /// Outcome.
    pub result: Result<Answer, Failure>,
}

/// Successful outcomes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Answer {
    /// Agreed protocol version.
    Hello {
        /// Version.
        version: u32,
    },
    /// Container created.
    Created {
        /// Host PID of its init.
        pid: i32,
    },
    /// Container or exec started.
    Started {
        /// Host PID.
        pid: i32,
        /// Unix time in nanoseconds.
        started_at: i64,
    },
    /// Nothing to add.
    Done,
    /// Containers.
    List(Vec<ContainerStatus>),
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
#[error("{message}")]
pub struct Failure {
    /// Machine-readable kind.
    pub kind: FailureKind,
    /// The whole chain of causes in one line.
    pub message: String,
}

/// Kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailureKind {
    /// No such container or exec.
    NotFound,
    /// The operation does not fit the container's state.
    State,
    /// The image or the pod asks for something that cannot be (`config.json`, missing executable, bad user).
    Invalid,
    /// The kernel refused.
    System,
}

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ContainerState {
    /// Created, not started.
    Created,
    /// Running.
    Running,
    /// Ended; `exit` is set.
    Exited,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    /// Exit code; 128 + signal when killed by one.
    pub code: i32,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// The kernel's OOM killer struck in its cgroup.
    pub oom_killed: bool,
    /// Unix time in nanoseconds.
    pub finished_at: i64,
}

/// Durable state of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    /// Container id.
    pub id: String,
    /// State.
    pub state: ContainerState,
    /// Host PID of its init while it runs.
    pub pid: Option<i32>,
    /// Unix time in nanoseconds.
    pub created_at: i64,
    /// Unix time in nanoseconds.
    pub started_at: Option<i64>,
    /// Set when it has ended.
    pub exit: Option<Exit>,
}

/// Things that happen by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event {
    /// A container ended (already durable).
    Exited {
        /// Its final status.
        status: ContainerStatus,
    },
    /// An exec'ed process ended.
    ExecExited {
        /// Exec id.
        exec: String,
        /// How.
        exit: Exit,
    },
}
