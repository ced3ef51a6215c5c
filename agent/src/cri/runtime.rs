//! The runtime service over CRI.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::Stream;
use isopod_runtime::supervisor::protocol::Op;
use tonic::{Request, Response, Status};

use super::{
    Items, convert, lifecycle, metrics, one_by_one, stats,
    streaming::{Streaming, Task},
    view,
};
use crate::{
    context::Context,
    grpc::proto::cri::{runtime_service_server::RuntimeService, *},
    host,
    pods::{sandbox::HANDLERS, state::now},
    server::{Stdio, read_all},
};

/// Most output of a command that is kept, of each stream.
const OUTPUT: u64 = 16 << 20;

/// The service.
pub(super) struct Runtime {
    pub(super) ctx: Arc<Context>,
    pub(super) streaming: Streaming,
}

type Answer<T> = Result<Response<T>, Status>;

fn has(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

fn stdio(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<Stdio, Status> {
    match (stdin || stdout || stderr, tty && stderr) {
        (false, _) => Err(Status::invalid_argument("one of stdin, stdout, or stderr must be set")),
        (_, true) => Err(Status::invalid_argument("tty and stderr cannot both be true")),
        _ => Ok(Stdio { stdin, stdout, stderr, tty }),
    }
}

impl Runtime {
    fn containers(&self, f: &ContainerFilter) -> Vec<view::Container> {
        let all = view::all(&self.ctx).into_iter().flat_map(|g| g.containers);
        let fits = |c: &view::Container| {
            c.id.starts_with(&f.id)
                && c.sandbox.starts_with(&f.pod_sandbox_id)
                && f.state.as_ref().is_none_or(|s| s.state() == c.state)
                && has(&c.labels, &f.label_selector)
        };
        all.filter(fits).collect()
    }

    fn sandboxes(&self, f: Option<PodSandboxFilter>) -> Vec<PodSandbox> {
        let f = f.unwrap_or_default();
        let fits = |s: &view::Sandbox| {
            s.id.starts_with(&f.id)
                && f.state.as_ref().is_none_or(|w| w.state() == s.state())
                && has(&s.labels, &f.label_selector)
        };
        let all = view::all(&self.ctx).into_iter().map(|g| g.sandbox);
        all.filter(fits).map(|s| s.listed()).collect()
    }

    fn container_usage(&self, f: Option<ContainerStatsFilter>) -> Vec<ContainerStats> {
        let f = f.unwrap_or_default();
        let all = self.containers(&ContainerFilter {
            id: f.id,
            pod_sandbox_id: f.pod_sandbox_id,
            label_selector: f.label_selector,
            state: Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() }),
        });
        all.iter().map(|c| stats::container(&self.ctx, c)).collect()
    }

    fn sandbox_usage(&self, f: Option<PodSandboxStatsFilter>) -> Vec<PodSandboxStats> {
        let f = f.unwrap_or_default();
        let fits = |g: &&view::Group| {
            g.sandbox.ready && g.sandbox.id.starts_with(&f.id) && has(&g.sandbox.labels, &f.label_selector)
        };
        view::all(&self.ctx).iter().filter(fits).map(|g| stats::sandbox(&self.ctx, g)).collect()
    }

    fn metrics(&self) -> Vec<PodSandboxMetrics> {
        let ready = |g: &&view::Group| g.sandbox.ready;
        view::all(&self.ctx).iter().filter(ready).map(|g| metrics::sandbox(&self.ctx, g)).collect()
    }

    async fn exec_sync_in(&self, r: ExecSyncRequest) -> Result<ExecSyncResponse, Status> {
        let c = view::container(&self.ctx, &r.container_id)?;
        let wanted = Stdio { stdin: false, stdout: true, stderr: true, tty: false };
        let started = host::exec_in(c.running()?.clone(), &c.id, &c.bundle, &r.cmd, wanted).await;
        let session = started.map_err(|e| Status::unknown(e.to_string()))?;
        let work = async {
            let (stdout, stderr, exit) =
                tokio::join!(read_all(session.stdout, OUTPUT), read_all(session.stderr, OUTPUT), session.exit);
            let exit_code = exit.map_err(|e| Status::internal(e.to_string()))?;
            Ok(ExecSyncResponse { stdout: stdout.unwrap_or_default(), stderr: stderr.unwrap_or_default(), exit_code })
        };
        let Some(limit) = u64::try_from(r.timeout).ok().filter(|t| *t > 0) else { return work.await };
        // Dropping the session kills the command.
        let done = tokio::time::timeout(Duration::from_secs(limit), work).await;
        done.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("command timed out after {limit}s"))))
    }
}

/// What of a container events tell.
type Seen = HashMap<String, (String, ContainerState)>;

/// Events between two looks at all containers.
fn events(before: &Seen, after: &Seen) -> Vec<(String, String, ContainerEventType)> {
    use ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    let mut out = Vec::new();
    for (id, (sandbox, state)) in after {
        let was = before.get(id).map(|(_, s)| *s);
        let mut tell = |kind| out.push((id.clone(), sandbox.clone(), kind));
        if was.is_none() {
            tell(ContainerCreatedEvent);
        }
        let (ran, runs) =
            (was.is_some_and(|s| s != ContainerState::ContainerCreated), *state != ContainerState::ContainerCreated);
        if runs && !ran {
            tell(ContainerStartedEvent);
        }
        if *state == ContainerState::ContainerExited && was != Some(ContainerState::ContainerExited) {
            tell(ContainerStoppedEvent);
        }
    }
    for (id, (sandbox, _)) in before.iter().filter(|(id, _)| !after.contains_key(*id)) {
        out.push((id.clone(), sandbox.clone(), ContainerDeletedEvent));
    }
    out
}

fn look(ctx: &Context) -> Seen {
    let all = view::all(ctx).into_iter().flat_map(|g| g.containers);
    all.map(|c| (c.id, (c.sandbox, c.state))).collect()
}

/// An endless stream of events from now on.
fn event_stream(ctx: Arc<Context>) -> impl Stream<Item = Result<ContainerEventResponse, Status>> + Send {
    let (own, made) = (ctx.table.changes(), ctx.cri.changes());
    let seen = look(&ctx);
    let start = (ctx, own, made, seen, VecDeque::new());
    futures::stream::unfold(start, |(ctx, mut own, mut made, mut seen, mut ready)| async move {
        loop {
            if let Some(event) = ready.pop_front() {
                return Some((Ok(event), (ctx, own, made, seen, ready)));
            }
            // Cancel-safe: a change that is not seen stays marked.
            let alive = tokio::select! {
                r = own.changed() => r.is_ok(),
                r = made.changed() => r.is_ok(),
            };
            if !alive {
                return None;
            }
            let fresh = look(&ctx);
            for (container_id, sandbox, kind) in events(&seen, &fresh) {
                let group = view::sandbox(&ctx, &sandbox).ok();
                ready.push_back(ContainerEventResponse {
                    container_id,
                    container_event_type: kind.into(),
                    created_at: now(),
                    pod_sandbox_status: group.as_ref().map(|g| g.sandbox.status()),
                    containers_statuses: group
                        .iter()
                        .flat_map(|g| &g.containers)
                        .map(view::Container::status)
                        .collect(),
                });
            }
            seen = fresh;
        }
    })
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "isopod".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, r: Request<StatusRequest>) -> Answer<StatusResponse> {
        let condition = |kind: &str, why: Option<String>| RuntimeCondition {
            r#type: kind.into(),
            status: why.is_none(),
            reason: if why.is_some() { "NetworkPluginNotReady".into() } else { String::new() },
            message: why.unwrap_or_default(),
        };
        let conditions = vec![condition("RuntimeReady", None), condition("NetworkReady", self.ctx.network.not_ready())];
        let features = RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: false };
        let handler = |name: &str| RuntimeHandler { name: name.into(), features: Some(features) };
        let mut info = HashMap::new();
        if r.into_inner().verbose {
            let config = serde_json::to_string(&self.ctx.config.kubelet).unwrap_or_default();
            info.insert("config".to_string(), config);
        }
        Ok(Response::new(StatusResponse {
            status: Some(RuntimeStatus { conditions }),
            info,
            runtime_handlers: [""].into_iter().chain(HANDLERS).map(handler).collect(),
            features: Some(RuntimeFeatures { supplemental_groups_policy: true }),
        }))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        let driver = match self.ctx.config.kubelet.cgroup_driver.as_str() {
            "systemd" => CgroupDriver::Systemd,
            _ => CgroupDriver::Cgroupfs,
        };
        let linux = LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(Response::new(RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn update_runtime_config(
        &self,
        r: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        let network = r.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        let cidrs = network.pod_cidr.split(',').filter(|c| !c.is_empty());
        let parsed: Result<Vec<ipnet::IpNet>, _> = cidrs.map(|c| c.trim().parse()).collect();
        let parsed = parsed.map_err(|e| Status::invalid_argument(format!("pod_cidr {:?}: {e}", network.pod_cidr)))?;
        if !parsed.is_empty() {
            self.ctx.network.set_pod_cidr(parsed);
        }
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn run_pod_sandbox(&self, r: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let r = r.into_inner();
        let pod_sandbox_id = lifecycle::run_sandbox(&self.ctx, r.config.unwrap_or_default(), r.runtime_handler).await?;
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(&self, r: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        lifecycle::stop_sandbox(&self.ctx, &r.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, r: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        lifecycle::remove_sandbox(&self.ctx, &r.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, r: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        let r = r.into_inner();
        let g = view::sandbox(&self.ctx, &r.pod_sandbox_id)?;
        let mut info = HashMap::new();
        if r.verbose {
            let netns = match &g.sandbox.netns {
                crate::server::NetNs::Path(path) => path.display().to_string(),
                crate::server::NetNs::Host => String::new(),
            };
            let run = self.ctx.config.paths.run_pod(&g.sandbox.uid);
            let pid = std::fs::read_to_string(run.join("supervisor.pid")).ok();
            let pid: i32 = pid.and_then(|p| p.trim().parse().ok()).unwrap_or(0);
            let text = serde_json::json!({"pid": pid, "netns": netns, "cgroup": g.sandbox.cgroup}).to_string();
            info.insert("info".to_string(), text);
        }
        Ok(Response::new(PodSandboxStatusResponse {
            status: Some(g.sandbox.status()),
            info,
            containers_statuses: g.containers.iter().map(view::Container::status).collect(),
            timestamp: now(),
        }))
    }

    async fn list_pod_sandbox(&self, r: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        Ok(Response::new(ListPodSandboxResponse { items: self.sandboxes(r.into_inner().filter) }))
    }

    type StreamPodSandboxesStream = Items<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        r: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let all = self.sandboxes(r.into_inner().filter).into_iter();
        one_by_one(all.map(|s| StreamPodSandboxesResponse { pod_sandbox: Some(s) }).collect())
    }

    async fn create_container(&self, r: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let r = r.into_inner();
        let config = r.config.unwrap_or_default();
        let container_id = lifecycle::create_container(&self.ctx, &r.pod_sandbox_id, config).await?;
        Ok(Response::new(CreateContainerResponse { container_id }))
    }

    async fn start_container(&self, r: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        lifecycle::start_container(&self.ctx, &r.into_inner().container_id).await?;
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(&self, r: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let r = r.into_inner();
        let c = match view::container(&self.ctx, &r.container_id) {
            Err(e) if e.code() == tonic::Code::NotFound => return Ok(Response::new(StopContainerResponse {})),
            other => other?,
        };
        let grace = Duration::from_secs(u64::try_from(r.timeout).unwrap_or(0));
        lifecycle::stop(&self.ctx, &c, grace).await?;
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(&self, r: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        lifecycle::remove_container(&self.ctx, &r.into_inner().container_id).await?;
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(&self, r: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        let all = self.containers(&r.into_inner().filter.unwrap_or_default());
        Ok(Response::new(ListContainersResponse { containers: all.iter().map(view::Container::listed).collect() }))
    }

    type StreamContainersStream = Items<StreamContainersResponse>;

    async fn stream_containers(&self, r: Request<StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
        let all = self.containers(&r.into_inner().filter.unwrap_or_default());
        one_by_one(all.iter().map(|c| StreamContainersResponse { container: Some(c.listed()) }).collect())
    }

    async fn container_status(&self, r: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        let r = r.into_inner();
        let c = view::container(&self.ctx, &r.container_id)?;
        let mut info = HashMap::new();
        if r.verbose {
            let spec = std::fs::read(c.bundle.join("bundle/config.json")).ok();
            let spec: serde_json::Value = spec.and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or_default();
            let text = serde_json::json!({"sandboxID": c.sandbox, "runtimeSpec": spec}).to_string();
            info.insert("info".to_string(), text);
        }
        Ok(Response::new(ContainerStatusResponse { status: Some(c.status()), info }))
    }

    async fn update_container_resources(
        &self,
        r: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let r = r.into_inner();
        let c = view::container(&self.ctx, &r.container_id)?;
        let resources = convert::resources(&r.linux.unwrap_or_default());
        let op = Op::Update { container: c.id.clone(), resources };
        c.running()?.done(op).await.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(UpdateContainerResourcesResponse {}))
    }

    async fn update_pod_sandbox_resources(
        &self,
        r: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        // The pod's own group is the caller's to change, and has been.
        view::sandbox(&self.ctx, &r.into_inner().pod_sandbox_id)?;
        Ok(Response::new(UpdatePodSandboxResourcesResponse {}))
    }

    async fn reopen_container_log(&self, r: Request<ReopenContainerLogRequest>) -> Answer<ReopenContainerLogResponse> {
        let c = view::container(&self.ctx, &r.into_inner().container_id)?;
        let op = Op::ReopenLog { container: c.id.clone() };
        c.running()?.done(op).await.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, r: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        self.exec_sync_in(r.into_inner()).await.map(Response::new)
    }

    async fn exec(&self, r: Request<ExecRequest>) -> Answer<ExecResponse> {
        let r = r.into_inner();
        let c = view::container(&self.ctx, &r.container_id)?;
        c.running()?;
        if r.cmd.is_empty() {
            return Err(Status::invalid_argument("no command"));
        }
        let stdio = stdio(r.stdin, r.stdout, r.stderr, r.tty)?;
        let task = Task::Exec { container: c.id, command: r.cmd, stdio };
        Ok(Response::new(ExecResponse { url: self.streaming.url("exec", task) }))
    }

    async fn attach(&self, r: Request<AttachRequest>) -> Answer<AttachResponse> {
        let r = r.into_inner();
        let c = view::container(&self.ctx, &r.container_id)?;
        c.running()?;
        let stdio = stdio(r.stdin, r.stdout, r.stderr, r.tty)?;
        let task = Task::Attach { container: c.id, stdio };
        Ok(Response::new(AttachResponse { url: self.streaming.url("attach", task) }))
    }

    async fn port_forward(&self, r: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        let r = r.into_inner();
        let g = view::sandbox(&self.ctx, &r.pod_sandbox_id)?;
        if !g.sandbox.ready {
            return Err(Status::failed_precondition(format!("pod sandbox {} is not ready", g.sandbox.id)));
        }
        let port = |p: &i32| u16::try_from(*p).map_err(|_| Status::invalid_argument(format!("invalid port {p}")));
        let ports = r.port.iter().map(port).collect::<Result<_, _>>()?;
        let task = Task::Forward { netns: g.sandbox.netns, ports };
        Ok(Response::new(PortForwardResponse { url: self.streaming.url("portforward", task) }))
    }

    async fn container_stats(&self, r: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        let c = view::container(&self.ctx, &r.into_inner().container_id)?;
        Ok(Response::new(ContainerStatsResponse { stats: Some(stats::container(&self.ctx, &c)) }))
    }

    async fn list_container_stats(&self, r: Request<ListContainerStatsRequest>) -> Answer<ListContainerStatsResponse> {
        Ok(Response::new(ListContainerStatsResponse { stats: self.container_usage(r.into_inner().filter) }))
    }

    type StreamContainerStatsStream = Items<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        r: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let all = self.container_usage(r.into_inner().filter).into_iter();
        one_by_one(all.map(|s| StreamContainerStatsResponse { container_stats: Some(s) }).collect())
    }

    async fn pod_sandbox_stats(&self, r: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        let g = view::sandbox(&self.ctx, &r.into_inner().pod_sandbox_id)?;
        Ok(Response::new(PodSandboxStatsResponse { stats: Some(stats::sandbox(&self.ctx, &g)) }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        r: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        Ok(Response::new(ListPodSandboxStatsResponse { stats: self.sandbox_usage(r.into_inner().filter) }))
    }

    type StreamPodSandboxStatsStream = Items<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        r: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let all = self.sandbox_usage(r.into_inner().filter).into_iter();
        one_by_one(all.map(|s| StreamPodSandboxStatsResponse { pod_sandbox_stats: Some(s) }).collect())
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        Ok(Response::new(ListMetricDescriptorsResponse { descriptors: metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics: self.metrics() }))
    }

    type StreamPodSandboxMetricsStream = Items<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let all = self.metrics().into_iter();
        one_by_one(all.map(|m| StreamPodSandboxMetricsResponse { pod_sandbox_metrics: Some(m) }).collect())
    }

    async fn checkpoint_container(
        &self,
        r: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        view::container(&self.ctx, &r.into_inner().container_id)?;
        Err(Status::unimplemented("containers cannot be checkpointed on this node"))
    }

    type GetContainerEventsStream = Items<ContainerEventResponse>;

    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(Box::pin(event_stream(self.ctx.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ContainerEventType::{
        ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
    };
    use ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};

    #[test]
    fn events_fill_in_what_nobody_saw() {
        let of = |state: Option<ContainerState>| -> Seen {
            state.map(|s| ("c".to_string(), ("s".to_string(), s))).into_iter().collect()
        };
        for (before, after, want) in [
            (None, Some(ContainerCreated), vec![ContainerCreatedEvent]),
            (Some(ContainerCreated), Some(ContainerRunning), vec![ContainerStartedEvent]),
            (None, Some(ContainerExited), vec![ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent]),
            (Some(ContainerRunning), Some(ContainerRunning), vec![]),
            (Some(ContainerRunning), Some(ContainerExited), vec![ContainerStoppedEvent]),
            (Some(ContainerExited), None, vec![ContainerDeletedEvent]),
        ] {
            let got: Vec<_> = events(&of(before), &of(after)).into_iter().map(|(_, _, kind)| kind).collect();
            assert_eq!(got, want, "{before:?} {after:?}");
        }
    }
}
