//! PodTopologySpread: pods that a selector counts as the same, spread over the values of a node label.

use super::{Plugin, Reject};
use crate::cluster::{Cluster, NodeIndex, NodeInfo};
use crate::model::{PodInfo, Spread};
use isopod_client::select::Selector;
use std::collections::{HashMap, HashSet};

const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";

/// How many matching pods each domain of each hard constraint has.
#[derive(Debug, Default)]
pub(crate) struct Hard {
    /// Parallel to the pod's hard constraints: domain -> count, and the smallest count.
    domains: Vec<(HashMap<String, i64>, i64)>,
}

fn counted(pod: &PodInfo, constraint: &Spread, node: &NodeInfo) -> bool {
    let tainted =
        || node.taints.iter().any(|t| matches!(t.effect.as_str(), "NoSchedule" | "NoExecute") && !pod.tolerates(t));
    (!constraint.honor_affinity || pod.allows_node(&node.name, &node.labels)) && !(constraint.honor_taints && tainted())
}

fn matching<'a>(
    cluster: &'a Cluster,
    pod: &'a PodInfo,
    selector: &'a Selector,
) -> impl Iterator<Item = (NodeIndex, i64)> + 'a {
    let groups = cluster.groups_in(&pod.namespace).filter(|g| !g.terminating && selector.matches(&g.labels));
    groups.flat_map(|group| group.nodes.iter().map(|(index, count)| (*index, *count)))
}

impl Hard {
    pub(crate) fn new(cluster: &Cluster, pod: &PodInfo) -> Self {
        let hard: Vec<&Spread> = pod.spread.iter().filter(|c| c.hard).collect();
        let mut state = Self::default();
        for constraint in &hard {
            let mut domains: HashMap<String, i64> = HashMap::new();
            let mut eligible: HashSet<NodeIndex> = HashSet::new();
            for (index, node) in cluster.nodes.iter().enumerate().filter(|(_, node)| node.exists) {
                let all_keys = hard.iter().all(|c| node.labels.contains_key(&c.topology));
                if all_keys && counted(pod, constraint, node) {
                    domains.entry(node.labels[&constraint.topology].clone()).or_default();
                    eligible.insert(index);
                }
            }
            for (index, count) in matching(cluster, pod, &constraint.selector) {
                if eligible.contains(&index)
                    && let Some(total) = domains.get_mut(&cluster.nodes[index].labels[&constraint.topology])
                {
                    *total += count;
                }
            }
            let enough = i64::try_from(domains.len()).unwrap_or(i64::MAX) >= constraint.min_domains;
            let smallest = if enough { domains.values().copied().min().unwrap_or(0) } else { 0 };
            state.domains.push((domains, smallest));
        }
        state
    }

    pub(crate) fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Reject> {
        for (constraint, (domains, smallest)) in pod.spread.iter().filter(|c| c.hard).zip(&self.domains) {
            let Some(value) = node.labels.get(&constraint.topology) else {
                let reason = "node(s) didn't match pod topology spread constraints (missing required label)";
                return Err(Reject::hopeless(Plugin::PodTopologySpread, reason));
            };
            let itself = i64::from(constraint.selector.matches(&pod.labels));
            let skew = domains.get(value).copied().unwrap_or(0) + itself - smallest;
            if skew > constraint.max_skew {
                let reason = "node(s) didn't match pod topology spread constraints";
                return Err(Reject::because(Plugin::PodTopologySpread, reason));
            }
        }
        Ok(())
    }
}

/// The constraints every pod of a workload has unless it brings its own.
fn system_defaults(selector: Selector) -> [Spread; 2] {
    let one = |topology: &str, max_skew, selector| Spread {
        topology: topology.to_owned(),
        max_skew,
        min_domains: 1,
        selector,
        hard: false,
        honor_affinity: true,
        honor_taints: false,
    };
    [one(HOSTNAME, 3, selector.clone()), one(ZONE, 5, selector)]
}

/// Scores of these nodes, normalised; `None` when nothing is to be spread. `workload` selects the pods of the pod's
/// Services and controller.
pub(crate) fn scores(
    cluster: &Cluster,
    pod: &PodInfo,
    nodes: &[NodeIndex],
    workload: impl FnOnce() -> Option<Selector>,
) -> Option<Vec<i64>> {
    let (constraints, strict) = if pod.spread.is_empty() {
        (system_defaults(workload()?).into(), false)
    } else {
        (pod.spread.iter().filter(|c| !c.hard).cloned().collect::<Vec<_>>(), true)
    };
    if constraints.is_empty() {
        return None;
    }
    let ignored =
        |index: NodeIndex| strict && !constraints.iter().all(|c| cluster.nodes[index].labels.contains_key(&c.topology));
    let considered: Vec<NodeIndex> = nodes.iter().copied().filter(|i| !ignored(*i)).collect();
    let mut raw: HashMap<NodeIndex, f64> = considered.iter().map(|i| (*i, 0.0)).collect();
    for constraint in &constraints {
        add_constraint(cluster, pod, constraint, &considered, &mut raw);
    }
    let round = |score: f64| score.round() as i64;
    let (mut min, mut max) = (i64::MAX, 0);
    for score in raw.values() {
        min = min.min(round(*score));
        max = max.max(round(*score));
    }
    let normal = |index: &NodeIndex| match raw.get(index) {
        None => 0,
        Some(_) if max == 0 => 100,
        Some(score) => 100 * (max + min - round(*score)) / max,
    };
    Some(nodes.iter().map(normal).collect())
}

fn add_constraint(
    cluster: &Cluster,
    pod: &PodInfo,
    constraint: &Spread,
    considered: &[NodeIndex],
    raw: &mut HashMap<NodeIndex, f64>,
) {
    let offset = (constraint.max_skew - 1) as f64;
    if constraint.topology == HOSTNAME {
        let weight = (considered.len() as f64 + 2.0).ln();
        let mut per_node: HashMap<NodeIndex, i64> = HashMap::new();
        for (index, count) in matching(cluster, pod, &constraint.selector) {
            *per_node.entry(index).or_default() += count;
        }
        for index in considered.iter().filter(|i| cluster.nodes[**i].labels.contains_key(HOSTNAME)) {
            let count = per_node.get(index).copied().unwrap_or(0) as f64;
            *raw.entry(*index).or_default() += count * weight + offset;
        }
        return;
    }
    let mut domains: HashMap<&str, i64> = HashMap::new();
    for index in considered {
        if let Some(value) = cluster.nodes[*index].labels.get(&constraint.topology) {
            domains.insert(value, 0);
        }
    }
    if domains.is_empty() {
        return;
    }
    let weight = (domains.len() as f64 + 2.0).ln();
    for (index, count) in matching(cluster, pod, &constraint.selector) {
        let node = &cluster.nodes[index];
        if let Some(value) = node.labels.get(&constraint.topology)
            && let Some(total) = domains.get_mut(value.as_str())
            && node.exists
            && counted(pod, constraint, node)
        {
            *total += count;
        }
    }
    for index in considered {
        if let Some(value) = cluster.nodes[*index].labels.get(&constraint.topology) {
            let count = domains.get(value.as_str()).copied().unwrap_or(0) as f64;
            *raw.entry(*index).or_default() += count * weight + offset;
        }
    }
}
