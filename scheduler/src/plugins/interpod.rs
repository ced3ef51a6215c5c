//! InterPodAffinity: pods that must or would rather be near each other, or not.

use super::{Plugin, Reject};
use crate::cluster::{Cluster, NodeIndex, NodeInfo};
use crate::model::{PodInfo, PodTerm};
use std::collections::HashMap;

/// Topology key -> value -> count.
type Pairs = HashMap<String, HashMap<String, i64>>;

fn add(pairs: &mut Pairs, key: &str, value: &str, amount: i64) {
    let values = match pairs.get_mut(key) {
        Some(values) => values,
        None => pairs.entry(key.to_owned()).or_default(),
    };
    match values.get_mut(value) {
        Some(count) => *count += amount,
        None => {
            values.insert(value.to_owned(), amount);
        }
    }
}

fn count(pairs: &Pairs, key: &str, value: &str) -> i64 {
    pairs.get(key).and_then(|values| values.get(value)).copied().unwrap_or(0)
}

/// What required terms say about each topology.
#[derive(Debug, Default)]
pub(crate) struct Required {
    /// Where existing pods refuse this one.
    refused: Pairs,
    /// Where pods are that satisfy all affinity terms.
    near: Pairs,
    /// Where pods are that an anti-affinity term is about.
    far: Pairs,
    /// No pod satisfies the affinity yet, and this one satisfies it itself.
    first_of_its_kind: bool,
}

impl Required {
    pub(crate) fn new(cluster: &Cluster, pod: &PodInfo) -> Self {
        let mut state = Self::default();
        let own = cluster.namespace_labels(&pod.namespace);
        for (other, index) in cluster.repelling.values() {
            let labels = &cluster.nodes[*index].labels;
            for term in other.anti_affinity.iter().filter(|t| t.matches(&pod.namespace, own, &pod.labels)) {
                if let Some(value) = labels.get(&term.topology) {
                    add(&mut state.refused, &term.topology, value, 1);
                }
            }
        }
        if pod.affinity.is_empty() && pod.anti_affinity.is_empty() {
            return state;
        }
        for (namespace, group) in cluster.groups() {
            let there = cluster.namespace_labels(namespace);
            let about = |term: &PodTerm| term.matches(namespace, there, &group.labels);
            let near = !pod.affinity.is_empty() && pod.affinity.iter().all(about);
            let far: Vec<&PodTerm> = pod.anti_affinity.iter().filter(|t| about(t)).collect();
            if !near && far.is_empty() {
                continue;
            }
            for (index, number) in &group.nodes {
                let labels = &cluster.nodes[*index].labels;
                for term in pod.affinity.iter().filter(|_| near) {
                    if let Some(value) = labels.get(&term.topology) {
                        add(&mut state.near, &term.topology, value, *number);
                    }
                }
                for term in &far {
                    if let Some(value) = labels.get(&term.topology) {
                        add(&mut state.far, &term.topology, value, *number);
                    }
                }
            }
        }
        state.first_of_its_kind =
            state.near.is_empty() && pod.affinity.iter().all(|t| t.matches(&pod.namespace, own, &pod.labels));
        state
    }

    pub(crate) fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Reject> {
        let mut near = true;
        for term in &pod.affinity {
            match node.labels.get(&term.topology) {
                None => {
                    return Err(Reject::hopeless(Plugin::InterPodAffinity, "node(s) didn't match pod affinity rules"));
                }
                Some(value) => near &= count(&self.near, &term.topology, value) > 0,
            }
        }
        if !near && !self.first_of_its_kind {
            return Err(Reject::hopeless(Plugin::InterPodAffinity, "node(s) didn't match pod affinity rules"));
        }
        let here = |pairs: &Pairs, key: &str| node.labels.get(key).is_some_and(|value| count(pairs, key, value) > 0);
        if pod.anti_affinity.iter().any(|term| here(&self.far, &term.topology)) {
            return Err(Reject::because(Plugin::InterPodAffinity, "node(s) didn't match pod anti-affinity rules"));
        }
        if self.refused.keys().any(|key| here(&self.refused, key)) {
            let reason = "node(s) didn't satisfy existing pods anti-affinity rules";
            return Err(Reject::because(Plugin::InterPodAffinity, reason));
        }
        Ok(())
    }
}

/// Scores of these nodes, normalised; `None` when no term has an opinion.
pub(crate) fn scores(cluster: &Cluster, pod: &PodInfo, nodes: &[NodeIndex]) -> Option<Vec<i64>> {
    let mut pairs = Pairs::new();
    let own = cluster.namespace_labels(&pod.namespace);
    for (other, index) in cluster.attracting.values() {
        let labels = &cluster.nodes[*index].labels;
        let required = other.affinity.iter().map(|t| (t, 1));
        let preferred = other.preferred.iter().map(|t| (t, t.weight));
        let preferred_anti = other.preferred_anti.iter().map(|t| (t, -t.weight));
        for (term, weight) in required.chain(preferred).chain(preferred_anti) {
            if term.matches(&pod.namespace, own, &pod.labels)
                && let Some(value) = labels.get(&term.topology)
            {
                add(&mut pairs, &term.topology, value, weight);
            }
        }
    }
    if !pod.preferred.is_empty() || !pod.preferred_anti.is_empty() {
        for (namespace, group) in cluster.groups() {
            let there = cluster.namespace_labels(namespace);
            let preferred = pod.preferred.iter().map(|t| (t, t.weight));
            let preferred_anti = pod.preferred_anti.iter().map(|t| (t, -t.weight));
            for (term, weight) in preferred.chain(preferred_anti) {
                if !term.matches(namespace, there, &group.labels) {
                    continue;
                }
                for (index, number) in &group.nodes {
                    if let Some(value) = cluster.nodes[*index].labels.get(&term.topology) {
                        add(&mut pairs, &term.topology, value, weight * number);
                    }
                }
            }
        }
    }
    if pairs.is_empty() {
        return None;
    }
    let score = |index: &NodeIndex| -> i64 {
        let labels = &cluster.nodes[*index].labels;
        let here = pairs.iter().filter_map(|(key, values)| values.get(labels.get(key)?));
        here.sum()
    };
    let raw: Vec<i64> = nodes.iter().map(score).collect();
    let (min, max) = (raw.iter().copied().min()?, raw.iter().copied().max()?);
    let span = (max - min) as f64;
    Some(raw.iter().map(|s| if max > min { (100.0 * (s - min) as f64 / span) as i64 } else { 0 }).collect())
}
