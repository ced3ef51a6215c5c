//! A pod's sandbox: its network, cgroup, files and supervisor; made, joined again, taken down.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use isopod_runtime::supervisor::{
    client::SOCKET,
    protocol::{ContainerStatus, Op, PidMode, PodConfig, VERSION},
};
use k8s_openapi::api::{
    core::v1::{Pod, PodSpec},
    node::v1::RuntimeClass,
};
use tokio::sync::mpsc;

use super::{state::Sandbox, users};
use crate::{
    claims,
    context::Context,
    events::Kind,
    network::{Bandwidth, HostPort, PodNetworkRequest, Protocol},
    qos::{self, Qos},
    quantity,
    runtime::{self, RuntimeEvent, Supervisor},
    spec::{files, security},
    volumes::mounts,
};

/// A sandbox that containers can be started in.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) supervisor: Supervisor,
    pub(crate) sandbox: Sandbox,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) hostname: String,
    pub(crate) shm: Option<PathBuf>,
}

pub(crate) fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub(crate) fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub(crate) fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// Whether a pod has a range of users to itself.
pub(crate) fn own_users(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|s| s.host_users == Some(false))
}

fn host_network(spec: &PodSpec) -> bool {
    spec.host_network == Some(true)
}

/// What the network is asked for.
pub(crate) fn network_request(pod: &Pod) -> PodNetworkRequest {
    let spec = pod.spec.as_ref();
    let containers = spec.into_iter().flat_map(qos::all_containers);
    let ports = containers.flat_map(|c| c.ports.iter().flatten());
    let host_ports = ports
        .filter_map(|p| {
            Some(HostPort {
                host_ip: p.host_ip.as_deref().filter(|i| !i.is_empty()).and_then(|i| i.parse().ok()),
                host_port: p.host_port.and_then(|h| u16::try_from(h).ok()).filter(|h| *h > 0)?,
                container_port: u16::try_from(p.container_port).ok()?,
                protocol: match p.protocol.as_deref() {
                    Some("UDP") => Protocol::Udp,
                    Some("SCTP") => Protocol::Sctp,
                    _ => Protocol::Tcp,
                },
            })
        })
        .collect();
    let annotation = |key: &str| {
        let text = pod.metadata.annotations.as_ref()?.get(key)?;
        quantity::milli(text).and_then(|m| u64::try_from(m / 1000).ok())
    };
    PodNetworkRequest {
        uid: uid(pod).into(),
        namespace: namespace(pod).into(),
        name: name(pod).into(),
        host_ports,
        bandwidth: Bandwidth {
            ingress: annotation("kubernetes.io/ingress-bandwidth"),
            egress: annotation("kubernetes.io/egress-bandwidth"),
        },
    }
}

/// The pod's group and its numbers; remembers a burstable pod's weight.
pub(crate) fn cgroup(ctx: &Context, pod: &Pod) -> Result<String, String> {
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    let class = qos::class(spec);
    let group = ctx.cgroups.pod_group(class, uid(pod));
    let limits = ctx.pod_limits(uid(pod), spec);
    let begun = Instant::now();
    let made = ctx.cgroups.create_pod(&group, &limits);
    ctx.metrics.observe("kubelet_cgroup_manager_duration_seconds", [("operation_type", "create")], begun.elapsed());
    made.map_err(|e| e.to_string())?;
    if class == Qos::Burstable {
        ctx.burstable_request(uid(pod), Some(qos::pod_amount(spec, "cpu").0));
    }
    Ok(group)
}

/// Makes everything a pod needs before its first container.
pub(crate) async fn create(
    ctx: &Arc<Context>,
    pod: &Pod,
    attempt: u32,
    events: mpsc::UnboundedSender<RuntimeEvent>,
) -> Result<Live, String> {
    create_in(ctx, pod, attempt, events, None).await
}

/// The same, with its group in one that somebody else has made and limited.
pub(crate) async fn create_in(
    ctx: &Arc<Context>,
    pod: &Pod,
    attempt: u32,
    events: mpsc::UnboundedSender<RuntimeEvent>,
    parent: Option<&str>,
) -> Result<Live, String> {
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    if let Some(name) = security::forbidden_sysctl(pod, &ctx.config.kubelet.allowed_unsafe_sysctls) {
        return Err(format!("forbidden sysctl: {name:?} not allowlisted"));
    }
    if own_users(pod) {
        if let Some(why) = users::refusal(spec) {
            return Err(format!("can't set spec.HostUsers: false: {why}"));
        }
        // Before anything uses it.
        ctx.users.of(uid(pod)).map_err(|e| format!("can't set spec.HostUsers: false: {e}"))?;
    }
    runtime_class(ctx, spec).await?;
    claims::prepare(ctx, pod).await.map_err(|e| format!("{}: {e}", claims::FAILED))?;
    let (netns, ips) = if host_network(spec) {
        (None, ctx.machine.ips.clone())
    } else {
        let made = ctx.network.setup(network_request(pod)).await;
        let made = made.map_err(|e| format!("failed to set up the pod's network: {e}"))?;
        (Some(made.netns), made.ips)
    };
    if attempt > 0 {
        // Nothing of the last sandbox may live on beside this one. Its groups go too: a kernel that was told to kill a
        // group by cgroup.kill also kills what is cloned from there into a newer group.
        let old = ctx.cgroups.pod_group(qos::class(spec), uid(pod));
        ctx.cgroups.end(&old).await.map_err(|e| e.to_string())?;
    }
    let group = match parent {
        None => cgroup(ctx, pod)?,
        Some(parent) => {
            let group = format!("{parent}/{}", uid(pod));
            ctx.cgroups.make(&group).map_err(|e| e.to_string())?;
            group
        }
    };
    let hostname = write_files(ctx, pod, &ips).map_err(|e| format!("failed to write the pod's files: {e}"))?;
    let shm = shared_memory(ctx, pod)?;
    let dir = ctx.config.paths.run_pod(uid(pod));
    let kubelet = &ctx.config.kubelet;
    let sysctls = spec.security_context.as_ref().and_then(|s| s.sysctls.clone()).unwrap_or_default();
    let config = PodConfig {
        version: VERSION,
        uid: uid(pod).into(),
        namespace: namespace(pod).into(),
        name: name(pod).into(),
        netns: netns.clone(),
        hostname: (!host_network(spec)).then(|| hostname.clone()),
        host_ipc: spec.host_ipc == Some(true),
        pid: match (spec.host_pid, spec.share_process_namespace) {
            (Some(true), _) => PidMode::Host,
            (_, Some(true)) => PidMode::Pod,
            _ => PidMode::Container,
        },
        sysctls: sysctls.into_iter().map(|s| (s.name.replace('/', "."), s.value)).collect(),
        cgroup: group.clone(),
        log_max_size: quantity::milli(&kubelet.container_log_max_size).map_or(0, |m| (m / 1000).max(0) as u64),
        log_max_files: kubelet.container_log_max_files,
    };
    let supervisor = runtime::launch(&ctx.config.runtime_binary, &dir, &config, events)
        .await
        .map_err(|e| format!("failed to start the supervisor: {e}"))?;
    // What a supervisor that died had is listed as ended; nobody asks for it any more.
    for old in supervisor.subscribe().await.map_err(|e| e.to_string())? {
        if let Err(error) = supervisor.done(Op::Delete { container: old.id }).await {
            tracing::warn!(pod = name(pod), %error, "leftovers of an earlier supervisor");
        }
    }
    Ok(Live { supervisor, sandbox: Sandbox { attempt, netns, ips: ips.clone(), cgroup: group }, ips, hostname, shm })
}

/// Handlers of RuntimeClasses that mean this node's own runtime.
pub(crate) const HANDLERS: [&str; 2] = ["isopod", "runc"];

/// A pod of a RuntimeClass is only run by the handler it names.
async fn runtime_class(ctx: &Context, spec: &PodSpec) -> Result<(), String> {
    let Some(name) = spec.runtime_class_name.as_deref().filter(|n| !n.is_empty()) else { return Ok(()) };
    let client =
        ctx.api.get().ok_or_else(|| format!("RuntimeClass {name:?} cannot be read: there is no API server"))?;
    let classes: kube::Api<RuntimeClass> = kube::Api::all(client);
    let class = classes.get(name).await.map_err(|e| format!("failed to get RuntimeClass {name:?}: {e}"))?;
    if HANDLERS.contains(&class.handler.as_str()) {
        return Ok(());
    }
    Err(format!("no runtime for {:?} is configured", class.handler))
}

/// Joins the sandbox of a pod that ran before this agent did: the sandbox and its containers as they stand.
pub(crate) async fn join(
    ctx: &Arc<Context>,
    pod: &Pod,
    sandbox: &Sandbox,
    events: mpsc::UnboundedSender<RuntimeEvent>,
) -> Result<(Live, Vec<ContainerStatus>), String> {
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    let dir = ctx.config.paths.run_pod(uid(pod));
    let supervisor = runtime::connect(&dir, events).map_err(|e| e.to_string())?;
    let containers = supervisor.subscribe().await.map_err(|e| e.to_string())?;
    if !host_network(spec) {
        // Idempotent: tells the network that this pod still holds its addresses.
        if let Err(error) = ctx.network.setup(network_request(pod)).await {
            tracing::warn!(pod = name(pod), %error, "the pod's network cannot be confirmed");
        }
    }
    if qos::class(spec) == Qos::Burstable {
        ctx.burstable_request(uid(pod), Some(qos::pod_amount(spec, "cpu").0));
    }
    let hostname = files::hostname(pod, &ctx.config.kubelet.cluster_domain).kernel;
    let shm = Some(shm_path(ctx, pod)).filter(|p| p.exists());
    let live = Live { supervisor, sandbox: sandbox.clone(), ips: sandbox.ips.clone(), hostname, shm };
    Ok((live, containers))
}

/// Whether a pod's supervisor was shut down (or the machine was): one that died leaves its socket.
pub(crate) fn was_stopped(ctx: &Context, uid: &str) -> bool {
    !ctx.config.paths.run_pod(uid).join(SOCKET).exists()
}

fn shm_path(ctx: &Context, pod: &Pod) -> PathBuf {
    ctx.config.paths.run_pod(uid(pod)).join("shm")
}

/// Containers of one pod share /dev/shm; a pod of one container needs no mount on the host for that.
fn shared_memory(ctx: &Context, pod: &Pod) -> Result<Option<PathBuf>, String> {
    let Some(spec) = &pod.spec else { return Ok(None) };
    let count = qos::all_containers(spec).count();
    if count < 2 || spec.host_ipc == Some(true) {
        return Ok(None);
    }
    let path = shm_path(ctx, pod);
    fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    if !mounts::is_mount(&path) {
        use nix::mount::MsFlags;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        nix::mount::mount(Some("shm"), &path, Some("tmpfs"), flags, Some("mode=1777,size=65536k"))
            .map_err(|e| format!("mount {}: {e}", path.display()))?;
    }
    Ok(Some(path))
}

/// Directory of /etc/hosts and its like.
pub(crate) fn files_dir(ctx: &Context, pod: &Pod) -> PathBuf {
    ctx.config.paths.pod(uid(pod)).join("etc")
}

fn write_files(ctx: &Context, pod: &Pod, ips: &[IpAddr]) -> io::Result<String> {
    let spec = pod.spec.clone().unwrap_or_default();
    let kubelet = &ctx.config.kubelet;
    let dir = files_dir(ctx, pod);
    fs::create_dir_all(&dir)?;
    let names = files::hostname(pod, &kubelet.cluster_domain);
    let host_file = host_network(&spec).then(|| fs::read_to_string("/etc/hosts").unwrap_or_default());
    fs::write(dir.join("hosts"), files::hosts(&spec, ips, &names, host_file.as_deref()))?;
    let mut resolver = files::resolver(pod, &ctx.machine.resolver, &kubelet.cluster_dns, &kubelet.cluster_domain);
    for text in resolver.fit() {
        ctx.events.pod(pod, Kind::Warning, "DNSConfigForming", text);
    }
    if let Some(text) = files::no_cluster_dns(pod, &kubelet.cluster_dns) {
        ctx.events.pod(pod, Kind::Warning, "MissingClusterDNS", text);
    }
    fs::write(dir.join("resolv.conf"), resolver.render())?;
    let kernel = if host_network(&spec) {
        fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string()
    } else {
        names.kernel
    };
    fs::write(dir.join("hostname"), format!("{kernel}\n"))?;
    Ok(kernel)
}

/// Takes a pod's sandbox down: processes, network, mounts, cgroups, run directory. Goes on after errors; all are told.
pub(crate) async fn remove(
    ctx: &Context,
    uid: &str,
    supervisor: Option<&Supervisor>,
    cgroup: Option<&str>,
) -> Result<(), String> {
    let mut errors = Vec::new();
    if let Some(s) = supervisor {
        let shutdown = s.done(Op::Shutdown);
        if tokio::time::timeout(Duration::from_secs(10), shutdown).await.is_err() {
            errors.push("the supervisor does not shut down".to_string());
        }
    }
    let known = ctx.cgroups.pods().remove(uid);
    for group in cgroup.map(ToString::to_string).into_iter().chain(known) {
        let begun = Instant::now();
        let ended = ctx.cgroups.end(&group).await;
        let labels = [("operation_type", "destroy")];
        ctx.metrics.observe("kubelet_cgroup_manager_duration_seconds", labels, begun.elapsed());
        if let Err(e) = ended {
            errors.push(e.to_string());
        }
    }
    if let Err(e) = ctx.network.teardown(uid).await {
        errors.push(e.to_string());
    }
    let dirs = [ctx.config.paths.run_pod(uid), ctx.config.paths.pod(uid).join("volume-subpaths")];
    let removed = tokio::task::spawn_blocking(move || mounts::remove_trees(&[&dirs[0], &dirs[1]])).await;
    if let Err(e) = removed.unwrap_or_else(|e| Err(io::Error::other(e))) {
        errors.push(format!("{}: {e}", ctx.config.paths.run_pod(uid).display()));
    }
    ctx.burstable_request(uid, None);
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}

/// Removes what a pod keeps on disk besides: volumes and containers, at the end also its memory.
pub(crate) fn remove_data(pod_dir: &Path, everything: bool) -> io::Result<()> {
    if everything {
        return mounts::remove_tree(pod_dir);
    }
    let [volumes, containers, etc] = ["volumes", "containers", "etc"].map(|part| pod_dir.join(part));
    mounts::remove_trees(&[&volumes, &containers, &etc])
}
