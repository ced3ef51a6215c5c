//! One scheduling cycle: filter, score, choose; or say why no node will do. Pure and synchronous.

use crate::cluster::{Cluster, NodeIndex};
use crate::model::PodInfo;
use crate::plugins::volumes::Needs;
use crate::plugins::{self, Plugin, Prepared, Reject, affinity, fit, images, interpod, normalize, spread};
use isopod_client::select::Selector;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Why a pod fits nowhere.
#[derive(Debug, Default)]
pub(crate) struct Unfit {
    pub(crate) total: usize,
    /// One reason for all nodes, found before looking at any.
    pub(crate) upfront: Option<String>,
    pub(crate) reasons: BTreeMap<String, usize>,
    pub(crate) plugins: BTreeSet<Plugin>,
    /// Nodes where removing pods could help.
    pub(crate) preemptable: Vec<NodeIndex>,
}

impl Unfit {
    fn note(&mut self, index: NodeIndex, reject: Reject) {
        self.plugins.insert(reject.plugin);
        for reason in reject.reasons {
            *self.reasons.entry(reason.into_owned()).or_default() += 1;
        }
        if !reject.hopeless {
            self.preemptable.push(index);
        }
    }

    /// Upstream's sentence, without what preemption has to add.
    pub(crate) fn message(&self) -> String {
        if self.total == 0 {
            return "no nodes available to schedule pods".to_owned();
        }
        let detail = match &self.upfront {
            Some(reason) => reason.clone(),
            None => {
                let mut parts: Vec<String> = self.reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
                parts.sort();
                parts.join(", ")
            }
        };
        format!("0/{} nodes are available: {detail}.", self.total)
    }
}

/// How many feasible nodes are enough to choose from: all of 100, then a falling share, at least 5 %.
pub(crate) fn enough(nodes: usize) -> usize {
    if nodes < 100 {
        return nodes;
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(100)
}

/// The node for a pod.
pub(crate) fn schedule(
    cluster: &mut Cluster,
    pod: &PodInfo,
    needs: Result<Needs, String>,
    workload: impl FnOnce() -> Option<Selector>,
) -> Result<NodeIndex, Unfit> {
    let mut unfit = Unfit { total: cluster.len(), ..Unfit::default() };
    if unfit.total == 0 {
        return Err(unfit);
    }
    let needs = match needs {
        Ok(needs) => needs,
        Err(reason) => {
            unfit.upfront = Some(reason);
            unfit.plugins.insert(Plugin::VolumeBinding);
            return Err(unfit);
        }
    };
    let prepared = Prepared::new(cluster, pod, needs);
    if let Some(index) = cluster.index(&pod.nominated)
        && feasible(cluster, pod, &prepared, index).is_ok()
    {
        return Ok(index);
    }
    let found = candidates(cluster, pod, &prepared, &mut unfit);
    match found.as_slice() {
        [] => Err(unfit),
        [only] => Ok(*only),
        _ => Ok(best(cluster, pod, &found, workload)),
    }
}

/// The filters, counting pods of at least this priority that wait for the node after a preemption as if they were there.
pub(crate) fn feasible(
    cluster: &mut Cluster,
    pod: &PodInfo,
    prepared: &Prepared,
    index: NodeIndex,
) -> Result<(), Reject> {
    let name = cluster.nodes[index].name.clone();
    let expected: Vec<Arc<PodInfo>> = if cluster.nominated.is_empty() {
        Vec::new()
    } else {
        let waits = |p: &&Arc<PodInfo>| p.nominated == name && p.uid != pod.uid && p.priority >= pod.priority;
        cluster.nominated.values().filter(waits).cloned().collect()
    };
    if expected.is_empty() {
        return plugins::filter(cluster, pod, prepared, index);
    }
    for other in &expected {
        cluster.place(other, &name);
    }
    let with = Prepared::new(cluster, pod, Needs::default());
    let result = plugins::filter(cluster, pod, &with, index);
    for other in &expected {
        cluster.unplace(&other.uid);
    }
    result.and_then(|()| plugins::filter(cluster, pod, prepared, index))
}

fn candidates(cluster: &mut Cluster, pod: &PodInfo, prepared: &Prepared, unfit: &mut Unfit) -> Vec<NodeIndex> {
    let mut found = Vec::new();
    if let Some(names) = pod.named_nodes() {
        let named: BTreeSet<NodeIndex> = names.iter().filter_map(|name| cluster.index(name)).collect();
        let elsewhere = cluster.len() - named.len();
        if elsewhere > 0 {
            let reason = "node(s) didn't satisfy plugin(s) [NodeAffinity]";
            unfit.reasons.insert(reason.to_owned(), elsewhere);
            unfit.plugins.insert(Plugin::NodeAffinity);
        }
        for index in named {
            match feasible(cluster, pod, prepared, index) {
                Ok(()) => found.push(index),
                Err(reject) => unfit.note(index, reject),
            }
        }
        return found;
    }
    let slots = cluster.nodes.len();
    let wanted = enough(cluster.len());
    let start = cluster.next_start % slots;
    let mut looked = 0;
    for step in 0..slots {
        let index = (start + step) % slots;
        looked = step + 1;
        if !cluster.nodes[index].exists {
            continue;
        }
        match feasible(cluster, pod, prepared, index) {
            Ok(()) => {
                found.push(index);
                if found.len() >= wanted {
                    break;
                }
            }
            Err(reject) => unfit.note(index, reject),
        }
    }
    cluster.next_start = (start + looked) % slots;
    found
}

fn best(
    cluster: &Cluster,
    pod: &PodInfo,
    nodes: &[NodeIndex],
    workload: impl FnOnce() -> Option<Selector>,
) -> NodeIndex {
    let mut totals: Vec<i64> = nodes
        .iter()
        .map(|index| {
            let node = &cluster.nodes[*index];
            fit::least_allocated(pod, node) + fit::balance(pod, node) + images::score(cluster, pod, node)
        })
        .collect();
    let mut weigh = |weight: i64, scores: Vec<i64>| {
        for (total, score) in totals.iter_mut().zip(scores) {
            *total += weight * score;
        }
    };
    let mut taints: Vec<i64> = nodes.iter().map(|i| affinity::unwelcome(pod, &cluster.nodes[*i])).collect();
    if taints.iter().any(|n| *n > 0) {
        normalize(&mut taints, true);
        weigh(3, taints);
    }
    if !pod.preferred_nodes.is_empty() {
        let mut preferred: Vec<i64> = nodes.iter().map(|i| affinity::preferred(pod, &cluster.nodes[*i])).collect();
        normalize(&mut preferred, false);
        weigh(2, preferred);
    }
    if let Some(scores) = spread::scores(cluster, pod, nodes, workload) {
        weigh(2, scores);
    }
    if let Some(scores) = interpod::scores(cluster, pod, nodes) {
        weigh(2, scores);
    }
    let highest = totals.iter().copied().max().unwrap_or(0);
    let ties: Vec<NodeIndex> =
        nodes.iter().zip(&totals).filter(|(_, total)| **total == highest).map(|(index, _)| *index).collect();
    ties[rand::random_range(0..ties.len())]
}

/// Groups what preemption found into upstream's sentence.
pub(crate) fn preemption_message(total: usize, reasons: &HashMap<&'static str, usize>) -> String {
    let mut parts: Vec<String> = reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
    parts.sort();
    format!("no new claims to deallocate, preemption: 0/{total} nodes are available: {}.", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Labels;
    use crate::testing::{labelled, node, pod};
    use serde_json::json;

    fn place(cluster: &mut Cluster, pod: &PodInfo) -> Result<String, String> {
        let result = schedule(cluster, pod, Ok(Needs::default()), || None);
        result.map(|i| cluster.nodes[i].name.clone()).map_err(|u| u.message())
    }

    #[test]
    fn messages_are_upstreams() {
        let mut cluster = Cluster::default();
        let want = pod("p", json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "3"}}}]}));
        assert_eq!(place(&mut cluster, &want), Err("no nodes available to schedule pods".into()));
        cluster.set_node(&node("a", json!({"cpu": "1", "memory": "1Gi", "pods": "10"})));
        cluster.set_node(&node("b", json!({"cpu": "2", "memory": "1Gi", "pods": "10"})));
        let mut tainted = node("c", json!({}));
        tainted.spec.get_or_insert_default().taints =
            serde_json::from_value(json!([{"key": "k", "effect": "NoSchedule"}])).unwrap();
        cluster.set_node(&tainted);
        assert_eq!(
            place(&mut cluster, &want),
            Err("0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient cpu.".into())
        );
    }

    #[test]
    fn the_emptier_node_wins() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("a", json!({})));
        cluster.set_node(&node("b", json!({})));
        let busy = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1", "memory": "2Gi"}}}]});
        cluster.place(&pod("x", busy.clone()), "a");
        assert_eq!(place(&mut cluster, &pod("y", busy)), Ok("b".into()));
    }

    #[test]
    fn anti_affinity_holds_in_both_directions() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("a", json!({})));
        cluster.set_node(&node("b", json!({})));
        let lonely = json!({"containers": [], "affinity": {"podAntiAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution":
            [{"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "a"}}}]}}});
        cluster.place(&pod("x", lonely.clone()), "a");
        let plain = json!({"containers": []});
        assert_eq!(place(&mut cluster, &pod("plain", plain.clone())), Ok("b".into()));
        assert_eq!(place(&mut cluster, &pod("y", lonely.clone())), Ok("b".into()));
        cluster.place(&pod("plain", plain), "b");
        assert_eq!(
            place(&mut cluster, &pod("y", lonely)),
            Err("0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules.".into())
        );
    }

    #[test]
    fn affinity_starts_somewhere_and_then_stays_there() {
        let mut cluster = Cluster::default();
        cluster.set_node(&labelled("a", &[("zone", "1")]));
        cluster.set_node(&labelled("b", &[("zone", "2")]));
        let social = json!({"containers": [], "affinity": {"podAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution":
            [{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "a"}}}]}}});
        assert!(place(&mut cluster, &pod("x", social.clone())).is_ok());
        cluster.place(&pod("x", social.clone()), "b");
        for _ in 0..5 {
            assert_eq!(place(&mut cluster, &pod("y", social.clone())), Ok("b".into()));
        }
    }

    #[test]
    fn hard_spreading_balances_and_needs_its_label() {
        let mut cluster = Cluster::default();
        cluster.set_node(&labelled("a", &[("zone", "1")]));
        cluster.set_node(&labelled("b", &[("zone", "2")]));
        cluster.set_node(&node("c", json!({})));
        let spec = json!({"containers": [], "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone",
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "a"}}}]});
        for i in 0..6 {
            let pod = pod(&format!("p{i}"), spec.clone());
            let node = place(&mut cluster, &pod).unwrap();
            cluster.place(&pod, &node);
        }
        let held: Vec<usize> = cluster.nodes.iter().map(|n| n.pods.len()).collect();
        assert_eq!(held, [3, 3, 0]);
    }

    #[test]
    fn soft_spreading_by_workload() {
        let mut cluster = Cluster::default();
        for name in ["a", "b", "c"] {
            cluster.set_node(&node(name, json!({})));
        }
        let selector = Selector::from_labels(&Labels::from([("app".to_owned(), "a".to_owned())]));
        for i in 0..9 {
            let pod = pod(&format!("p{i}"), json!({"containers": []}));
            let index = schedule(&mut cluster, &pod, Ok(Needs::default()), || Some(selector.clone())).unwrap();
            let name = cluster.nodes[index].name.clone();
            cluster.place(&pod, &name);
        }
        assert_eq!(cluster.nodes.iter().map(|n| n.pods.len()).collect::<Vec<_>>(), [3, 3, 3]);
    }

    #[test]
    fn a_daemon_pod_goes_where_it_is_told() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("a", json!({})));
        cluster.set_node(&node("b", json!({"cpu": "0", "pods": "0"})));
        let to = |name: &str| {
            pod(
                "d",
                json!({"containers": [], "affinity": {"nodeAffinity":
                {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields":
                [{"key": "metadata.name", "operator": "In", "values": [name]}]}]}}}}),
            )
        };
        assert_eq!(place(&mut cluster, &to("a")), Ok("a".into()));
        assert_eq!(
            place(&mut cluster, &to("b")),
            Err("0/2 nodes are available: 1 Too many pods, 1 node(s) didn't satisfy plugin(s) [NodeAffinity].".into())
        );
    }

    #[test]
    fn how_many_are_enough() {
        for (nodes, want) in [(10, 10), (100, 100), (150, 100), (1000, 420), (5000, 500), (20000, 1000)] {
            assert_eq!(enough(nodes), want, "{nodes}");
        }
    }
}
