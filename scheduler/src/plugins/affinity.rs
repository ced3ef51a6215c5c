//! Scores of NodeAffinity and TaintToleration; their filters are single expressions in the chain.

use crate::cluster::NodeInfo;
use crate::model::PodInfo;

/// The weights of the preferences a node meets.
pub(crate) fn preferred(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let met = pod.preferred_nodes.iter().filter(|(_, term)| term.matches(&node.name, &node.labels));
    met.map(|(weight, _)| weight).sum()
}

/// How many PreferNoSchedule taints the pod does not tolerate.
pub(crate) fn unwelcome(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let taints = node.taints.iter().filter(|t| t.effect == "PreferNoSchedule" && !pod.tolerates(t));
    i64::try_from(taints.count()).unwrap_or(i64::MAX)
}
