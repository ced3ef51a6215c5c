//! What the node API on port 10250 asks of the pods.

use std::{
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::{
    context::Context,
    metrics,
    pods::{
        exec, sandbox, start,
        table::{ContainerView, Snapshot},
    },
    runtime::Supervisor,
    server::{
        AttachRequest, ExecRequest, Host, HostError, Identity, LogSource, NetNs, PodRef, Session, Stdio, TerminalSize,
    },
    stats,
};
use isopod_runtime::supervisor::protocol::{Op, WinSize};

/// The pods of this node, for the server.
pub(crate) struct NodeHost {
    pub(crate) ctx: Arc<Context>,
}

fn io(e: std::io::Error) -> HostError {
    HostError::Internal(e.to_string())
}

impl NodeHost {
    fn snapshot(&self, r: &PodRef) -> Result<Arc<Snapshot>, HostError> {
        let found = self.ctx.table.find(&r.namespace, &r.name, r.uid.as_deref());
        found.ok_or_else(|| HostError::NotFound(format!("pod {:?} not found", format!("{}/{}", r.namespace, r.name))))
    }

    fn waiting(&self, s: &Snapshot, container: &str) -> HostError {
        let spec = s.pod.spec.as_ref();
        let name = sandbox::name(&s.pod);
        let exists = spec.is_some_and(|s| crate::qos::all_containers(s).any(|c| c.name == container))
            || spec.is_some_and(|s| s.ephemeral_containers.iter().flatten().any(|c| c.name == container));
        if !exists {
            return HostError::BadRequest(format!("container {container} is not valid for pod {name}"));
        }
        let status = s.pod.status.as_ref();
        let all = status.into_iter().flat_map(|s| {
            let lists = [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses];
            lists.into_iter().flatten().flatten().collect::<Vec<_>>()
        });
        let waiting = all.into_iter().find(|c| c.name == container).and_then(|c| c.state.as_ref()?.waiting.as_ref());
        let reason = waiting.and_then(|w| w.reason.as_deref()).unwrap_or("ContainerCreating");
        let text = match reason {
            "ErrImagePull" => "image can't be pulled",
            "ImagePullBackOff" => "trying and failing to pull image",
            other => other,
        };
        HostError::BadRequest(format!("container {container:?} in pod {name:?} is waiting to start: {text}"))
    }

    fn running(&self, r: &PodRef, container: &str) -> Result<(Arc<Snapshot>, ContainerView, Supervisor), HostError> {
        let s = self.snapshot(r)?;
        let view = s.containers.get(container).filter(|c| c.running).cloned();
        let supervisor = s.supervisor.clone();
        match (view, supervisor) {
            (Some(v), Some(sup)) => Ok((s, v, sup)),
            _ => Err(HostError::NotFound(format!("container not found ({container:?})"))),
        }
    }
}

/// The process's ends and the client's ends of pipes for the wanted streams.
type Ends = (Option<OwnedFd>, Option<OwnedFd>, Option<OwnedFd>);

fn pipes(want: Stdio) -> std::io::Result<(Ends, Ends)> {
    let (mut theirs, mut ours): (Ends, Ends) = ((None, None, None), (None, None, None));
    if want.stdin {
        let (read, write) = exec::pipe_pair()?;
        (theirs.0, ours.0) = (Some(read), Some(write));
    }
    if want.stdout {
        let (read, write) = exec::pipe_pair()?;
        (theirs.1, ours.1) = (Some(write), Some(read));
    }
    if want.stderr {
        let (read, write) = exec::pipe_pair()?;
        (theirs.2, ours.2) = (Some(write), Some(read));
    }
    Ok((theirs, ours))
}

/// Sends new terminal sizes on until the session ends.
fn resizer(supervisor: Supervisor, target: String) -> mpsc::Sender<TerminalSize> {
    let (sender, mut sizes) = mpsc::channel::<TerminalSize>(4);
    tokio::spawn(async move {
        while let Some(s) = sizes.recv().await {
            let size = WinSize { rows: s.height, cols: s.width };
            if supervisor.done(Op::Resize { target: target.clone(), size }).await.is_err() {
                return;
            }
        }
    });
    sender
}

/// Kills an exec whose client has gone.
struct KillOnDrop {
    supervisor: Supervisor,
    exec: String,
    armed: bool,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.armed {
            let (s, exec) = (self.supervisor.clone(), self.exec.clone());
            tokio::spawn(async move { s.done(Op::KillExec { exec, signal: libc::SIGKILL }).await });
        }
    }
}

/// Runs a command in a running container; it is killed when the session is dropped.
pub(crate) async fn exec_in(
    supervisor: Supervisor,
    container: &str,
    bundle: &Path,
    command: &[String],
    stdio: Stdio,
) -> Result<Session, HostError> {
    let process = exec::process(bundle, command, stdio.tty).map_err(io)?;
    let none = Stdio { stdin: false, stdout: false, stderr: false, tty: false };
    let (theirs, ours) = pipes(if stdio.tty { none } else { stdio }).map_err(io)?;
    let started = supervisor.exec(container, process, theirs).await;
    let started = started.map_err(|e| HostError::Internal(e.to_string()))?;
    let (mut stdin, mut stdout, stderr) = ours;
    if let Some(master) = started.terminal {
        if stdio.stdin {
            stdin = Some(master.try_clone().map_err(io)?);
        }
        stdout = Some(master);
    }
    let resize = resizer(supervisor.clone(), started.id.clone());
    let guard = KillOnDrop { supervisor, exec: started.id, armed: true };
    let exit = Box::pin(async move {
        let mut guard = guard;
        let exit = started.exit.await;
        guard.armed = false;
        exit.map(|e| e.code).map_err(|_| HostError::Internal("the pod's supervisor is gone".into()))
    });
    Ok(Session { stdin, stdout, stderr, resize, exit })
}

/// Joins a running container's own streams.
pub(crate) async fn attach_to(
    supervisor: Supervisor,
    container: &str,
    tty: bool,
    stdio: Stdio,
    mut code: watch::Receiver<Option<i32>>,
) -> Result<Session, HostError> {
    let want = Stdio { stderr: stdio.stderr && !tty, ..stdio };
    let (theirs, (stdin, stdout, stderr)) = pipes(want).map_err(io)?;
    let op = Op::Attach {
        container: container.into(),
        stdin: theirs.0.is_some(),
        stdout: theirs.1.is_some(),
        stderr: theirs.2.is_some(),
    };
    let fds = [theirs.0, theirs.1, theirs.2].into_iter().flatten().collect();
    supervisor.call(op, fds).await.map_err(|e| HostError::Internal(e.to_string()))?;
    let resize = resizer(supervisor, container.into());
    let exit = Box::pin(async move {
        let code = code.wait_for(Option::is_some).await;
        Ok(code.ok().and_then(|c| *c).unwrap_or(0))
    });
    Ok(Session { stdin, stdout, stderr, resize, exit })
}

/// Labels of requests that are counted.
fn counted<'a>(method: &'a str, path: &'a str) -> Option<[(&'static str, &'a str); 4]> {
    let long = match path {
        "exec" | "attach" | "portForward" | "containerLogs" => "true",
        "pods" | "metrics" | "stats" | "configz" => "false",
        _ => return None,
    };
    Some([("long_running", long), ("method", method), ("path", path), ("server_type", "readwrite")])
}

impl Host for NodeHost {
    fn pods(&self) -> Vec<Arc<Value>> {
        let all = self.ctx.table.all();
        all.iter().filter_map(|s| serde_json::to_value(s.pod.as_ref()).ok()).map(Arc::new).collect()
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let found = self.ctx.table.find(namespace, name, None)?;
        serde_json::to_value(found.pod.as_ref()).ok().map(Arc::new)
    }

    fn running_pods(&self) -> Vec<Arc<Value>> {
        let mut all = self.ctx.table.all();
        all.retain(|s| s.containers.values().any(|c| c.running));
        all.iter().filter_map(|s| serde_json::to_value(s.pod.as_ref()).ok()).map(Arc::new).collect()
    }

    fn node(&self) -> Value {
        crate::node::object(&self.ctx)
    }

    fn events(&self) -> Vec<Value> {
        self.ctx.events.recent().iter().filter_map(|e| serde_json::to_value(e).ok()).collect()
    }

    fn system_logs(&self) -> Option<(std::path::PathBuf, bool)> {
        let k = &self.ctx.config.kubelet;
        let root = self.ctx.config.paths.root().join("var/log");
        k.enable_system_log_handler.then_some((root, k.enable_system_log_query))
    }

    fn log_source(&self, pod: &PodRef, container: &str, previous: bool) -> Result<LogSource, HostError> {
        let s = self.snapshot(pod)?;
        let Some(view) = s.containers.get(container) else { return Err(self.waiting(&s, container)) };
        if !previous {
            let path = start::log_path(&self.ctx, &s.pod, container, view.attempt);
            return Ok(LogSource { path, ended: view.ended.clone() });
        }
        let name = sandbox::name(&s.pod);
        let attempt = view.previous.ok_or_else(|| {
            HostError::BadRequest(format!("previous terminated container {container:?} in pod {name:?} not found"))
        })?;
        let path = start::log_path(&self.ctx, &s.pod, container, attempt);
        Ok(LogSource { path, ended: tokio::sync::watch::channel(true).1 })
    }

    fn exec(&self, r: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        Box::pin(async move {
            let (s, view, supervisor) = self.running(&r.pod, &r.container)?;
            let bundle = exec::bundle(&self.ctx.config.paths, sandbox::uid(&s.pod), &r.container, view.attempt);
            let begun = Instant::now();
            let session = exec_in(supervisor, &view.id, &bundle, &r.command, r.stdio).await;
            self.ctx.metrics.operation("exec", begun, session.is_ok());
            session
        })
    }

    fn attach(&self, r: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        Box::pin(async move {
            let (_, view, supervisor) = self.running(&r.pod, &r.container)?;
            let begun = Instant::now();
            let session = attach_to(supervisor, &view.id, view.tty, r.stdio, view.exit_code.clone()).await;
            self.ctx.metrics.operation("attach", begun, session.is_ok());
            session
        })
    }

    fn network_namespace(&self, pod: &PodRef) -> Result<NetNs, HostError> {
        let s = self.snapshot(pod)?;
        if s.host_network {
            return Ok(NetNs::Host);
        }
        let name = sandbox::name(&s.pod);
        s.netns.clone().map(NetNs::Path).ok_or_else(|| HostError::NotFound(format!("pod {name:?} has no network yet")))
    }

    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Identity>, String>> {
        Box::pin(self.ctx.access.authenticate(token))
    }

    fn allowed<'a>(
        &'a self,
        who: &'a Identity,
        verb: &'a str,
        subresource: &'a str,
    ) -> BoxFuture<'a, Result<bool, String>> {
        Box::pin(self.ctx.access.allowed(who, verb, subresource))
    }

    fn debugging(&self) -> bool {
        self.ctx.config.kubelet.enable_debugging_handlers
    }

    fn anonymous(&self) -> bool {
        self.ctx.config.kubelet.authentication.anonymous.enabled
    }

    fn stats(&self, brief: bool) -> BoxFuture<'_, Value> {
        Box::pin(stats::summary(self.ctx.clone(), brief))
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async { metrics::render(&self.ctx, &stats::volumes(&self.ctx).await) })
    }

    fn asked(&self, method: &str, path: &str) {
        if let Some(labels) = counted(method, path) {
            self.ctx.metrics.add("kubelet_http_inflight_requests", labels, 1.0);
        }
    }

    fn answered(&self, method: &str, path: &str, took: Duration) {
        if let Some(labels) = counted(method, path) {
            self.ctx.metrics.add("kubelet_http_inflight_requests", labels, -1.0);
            self.ctx.metrics.count("kubelet_http_requests_total", labels);
            self.ctx.metrics.observe("kubelet_http_requests_duration_seconds", labels, took);
        }
    }

    fn websocket(&self, subresource: &str) {
        self.ctx.metrics.count("kubelet_websocket_streaming_requests_total", [("subresource", subresource)]);
    }

    fn probes(&self) -> String {
        metrics::probes(&self.ctx)
    }

    fn cadvisor(&self) -> BoxFuture<'_, String> {
        Box::pin(stats::cadvisor::text(self.ctx.clone()))
    }

    fn configuration(&self) -> Value {
        let mut value = serde_json::to_value(&self.ctx.config.kubelet).unwrap_or_default();
        value["kind"] = json!("KubeletConfiguration");
        value["apiVersion"] = json!("kubelet.config.k8s.io/v1beta1");
        value
    }
}
