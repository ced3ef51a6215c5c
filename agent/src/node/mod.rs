//! This machine as a Node object: registration, status, conditions, lease.
//!
//! In: facts of the machine, the image list, the API's Node (for podCIDRs). Out: the Node, its status when it changes (or
//! every five minutes), its lease every ten seconds, the pod range for the network.

pub(crate) mod eviction;
mod images;
pub(crate) mod info;
pub(crate) mod oom;
pub(crate) mod pressure;
mod psi;
mod ranking;
pub(crate) mod shutdown;
mod startup;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{
            ContainerImage, Node, NodeCondition, NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures,
            NodeSpec, NodeStatus,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time},
    },
    jiff::Timestamp,
};
use kube::{
    Client,
    api::{Api, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::startup::Startup;
use crate::{
    api::{is_code, refusal},
    context::Context,
    events::Kind,
    pods::{sandbox, users},
};

fn now() -> Time {
    let t = Timestamp::now();
    Time(Timestamp::from_second(t.as_second()).unwrap_or(t))
}

/// A condition as it should be: type, status, reason, message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
}

/// What conditions are made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Signals {
    pub(crate) memory_low: bool,
    pub(crate) disk_low: bool,
    pub(crate) pids_low: bool,
    pub(crate) network: Option<String>,
    pub(crate) shutdown: bool,
}

/// The four conditions, in upstream's order.
pub(crate) fn conditions(s: &Signals) -> [Wanted; 4] {
    let pick = |kind, bad: bool, yes: (&'static str, &str), no: (&'static str, &str)| {
        let (reason, message) = if bad { yes } else { no };
        Wanted { kind, status: bad, reason, message: message.into() }
    };
    let ready = match &s.network {
        _ if s.shutdown => {
            Wanted { kind: "Ready", status: false, reason: "KubeletNotReady", message: "node is shutting down".into() }
        }
        None => Wanted {
            kind: "Ready",
            status: true,
            reason: "KubeletReady",
            message: "kubelet is posting ready status".into(),
        },
        Some(why) => Wanted {
            kind: "Ready",
            status: false,
            reason: "KubeletNotReady",
            message: format!(
                "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{why}"
            ),
        },
    };
    [
        pick(
            "MemoryPressure",
            s.memory_low,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        pick(
            "DiskPressure",
            s.disk_low,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pick(
            "PIDPressure",
            s.pids_low,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        ready,
    ]
}

/// Keeps the Node in step until `stop`; waits for an API server first.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let Some(client) = ctx.api.wait().await else { return };
    ctx.events.node(&ctx.node_name, Kind::Normal, "Starting", "Starting kubelet.");
    let work = async {
        let (uid_sender, uid) = tokio::sync::watch::channel(None);
        tokio::join!(status(&ctx, &client, uid_sender), lease(&ctx, &client, uid));
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// First pause after a failed request.
const PAUSE: Duration = Duration::from_millis(50);

async fn pause(d: &mut Duration) {
    tokio::time::sleep(*d).await;
    *d = (*d * 2).min(Duration::from_secs(7));
}

/// Says why something does not work: a refusal once, for a person to act on; an unreachable server is no news.
#[derive(Default)]
struct Complaint {
    said: Option<String>,
}

impl Complaint {
    fn say(&mut self, what: &str, error: &kube::Error) {
        match refusal(error) {
            Some(why) if self.said.as_ref() != Some(&why) => {
                tracing::warn!("{what}: the API server says: {why}");
                self.said = Some(why);
            }
            _ => tracing::debug!(%error, "{what}"),
        }
    }
}

/// Registers, then follows the Node: its pod range goes to the network, its status is kept.
async fn status(ctx: &Arc<Context>, client: &Client, uid: tokio::sync::watch::Sender<Option<String>>) {
    let nodes: Api<Node> = Api::all(client.clone());
    let (mut wait, mut complaint) = (PAUSE, Complaint::default());
    let mut network = ctx.network.changes();
    let mut pressure = ctx.pressure.subscribe();
    let mut shutdown = ctx.shutdown.subscribe();
    let mut startup = Startup::begin();
    let mut node = loop {
        match register(ctx, &nodes).await {
            Ok(node) => break node,
            Err(error) => {
                complaint.say("node not registered yet", &error);
                pause(&mut wait).await;
            }
        }
    };
    tracing::info!(node = %ctx.node_name, "node registered");
    startup.registered(ctx);
    let mut stream = watcher::watch_object(nodes.clone(), &ctx.node_name).backoff(crate::api::pauses()).boxed();
    let k = &ctx.config.kubelet;
    let mut images = ctx.images.changes();
    let mut volumes = ctx.csi.in_use();
    let mut devices = ctx.devices.changes();
    let report = k.node_status_report_frequency.max(Duration::from_secs(1));
    let mut written = tokio::time::Instant::now() - report;
    let mut retry = PAUSE;
    let mut schedulable: Option<bool> = None;
    rebooted(ctx, &node);
    loop {
        let mut failed = false;
        uid.send_replace(node.metadata.uid.clone());
        take_pod_cidr(ctx, &node);
        ctx.csi.take_node(&node);
        *ctx.node.write() = Some(Arc::new(node.clone()));
        network.borrow_and_update();
        pressure.borrow_and_update();
        shutdown.borrow_and_update();
        images.borrow_and_update();
        volumes.borrow_and_update();
        devices.borrow_and_update();
        let unschedulable = node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
        if schedulable.replace(!unschedulable).is_some_and(|before| before == unschedulable) {
            let reason = if unschedulable { "NodeNotSchedulable" } else { "NodeSchedulable" };
            ctx.events.node(
                &ctx.node_name,
                Kind::Normal,
                reason,
                format!("Node {} status is now: {reason}", ctx.node_name),
            );
        }
        let fresh = tokio::time::Instant::now() - written >= report;
        let (patch, changed, events) = status_patch(ctx, &node);
        if changed || fresh {
            match nodes.patch_status(&ctx.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                Ok(n) => {
                    node = n;
                    startup.seen(ctx, &node);
                    written = tokio::time::Instant::now();
                    (retry, complaint) = (PAUSE, Complaint::default());
                    for (reason, text) in events {
                        ctx.events.node(&ctx.node_name, Kind::Normal, &reason, text);
                    }
                }
                Err(error) => {
                    complaint.say("node status not written", &error);
                    failed = true;
                }
            }
        }
        // Cancel-safe: what a stream or channel has is still there in the next round.
        tokio::select! {
            () = tokio::time::sleep_until(written + report), if !failed => {}
            Ok(()) = images.changed() => {}
            Ok(()) = network.changed() => {}
            Ok(()) = volumes.changed() => {}
            Ok(()) = devices.changed() => {}
            Ok(()) = pressure.changed() => {}
            Ok(()) = shutdown.changed() => {}
            () = tokio::time::sleep(retry), if failed => retry = (retry * 2).min(Duration::from_secs(7)),
            event = stream.next() => match event {
                Some(Ok(Some(n))) => node = n,
                Some(Ok(None)) => match register(ctx, &nodes).await {
                    Ok(n) => node = n,
                    Err(error) => complaint.say("node not registered again", &error),
                },
                Some(Err(error)) => tracing::debug!(%error, "watch of the node"),
                None => return,
            }
        }
    }
}

/// Tells when the machine has started anew since it last wrote its status.
fn rebooted(ctx: &Context, node: &Node) {
    let before = node.status.as_ref().and_then(|s| s.node_info.as_ref()).map(|i| i.boot_id.as_str()).unwrap_or("");
    let now = info::system_info().boot_id;
    if !before.is_empty() && before != now {
        let text = format!("Node {} has been rebooted, boot id: {now}", ctx.node_name);
        ctx.events.node(&ctx.node_name, Kind::Warning, "Rebooted", text);
    }
    if !ctx.cgroups.memory_is_v2() {
        let text = "cgroup v1 support is in maintenance mode, please migrate to cgroup v2";
        ctx.events.node(&ctx.node_name, Kind::Warning, "CgroupV1", text);
    }
    if ctx.machine.swap > 0 {
        let text = "Memory-backed volumes (e.g. secrets) might be swapped to disk: their tmpfs is the machine's /run, and there is swap";
        ctx.events.node(&ctx.node_name, Kind::Warning, "PossibleMemoryBackedVolumesOnDisk", text);
    }
}

fn take_pod_cidr(ctx: &Context, node: &Node) {
    let spec = node.spec.clone().unwrap_or_default();
    let mut all: Vec<String> = spec.pod_cidrs.unwrap_or_default();
    if all.is_empty() {
        all.extend(spec.pod_cidr);
    }
    let parsed: Vec<ipnet::IpNet> = all.iter().filter_map(|c| c.parse().ok()).collect();
    if !parsed.is_empty() {
        ctx.network.set_pod_cidr(parsed);
    }
}

fn labels(ctx: &Context) -> BTreeMap<String, String> {
    let host = ctx.node_name.to_string();
    let arch = info::architecture();
    let mut all: BTreeMap<String, String> = [
        ("beta.kubernetes.io/arch", arch),
        ("beta.kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch),
        ("kubernetes.io/hostname", host.as_str()),
        ("kubernetes.io/os", "linux"),
    ]
    .map(|(k, v)| (k.to_string(), v.to_string()))
    .into();
    all.extend(ctx.config.labels.clone());
    all
}

async fn register(ctx: &Arc<Context>, nodes: &Api<Node>) -> Result<Node, kube::Error> {
    let k = &ctx.config.kubelet;
    if let Some(node) = nodes.get_opt(&ctx.node_name).await? {
        let known = node.metadata.labels.clone().unwrap_or_default();
        let missing: BTreeMap<String, String> =
            labels(ctx).into_iter().filter(|(key, v)| known.get(key) != Some(v)).collect();
        if missing.is_empty() {
            return Ok(node);
        }
        let patch = json!({"metadata": {"labels": missing}});
        return nodes.patch(&ctx.node_name, &PatchParams::default(), &Patch::Merge(patch)).await;
    }
    if !k.register_node {
        return Err(kube::Error::Api(
            kube::core::Status::failure("registerNode is off and the node does not exist", "NotFound")
                .with_code(404)
                .boxed(),
        ));
    }
    let (status, events) = full_status(ctx, None);
    let node = Node {
        metadata: ObjectMeta {
            name: Some(ctx.node_name.to_string()),
            labels: Some(labels(ctx)),
            annotations: Some(BTreeMap::from([(
                "volumes.kubernetes.io/controller-managed-attach-detach".to_string(),
                "true".to_string(),
            )])),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id: k.provider_id.clone(),
            taints: Some(k.register_with_taints.clone()).filter(|t| !t.is_empty()),
            ..NodeSpec::default()
        }),
        status: Some(status),
    };
    match nodes.create(&PostParams::default(), &node).await {
        Err(e) if is_code(&e, 409) => nodes.get(&ctx.node_name).await,
        Ok(node) => {
            for (reason, text) in events.into_iter().filter(|(reason, _)| reason.starts_with("NodeHas")) {
                ctx.events.node(&ctx.node_name, Kind::Normal, &reason, text);
            }
            let text = "Updated Node Allocatable limit across pods";
            ctx.events.node(&ctx.node_name, Kind::Normal, "NodeAllocatableEnforced", text);
            Ok(node)
        }
        other => other,
    }
}

fn signals(ctx: &Context) -> Signals {
    let p = *ctx.pressure.borrow();
    let shutdown = *ctx.shutdown.borrow();
    Signals { memory_low: p.memory, disk_low: p.disk, pids_low: p.pids, network: ctx.network.not_ready(), shutdown }
}

/// What the default handler and those of RuntimeClasses can do.
fn handlers() -> Vec<NodeRuntimeHandler> {
    let features = NodeRuntimeHandlerFeatures {
        recursive_read_only_mounts: Some(true),
        user_namespaces: Some(users::supported()),
    };
    let names = [""].into_iter().chain(sandbox::HANDLERS);
    names.map(|n| NodeRuntimeHandler { name: Some(n.into()), features: Some(features.clone()) }).collect()
}

/// The status as it should be, and events for conditions that turned.
fn full_status(ctx: &Context, old: Option<&NodeStatus>) -> (NodeStatus, Vec<(String, String)>) {
    let (mut capacity, mut allocatable) = info::resources(&ctx.config, &ctx.machine);
    for (name, all, healthy) in ctx.devices.amounts() {
        capacity.insert(name.clone(), Quantity(all.to_string()));
        allocatable.insert(name, Quantity(healthy.to_string()));
    }
    let at = now();
    let mut events = Vec::new();
    let list = conditions(&signals(ctx))
        .into_iter()
        .map(|w| {
            let status = if w.status { "True" } else { "False" };
            let before = old.and_then(|s| s.conditions.as_ref()).into_iter().flatten().find(|c| c.type_ == w.kind);
            let same = before.filter(|c| c.status == status);
            if same.is_none() {
                let reason = match (w.kind, w.status) {
                    ("Ready", true) => "NodeReady".to_string(),
                    ("Ready", false) => "NodeNotReady".to_string(),
                    _ => w.reason.replace("Kubelet", "Node"),
                };
                events.push((reason.clone(), format!("Node {} status is now: {reason}", ctx.node_name)));
            }
            NodeCondition {
                type_: w.kind.into(),
                status: status.into(),
                reason: Some(w.reason.into()),
                message: Some(w.message),
                last_heartbeat_time: Some(at.clone()),
                last_transition_time: same.and_then(|c| c.last_transition_time.clone()).or(Some(at.clone())),
            }
        })
        .collect();
    let most = usize::try_from(ctx.config.kubelet.node_status_max_images).unwrap_or(usize::MAX);
    let mut addresses: Vec<_> =
        ctx.machine.ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
    addresses.push(json!({"type": "Hostname", "address": ctx.node_name.as_ref()}));
    let status = NodeStatus {
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        addresses: serde_json::from_value(json!(addresses)).ok(),
        conditions: Some(list),
        daemon_endpoints: serde_json::from_value(json!({"kubeletEndpoint": {"Port": ctx.config.kubelet.port}})).ok(),
        images: Some(images(ctx, most)),
        node_info: Some(info::system_info()),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(true) }),
        runtime_handlers: Some(handlers()),
        volumes_in_use: Some(ctx.csi.in_use().borrow().iter().cloned().collect()),
        ..NodeStatus::default()
    };
    (status, events)
}

/// This machine as a Node: the API's with its status as it is now; its own word alone where there is no API.
pub(crate) fn object(ctx: &Context) -> serde_json::Value {
    let known = ctx.node.read().clone();
    let mut node = known.as_deref().cloned().unwrap_or_else(|| Node {
        metadata: ObjectMeta {
            name: Some(ctx.node_name.to_string()),
            labels: Some(labels(ctx)),
            ..ObjectMeta::default()
        },
        ..Node::default()
    });
    let (mut status, _) = full_status(ctx, node.status.as_ref());
    status.images = Some(images(ctx, usize::MAX));
    node.status = Some(status);
    serde_json::to_value(node).unwrap_or_default()
}

fn images(ctx: &Context, most: usize) -> Vec<ContainerImage> {
    let all = ctx.images.list().into_iter().take(most);
    all.map(|i| ContainerImage {
        names: Some(i.names.into_iter().take(5).collect()),
        size_bytes: i64::try_from(i.size).ok(),
    })
    .collect()
}

/// A patch of the status, whether anything but heartbeats changes by it, and events.
fn status_patch(ctx: &Context, node: &Node) -> (serde_json::Value, bool, Vec<(String, String)>) {
    let old = node.status.clone().unwrap_or_default();
    let (fresh, events) = full_status(ctx, Some(&old));
    let mut comparable = fresh.clone();
    for c in comparable.conditions.iter_mut().flatten() {
        let before = old.conditions.iter().flatten().find(|o| o.type_ == c.type_);
        c.last_heartbeat_time = before.and_then(|o| o.last_heartbeat_time.clone());
    }
    let changed = [
        comparable.capacity != old.capacity,
        comparable.allocatable != old.allocatable,
        comparable.addresses != old.addresses,
        comparable.node_info != old.node_info,
        comparable.daemon_endpoints != old.daemon_endpoints,
        comparable.features != old.features,
        comparable.runtime_handlers != old.runtime_handlers,
        comparable.volumes_in_use.unwrap_or_default() != old.volumes_in_use.clone().unwrap_or_default(),
        comparable.images.unwrap_or_default() != old.images.clone().unwrap_or_default(),
        comparable.conditions.iter().flatten().any(|c| !old.conditions.iter().flatten().any(|o| o == c)),
    ];
    (json!({ "status": fresh }), changed.contains(&true), events)
}

/// Renews the node's lease.
async fn lease(ctx: &Arc<Context>, client: &Client, uid: tokio::sync::watch::Receiver<Option<String>>) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    let seconds = ctx.config.kubelet.node_lease_duration_seconds.max(4);
    let every = Duration::from_secs(u64::try_from(seconds / 4).unwrap_or(10));
    let name = ctx.node_name.to_string();
    let (mut wait, mut complaint) = (PAUSE, Complaint::default());
    loop {
        let (renew, asked) = (MicroTime(Timestamp::now()), std::time::Instant::now());
        let patch = json!({"spec": {"renewTime": renew, "holderIdentity": name, "leaseDurationSeconds": seconds}});
        let mut result = leases.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
        if result.as_ref().is_err_and(|e| is_code(e, 404)) {
            let owner = uid.borrow().clone().map(|uid| OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.clone(),
                uid,
                ..OwnerReference::default()
            });
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    namespace: Some("kube-node-lease".into()),
                    owner_references: owner.map(|o| vec![o]),
                    ..ObjectMeta::default()
                },
                spec: Some(LeaseSpec {
                    holder_identity: Some(name.clone()),
                    lease_duration_seconds: Some(seconds),
                    renew_time: Some(MicroTime(Timestamp::now())),
                    ..LeaseSpec::default()
                }),
            };
            result = leases.create(&PostParams::default(), &lease).await;
        }
        match result {
            Ok(_) => {
                let life = Duration::from_secs(u64::try_from(seconds).unwrap_or(40));
                ctx.config.lease.send_replace(Some(asked + life));
                (wait, complaint) = (PAUSE, Complaint::default());
                tokio::time::sleep(every).await;
            }
            Err(error) => {
                complaint.say("node lease not renewed", &error);
                pause(&mut wait).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_by_signal() {
        let text = |s: &Signals| conditions(s).map(|w| (w.kind, w.status, w.reason));
        assert_eq!(
            text(&Signals::default()),
            [
                ("MemoryPressure", false, "KubeletHasSufficientMemory"),
                ("DiskPressure", false, "KubeletHasNoDiskPressure"),
                ("PIDPressure", false, "KubeletHasSufficientPID"),
                ("Ready", true, "KubeletReady"),
            ]
        );
        let bad = Signals { memory_low: true, network: Some("no pod range".into()), ..Signals::default() };
        assert_eq!(text(&bad)[0].2, "KubeletHasInsufficientMemory");
        assert_eq!(text(&bad)[3], ("Ready", false, "KubeletNotReady"));
    }
}
