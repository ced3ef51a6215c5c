//! The plugins: pure functions over the cluster. A filter says why a node is out, a score how good it is.
//!
//! What a filter needs to know of the whole cluster is computed once per pod in [`Prepared`]; the filters themselves are a
//! few comparisons. Their order is upstream's, and so are the words of their reasons.

pub(crate) mod affinity;
pub(crate) mod fit;
pub(crate) mod images;
pub(crate) mod interpod;
pub(crate) mod spread;
pub(crate) mod volumes;

use crate::cluster::{Cluster, NodeIndex};
use crate::model::PodInfo;
use k8s_openapi::api::core::v1::Taint;
use std::borrow::Cow;

/// Who rejected a node; decides which events can help the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Plugin {
    NodeUnschedulable,
    NodeName,
    TaintToleration,
    NodeAffinity,
    NodePorts,
    NodeResourcesFit,
    VolumeBinding,
    PodTopologySpread,
    InterPodAffinity,
    SchedulingGates,
}

/// Why a node is out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reject {
    pub(crate) plugin: Plugin,
    pub(crate) reasons: Vec<Cow<'static, str>>,
    /// Removing pods would not help.
    pub(crate) hopeless: bool,
}

impl Reject {
    fn hopeless(plugin: Plugin, reason: &'static str) -> Self {
        Self { plugin, reasons: vec![reason.into()], hopeless: true }
    }
    fn because(plugin: Plugin, reason: &'static str) -> Self {
        Self { plugin, reasons: vec![reason.into()], hopeless: false }
    }
}

/// What the filters of one pod need to know of the whole cluster.
#[derive(Debug)]
pub(crate) struct Prepared {
    spread: spread::Hard,
    interpod: interpod::Required,
    volumes: volumes::Needs,
}

impl Prepared {
    pub(crate) fn new(cluster: &Cluster, pod: &PodInfo, volumes: volumes::Needs) -> Self {
        Self { spread: spread::Hard::new(cluster, pod), interpod: interpod::Required::new(cluster, pod), volumes }
    }
}

/// Whether a pod can run on a node.
pub(crate) fn filter(cluster: &Cluster, pod: &PodInfo, prepared: &Prepared, index: NodeIndex) -> Result<(), Reject> {
    let node = &cluster.nodes[index];
    if node.unschedulable && !pod.tolerates(&unschedulable_taint()) {
        return Err(Reject::hopeless(Plugin::NodeUnschedulable, "node(s) were unschedulable"));
    }
    if !pod.node.is_empty() && pod.node != node.name {
        return Err(Reject::hopeless(Plugin::NodeName, "node(s) didn't match the requested node name"));
    }
    let untolerated = |t: &&Taint| matches!(t.effect.as_str(), "NoSchedule" | "NoExecute") && !pod.tolerates(t);
    if node.taints.iter().find(untolerated).is_some() {
        return Err(Reject::hopeless(Plugin::TaintToleration, "node(s) had untolerated taint(s)"));
    }
    if !pod.allows_node(&node.name, &node.labels) {
        return Err(Reject::hopeless(Plugin::NodeAffinity, "node(s) didn't match Pod's node affinity/selector"));
    }
    if pod.ports.iter().any(|port| node.port_in_use(port)) {
        let reason = "node(s) didn't have free ports for the requested pod ports";
        return Err(Reject::because(Plugin::NodePorts, reason));
    }
    fit::filter(pod, node)?;
    prepared.volumes.filter(node)?;
    prepared.spread.filter(pod, node)?;
    prepared.interpod.filter(pod, node)
}

fn unschedulable_taint() -> Taint {
    Taint { key: "node.kubernetes.io/unschedulable".into(), effect: "NoSchedule".into(), value: None, time_added: None }
}

/// Scales scores to 0..=100 of the highest; `reverse` turns them around.
pub(crate) fn normalize(scores: &mut [i64], reverse: bool) {
    let highest = scores.iter().copied().max().unwrap_or(0);
    for score in scores.iter_mut() {
        let share = if highest == 0 { 0 } else { *score * 100 / highest };
        *score = if reverse { 100 - share } else { share };
    }
}
