//! The CSINode of this machine, and what drivers say of the Node: topology labels and the annotation with their ids.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        core::v1::Node,
        storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Client,
    api::{Api, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Driver;
use crate::{api::is_code, context::Context};

const IDS: &str = "csi.volume.kubernetes.io/nodeid";

type Drivers = BTreeMap<String, Arc<Driver>>;

/// Keeps them in step with the registered drivers until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let work = async {
        let Some(client) = ctx.api.wait().await else { return };
        let mut drivers = ctx.csi.drivers.subscribe();
        let mut pause = Duration::from_millis(100);
        loop {
            let wanted = drivers.borrow_and_update().clone();
            match write(&client, &ctx.node_name, &wanted).await {
                Ok(()) => {
                    pause = Duration::from_millis(100);
                    if drivers.changed().await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "CSINode");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(10));
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// What the CSINode should say.
fn spec(drivers: &Drivers) -> CSINodeSpec {
    let entry = |d: &Arc<Driver>| CSINodeDriver {
        name: d.name.clone(),
        node_id: d.node_id.clone(),
        topology_keys: Some(d.topology.keys().cloned().collect()),
        allocatable: (d.max_volumes > 0)
            .then(|| VolumeNodeResources { count: Some(i32::try_from(d.max_volumes).unwrap_or(i32::MAX)) }),
    };
    CSINodeSpec { drivers: drivers.values().map(entry).collect() }
}

async fn write(client: &Client, node: &str, drivers: &Drivers) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let own = nodes.get(node).await?;
    let csi_nodes: Api<CSINode> = Api::all(client.clone());
    let wanted = spec(drivers);
    match csi_nodes.get_opt(node).await? {
        Some(old) if sorted(&old.spec) == sorted(&wanted) => {}
        Some(mut old) => {
            old.spec = wanted;
            csi_nodes.replace(node, &PostParams::default(), &old).await?;
        }
        None => {
            let owner = OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node.into(),
                uid: own.metadata.uid.clone().unwrap_or_default(),
                ..OwnerReference::default()
            };
            let metadata =
                ObjectMeta { name: Some(node.into()), owner_references: Some(vec![owner]), ..ObjectMeta::default() };
            match csi_nodes.create(&PostParams::default(), &CSINode { metadata, spec: wanted }).await {
                Err(e) if !is_code(&e, 409) => return Err(e),
                _ => {}
            }
        }
    }
    mark(&nodes, node, &own, drivers).await
}

fn sorted(spec: &CSINodeSpec) -> BTreeMap<String, (String, Vec<String>, Option<i32>)> {
    let drivers = spec.drivers.iter().map(|d| {
        let mut keys = d.topology_keys.clone().unwrap_or_default();
        keys.sort();
        (d.name.clone(), (d.node_id.clone(), keys, d.allocatable.as_ref().and_then(|a| a.count)))
    });
    drivers.collect()
}

/// Labels of the drivers' topology (which stay when a driver goes) and the annotation of their ids.
async fn mark(nodes: &Api<Node>, name: &str, node: &Node, drivers: &Drivers) -> Result<(), kube::Error> {
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let topology = drivers.values().flat_map(|d| d.topology.iter());
    let missing: BTreeMap<_, _> = topology.filter(|(k, v)| labels.get(*k) != Some(*v)).collect();
    let ids: BTreeMap<&String, &String> = drivers.iter().map(|(name, d)| (name, &d.node_id)).collect();
    let text = (!ids.is_empty()).then(|| json!(ids).to_string());
    let before = node.metadata.annotations.as_ref().and_then(|a| a.get(IDS));
    if missing.is_empty() && before == text.as_ref() {
        return Ok(());
    }
    let patch = json!({"metadata": {"labels": missing, "annotations": {IDS: text}}});
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
}
