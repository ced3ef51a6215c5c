//! DaemonSet: one pod on every node that qualifies, rolled node by node when the template changes.
//!
//! In: the set, nodes, its pods, its ControllerRevisions. Out: pods tied to their node by affinity (the scheduler binds
//! them), deletions, revisions, status.

use crate::context::{Context, Key, key};
use crate::deployment::plan::{scaled, template_hash};
use crate::expectations::Expectations;
use crate::ownership::{claim, concerned, controller};
use crate::revisions;
use crate::{pod_control, pods, replica};
use isopod_client::objects::HasMeta;
use isopod_client::placement::{NodeTerm, node_terms, tolerates};
use isopod_client::select::Selector;
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "daemonset-controller";
/// The label that names a pod's revision.
pub(crate) const HASH: &str = "controller-revision-hash";
const GENERATION: &str = "pod-template-generation";
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";
const FAILED_FIRST: i64 = 1;
const FAILED_MAX: i64 = 15 * 60;

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Key>>,
    expectations: Expectations,
    /// When a failed pod of (set, node) may be replaced, and how often it failed.
    failures: parking_lot::Mutex<BTreeMap<(Key, String), (Timestamp, u32)>>,
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component(NAME),
        queue: Queue::new(),
        expectations: Expectations::default(),
        failures: parking_lot::Mutex::default(),
    });
    let c = controller.clone();
    ctx.caches.daemon_sets.subscribe(move |change| {
        if change.is_deleted() {
            c.expectations.forget(&key(&**change.object()));
        }
        c.queue.add(key(&**change.object()));
    });
    let c = controller.clone();
    ctx.caches.nodes.subscribe(move |change| {
        if let Change::Updated(old, new) = change
            && !node_changed(old, new)
        {
            return;
        }
        for set in c.ctx.caches.daemon_sets.list() {
            c.queue.add(key(&*set));
        }
    });
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| c.pod_changed(change));
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(NAME, &queue, 2, &stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
}

fn node_changed(old: &Node, new: &Node) -> bool {
    old.metadata.labels != new.metadata.labels
        || old.spec.as_ref().map(|s| (&s.taints, s.unschedulable))
            != new.spec.as_ref().map(|s| (&s.taints, s.unschedulable))
}

impl Controller {
    fn pod_changed(&self, change: &Change<'_, Pod>) {
        let sets = &self.ctx.caches.daemon_sets;
        concerned(sets, change, selector).iter().for_each(|set| self.queue.add(key(&**set)));
        if let Some(owner) = controller(sets, &**change.object()) {
            let key = key(&*owner);
            self.expectations.seen(&key, change);
            self.queue.add(key);
        }
    }

    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(set) = self.ctx.caches.daemon_sets.get(&key.0, &key.1) else {
            self.expectations.forget(&key);
            self.failures.lock().retain(|(owner, _), _| *owner != key);
            return Ok(None);
        };
        let selector = selector(&set);
        if selector.is_everything() {
            let text = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.recorder.warning(&*set, "SelectingAll", text);
            return Ok(None);
        }
        if set.deleting() {
            return Ok(None);
        }
        let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
        let data = revisions::data(&template);
        let collisions = set.status.as_ref().and_then(|s| s.collision_count);
        let hash = template_hash(&template, collisions);
        let history = revisions::ensure(&self.ctx, &*set, &selector, &data, &hash, HASH).await?;
        let hash = history.hash.clone();
        let owned = claim(&self.ctx, &*set, &self.ctx.caches.pods, &selector, |_| true, None).await?;
        let nodes = self.ctx.caches.nodes.list();
        let now = Timestamp::now();
        let mut again = None;
        if self.expectations.satisfied(&key) {
            let mut plan = place(&set, &nodes, &owned);
            again = self.hold_back(&key, &mut plan, now);
            let idle = plan.create.is_empty() && plan.delete.is_empty();
            if idle && rolling(&set) {
                plan.delete = roll(&set, &nodes, &owned, &hash, now);
            }
            self.apply(&key, &set, plan, &hash).await?;
        }
        let status = status(&set, &nodes, &owned, &hash, now);
        if set.status.as_ref() != Some(&status) {
            let mut new = (*set).clone();
            new.status = Some(status);
            self.ctx.objects.update(&*set, &new, "status").await?;
        }
        let live: Vec<&str> = owned.iter().filter_map(|p| revisions::label(&**p, HASH)).collect();
        let limit = set.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10);
        revisions::trim(&self.ctx, &history, &live, HASH, limit).await?;
        let available = replica::next_available(&owned, min_ready(&set), now);
        Ok(again.into_iter().chain(available).min())
    }

    /// Failed pods are replaced ever more slowly. Returns when to look again.
    fn hold_back(&self, key: &Key, plan: &mut Plan, now: Timestamp) -> Option<Duration> {
        let mut failures = self.failures.lock();
        let mut again = None;
        plan.delete.retain(|pod| {
            if !pods::is_finished(pod) {
                return true;
            }
            let slot = (key.clone(), node_of(pod).unwrap_or_default().to_owned());
            let (allowed, count) = failures.get(&slot).copied().unwrap_or((now, 0));
            if now < allowed {
                let wait =
                    Duration::from_millis(u64::try_from(allowed.duration_since(now).as_millis()).unwrap_or(0) + 1);
                again = Some(again.map_or(wait, |a: Duration| a.min(wait)));
                return false;
            }
            let pause = (FAILED_FIRST << count.min(16)).min(FAILED_MAX);
            failures.insert(slot, (now + SignedDuration::from_secs(pause), count + 1));
            true
        });
        again
    }

    async fn apply(&self, key: &Key, set: &DaemonSet, plan: Plan, hash: &str) -> Result<(), kube::Error> {
        let create: Vec<String> = plan.create.into_iter().take(pod_control::BURST).collect();
        let delete: Vec<Arc<Pod>> = plan.delete.into_iter().take(pod_control::BURST).collect();
        if create.is_empty() && delete.is_empty() {
            return Ok(());
        }
        for pod in delete.iter().filter(|pod| pods::phase(pod) == "Failed") {
            let node = node_of(pod).unwrap_or_default();
            let text = format!("Found failed daemon pod {}/{} on node {node}, will try to kill it", key.0, pod.name());
            self.recorder.warning(set, "FailedDaemonPod", text);
        }
        let create: Vec<Pod> = create.iter().map(|node| pod_for(set, node, hash)).collect();
        pod_control::change(&self.ctx, &self.recorder, &self.expectations, key, set, &create, &delete).await
    }
}

fn selector(set: &DaemonSet) -> Selector {
    Selector::optional(set.spec.as_ref().map(|s| &s.selector))
}

fn min_ready(set: &DaemonSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
}

fn rolling(set: &DaemonSet) -> bool {
    let strategy = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref());
    strategy.and_then(|s| s.type_.as_deref()) != Some("OnDelete")
}

/// The node a pod is on, or is meant for.
fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty()) {
        return Some(node);
    }
    let required = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &required.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let fields = terms.iter().flat_map(|t| t.match_fields.iter().flatten());
    let rule = fields.into_iter().find(|f| f.key == "metadata.name" && f.operator == "In")?;
    rule.values.as_ref()?.first().map(String::as_str)
}

fn tolerations(set: &DaemonSet) -> Vec<Toleration> {
    let spec = set.spec.as_ref().and_then(|s| s.template.spec.as_ref());
    let mut all = spec.and_then(|s| s.tolerations.clone()).unwrap_or_default();
    let exists = |key: &str, effect: &str| Toleration {
        key: Some(format!("node.kubernetes.io/{key}")),
        operator: Some("Exists".into()),
        effect: Some(effect.into()),
        ..Toleration::default()
    };
    let mut own = vec![
        exists("not-ready", "NoExecute"),
        exists("unreachable", "NoExecute"),
        exists("disk-pressure", "NoSchedule"),
        exists("memory-pressure", "NoSchedule"),
        exists("pid-pressure", "NoSchedule"),
        exists("unschedulable", "NoSchedule"),
    ];
    if spec.and_then(|s| s.host_network).unwrap_or(false) {
        own.push(exists("network-unavailable", "NoSchedule"));
    }
    for toleration in own {
        if !all.contains(&toleration) {
            all.push(toleration);
        }
    }
    all
}

/// Whether a pod of the set should start on a node, and whether one that is there may stay.
fn suits(set: &DaemonSet, node: &Node) -> (bool, bool) {
    let spec = set.spec.as_ref().and_then(|s| s.template.spec.clone()).unwrap_or_default();
    if spec.node_name.as_deref().is_some_and(|n| !n.is_empty() && n != node.name()) {
        return (false, false);
    }
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selected = spec.node_selector.iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    let affinity = spec.affinity.and_then(|a| a.node_affinity);
    let terms: Option<Vec<NodeTerm>> = affinity
        .and_then(|a| a.required_during_scheduling_ignored_during_execution)
        .map(|selector| node_terms(&selector));
    if !selected || !terms.is_none_or(|terms| terms.iter().any(|t| t.matches(node.name(), labels))) {
        return (false, false);
    }
    let tolerations = tolerations(set);
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    let untolerated: Vec<&Taint> =
        taints.into_iter().flatten().filter(|t| !tolerations.iter().any(|own| tolerates(own, t))).collect();
    let blocks = |effect: &str| untolerated.iter().any(|t| t.effect == effect);
    (!blocks("NoSchedule") && !blocks("NoExecute"), !blocks("NoExecute"))
}

/// Nodes that get a pod, pods that go.
#[derive(Debug, Default)]
struct Plan {
    create: Vec<String>,
    delete: Vec<Arc<Pod>>,
}

fn by_node(owned: &[Arc<Pod>]) -> BTreeMap<&str, Vec<&Arc<Pod>>> {
    let mut map: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
    for pod in owned {
        map.entry(node_of(pod).unwrap_or_default()).or_default().push(pod);
    }
    map
}

fn surge(set: &DaemonSet, total: i32) -> i32 {
    let rolling = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref()?.rolling_update.as_ref());
    scaled(rolling.and_then(|r| r.max_surge.as_ref()), total, true)
}

fn place(set: &DaemonSet, nodes: &[Arc<Node>], owned: &[Arc<Pod>]) -> Plan {
    let mut plan = Plan::default();
    let on = by_node(owned);
    let one_each = surge(set, i32::try_from(nodes.len()).unwrap_or(i32::MAX)) == 0;
    for node in nodes {
        let (start, stay) = suits(set, node);
        let here = on.get(node.name()).map(Vec::as_slice).unwrap_or_default();
        let (finished, running): (Vec<&&Arc<Pod>>, Vec<&&Arc<Pod>>) =
            here.iter().partition(|pod| pods::is_finished(pod));
        let leaving = running.iter().any(|pod| pod.deleting());
        let mut running: Vec<&&Arc<Pod>> = running.into_iter().filter(|pod| !pod.deleting()).collect();
        if !stay {
            plan.delete.extend(running.into_iter().map(|pod| (**pod).clone()));
            continue;
        }
        plan.delete.extend(finished.iter().filter(|pod| !pod.deleting()).map(|pod| (**pod).clone()));
        if start && here.is_empty() {
            plan.create.push(node.name().to_owned());
        }
        // The oldest stays when there are several.
        if running.len() > 1 && one_each && !leaving {
            running.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|t| t.0));
            plan.delete.extend(running.into_iter().skip(1).map(|pod| (**pod).clone()));
        }
    }
    // Pods meant for a node that is gone can never run.
    let known = |node: &str| nodes.iter().any(|n| n.name() == node);
    for (node, pods) in on.iter().filter(|(node, _)| !known(node)) {
        let unbound = |p: &&&Arc<Pod>| pods::node(p).is_empty() && !p.deleting() && !node.is_empty();
        plan.delete.extend(pods.iter().filter(unbound).map(|p| (*p).clone()));
    }
    plan
}

/// The old pods to replace now: those that do not work anyway, and then as many as may be unavailable.
fn roll(set: &DaemonSet, nodes: &[Arc<Node>], owned: &[Arc<Pod>], hash: &str, now: Timestamp) -> Vec<Arc<Pod>> {
    let wanted = nodes.iter().filter(|node| suits(set, node).0).count();
    let total = i32::try_from(wanted).unwrap_or(i32::MAX);
    let rolling = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref()?.rolling_update.as_ref());
    let one = IntOrString::Int(1);
    let surge = surge(set, total);
    let mut unavailable_allowed = scaled(rolling.map_or(Some(&one), |r| r.max_unavailable.as_ref()), total, true);
    if unavailable_allowed <= 0 && surge <= 0 {
        unavailable_allowed = 1;
    }
    let on = by_node(owned);
    let (mut unavailable, mut broken, mut working) = (0, Vec::new(), Vec::new());
    for node in nodes.iter().filter(|node| suits(set, node).0) {
        let here = on.get(node.name()).map(Vec::as_slice).unwrap_or_default();
        let available = here.iter().any(|pod| !pod.deleting() && pods::is_available(pod, min_ready(set), now));
        if !available {
            unavailable += 1;
        }
        let old = here.iter().filter(|p| !p.deleting() && revisions::label(&****p, HASH) != Some(hash));
        for pod in old {
            if pods::is_available(pod, min_ready(set), now) { &mut working } else { &mut broken }.push((*pod).clone());
        }
    }
    let room = usize::try_from((unavailable_allowed.max(surge) - unavailable).max(0)).unwrap_or(0);
    broken.extend(working.into_iter().take(room));
    broken
}

fn pod_for(set: &DaemonSet, node: &str, hash: &str) -> Pod {
    let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let mut pod = pod_control::from_template(&template, set);
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(HASH.to_owned(), hash.to_owned());
    let generation = set.metadata.annotations.as_ref().and_then(|a| a.get(TEMPLATE_GENERATION)).cloned();
    labels
        .insert(GENERATION.to_owned(), generation.unwrap_or_else(|| set.metadata.generation.unwrap_or(1).to_string()));
    let spec = pod.spec.get_or_insert_default();
    spec.tolerations = Some(tolerations(set));
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    let rule = NodeSelectorRequirement {
        key: "metadata.name".into(),
        operator: "In".into(),
        values: Some(vec![node.to_owned()]),
    };
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_with(|| NodeSelector { node_selector_terms: vec![NodeSelectorTerm::default()] });
    // The node's name replaces whatever fields were asked for: the controller chose among them already.
    for term in &mut required.node_selector_terms {
        term.match_fields = Some(vec![rule.clone()]);
    }
    pod
}

fn status(set: &DaemonSet, nodes: &[Arc<Node>], owned: &[Arc<Pod>], hash: &str, now: Timestamp) -> DaemonSetStatus {
    let on = by_node(owned);
    let old = set.status.clone().unwrap_or_default();
    let (mut desired, mut current, mut wrong, mut ready, mut updated, mut available) = (0, 0, 0, 0, 0, 0);
    for node in nodes {
        let (start, _) = suits(set, node);
        let here = on.get(node.name()).map(Vec::as_slice).unwrap_or_default();
        if !start {
            wrong += i32::from(!here.is_empty());
            continue;
        }
        desired += 1;
        let Some(pod) = here.iter().min_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|t| t.0)) else {
            continue;
        };
        current += 1;
        ready += i32::from(pods::is_ready(pod));
        available += i32::from(pods::is_available(pod, min_ready(set), now));
        updated += i32::from(revisions::label(&***pod, HASH) == Some(hash));
    }
    let some = |n: i32| (n != 0).then_some(n);
    DaemonSetStatus {
        desired_number_scheduled: desired,
        current_number_scheduled: current,
        number_misscheduled: wrong,
        number_ready: ready,
        updated_number_scheduled: some(updated),
        number_available: some(available),
        number_unavailable: some(desired - available),
        observed_generation: set.metadata.generation,
        collision_count: old.collision_count,
        conditions: old.conditions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(spec: serde_json::Value) -> DaemonSet {
        serde_json::from_value(json!({"metadata": {"name": "d", "namespace": "ns", "uid": "d"}, "spec": spec})).unwrap()
    }

    fn plain() -> DaemonSet {
        set(json!({"selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": []}},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}}))
    }

    fn node(name: &str, taints: serde_json::Value) -> Arc<Node> {
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"taints": taints}})).unwrap())
    }

    fn pod(name: &str, node: &str, phase: &str, hash: &str) -> Arc<Pod> {
        let ready = if phase == "Running" { "True" } else { "False" };
        Arc::new(
            serde_json::from_value(
                json!({"metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {HASH: hash}},
                "spec": {"containers": [], "nodeName": node},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}}),
            )
            .unwrap(),
        )
    }

    fn render(plan: &Plan) -> String {
        let delete: Vec<&str> = plan.delete.iter().map(|p| p.name()).collect();
        format!("+{} -{}", plan.create.join(","), delete.join(","))
    }

    #[test]
    fn one_pod_per_node_that_suits() {
        let nodes = [
            node("a", json!([])),
            node("b", json!([{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}])),
            node("c", json!([{"key": "own", "effect": "NoSchedule"}])),
            node("d", json!([{"key": "own", "effect": "NoExecute"}])),
        ];
        assert_eq!(render(&place(&plain(), &nodes, &[])), "+a,b -");
        let pods = [pod("pa", "a", "Running", "h"), pod("pc", "c", "Running", "h"), pod("pd", "d", "Running", "h")];
        assert_eq!(render(&place(&plain(), &nodes, &pods)), "+b -pd");
        assert_eq!(render(&place(&plain(), &nodes[..1], &[pod("f", "a", "Failed", "h")])), "+ -f");
    }

    #[test]
    fn a_rolling_update_takes_what_may_be_unavailable_and_everything_broken() {
        let nodes = [node("a", json!([])), node("b", json!([])), node("c", json!([]))];
        let now = Timestamp::now();
        let names = |pods: &[Arc<Pod>]| -> Vec<String> {
            roll(&plain(), &nodes, pods, "new", now).iter().map(|p| p.name().to_owned()).collect()
        };
        let old = [pod("a", "a", "Running", "old"), pod("b", "b", "Running", "old"), pod("c", "c", "Running", "old")];
        assert_eq!(names(&old), ["a"]);
        let broken =
            [pod("a", "a", "Pending", "old"), pod("b", "b", "Running", "old"), pod("c", "c", "Running", "old")];
        assert_eq!(names(&broken), ["a"], "the broken one uses up the allowance");
        let waiting =
            [pod("a", "a", "Pending", "new"), pod("b", "b", "Running", "old"), pod("c", "c", "Running", "old")];
        assert!(names(&waiting).is_empty());
    }

    #[test]
    fn pods_name_their_node() {
        let pod = pod_for(&plain(), "n1", "h");
        assert_eq!(node_of(&pod), Some("n1"));
        assert_eq!(pod.spec.as_ref().and_then(|s| s.tolerations.as_ref()).map(Vec::len), Some(6));
    }
}
