//! Pods: one worker each, told what to do by the [`manager`].

mod act;
mod admission;
mod adopt;
mod ends;
pub(crate) mod exec;
mod hooks;
pub(crate) mod manager;
mod message;
mod plan;
mod probing;
mod publish;
pub(crate) mod record;
mod resize;
pub(crate) mod sandbox;
pub(crate) mod start;
pub(crate) mod state;
mod status;
mod stop;
pub(crate) mod table;
pub(crate) mod users;
mod worker;
mod writer;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::{
    context::Context,
    objects::{ObjectKind, ObjectRef},
    spec::env,
    volumes::content,
};

/// Reason and message of a pod that ended because its node goes down.
pub(crate) const TERMINATED: (&str, &str) = ("Terminated", "Pod was terminated in response to imminent node shutdown.");

/// A container id: 64 hexadecimal digits.
pub(crate) fn new_id() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Ephemeral containers as ordinary ones that are never restarted.
fn ephemeral(pod: &Pod) -> Vec<Container> {
    let list = pod.spec.as_ref().and_then(|s| s.ephemeral_containers.as_ref());
    let as_container = |c| {
        let mut value = serde_json::to_value(c).ok()?;
        value["restartPolicy"] = "Never".into();
        serde_json::from_value(value).ok()
    };
    list.into_iter().flatten().filter_map(as_container).collect()
}

/// Every ConfigMap and Secret a pod refers to.
fn references(pod: &Pod) -> BTreeSet<ObjectRef> {
    let namespace = sandbox::namespace(pod);
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    let mut all = BTreeSet::new();
    for c in crate::qos::all_containers(spec) {
        all.extend(env::references(namespace, c));
    }
    for v in spec.volumes.iter().flatten() {
        if let Some(s) = content::sources(namespace, v) {
            all.extend(content::references(&s).cloned());
        }
    }
    for s in spec.image_pull_secrets.iter().flatten() {
        all.insert(ObjectRef { kind: ObjectKind::Secret, namespace: namespace.into(), name: s.name.clone() });
    }
    all
}

/// Removes a log file and what was rotated from it.
fn remove_logs(log: &Path) {
    let (Some(dir), Some(stem)) = (log.parent(), log.file_name().and_then(|n| n.to_str())) else { return };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|n| n == stem || n.starts_with(&format!("{stem}."))) {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

/// Removes supervisors, cgroups, networks, directories and logs that belong to none of these pods.
async fn manager_clean(ctx: &Arc<Context>, known: &[String]) {
    // Sandboxes made over the CRI socket have directories, groups and networks too.
    let known = &[known, &ctx.cri.on_disk()].concat();
    let paths = &ctx.config.paths;
    let names = |dir: std::path::PathBuf| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let mut strangers: BTreeSet<String> = names(paths.run_pods()).into_iter().collect();
    strangers.extend(names(paths.pods()));
    strangers.extend(ctx.cgroups.pods().into_keys());
    strangers.retain(|uid| !known.contains(uid));
    crate::csi::adopt(ctx, known);
    ctx.devices.retain(known);
    ctx.topology.retain(known);
    for uid in strangers {
        tracing::info!(uid, "removing what is left of a pod nobody knows");
        let (events, _) = tokio::sync::mpsc::unbounded_channel();
        let supervisor = crate::runtime::connect(&paths.run_pod(&uid), events).ok();
        if supervisor.is_some() {
            ctx.metrics.count("kubelet_orphaned_runtime_pods_total", []);
        }
        if let Err(error) = sandbox::remove(ctx, &uid, supervisor.as_ref(), None).await {
            tracing::warn!(uid, error, "leftovers");
        }
        manager::drop_directory(ctx, &uid);
    }
    if let Err(error) = ctx.network.reconcile(known).await {
        tracing::warn!(%error, "leftovers of pod networks");
    }
    for name in names(paths.logs()) {
        let ours = name.rsplit('_').next().is_some_and(|uid| known.iter().any(|k| k == uid));
        if !ours && name.matches('_').count() == 2 {
            std::fs::remove_dir_all(paths.logs().join(&name)).ok();
        }
    }
}
