//! The agent's side of the pods' supervisors.
//!
//! [`launch`] executes `isopod-runtime supervise DIR` and waits until it listens; [`connect`] joins one that already runs
//! (after a restart of the agent). Either gives a [`Supervisor`] handle: requests go in from anywhere, replies come back
//! to the caller, container exits go to the one receiver of [`RuntimeEvent`]s. One task per connection owns the socket.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use isopod_runtime::supervisor::{
    client::Connection,
    protocol::{Answer, ContainerStatus, Event, Exit, Failure, Message, OLDEST, Op, PodConfig, Request, VERSION},
};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
};

/// Why a supervisor could not do something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// It answered with a failure.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// It is gone.
    #[error("the pod's supervisor is gone")]
    Gone,
    /// It is of another time.
    #[error("the pod's supervisor speaks version {0} of the protocol, this agent {OLDEST} to {VERSION}")]
    Version(u32),
    /// It answered something else than asked.
    #[error("the pod's supervisor gave an unexpected answer")]
    Unexpected,
    /// The executable could not be run.
    #[error("cannot execute {binary}: {source}")]
    Execute {
        /// The executable.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended before it listened.
    #[error("the supervisor did not start: {0}")]
    NotStarted(String),
    /// A file of the run directory could not be written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a supervisor tells by itself.
#[derive(Debug)]
pub(crate) enum RuntimeEvent {
    /// A container ended.
    Exited(ContainerStatus),
    /// The connection ended: the supervisor died or shut down.
    Lost,
}

struct Call {
    op: Op,
    fds: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<(Answer, Vec<OwnedFd>), RuntimeError>>,
    /// For an exec: its id and who waits for its end.
    exec: Option<(String, oneshot::Sender<Exit>)>,
}

/// A handle to one pod's supervisor.
#[derive(Clone)]
pub(crate) struct Supervisor {
    calls: mpsc::Sender<Call>,
    execs: Arc<AtomicU64>,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Supervisor")
    }
}

/// A running exec.
#[derive(Debug)]
pub(crate) struct Exec {
    /// Its id, for signals and terminal sizes.
    pub(crate) id: String,
    /// The terminal's master, when one was asked for.
    pub(crate) terminal: Option<OwnedFd>,
    /// Resolves when it ends; an error means the supervisor went away.
    pub(crate) exit: oneshot::Receiver<Exit>,
}

impl Supervisor {
    /// Sends `op` with descriptors and waits for the answer.
    pub(crate) async fn call(&self, op: Op, fds: Vec<OwnedFd>) -> Result<(Answer, Vec<OwnedFd>), RuntimeError> {
        let (reply, answer) = oneshot::channel();
        let call = Call { op, fds, reply, exec: None };
        self.calls.send(call).await.map_err(|_| RuntimeError::Gone)?;
        answer.await.map_err(|_| RuntimeError::Gone)?
    }

    /// Sends an operation whose success says nothing more.
    pub(crate) async fn done(&self, op: Op) -> Result<(), RuntimeError> {
        self.call(op, Vec::new()).await.map(|_| ())
    }

    /// Starts a created container: host PID and start time in nanoseconds.
    pub(crate) async fn start(&self, container: &str) -> Result<(i32, i64), RuntimeError> {
        match self.call(Op::Start { container: container.into() }, Vec::new()).await?.0 {
            Answer::Started { pid, started_at } => Ok((pid, started_at)),
            _ => Err(RuntimeError::Unexpected),
        }
    }

    /// Agrees on a version and asks for events from now on; the containers as they stand at that instant.
    pub(crate) async fn subscribe(&self) -> Result<Vec<ContainerStatus>, RuntimeError> {
        match self.call(Op::Hello { version: VERSION }, Vec::new()).await?.0 {
            Answer::Hello { version: OLDEST..=VERSION } => {}
            Answer::Hello { version } => return Err(RuntimeError::Version(version)),
            _ => return Err(RuntimeError::Unexpected),
        }
        match self.call(Op::Subscribe, Vec::new()).await?.0 {
            Answer::List(list) => Ok(list),
            _ => Err(RuntimeError::Unexpected),
        }
    }

    /// Sends a signal to a container's init, or to all its processes.
    pub(crate) async fn kill(&self, container: &str, signal: i32, all: bool) -> Result<(), RuntimeError> {
        self.done(Op::Kill { container: container.into(), signal, all }).await
    }

    /// Runs a process in a container. `fds` are its stdio ends for those asked for, in order.
    pub(crate) async fn exec(
        &self,
        container: &str,
        process: serde_json::Value,
        stdio: (Option<OwnedFd>, Option<OwnedFd>, Option<OwnedFd>),
    ) -> Result<Exec, RuntimeError> {
        let id = format!("exec-{:x}-{:x}", std::process::id(), self.execs.fetch_add(1, Ordering::Relaxed));
        let (stdin, stdout, stderr) = stdio;
        let op = Op::Exec {
            container: container.into(),
            exec: id.clone(),
            process,
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
        };
        let fds = [stdin, stdout, stderr].into_iter().flatten().collect();
        let (reply, answer) = oneshot::channel();
        let (ended, exit) = oneshot::channel();
        let call = Call { op, fds, reply, exec: Some((id.clone(), ended)) };
        self.calls.send(call).await.map_err(|_| RuntimeError::Gone)?;
        let (_, fds) = answer.await.map_err(|_| RuntimeError::Gone)??;
        Ok(Exec { id, terminal: fds.into_iter().next(), exit })
    }
}

/// Writes `pod.json`, executes the supervisor in the pod's run directory `dir` and connects to it.
pub(crate) async fn launch(
    binary: &Path,
    dir: &Path,
    pod: &PodConfig,
    events: mpsc::UnboundedSender<RuntimeEvent>,
) -> Result<Supervisor, RuntimeError> {
    let path = dir.join("pod.json");
    let file_error = |path: &Path| {
        let path = path.to_path_buf();
        move |source| RuntimeError::File { path, source }
    };
    std::fs::create_dir_all(dir).map_err(file_error(dir))?;
    let text = serde_json::to_vec(pod).map_err(|e| file_error(&path)(e.into()))?;
    std::fs::write(&path, text).map_err(file_error(&path))?;
    // It leaves this process (so that it outlives it) and tells in one line whether it listens.
    let said = tokio::process::Command::new(binary)
        .arg("supervise")
        .arg(dir)
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .await
        .map_err(|source| RuntimeError::Execute { binary: binary.to_path_buf(), source })?;
    let line = String::from_utf8_lossy(&said.stdout);
    if !line.starts_with("ready") {
        let more = String::from_utf8_lossy(&said.stderr);
        let text = format!("{} {}", line.trim().trim_start_matches("error: "), more.trim());
        return Err(RuntimeError::NotStarted(text.trim().to_string()));
    }
    connect(dir, events).map_err(|e| RuntimeError::NotStarted(e.to_string()))
}

/// Connects to the supervisor that listens in `dir`.
pub(crate) fn connect(dir: &Path, events: mpsc::UnboundedSender<RuntimeEvent>) -> io::Result<Supervisor> {
    // `register` is unsafe for types that may give another descriptor each time; a connection has one.
    #[allow(deprecated)]
    let connection = AsyncFd::new(Connection::connect(dir)?)?;
    let (calls, receiver) = mpsc::channel(16);
    let handle = Supervisor { calls, execs: Arc::new(AtomicU64::new(now_id())) };
    tokio::spawn(serve(connection, receiver, events));
    Ok(handle)
}

fn now_id() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_micros() as u64)
}

#[derive(Default)]
struct Waiting {
    next: u64,
    replies: HashMap<u64, Call>,
    execs: HashMap<String, oneshot::Sender<Exit>>,
}

async fn serve(
    connection: AsyncFd<Connection>,
    mut calls: mpsc::Receiver<Call>,
    events: mpsc::UnboundedSender<RuntimeEvent>,
) {
    let mut waiting = Waiting::default();
    loop {
        // Both arms are cancel-safe: a call not yet received stays queued, readiness is level-triggered.
        tokio::select! {
            call = calls.recv() => match call {
                Some(call) => if send(&connection, &mut waiting, call).await.is_err() { break },
                None => return,
            },
            ready = connection.readable() => {
                let Ok(mut guard) = ready else { break };
                match guard.try_io(|c| c.get_ref().recv()) {
                    Ok(Ok(Some((message, fds)))) => dispatch(&mut waiting, message, fds, &events),
                    Ok(_) => break,
                    Err(_would_block) => {}
                }
            }
        }
    }
    drop(waiting);
    let _ = events.send(RuntimeEvent::Lost);
}

async fn send(connection: &AsyncFd<Connection>, waiting: &mut Waiting, mut call: Call) -> io::Result<()> {
    waiting.next += 1;
    let id = waiting.next;
    let request = Request { id, op: call.op.clone() };
    let fds = std::mem::take(&mut call.fds);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    loop {
        match connection.get_ref().send(&request, &borrowed) {
            Ok(()) => break,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut guard = connection.writable().await?;
                guard.clear_ready();
            }
            Err(e) => return Err(e),
        }
    }
    if let Some((exec, ended)) = call.exec.take() {
        waiting.execs.insert(exec, ended);
    }
    waiting.replies.insert(id, call);
    Ok(())
}

fn dispatch(waiting: &mut Waiting, message: Message, fds: Vec<OwnedFd>, events: &mpsc::UnboundedSender<RuntimeEvent>) {
    match message {
        Message::Reply(reply) => {
            if let Some(call) = waiting.replies.remove(&reply.id) {
                if let (Err(_), Op::Exec { exec, .. }) = (&reply.result, &call.op) {
                    waiting.execs.remove(exec);
                }
                let _ = call.reply.send(reply.result.map(|a| (a, fds)).map_err(Into::into));
            }
        }
        Message::Event(Event::Exited { status }) => {
            let _ = events.send(RuntimeEvent::Exited(status));
        }
        Message::Event(Event::ExecExited { exec, exit }) => {
            if let Some(ended) = waiting.execs.remove(&exec) {
                let _ = ended.send(exit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use isopod_runtime::supervisor::{client::SOCKET, wire};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    use serde_json::{Value, json};

    use super::*;

    /// A supervisor that says what `script` does for each operation, by name.
    fn peer(dir: &Path, script: impl Fn(&str, &Value) -> Vec<Value> + Send + 'static) {
        let flags = SocketFlags::CLOEXEC;
        let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(dir.join(SOCKET)).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        std::thread::spawn(move || {
            let socket = rustix::net::accept_with(&listener, flags).unwrap();
            while let Ok(Some((bytes, _))) = wire::recv_bytes(socket.as_fd()) {
                let request: Value = serde_json::from_slice(&bytes).unwrap();
                let op = request["op"].as_object().and_then(|o| o.keys().next().cloned());
                let op = op.or_else(|| request["op"].as_str().map(str::to_owned)).unwrap();
                for message in script(&op, &request["id"]) {
                    wire::send_bytes(socket.as_fd(), message.to_string().as_bytes(), &[]).unwrap();
                }
            }
        });
    }

    fn ok(id: &Value, answer: Value) -> Value {
        json!({"reply": {"id": id, "result": {"Ok": answer}, "mood": "good"}})
    }

    #[tokio::test]
    async fn a_younger_supervisor_is_understood_as_far_as_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let status =
            |id: &str| json!({"id": id, "state": "running", "pid": 7, "createdAt": 1, "startedAt": 2, "colour": "red"});
        peer(dir.path(), move |op, id| match op {
            "hello" => vec![ok(id, json!({"hello": {"version": VERSION, "features": ["teleport"]}}))],
            "subscribe" => vec![
                json!({"event": {"teleported": {"status": status("a")}}}),
                json!({"rumour": 1}),
                ok(id, json!({"list": [status("a")]})),
                json!({"event": {"exited": {"status": status("a"), "witness": "none"}}}),
            ],
            "start" => vec![ok(id, json!({"started": {"pid": 8, "startedAt": 9, "lane": 1}}))],
            _ => vec![ok(id, json!({"levitated": {"metres": 3}}))],
        });
        let (events, mut told) = mpsc::unbounded_channel();
        let supervisor = connect(dir.path(), events).unwrap();
        assert_eq!(supervisor.subscribe().await.unwrap()[0].pid, Some(7));
        assert!(matches!(told.recv().await, Some(RuntimeEvent::Exited(status)) if status.id == "a"));
        let text = supervisor.kill("a", 9, false).await.unwrap_err().to_string();
        assert!(text.starts_with("an answer of another version"), "{text}");
        // The connection goes on.
        assert_eq!(supervisor.start("a").await.unwrap(), (8, 9));
        assert!(told.try_recv().is_err());
    }

    #[tokio::test]
    async fn versions_that_share_nothing_are_told() {
        for (answer, said) in [
            (
                json!({"Ok": {"hello": {"version": 0}}}),
                "the pod's supervisor speaks version 0 of the protocol, this agent 1 to 1",
            ),
            (json!({"Err": {"kind": "invalid", "message": "the oldest is 9"}}), "the oldest is 9"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            peer(dir.path(), move |_, id| vec![json!({"reply": {"id": id, "result": answer}})]);
            let supervisor = connect(dir.path(), mpsc::unbounded_channel().0).unwrap();
            assert_eq!(supervisor.subscribe().await.unwrap_err().to_string(), said);
        }
    }
}
