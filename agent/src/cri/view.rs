//! Sandboxes and containers of this node in the CRI's words, whoever made them.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::PathBuf,
};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use sha2::{Digest, Sha256};
use tonic::Status;

use crate::{
    context::Context,
    grpc::proto::cri::{self, ContainerMetadata, ContainerState, NamespaceMode, NamespaceOption, PodSandboxMetadata},
    pods::{exec, sandbox, start, table::Snapshot},
    runtime::Supervisor,
    server::NetNs,
};

/// A sandbox.
#[derive(Clone)]
pub(super) struct Sandbox {
    pub(super) id: String,
    pub(super) metadata: PodSandboxMetadata,
    pub(super) ready: bool,
    pub(super) created_at: i64,
    pub(super) labels: HashMap<String, String>,
    pub(super) annotations: HashMap<String, String>,
    pub(super) handler: String,
    pub(super) ips: Vec<IpAddr>,
    pub(super) netns: NetNs,
    pub(super) namespaces: NamespaceOption,
    pub(super) cgroup: String,
    /// Directory name of what the agent keeps of it.
    pub(super) uid: String,
}

/// A container.
#[derive(Clone)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) sandbox: String,
    pub(super) metadata: ContainerMetadata,
    pub(super) image: String,
    pub(super) image_ref: String,
    pub(super) image_id: String,
    pub(super) state: ContainerState,
    pub(super) created_at: i64,
    pub(super) started_at: i64,
    pub(super) finished_at: i64,
    pub(super) exit_code: i32,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) labels: HashMap<String, String>,
    pub(super) annotations: HashMap<String, String>,
    pub(super) mounts: Vec<cri::Mount>,
    pub(super) log_path: PathBuf,
    pub(super) bundle: PathBuf,
    pub(super) cgroup: String,
    pub(super) tty: bool,
    pub(super) user: Option<cri::LinuxContainerUser>,
    pub(super) supervisor: Option<Supervisor>,
    /// Code of its end, once it has come.
    pub(super) ended: tokio::sync::watch::Receiver<Option<i32>>,
    /// Made over this socket.
    pub(super) foreign: bool,
}

/// A sandbox and its containers.
pub(super) struct Group {
    pub(super) sandbox: Sandbox,
    pub(super) containers: Vec<Container>,
}

/// Everything there is.
pub(super) fn all(ctx: &Context) -> Vec<Group> {
    let ids = image_ids(ctx);
    let own = ctx.table.all();
    let mut all: Vec<Group> = own.iter().map(|s| of_pod(ctx, s, &ids)).collect();
    all.extend(ctx.cri.groups());
    all
}

/// One by the beginning of its id, as crictl sends it.
fn pick<T>(what: &str, id: &str, all: Vec<T>, of: impl Fn(&T) -> &str) -> Result<T, Status> {
    let mut found = all.into_iter().filter(|t| !id.is_empty() && of(t).starts_with(id));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => Err(Status::invalid_argument(format!("{what} {id:?} is not one alone"))),
        _ => Err(Status::not_found(format!("{what} {id:?} not found"))),
    }
}

/// A sandbox and its containers by id.
pub(super) fn sandbox(ctx: &Context, id: &str) -> Result<Group, Status> {
    pick("pod sandbox", id, all(ctx), |g| &g.sandbox.id)
}

/// A container by id.
pub(super) fn container(ctx: &Context, id: &str) -> Result<Container, Status> {
    pick("container", id, all(ctx).into_iter().flat_map(|g| g.containers).collect(), |c| &c.id)
}

/// Id by every name of every image.
pub(super) fn image_ids(ctx: &Context) -> HashMap<String, String> {
    let all = ctx.images.list();
    all.into_iter().flat_map(|i| i.names.into_iter().map(move |n| (n, i.id.clone()))).collect()
}

fn nanos(t: Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>) -> i64 {
    t.map_or(0, |t| i64::try_from(t.0.as_nanosecond()).unwrap_or(0))
}

/// The id of an agent's pod as a sandbox: one for each try.
fn id_of(uid: &str, attempt: u32) -> String {
    let sum = Sha256::digest(format!("{uid}/{attempt}").as_bytes());
    sum.iter().map(|b| format!("{b:02x}")).collect()
}

fn map(of: Option<&BTreeMap<String, String>>) -> HashMap<String, String> {
    of.into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Labels by which a kubelet's containers are known.
fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    [
        ("io.kubernetes.pod.name", sandbox::name(pod)),
        ("io.kubernetes.pod.namespace", sandbox::namespace(pod)),
        ("io.kubernetes.pod.uid", sandbox::uid(pod)),
    ]
    .map(|(k, v)| (k.to_string(), v.to_string()))
    .into()
}

fn namespaces(pod: &Pod) -> NamespaceOption {
    let Some(spec) = &pod.spec else { return NamespaceOption::default() };
    let node =
        |wanted: Option<bool>, other: NamespaceMode| if wanted == Some(true) { NamespaceMode::Node } else { other };
    let shared = spec.share_process_namespace == Some(true);
    let pid = if shared { NamespaceMode::Pod } else { NamespaceMode::Container };
    NamespaceOption {
        network: node(spec.host_network, NamespaceMode::Pod).into(),
        pid: node(spec.host_pid, pid).into(),
        ipc: node(spec.host_ipc, NamespaceMode::Pod).into(),
        ..NamespaceOption::default()
    }
}

fn of_pod(ctx: &Context, s: &Snapshot, ids: &HashMap<String, String>) -> Group {
    let pod = &s.pod;
    let (uid, meta) = (sandbox::uid(pod), &pod.metadata);
    let status = pod.status.clone().unwrap_or_default();
    let mut labels = map(meta.labels.as_ref());
    labels.extend(pod_labels(pod));
    let started = nanos(status.start_time.as_ref()).max(1);
    let qos = pod.spec.as_ref().map_or(crate::qos::Qos::BestEffort, crate::qos::class);
    let view = Sandbox {
        id: id_of(uid, s.attempt),
        metadata: PodSandboxMetadata {
            name: sandbox::name(pod).into(),
            uid: uid.into(),
            namespace: sandbox::namespace(pod).into(),
            attempt: s.attempt,
        },
        ready: s.supervisor.is_some(),
        created_at: started,
        labels,
        annotations: map(meta.annotations.as_ref()),
        handler: String::new(),
        ips: status.pod_ips.iter().flatten().filter_map(|p| p.ip.parse().ok()).collect(),
        netns: match (s.host_network, &s.netns) {
            (false, Some(path)) => NetNs::Path(path.clone()),
            _ => NetNs::Host,
        },
        namespaces: namespaces(pod),
        cgroup: ctx.cgroups.pod_group(qos, uid),
        uid: uid.into(),
    };
    let lists = [&status.init_container_statuses, &status.container_statuses, &status.ephemeral_container_statuses];
    let statuses: HashMap<&str, &ContainerStatus> =
        lists.into_iter().flatten().flatten().map(|c| (c.name.as_str(), c)).collect();
    let of = |(name, c): (&String, &crate::pods::table::ContainerView)| {
        let status = statuses.get(name.as_str()).copied();
        let state = status.and_then(|s| s.state.as_ref());
        let ended = state.and_then(|s| s.terminated.as_ref());
        let running = state.and_then(|s| s.running.as_ref());
        let began = nanos(running.and_then(|r| r.started_at.as_ref()).or(ended.and_then(|e| e.started_at.as_ref())));
        let image_ref = status.map(|s| s.image_id.clone()).unwrap_or_default();
        let mut labels = pod_labels(pod);
        labels.insert("io.kubernetes.container.name".into(), name.clone());
        let restarts = ("io.kubernetes.container.restartCount".to_string(), c.attempt.to_string());
        Container {
            id: c.id.clone(),
            sandbox: view.id.clone(),
            metadata: ContainerMetadata { name: name.clone(), attempt: c.attempt },
            image: status.map(|s| s.image.clone()).unwrap_or_default(),
            image_id: ids.get(&image_ref).cloned().unwrap_or_else(|| image_ref.clone()),
            image_ref,
            state: match (c.running, began > 0 || ended.is_some()) {
                (true, _) => ContainerState::ContainerRunning,
                (false, true) => ContainerState::ContainerExited,
                (false, false) => ContainerState::ContainerCreated,
            },
            created_at: began.max(started),
            started_at: began,
            finished_at: nanos(ended.and_then(|e| e.finished_at.as_ref())),
            exit_code: ended.map_or(0, |e| e.exit_code),
            reason: ended.and_then(|e| e.reason.clone()).unwrap_or_default(),
            message: ended.and_then(|e| e.message.clone()).unwrap_or_default(),
            labels,
            annotations: [restarts].into(),
            mounts: Vec::new(),
            log_path: start::log_path(ctx, pod, name, c.attempt),
            bundle: exec::bundle(&ctx.config.paths, uid, name, c.attempt),
            cgroup: format!("{}/{}", view.cgroup, c.id),
            tty: c.tty,
            user: status.and_then(|s| s.user.as_ref()?.linux.as_ref()).map(|u| cri::LinuxContainerUser {
                uid: u.uid,
                gid: u.gid,
                supplemental_groups: u.supplemental_groups.clone().unwrap_or_default(),
            }),
            supervisor: s.supervisor.clone(),
            ended: c.exit_code.clone(),
            foreign: false,
        }
    };
    let containers = s.containers.iter().map(of).collect();
    Group { sandbox: view, containers }
}

impl Sandbox {
    pub(super) fn state(&self) -> cri::PodSandboxState {
        if self.ready { cri::PodSandboxState::SandboxReady } else { cri::PodSandboxState::SandboxNotready }
    }

    pub(super) fn listed(&self) -> cri::PodSandbox {
        cri::PodSandbox {
            id: self.id.clone(),
            metadata: Some(self.metadata.clone()),
            state: self.state().into(),
            created_at: self.created_at,
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            runtime_handler: self.handler.clone(),
        }
    }

    pub(super) fn status(&self) -> cri::PodSandboxStatus {
        let mut ips = self.ips.iter().map(ToString::to_string);
        let host = self.namespaces.network == i32::from(NamespaceMode::Node);
        let network = (!host).then(|| cri::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
        });
        let options = Some(self.namespaces.clone());
        cri::PodSandboxStatus {
            id: self.id.clone(),
            metadata: Some(self.metadata.clone()),
            state: self.state().into(),
            created_at: self.created_at,
            network: Some(network.unwrap_or_default()),
            linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options }) }),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            runtime_handler: self.handler.clone(),
        }
    }
}

impl Container {
    fn image_spec(&self) -> Option<cri::ImageSpec> {
        let image = self.image.clone();
        Some(cri::ImageSpec { user_specified_image: image.clone(), image, ..cri::ImageSpec::default() })
    }

    pub(super) fn listed(&self) -> cri::Container {
        cri::Container {
            id: self.id.clone(),
            pod_sandbox_id: self.sandbox.clone(),
            metadata: Some(self.metadata.clone()),
            image: self.image_spec(),
            image_ref: self.image_ref.clone(),
            state: self.state.into(),
            created_at: self.created_at,
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            image_id: self.image_id.clone(),
        }
    }

    pub(super) fn status(&self) -> cri::ContainerStatus {
        cri::ContainerStatus {
            id: self.id.clone(),
            metadata: Some(self.metadata.clone()),
            state: self.state.into(),
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            exit_code: self.exit_code,
            image: self.image_spec(),
            image_ref: self.image_ref.clone(),
            reason: self.reason.clone(),
            message: self.message.clone(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            mounts: self.mounts.clone(),
            log_path: self.log_path.display().to_string(),
            resources: None,
            image_id: self.image_id.clone(),
            user: self.user.clone().map(|linux| cri::ContainerUser { linux: Some(linux) }),
        }
    }

    /// Its supervisor, while it runs.
    pub(super) fn running(&self) -> Result<&Supervisor, Status> {
        let running = self.state == ContainerState::ContainerRunning;
        let found = self.supervisor.as_ref().filter(|_| running);
        found.ok_or_else(|| Status::failed_precondition(format!("container {:?} is not running", self.id)))
    }
}
