//! The cluster as the scheduler believes it to be: nodes with what runs on them, counted incrementally. There is no
//! snapshot to take: one cycle runs at a time, and every change is a few additions.
//!
//! Pods with the same namespace and labels form a group, which knows how many of its pods each node holds. Matching a
//! selector then costs one test per group instead of one per pod: with 30,000 pods of 50 Deployments, 50 tests.

use crate::model::{HostPort, Labels, PodInfo, Resources, normalized_image};
use isopod_client::objects::HasMeta;
use k8s_openapi::api::core::v1::{Node, Taint};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Index of a node in [`Cluster::nodes`].
pub(crate) type NodeIndex = usize;

/// A node and what it holds.
#[derive(Debug, Default)]
pub(crate) struct NodeInfo {
    pub(crate) name: String,
    pub(crate) labels: Labels,
    pub(crate) taints: Vec<Taint>,
    pub(crate) unschedulable: bool,
    pub(crate) allocatable: Resources,
    pub(crate) requested: Resources,
    pub(crate) nonzero: (i64, i64),
    pub(crate) pods: Vec<Arc<PodInfo>>,
    pub(crate) images: HashMap<String, i64>,
    /// Whether there is a Node object; pods can be known before it.
    pub(crate) exists: bool,
    ports: Vec<HostPort>,
}

impl NodeInfo {
    fn describe(&mut self, node: &Node) {
        let spec = node.spec.as_ref();
        let status = node.status.as_ref();
        self.name = node.name().to_owned();
        self.labels = node.metadata.labels.clone().unwrap_or_default();
        self.taints = spec.and_then(|s| s.taints.clone()).unwrap_or_default();
        self.unschedulable = spec.and_then(|s| s.unschedulable).unwrap_or(false);
        self.allocatable = Resources::parse(status.and_then(|s| s.allocatable.as_ref()));
        self.images = status
            .and_then(|s| s.images.as_ref())
            .into_iter()
            .flatten()
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or(0);
                image.names.iter().flatten().map(move |name| (normalized_image(name), size))
            })
            .collect();
        self.exists = true;
    }

    fn add(&mut self, pod: &Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.nonzero.0 += pod.nonzero.0;
        self.nonzero.1 += pod.nonzero.1;
        self.ports.extend(pod.ports.iter().cloned());
        self.pods.push(pod.clone());
    }

    fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let position = self.pods.iter().position(|pod| pod.uid == uid)?;
        let pod = self.pods.swap_remove(position);
        self.requested.sub(&pod.requests);
        self.nonzero.0 -= pod.nonzero.0;
        self.nonzero.1 -= pod.nonzero.1;
        for port in &pod.ports {
            if let Some(position) = self.ports.iter().position(|p| p == port) {
                self.ports.swap_remove(position);
            }
        }
        Some(pod)
    }

    /// Whether a host port is taken.
    pub(crate) fn port_in_use(&self, (protocol, ip, number): &HostPort) -> bool {
        let any = |ip: &str| ip == "0.0.0.0" || ip == "::";
        self.ports.iter().any(|(p, i, n)| p == protocol && n == number && (i == ip || any(i) || any(ip)))
    }
}

/// Pods that no selector can tell apart.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) labels: Labels,
    pub(crate) terminating: bool,
    pub(crate) nodes: HashMap<NodeIndex, i64>,
}

type GroupKey = (Labels, bool);

/// Everything filters and scores look at.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<NodeInfo>,
    by_name: HashMap<String, NodeIndex>,
    /// Namespace -> groups.
    groups: HashMap<String, HashMap<GroupKey, Group>>,
    /// Where each bound or assumed pod is.
    placed: HashMap<String, NodeIndex>,
    /// Pods with required anti-affinity, by UID.
    pub(crate) repelling: BTreeMap<String, (Arc<PodInfo>, NodeIndex)>,
    /// Pods with any other inter-pod term, by UID.
    pub(crate) attracting: BTreeMap<String, (Arc<PodInfo>, NodeIndex)>,
    /// Pods that preempted their way to a node and wait for it, by UID.
    pub(crate) nominated: HashMap<String, Arc<PodInfo>>,
    pub(crate) namespaces: HashMap<String, Labels>,
    /// Image name -> number of nodes that have it.
    pub(crate) image_nodes: HashMap<String, usize>,
    existing: usize,
    /// Where the next search starts.
    pub(crate) next_start: usize,
}

impl Cluster {
    /// How many nodes there are.
    pub(crate) fn len(&self) -> usize {
        self.existing
    }

    /// The index of a node that exists.
    pub(crate) fn index(&self, name: &str) -> Option<NodeIndex> {
        self.by_name.get(name).copied().filter(|i| self.nodes[*i].exists)
    }

    fn slot(&mut self, name: &str) -> NodeIndex {
        if let Some(index) = self.by_name.get(name) {
            return *index;
        }
        self.nodes.push(NodeInfo { name: name.to_owned(), ..NodeInfo::default() });
        self.by_name.insert(name.to_owned(), self.nodes.len() - 1);
        self.nodes.len() - 1
    }

    /// Adds or updates a node; says whether anything changed that can make a pod fit.
    pub(crate) fn set_node(&mut self, node: &Node) -> bool {
        let index = self.slot(node.name());
        let info = &self.nodes[index];
        let before = (info.exists, info.labels.clone(), info.taints.clone(), info.unschedulable);
        let allocatable = info.allocatable.clone();
        self.count_images(index, false);
        self.nodes[index].describe(node);
        self.count_images(index, true);
        if !before.0 {
            self.existing += 1;
        }
        let info = &self.nodes[index];
        before != (true, info.labels.clone(), info.taints.clone(), info.unschedulable)
            || allocatable != info.allocatable
    }

    /// Removes a node; its pods stay known until they are gone too.
    pub(crate) fn remove_node(&mut self, name: &str) {
        let Some(index) = self.index(name) else { return };
        self.count_images(index, false);
        let info = &mut self.nodes[index];
        info.exists = false;
        info.images = HashMap::new();
        self.existing -= 1;
    }

    fn count_images(&mut self, index: NodeIndex, present: bool) {
        for image in self.nodes[index].images.keys() {
            let count = self.image_nodes.entry(image.clone()).or_default();
            *count = if present { *count + 1 } else { count.saturating_sub(1) };
        }
        if !present {
            self.image_nodes.retain(|_, count| *count > 0);
        }
    }

    /// Puts a pod on a node.
    pub(crate) fn place(&mut self, pod: &Arc<PodInfo>, node: &str) {
        self.unplace(&pod.uid);
        let index = self.slot(node);
        self.nodes[index].add(pod);
        self.placed.insert(pod.uid.clone(), index);
        let groups = self.groups.entry(pod.namespace.clone()).or_default();
        let key = (pod.labels.clone(), pod.terminating);
        let group = groups.entry(key).or_insert_with(|| Group {
            labels: pod.labels.clone(),
            terminating: pod.terminating,
            nodes: HashMap::new(),
        });
        *group.nodes.entry(index).or_default() += 1;
        if !pod.anti_affinity.is_empty() {
            self.repelling.insert(pod.uid.clone(), (pod.clone(), index));
        }
        if !pod.affinity.is_empty() || !pod.preferred.is_empty() || !pod.preferred_anti.is_empty() {
            self.attracting.insert(pod.uid.clone(), (pod.clone(), index));
        }
    }

    /// Takes a pod off its node.
    pub(crate) fn unplace(&mut self, uid: &str) -> Option<(Arc<PodInfo>, NodeIndex)> {
        let index = self.placed.remove(uid)?;
        self.repelling.remove(uid);
        self.attracting.remove(uid);
        let pod = self.nodes[index].remove(uid)?;
        if let Some(groups) = self.groups.get_mut(&pod.namespace) {
            let key = (pod.labels.clone(), pod.terminating);
            if let Some(group) = groups.get_mut(&key) {
                if let Some(count) = group.nodes.get_mut(&index) {
                    *count -= 1;
                    if *count == 0 {
                        group.nodes.remove(&index);
                    }
                }
                if group.nodes.is_empty() {
                    groups.remove(&key);
                }
            }
            if groups.is_empty() {
                self.groups.remove(&pod.namespace);
            }
        }
        Some((pod, index))
    }

    /// Where a pod is.
    pub(crate) fn placement(&self, uid: &str) -> Option<&str> {
        self.placed.get(uid).map(|index| self.nodes[*index].name.as_str())
    }

    /// The groups of one namespace.
    pub(crate) fn groups_in(&self, namespace: &str) -> impl Iterator<Item = &Group> {
        self.groups.get(namespace).into_iter().flat_map(|groups| groups.values())
    }

    /// All groups, with their namespace.
    pub(crate) fn groups(&self) -> impl Iterator<Item = (&str, &Group)> {
        self.groups.iter().flat_map(|(namespace, groups)| groups.values().map(move |g| (namespace.as_str(), g)))
    }

    /// The labels of a namespace.
    pub(crate) fn namespace_labels(&self, namespace: &str) -> &Labels {
        static NONE: Labels = Labels::new();
        self.namespaces.get(namespace).unwrap_or(&NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod};
    use serde_json::json;

    #[test]
    fn what_is_added_is_taken_away_again() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("n1", json!({})));
        let before = format!("{:?}", cluster.nodes[0].requested);
        let pod = pod(
            "a",
            json!({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80}],
            "resources": {"requests": {"cpu": "1", "gpu.example/x": "2"}}}]}),
        );
        cluster.place(&pod, "n1");
        assert_eq!(cluster.nodes[0].requested.cpu, 1000);
        assert!(cluster.nodes[0].port_in_use(&("TCP".into(), "10.0.0.1".into(), 80)));
        assert_eq!(cluster.groups_in("ns").count(), 1);
        cluster.place(&pod, "n1");
        assert_eq!(cluster.nodes[0].pods.len(), 1, "placing again moves");
        cluster.unplace("a");
        assert_eq!(cluster.groups_in("ns").count(), 0);
        assert!(!cluster.nodes[0].port_in_use(&("TCP".into(), "10.0.0.1".into(), 80)));
        assert_eq!(cluster.nodes[0].requested.cpu, 0, "was {before}");
    }

    #[test]
    fn a_node_without_object_is_not_there() {
        let mut cluster = Cluster::default();
        cluster.place(&pod("a", json!({"containers": []})), "ghost");
        assert_eq!((cluster.len(), cluster.index("ghost")), (0, None));
        assert!(cluster.set_node(&node("ghost", json!({}))));
        assert!(!cluster.set_node(&node("ghost", json!({}))), "nothing changed");
        assert_eq!(cluster.nodes[0].pods.len(), 1);
        cluster.remove_node("ghost");
        assert_eq!(cluster.len(), 0);
    }
}
