//! ReplicaSet and ReplicationController: as many pods as asked for, no more, no fewer.
//!
//! In: the set, its pods. Out: pod creations (slow start), deletions (least valuable first), status. Both kinds run the
//! same code; [`ReplicaKind`] is what differs.

use crate::context::{Context, Key, key};
use crate::expectations::Expectations;
use crate::ownership::{claim, concerned, controller};
use crate::{pod_control, pods};
use isopod_client::cache::controller_of;
use isopod_client::objects::{Object, message};
use isopod_client::select::Selector;
use isopod_client::{Cache, Change, Queue, Recorder, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// What the two kinds have in common.
pub(crate) trait ReplicaKind: Object {
    /// Who the events are from.
    const COMPONENT: &'static str;
    fn cache(ctx: &Context) -> &Arc<Cache<Self>>;
    fn wanted(&self) -> usize;
    fn pod_selector(&self) -> Selector;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn min_ready_seconds(&self) -> i32;
    fn status(&self) -> Status;
    fn set_status(&mut self, status: Status);
}

/// The status of either kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Status {
    pub(crate) replicas: i32,
    pub(crate) labeled: i32,
    pub(crate) ready: i32,
    pub(crate) available: i32,
    pub(crate) terminating: Option<i32>,
    pub(crate) observed_generation: i64,
    pub(crate) conditions: Vec<ReplicaSetCondition>,
}

fn some(n: i32) -> Option<i32> {
    (n != 0).then_some(n)
}

impl ReplicaKind for ReplicaSet {
    const COMPONENT: &'static str = "replicaset-controller";
    fn cache(ctx: &Context) -> &Arc<Cache<Self>> {
        &ctx.caches.replica_sets
    }
    fn wanted(&self) -> usize {
        count(self.spec.as_ref().map_or(Some(1), |s| s.replicas.or(Some(1))))
    }
    fn pod_selector(&self) -> Selector {
        Selector::optional(self.spec.as_ref().map(|s| &s.selector))
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
    }
    fn status(&self) -> Status {
        let status = self.status.clone().unwrap_or_default();
        Status {
            replicas: status.replicas,
            labeled: status.fully_labeled_replicas.unwrap_or(0),
            ready: status.ready_replicas.unwrap_or(0),
            available: status.available_replicas.unwrap_or(0),
            terminating: status.terminating_replicas,
            observed_generation: status.observed_generation.unwrap_or(0),
            conditions: status.conditions.unwrap_or_default(),
        }
    }
    fn set_status(&mut self, status: Status) {
        self.status = Some(ReplicaSetStatus {
            replicas: status.replicas,
            fully_labeled_replicas: some(status.labeled),
            ready_replicas: some(status.ready),
            available_replicas: some(status.available),
            terminating_replicas: status.terminating,
            observed_generation: Some(status.observed_generation),
            conditions: (!status.conditions.is_empty()).then_some(status.conditions),
        });
    }
}

impl ReplicaKind for ReplicationController {
    const COMPONENT: &'static str = "replication-controller";
    fn cache(ctx: &Context) -> &Arc<Cache<Self>> {
        &ctx.caches.replication_controllers
    }
    fn wanted(&self) -> usize {
        count(self.spec.as_ref().map_or(Some(1), |s| s.replicas.or(Some(1))))
    }
    fn pod_selector(&self) -> Selector {
        match self.spec.as_ref().and_then(|s| s.selector.as_ref()).filter(|s| !s.is_empty()) {
            Some(labels) => Selector::from_labels(labels),
            None => Selector::nothing(),
        }
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
    }
    fn status(&self) -> Status {
        let status = self.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default().into_iter().map(|c| ReplicaSetCondition {
            last_transition_time: c.last_transition_time,
            message: c.message,
            reason: c.reason,
            status: c.status,
            type_: c.type_,
        });
        Status {
            replicas: status.replicas,
            labeled: status.fully_labeled_replicas.unwrap_or(0),
            ready: status.ready_replicas.unwrap_or(0),
            available: status.available_replicas.unwrap_or(0),
            terminating: None,
            observed_generation: status.observed_generation.unwrap_or(0),
            conditions: conditions.collect(),
        }
    }
    fn set_status(&mut self, status: Status) {
        let conditions = status.conditions.into_iter().map(|c| ReplicationControllerCondition {
            last_transition_time: c.last_transition_time,
            message: c.message,
            reason: c.reason,
            status: c.status,
            type_: c.type_,
        });
        let conditions: Vec<_> = conditions.collect();
        self.status = Some(ReplicationControllerStatus {
            replicas: status.replicas,
            fully_labeled_replicas: some(status.labeled),
            ready_replicas: some(status.ready),
            available_replicas: some(status.available),
            observed_generation: Some(status.observed_generation),
            conditions: (!conditions.is_empty()).then_some(conditions),
        });
    }
}

fn count(n: Option<i32>) -> usize {
    usize::try_from(n.unwrap_or(0)).unwrap_or(0)
}

struct Controller<K> {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Key>>,
    expectations: Expectations,
    kind: std::marker::PhantomData<fn() -> K>,
}

/// Subscribes the controller of kind `K` and starts its workers.
pub(crate) fn start<K: ReplicaKind>(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller::<K> {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component(K::COMPONENT),
        queue: Queue::new(),
        expectations: Expectations::default(),
        kind: std::marker::PhantomData,
    });
    let c = controller.clone();
    K::cache(ctx).subscribe(move |change| {
        if change.is_deleted() {
            c.expectations.forget(&key(&**change.object()));
        }
        c.queue.add(key(&**change.object()));
    });
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| c.pod_changed(change));
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(K::COMPONENT, &queue, 5, &stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
}

impl<K: ReplicaKind> Controller<K> {
    fn pod_changed(&self, change: &Change<'_, Pod>) {
        let sets = K::cache(&self.ctx);
        concerned(sets, change, K::pod_selector).iter().for_each(|set| self.queue.add(key(&**set)));
        if let Some(owner) = controller(sets, &**change.object()) {
            let owner = key(&*owner);
            self.expectations.seen(&owner, change);
            self.queue.add(owner);
        }
    }

    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(set) = K::cache(&self.ctx).get(&key.0, &key.1) else {
            self.expectations.forget(&key);
            return Ok(None);
        };
        let settled = self.expectations.satisfied(&key);
        let owned =
            claim(&self.ctx, &*set, &self.ctx.caches.pods, &set.pod_selector(), |pod| !pods::is_finished(pod), None)
                .await?;
        let active: Vec<Arc<Pod>> = owned.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
        let managed = if settled && !set.deleting() { self.manage(&set, &key, &active).await } else { Ok(()) };
        let now = Timestamp::now();
        let terminating = owned.iter().filter(|pod| pods::is_terminating(pod)).count();
        let status = plan_status(&*set, &active, terminating, managed.as_ref().err(), now);
        if status != set.status() {
            let mut new = (*set).clone();
            new.set_status(status);
            self.ctx.objects.update(&*set, &new, "status").await?;
        }
        managed?;
        Ok(next_available(&active, set.min_ready_seconds(), now))
    }

    async fn manage(&self, set: &K, key: &Key, active: &[Arc<Pod>]) -> Result<(), kube::Error> {
        let wanted = set.wanted();
        let (mut create, mut delete) = (Vec::new(), Vec::new());
        if active.len() < wanted {
            let Some(template) = set.template() else { return Ok(()) };
            let missing = (wanted - active.len()).min(pod_control::BURST);
            create = vec![pod_control::from_template(template, set); missing];
        } else if active.len() > wanted {
            let excess = (active.len() - wanted).min(pod_control::BURST);
            delete = victims(active, &self.related(set), excess);
        } else {
            return Ok(());
        }
        pod_control::change(&self.ctx, &self.recorder, &self.expectations, key, set, &create, &delete).await
    }

    /// Pods of the sets that share this set's controller (of one Deployment): how many of them are on each node decides
    /// which pod is crowded.
    fn related(&self, set: &K) -> Vec<Arc<Pod>> {
        let owners = match controller_of(set.object_meta()) {
            Some(owner) => K::cache(&self.ctx).owned_by(&owner.uid).iter().map(|s| s.uid().to_owned()).collect(),
            None => vec![set.uid().to_owned()],
        };
        owners.iter().flat_map(|uid| self.ctx.caches.pods.owned_by(uid)).filter(|pod| pods::is_active(pod)).collect()
    }
}

/// The pods to delete, least valuable first.
fn victims(active: &[Arc<Pod>], related: &[Arc<Pod>], excess: usize) -> Vec<Arc<Pod>> {
    if excess >= active.len() {
        return active.to_vec();
    }
    let mut crowd: HashMap<&str, usize> = HashMap::new();
    for pod in related {
        *crowd.entry(pods::node(pod)).or_default() += 1;
    }
    let rank = |pod: &Pod| crowd.get(pods::node(pod)).copied().unwrap_or(0);
    let now = Timestamp::now();
    let mut sorted = active.to_vec();
    sorted.sort_by(|a, b| pods::deletion_order(a, rank(a), b, rank(b), now));
    sorted.truncate(excess);
    sorted
}

fn as_i32(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// The status a set should show for these pods.
fn plan_status<K: ReplicaKind>(
    set: &K,
    active: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&kube::Error>,
    now: Timestamp,
) -> Status {
    let empty = BTreeMap::new();
    let wanted_labels = set.template().and_then(|t| t.metadata.as_ref()).and_then(|m| m.labels.as_ref());
    let template = Selector::from_labels(wanted_labels.unwrap_or(&empty));
    let old = set.status();
    let mut conditions = old.conditions.clone();
    let failed = conditions.iter().any(|c| c.type_ == "ReplicaFailure");
    match failure {
        Some(error) if !failed => conditions.push(ReplicaSetCondition {
            type_: "ReplicaFailure".into(),
            status: "True".into(),
            reason: Some(if active.len() < set.wanted() { "FailedCreate" } else { "FailedDelete" }.into()),
            message: Some(message(error)),
            last_transition_time: Some(Time(now)),
        }),
        None if failed => conditions.retain(|c| c.type_ != "ReplicaFailure"),
        _ => {}
    }
    let number = |f: &dyn Fn(&Pod) -> bool| as_i32(active.iter().filter(|pod| f(pod)).count());
    let min_ready = set.min_ready_seconds();
    Status {
        replicas: as_i32(active.len()),
        labeled: number(&|pod| template.matches_optional(pod.metadata.labels.as_ref())),
        ready: number(&pods::is_ready),
        available: number(&|pod| pods::is_available(pod, min_ready, now)),
        terminating: old.terminating.map_or_else(|| Some(as_i32(terminating)), |_| Some(as_i32(terminating))),
        observed_generation: set.object_meta().generation.unwrap_or(0),
        conditions,
    }
    .for_kind::<K>()
}

impl Status {
    fn for_kind<K: ReplicaKind>(mut self) -> Self {
        if K::COMPONENT == ReplicationController::COMPONENT {
            self.terminating = None;
        }
        self
    }
}

/// How long until the next ready pod becomes available.
pub(crate) fn next_available(active: &[Arc<Pod>], min_ready_seconds: i32, now: Timestamp) -> Option<Duration> {
    let next =
        active.iter().filter_map(|pod| pods::available_at(pod, min_ready_seconds)).filter(|at| *at > now).min()?;
    Some(Duration::from_millis(u64::try_from(next.duration_since(now).as_millis()).unwrap_or(0) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use isopod_client::objects::HasMeta;
    use serde_json::json;

    fn pod(name: &str, node: Option<&str>, phase: &str, ready: bool, extra: serde_json::Value) -> Arc<Pod> {
        let ready = if ready { "True" } else { "False" };
        let mut pod = json!({
            "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": "a"},
                "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [], "nodeName": node},
            "status": {"phase": phase, "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:10Z"}]},
        });
        for (key, value) in extra.as_object().unwrap() {
            pod["metadata"][key] = value.clone();
        }
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn the_least_valuable_pod_goes_first() {
        let none = json!({});
        let pods = [
            pod("ready", Some("n1"), "Running", true, none.clone()),
            pod("unready", Some("n1"), "Running", false, none.clone()),
            pod("pending", Some("n1"), "Pending", false, none.clone()),
            pod("unassigned", None, "Pending", false, none),
            pod(
                "cheap",
                Some("n2"),
                "Running",
                true,
                json!({"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}}),
            ),
        ];
        let order: Vec<String> = victims(&pods, &pods, 4).iter().map(|p| p.name().to_owned()).collect();
        assert_eq!(order, ["unassigned", "pending", "unready", "cheap"]);
    }

    #[test]
    fn a_crowded_node_gives_first() {
        let pods: Vec<_> = [("a", "n1"), ("b", "n2"), ("c", "n2")]
            .map(|(name, node)| pod(name, Some(node), "Running", true, json!({})))
            .into();
        let first = victims(&pods, &pods, 1);
        assert_eq!(pods::node(&first[0]), "n2");
    }

    #[test]
    fn status_counts_what_it_says() {
        let set: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": "s", "namespace": "ns", "generation": 3},
            "spec": {"replicas": 3, "minReadySeconds": 30, "selector": {"matchLabels": {"app": "a"}},
                "template": {"metadata": {"labels": {"app": "a"}}}},
        }))
        .unwrap();
        let pods = [
            pod("a", Some("n"), "Running", true, json!({})),
            pod("b", Some("n"), "Running", false, json!({"labels": {"app": "b"}})),
        ];
        let now: Timestamp = "2026-01-01T00:00:20Z".parse().unwrap();
        let status = plan_status(&set, &pods, 1, None, now);
        assert_eq!(
            (status.replicas, status.labeled, status.ready, status.available, status.terminating),
            (2, 1, 1, 0, Some(1))
        );
        assert_eq!(next_available(&pods, 30, now), Some(Duration::from_millis(20_001)));
        assert_eq!(plan_status(&set, &pods, 1, None, now + jiff::SignedDuration::from_secs(20)).available, 1);
    }
}
