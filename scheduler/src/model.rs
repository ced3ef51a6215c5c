//! Pods and nodes as the scheduler sees them: everything parsed once, nothing kept that no plugin reads.

use isopod_client::objects::HasMeta;
pub(crate) use isopod_client::placement::{NodeTerm, node_terms, tolerates};
use isopod_client::quantity::{milli, value};
use isopod_client::select::Selector;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, Pod, PodAffinityTerm, PodSpec, PodStatus, Taint, Toleration, TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Labels of a pod or node.
pub(crate) type Labels = BTreeMap<String, String>;

/// Amounts of resources; CPU in thousandths, the rest in whole units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) cpu: i64,
    pub(crate) memory: i64,
    pub(crate) ephemeral: i64,
    pub(crate) pods: i64,
    pub(crate) other: BTreeMap<String, i64>,
}

impl Resources {
    pub(crate) fn parse(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let mut all = Self::default();
        for (name, quantity) in list.into_iter().flatten() {
            match name.as_str() {
                "cpu" => all.cpu = milli(quantity),
                "memory" => all.memory = value(quantity),
                "ephemeral-storage" => all.ephemeral = value(quantity),
                "pods" => all.pods = value(quantity),
                _ => {
                    all.other.insert(name.clone(), value(quantity));
                }
            }
        }
        all
    }

    pub(crate) fn add(&mut self, more: &Self) {
        self.cpu += more.cpu;
        self.memory += more.memory;
        self.ephemeral += more.ephemeral;
        for (name, amount) in &more.other {
            *self.other.entry(name.clone()).or_default() += amount;
        }
    }

    pub(crate) fn sub(&mut self, less: &Self) {
        self.cpu -= less.cpu;
        self.memory -= less.memory;
        self.ephemeral -= less.ephemeral;
        for (name, amount) in &less.other {
            if let Some(have) = self.other.get_mut(name) {
                *have -= amount;
            }
        }
    }

    fn max(&mut self, than: &Self) {
        self.cpu = self.cpu.max(than.cpu);
        self.memory = self.memory.max(than.memory);
        self.ephemeral = self.ephemeral.max(than.ephemeral);
        for (name, amount) in &than.other {
            let have = self.other.entry(name.clone()).or_default();
            *have = (*have).max(*amount);
        }
    }
}

/// A term of inter-pod affinity: these pods, within this topology.
#[derive(Clone, Debug)]
pub(crate) struct PodTerm {
    pub(crate) topology: String,
    namespaces: Vec<String>,
    namespace_selector: Option<Selector>,
    selector: Selector,
    pub(crate) weight: i64,
}

impl PodTerm {
    fn new(source: &PodAffinityTerm, owner: &Pod, weight: i32) -> Self {
        let mut selector = source.label_selector.clone();
        let labels = owner.metadata.labels.clone().unwrap_or_default();
        if let Some(selector) = selector.as_mut() {
            let own = source.match_label_keys.iter().flatten().map(|key| (key, "In"));
            let other = source.mismatch_label_keys.iter().flatten().map(|key| (key, "NotIn"));
            for (key, operator) in own.chain(other) {
                if let Some(value) = labels.get(key) {
                    selector.match_expressions.get_or_insert_default().push(
                        k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement {
                            key: key.clone(),
                            operator: operator.to_owned(),
                            values: Some(vec![value.clone()]),
                        },
                    );
                }
            }
        }
        let mut namespaces = source.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && source.namespace_selector.is_none() {
            namespaces.push(owner.namespace().to_owned());
        }
        Self {
            topology: source.topology_key.clone(),
            namespaces,
            namespace_selector: source.namespace_selector.as_ref().map(Selector::new),
            selector: Selector::optional(selector.as_ref()),
            weight: i64::from(weight),
        }
    }

    /// Whether the term is about pods with these labels in this namespace.
    pub(crate) fn matches(&self, namespace: &str, namespace_labels: &Labels, labels: &Labels) -> bool {
        let here = self.namespaces.iter().any(|ns| ns == namespace)
            || self.namespace_selector.as_ref().is_some_and(|s| s.matches(namespace_labels));
        here && self.selector.matches(labels)
    }
}

/// A constraint on how pods spread over a topology.
#[derive(Clone, Debug)]
pub(crate) struct Spread {
    pub(crate) topology: String,
    pub(crate) max_skew: i64,
    pub(crate) min_domains: i64,
    pub(crate) selector: Selector,
    pub(crate) hard: bool,
    pub(crate) honor_affinity: bool,
    pub(crate) honor_taints: bool,
}

impl Spread {
    fn new(source: &TopologySpreadConstraint, pod: &Pod) -> Self {
        let mut selector = source.label_selector.clone();
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        for key in source.match_label_keys.iter().flatten() {
            if let Some(value) = labels.get(key) {
                let requirement = k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement {
                    key: key.clone(),
                    operator: "In".into(),
                    values: Some(vec![value.clone()]),
                };
                selector.get_or_insert_default().match_expressions.get_or_insert_default().push(requirement);
            }
        }
        Self {
            topology: source.topology_key.clone(),
            max_skew: i64::from(source.max_skew),
            min_domains: i64::from(source.min_domains.unwrap_or(1)),
            selector: Selector::optional(selector.as_ref()),
            hard: source.when_unsatisfiable == "DoNotSchedule",
            honor_affinity: source.node_affinity_policy.as_deref() != Some("Ignore"),
            honor_taints: source.node_taints_policy.as_deref() == Some("Honor"),
        }
    }
}

/// A host port: protocol, address, number.
pub(crate) type HostPort = (String, String, i32);

/// A pod, parsed.
#[derive(Clone, Debug)]
pub(crate) struct PodInfo {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) revision: String,
    pub(crate) labels: Labels,
    pub(crate) node: String,
    pub(crate) nominated: String,
    pub(crate) terminating: bool,
    pub(crate) priority: i64,
    pub(crate) never_preempts: bool,
    pub(crate) started: Option<Timestamp>,
    pub(crate) scheduler: String,
    pub(crate) gated: bool,
    pub(crate) condition: Option<(String, String)>,
    pub(crate) requests: Resources,
    pub(crate) nonzero: (i64, i64),
    pub(crate) ports: Vec<HostPort>,
    pub(crate) node_selector: Labels,
    pub(crate) node_terms: Option<Vec<NodeTerm>>,
    pub(crate) preferred_nodes: Vec<(i64, NodeTerm)>,
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) affinity: Vec<PodTerm>,
    pub(crate) anti_affinity: Vec<PodTerm>,
    pub(crate) preferred: Vec<PodTerm>,
    pub(crate) preferred_anti: Vec<PodTerm>,
    pub(crate) spread: Vec<Spread>,
    pub(crate) images: Vec<String>,
    pub(crate) claims: Vec<String>,
    pub(crate) owner: Option<(String, String)>,
}

impl PodInfo {
    pub(crate) fn new(pod: &Pod) -> Arc<Self> {
        let spec = pod.spec.clone().unwrap_or_default();
        let status = pod.status.as_ref();
        let affinity = spec.affinity.clone().unwrap_or_default();
        let node_affinity = affinity.node_affinity.unwrap_or_default();
        let required = node_affinity.required_during_scheduling_ignored_during_execution;
        let preferred_nodes = node_affinity.preferred_during_scheduling_ignored_during_execution;
        let with = affinity.pod_affinity.unwrap_or_default();
        let without = affinity.pod_anti_affinity.unwrap_or_default();
        let hard = |list: Option<Vec<PodAffinityTerm>>| -> Vec<PodTerm> {
            list.iter().flatten().map(|term| PodTerm::new(term, pod, 0)).collect()
        };
        let soft = |list: Option<Vec<k8s_openapi::api::core::v1::WeightedPodAffinityTerm>>| -> Vec<PodTerm> {
            list.iter().flatten().map(|term| PodTerm::new(&term.pod_affinity_term, pod, term.weight)).collect()
        };
        let scheduled = status.and_then(|s| s.conditions.as_ref()?.iter().find(|c| c.type_ == "PodScheduled"));
        let sizes = Sizes::of(status);
        let owner = isopod_client::cache::controller_of(&pod.metadata).map(|o| (o.kind.clone(), o.name.clone()));
        Arc::new(Self {
            namespace: pod.namespace().to_owned(),
            name: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            revision: pod.metadata.resource_version.clone().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            node: spec.node_name.clone().unwrap_or_default(),
            nominated: status.and_then(|s| s.nominated_node_name.clone()).unwrap_or_default(),
            terminating: pod.deleting(),
            priority: i64::from(spec.priority.unwrap_or(0)),
            never_preempts: spec.preemption_policy.as_deref() == Some("Never"),
            started: status.and_then(|s| s.start_time.as_ref()).map(|t| t.0),
            scheduler: spec.scheduler_name.clone().unwrap_or_default(),
            gated: spec.scheduling_gates.as_ref().is_some_and(|g| !g.is_empty()),
            condition: scheduled.map(|c| (c.reason.clone().unwrap_or_default(), c.message.clone().unwrap_or_default())),
            requests: requests(&spec, &sizes, false),
            nonzero: {
                let all = requests(&spec, &sizes, true);
                (all.cpu, all.memory)
            },
            ports: host_ports(&spec),
            node_selector: spec.node_selector.clone().unwrap_or_default(),
            node_terms: required.as_ref().map(node_terms),
            preferred_nodes: preferred_nodes
                .iter()
                .flatten()
                .map(|p| (i64::from(p.weight), NodeTerm::new(&p.preference)))
                .collect(),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            affinity: hard(with.required_during_scheduling_ignored_during_execution),
            anti_affinity: hard(without.required_during_scheduling_ignored_during_execution),
            preferred: soft(with.preferred_during_scheduling_ignored_during_execution),
            preferred_anti: soft(without.preferred_during_scheduling_ignored_during_execution),
            spread: spec.topology_spread_constraints.iter().flatten().map(|c| Spread::new(c, pod)).collect(),
            images: spec.containers.iter().filter_map(|c| c.image.clone()).map(|i| normalized_image(&i)).collect(),
            claims: claims(&spec, pod.name()),
            owner,
        })
    }

    /// The nodes the pod's affinity names, when every alternative names some.
    pub(crate) fn named_nodes(&self) -> Option<Vec<&str>> {
        let terms = self.node_terms.as_ref().filter(|terms| !terms.is_empty())?;
        let mut names = Vec::new();
        for term in terms {
            names.extend(term.names()?.iter().map(String::as_str));
        }
        Some(names)
    }

    /// Whether the pod's node selector and required affinity allow a node.
    pub(crate) fn allows_node(&self, name: &str, labels: &Labels) -> bool {
        self.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.node_terms.as_ref().is_none_or(|terms| terms.iter().any(|term| term.matches(name, labels)))
    }

    /// Whether the pod tolerates a taint.
    pub(crate) fn tolerates(&self, taint: &Taint) -> bool {
        self.tolerations.iter().any(|t| tolerates(t, taint))
    }
}

/// What a resize has to do with a pod's requests: until it is done, the larger of old and new counts; one that cannot be is
/// left out.
struct Sizes<'a> {
    statuses: Vec<&'a ContainerStatus>,
    infeasible: bool,
    pod: Option<&'a PodStatus>,
}

type Amounts = BTreeMap<String, Quantity>;

impl<'a> Sizes<'a> {
    fn of(pod: Option<&'a PodStatus>) -> Self {
        let lists = pod.map(|s| [&s.container_statuses, &s.init_container_statuses]);
        let mut conditions = pod.into_iter().flat_map(|s| s.conditions.iter().flatten());
        Self {
            statuses: lists.into_iter().flatten().flatten().flatten().filter(|s| s.resources.is_some()).collect(),
            infeasible: conditions.any(|c| c.type_ == "PodResizePending" && c.reason.as_deref() == Some("Infeasible")),
            pod,
        }
    }

    fn wanted(&self, spec: Option<&'a Amounts>, has_status: bool) -> Option<&'a Amounts> {
        spec.filter(|_| !(self.infeasible && has_status))
    }

    fn container(&self, c: &'a Container) -> [Option<&'a Amounts>; 3] {
        let spec = c.resources.as_ref().and_then(|r| r.requests.as_ref());
        let status = self.statuses.iter().find(|s| s.name == c.name);
        let actual = status.and_then(|s| s.resources.as_ref()?.requests.as_ref());
        let allocated = status.and_then(|s| s.allocated_resources.as_ref());
        [self.wanted(spec, status.is_some()), actual, allocated]
    }

    fn whole_pod(&self, spec: &'a PodSpec) -> [Option<&'a Amounts>; 3] {
        let own = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
        let actual = self.pod.and_then(|s| s.resources.as_ref()?.requests.as_ref());
        let allocated = self.pod.and_then(|s| s.allocated_resources.as_ref());
        [self.wanted(own, actual.is_some()), actual, allocated]
    }
}

fn largest(lists: [Option<&Amounts>; 3]) -> Resources {
    let mut all = Resources::default();
    lists.into_iter().flatten().for_each(|list| all.max(&Resources::parse(Some(list))));
    all
}

fn container_requests(container: &Container, sizes: &Sizes<'_>, nonzero: bool) -> Resources {
    let lists = sizes.container(container);
    let mut all = largest(lists);
    let names = |name: &str| lists.into_iter().flatten().any(|l| l.contains_key(name));
    if nonzero {
        if !names("cpu") {
            all.cpu = 100;
        }
        if !names("memory") {
            all.memory = 200 * 1024 * 1024;
        }
    }
    all
}

/// What a pod takes: its containers and sidecars together, or the largest moment of initialisation, plus overhead.
fn requests(spec: &PodSpec, sizes: &Sizes<'_>, nonzero: bool) -> Resources {
    let mut total = Resources::default();
    for container in &spec.containers {
        total.add(&container_requests(container, sizes, nonzero));
    }
    let mut sidecars = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let own = container_requests(container, sizes, nonzero);
        if container.restart_policy.as_deref() == Some("Always") {
            total.add(&own);
            sidecars.add(&own);
            peak.max(&sidecars);
        } else {
            let mut moment = sidecars.clone();
            moment.add(&own);
            peak.max(&moment);
        }
    }
    total.max(&peak);
    if let Some(pod_level) = spec.resources.as_ref().and_then(|r| r.requests.as_ref()) {
        let own = largest(sizes.whole_pod(spec));
        for name in pod_level.keys() {
            match name.as_str() {
                "cpu" => total.cpu = own.cpu,
                "memory" => total.memory = own.memory,
                _ => {}
            }
        }
    }
    total.add(&Resources::parse(spec.overhead.as_ref()));
    total
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    ports
        .filter_map(|p| {
            let number = p.host_port.filter(|n| *n > 0)?;
            let ip = p.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some((p.protocol.clone().unwrap_or_else(|| "TCP".into()), ip, number))
        })
        .collect()
}

fn claims(spec: &PodSpec, pod: &str) -> Vec<String> {
    spec.volumes
        .iter()
        .flatten()
        .filter_map(|volume| {
            let named = volume.persistent_volume_claim.as_ref().map(|c| c.claim_name.clone());
            named.or_else(|| volume.ephemeral.as_ref().map(|_| format!("{pod}-{}", volume.name)))
        })
        .collect()
}

/// Image names as nodes report them: with a tag.
pub(crate) fn normalized_image(name: &str) -> String {
    let after_slash = name.rsplit('/').next().unwrap_or(name);
    if after_slash.contains(':') || name.contains('@') { name.to_owned() } else { format!("{name}:latest") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Arc<PodInfo> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec})).unwrap();
        PodInfo::new(&pod)
    }

    #[test]
    fn requests_follow_containers_sidecars_and_initialisation() {
        let c = |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        let sidecar =
            |cpu: &str| json!({"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": cpu}}});
        for (spec, want) in [
            (json!({"containers": [c("100m"), c("200m")]}), 300),
            (json!({"containers": [c("100m")], "initContainers": [c("500m")]}), 500),
            (json!({"containers": [c("100m")], "initContainers": [sidecar("50m"), c("500m")]}), 550),
            (json!({"containers": [c("1")], "initContainers": [sidecar("50m"), c("500m")]}), 1050),
            (json!({"containers": [c("1")], "overhead": {"cpu": "10m"}}), 1010),
        ] {
            assert_eq!(pod(spec.clone()).requests.cpu, want, "{spec}");
        }
        assert_eq!(pod(json!({"containers": [{"name": "c"}]})).nonzero, (100, 209_715_200));
    }

    #[test]
    fn a_resize_counts_as_the_larger_until_it_is_done_or_cannot_be() {
        let with = |status: serde_json::Value| {
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "status": status,
                "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "8"}}},
                    {"name": "d", "resources": {"requests": {"cpu": "100m"}}}]}}))
                .unwrap();
            PodInfo::new(&pod).requests.cpu
        };
        let status = |allocated: &str, actual: &str, reason: &str| {
            json!({"conditions": [{"type": "PodResizePending", "status": "True", "reason": reason}],
                "containerStatuses": [{"name": "c", "allocatedResources": {"cpu": allocated},
                    "resources": {"requests": {"cpu": actual}}}]})
        };
        assert_eq!(with(json!({})), 8100);
        assert_eq!(with(status("1", "1", "Deferred")), 8100);
        assert_eq!(with(status("1", "1", "Infeasible")), 1100);
        assert_eq!(with(status("1", "2", "Infeasible")), 2100);
        assert_eq!(with(status("9", "2", "")), 9100);
        // Nothing is known of what it has.
        let mut none = status("1", "1", "Infeasible");
        none["containerStatuses"] = json!([]);
        assert_eq!(with(none), 8100);
    }

    #[test]
    fn node_terms() {
        let affinity = |terms: serde_json::Value| {
            pod(json!({"containers": [], "affinity": {"nodeAffinity":
                {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}))
        };
        let labels: Labels = [("zone".to_owned(), "a".to_owned()), ("n".to_owned(), "5".to_owned())].into();
        for (terms, want) in [
            (json!([{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]), true),
            (json!([{"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}]), false),
            (json!([{"matchExpressions": [{"key": "n", "operator": "Gt", "values": ["4"]}]}]), true),
            (json!([{"matchExpressions": [{"key": "n", "operator": "Lt", "values": ["5"]}]}]), false),
            (json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]), true),
            (json!([{}]), false),
            (json!([{}, {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}]), true),
        ] {
            assert_eq!(affinity(terms.clone()).allows_node("n1", &labels), want, "{terms}");
        }
    }

    #[test]
    fn tolerations() {
        let taint = Taint { key: "k".into(), value: Some("v".into()), effect: "NoSchedule".into(), time_added: None };
        for (toleration, want) in [
            (json!({"key": "k", "operator": "Exists"}), true),
            (json!({"operator": "Exists"}), true),
            (json!({"key": "k", "value": "v"}), true),
            (json!({"key": "k", "value": "w"}), false),
            (json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}), false),
        ] {
            let parsed: Toleration = serde_json::from_value(toleration.clone()).unwrap();
            assert_eq!(tolerates(&parsed, &taint), want, "{toleration}");
        }
    }

    #[test]
    fn images_get_their_tag() {
        for (name, want) in [
            ("busybox", "busybox:latest"),
            ("reg:5000/a/b", "reg:5000/a/b:latest"),
            ("a:1", "a:1"),
            ("a@sha256:x", "a@sha256:x"),
        ] {
            assert_eq!(normalized_image(name), want);
        }
    }
}
