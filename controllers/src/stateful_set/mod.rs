//! StatefulSet: numbered pods with their own claims, started, updated and stopped in order.
//!
//! In: the set, its pods, its ControllerRevisions. Out: at most the next steps that the order allows; pods named
//! `<set>-<ordinal>`, their claims, revisions, status.

mod claims;

use crate::context::{Context, Key, key};
use crate::deployment::plan::{scaled, short_hash};
use crate::ownership::{claim, concerned, controller};
use crate::revisions;
use crate::{pod_control, pods};
use isopod_client::objects::{
    DeleteOptions, HasMeta, is_already_exists, is_namespace_terminating, is_not_found, message,
};
use isopod_client::select::Selector;
use isopod_client::{Queue, Recorder, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "statefulset-controller";
const HASH: &str = "controller-revision-hash";
const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller_ = Arc::new(Controller { ctx: ctx.clone(), recorder: ctx.recorder.component(NAME) });
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.stateful_sets.subscribe(move |change| q.add(key(&**change.object())));
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        if let Some(owner) = controller(&c.caches.stateful_sets, &**pod) {
            q.add(key(&*owner));
        }
        concerned(&c.caches.stateful_sets, change, selector).iter().for_each(|set| q.add(key(&**set)));
    });
    spawn_workers(NAME, &queue, 5, &ctx.stop, move |key| {
        let controller = controller_.clone();
        async move { controller.sync(key).await }
    });
}

fn selector(set: &StatefulSet) -> Selector {
    Selector::optional(set.spec.as_ref().map(|s| &s.selector))
}

/// The ordinal in a pod's name.
fn ordinal(set: &str, pod: &str) -> Option<i32> {
    pod.strip_prefix(set)?.strip_prefix('-')?.parse().ok()
}

/// What to do next.
#[derive(Debug, PartialEq)]
enum Step {
    /// Start this ordinal with the newest (or else the current) revision.
    Create(i32, Revision),
    /// Stop this pod.
    Delete(String),
    /// It ended by itself: remove it, so that it can be started again.
    Replace(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Revision {
    Current,
    Update,
}

/// The numbers the plan needs.
struct Goal {
    start: i32,
    replicas: i32,
    parallel: bool,
    /// Pods below this ordinal keep the current revision; `None` when nothing is updated by itself.
    partition: Option<i32>,
    max_unavailable: i32,
    min_ready: i32,
}

impl Goal {
    fn of(set: &StatefulSet) -> Self {
        let spec = set.spec.clone().unwrap_or_default();
        let replicas = spec.replicas.unwrap_or(1);
        let strategy = spec.update_strategy.unwrap_or_default();
        let rolling = strategy.rolling_update.unwrap_or_default();
        let max_unavailable = rolling.max_unavailable.as_ref().map_or(1, |v| scaled(Some(v), replicas, false).max(1));
        Self {
            start: spec.ordinals.and_then(|o| o.start).unwrap_or(0),
            replicas,
            parallel: spec.pod_management_policy.as_deref() == Some("Parallel"),
            partition: (strategy.type_.as_deref() != Some("OnDelete")).then(|| rolling.partition.unwrap_or(0)),
            max_unavailable,
            min_ready: spec.min_ready_seconds.unwrap_or(0),
        }
    }

    fn revision_for(&self, ordinal: i32, current_replicas: i32) -> Revision {
        let old = match self.partition {
            Some(partition) => ordinal < self.start + partition,
            None => ordinal < self.start + current_replicas,
        };
        if old { Revision::Current } else { Revision::Update }
    }
}

fn plan(goal: &Goal, owned: &[(i32, Arc<Pod>)], update: &str, current_replicas: i32, now: Timestamp) -> Vec<Step> {
    let by_ordinal: BTreeMap<i32, &Arc<Pod>> = owned.iter().map(|(n, pod)| (*n, pod)).collect();
    let end = goal.start + goal.replicas;
    let available = |pod: &Pod| !pod.deleting() && pods::is_available(pod, goal.min_ready, now);
    let mut steps = Vec::new();
    for n in goal.start..end {
        let Some(pod) = by_ordinal.get(&n) else {
            steps.push(Step::Create(n, goal.revision_for(n, current_replicas)));
            if goal.parallel { continue } else { return steps }
        };
        if pods::is_finished(pod) && !pod.deleting() {
            steps.push(Step::Replace(pod.name().to_owned()));
            if goal.parallel { continue } else { return steps }
        }
        // In order, each waits for the one before it.
        if !goal.parallel && !available(pod) {
            return steps;
        }
    }
    // Beyond the end: the highest first, one at a time, and only when the ones before it are well.
    let condemned: Vec<&Arc<Pod>> =
        by_ordinal.iter().rev().filter(|(n, _)| **n < goal.start || **n >= end).map(|(_, p)| *p).collect();
    for pod in &condemned {
        if pod.deleting() {
            if goal.parallel { continue } else { return steps }
        }
        steps.push(Step::Delete(pod.name().to_owned()));
        if !goal.parallel {
            return steps;
        }
    }
    let Some(partition) = goal.partition else { return steps };
    if !steps.is_empty() {
        return steps;
    }
    let mut unavailable = by_ordinal.range(goal.start..end).filter(|(_, p)| !available(p)).count();
    let allowed = usize::try_from(goal.max_unavailable).unwrap_or(1);
    for (_, pod) in by_ordinal.range(goal.start + partition..end.max(goal.start + partition)).rev() {
        let old = revisions::label(&***pod, HASH) != Some(update);
        if old && !pod.deleting() {
            let broken = !available(pod);
            if !broken && unavailable >= allowed {
                return steps;
            }
            steps.push(Step::Delete(pod.name().to_owned()));
            unavailable += usize::from(!broken);
            if unavailable >= allowed {
                return steps;
            }
        } else if !available(pod) && unavailable >= allowed {
            return steps;
        }
    }
    steps
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(set) = self.ctx.caches.stateful_sets.get(&key.0, &key.1) else { return Ok(None) };
        if set.deleting() {
            return Ok(None);
        }
        let selector = selector(&set);
        let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
        let data = revisions::data(&template);
        let old = set.status.clone().unwrap_or_default();
        let hash = short_hash(&data.to_string(), old.collision_count);
        let history =
            revisions::ensure(&self.ctx, &*set, &selector, &data, &hash, "controller.kubernetes.io/hash").await?;
        let update = history.name.clone();
        let exists = |name: &String| history.all.iter().any(|r| r.name() == *name);
        let current = old.current_revision.clone().filter(exists).unwrap_or_else(|| update.clone());
        let owned = claim(
            &self.ctx,
            &*set,
            &self.ctx.caches.pods,
            &selector,
            |p| ordinal(set.name(), p.name()).is_some(),
            None,
        )
        .await?;
        let numbered: Vec<(i32, Arc<Pod>)> =
            owned.iter().filter_map(|p| Some((ordinal(set.name(), p.name())?, p.clone()))).collect();
        let goal = Goal::of(&set);
        let now = Timestamp::now();
        let steps = plan(&goal, &numbered, &update, old.current_replicas.unwrap_or(0), now);
        claims::own(&self.ctx, &set, &goal, &numbered).await?;
        let mut result = Ok(());
        for step in steps {
            result = self.apply(&set, &step, &history, &current, &update).await;
            if result.is_err() {
                break;
            }
        }
        let status = status(&set, &goal, &numbered, &current, &update, now);
        if set.status.as_ref() != Some(&status) {
            let mut new = (*set).clone();
            new.status = Some(status);
            match self.ctx.objects.update(&*set, &new, "status").await {
                Err(error) if !is_not_found(&error) => return Err(error),
                _ => {}
            }
        }
        let mut live: Vec<&str> = owned.iter().filter_map(|p| revisions::label(&**p, HASH)).collect();
        live.push(&current);
        let limit = set.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10);
        revisions::trim(&self.ctx, &history, &live, HASH, limit).await?;
        result?;
        Ok(crate::replica::next_available(&owned, goal.min_ready, now))
    }

    async fn apply(
        &self,
        set: &StatefulSet,
        step: &Step,
        history: &revisions::History,
        current: &str,
        update: &str,
    ) -> Result<(), kube::Error> {
        match step {
            Step::Create(n, revision) => {
                let name = if *revision == Revision::Current { current } else { update };
                let template = template_of(set, &history.all, name);
                self.create(set, *n, &template, name).await
            }
            Step::Delete(name) => self.delete(set, name).await,
            Step::Replace(name) => {
                let text = format!("StatefulSet {}/{} is recreating failed Pod {name}", set.namespace(), set.name());
                self.recorder.warning(set, "RecreatingFailedPod", text);
                self.delete(set, name).await
            }
        }
    }

    async fn delete(&self, set: &StatefulSet, name: &str) -> Result<(), kube::Error> {
        let Some(pod) = self.ctx.caches.pods.get(set.namespace(), name) else { return Ok(()) };
        match self.ctx.objects.delete::<Pod>(pod.namespace(), name, &DeleteOptions::uid(pod.uid())).await {
            Ok(_) => {
                let text = format!("delete Pod {name} in StatefulSet {} successful", set.name());
                self.recorder.normal(set, "SuccessfulDelete", text);
                Ok(())
            }
            Err(error) => {
                let text = format!("delete Pod {name} in StatefulSet {} failed error: {}", set.name(), message(&error));
                self.recorder.warning(set, "FailedDelete", text);
                Err(error)
            }
        }
    }

    async fn create(
        &self,
        set: &StatefulSet,
        n: i32,
        template: &PodTemplateSpec,
        revision: &str,
    ) -> Result<(), kube::Error> {
        let pod = pod_for(set, n, template, revision);
        for claim in claims::of(set, n) {
            if self.ctx.caches.claims.get(claim.namespace(), claim.name()).is_some() {
                continue;
            }
            match self.ctx.objects.create(&claim).await {
                Ok(_) => {
                    let text = format!(
                        "create Claim {} Pod {} in StatefulSet {} success",
                        claim.name(),
                        pod.name(),
                        set.name()
                    );
                    self.recorder.normal(set, "SuccessfulCreate", text);
                }
                Err(error) if is_already_exists(&error) => {}
                Err(error) if is_namespace_terminating(&error) => return Ok(()),
                Err(error) => {
                    let text = format!(
                        "create Claim {} for Pod {} in StatefulSet {} failed error: {}",
                        claim.name(),
                        pod.name(),
                        set.name(),
                        message(&error)
                    );
                    self.recorder.warning(set, "FailedCreate", text);
                    return Err(error);
                }
            }
        }
        match self.ctx.objects.create(&pod).await {
            Ok(_) => {
                let text = format!("create Pod {} in StatefulSet {} successful", pod.name(), set.name());
                self.recorder.normal(set, "SuccessfulCreate", text);
                Ok(())
            }
            // The cache is behind: its pod will show.
            Err(error) if is_already_exists(&error) || is_namespace_terminating(&error) => Ok(()),
            Err(error) => {
                let text = format!(
                    "create Pod {} in StatefulSet {} failed error: {}",
                    pod.name(),
                    set.name(),
                    message(&error)
                );
                self.recorder.warning(set, "FailedCreate", text);
                Err(error)
            }
        }
    }
}

fn template_of(set: &StatefulSet, history: &[Arc<ControllerRevision>], name: &str) -> PodTemplateSpec {
    let stored = history.iter().find(|r| r.name() == name).and_then(|r| r.data.as_ref());
    let stored = stored.and_then(|d| serde_json::from_value(d.0.pointer("/spec/template")?.clone()).ok());
    stored.unwrap_or_else(|| set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default())
}

fn pod_for(set: &StatefulSet, n: i32, template: &PodTemplateSpec, revision: &str) -> Pod {
    let mut pod = pod_control::from_template(template, set);
    let name = format!("{}-{n}", set.name());
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(name.clone());
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(POD_NAME.to_owned(), name.clone());
    labels.insert(POD_INDEX.to_owned(), n.to_string());
    labels.insert(HASH.to_owned(), revision.to_owned());
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(name);
    spec.subdomain = set.spec.as_ref().and_then(|s| s.service_name.clone()).filter(|s| !s.is_empty());
    let templates = set.spec.as_ref().and_then(|s| s.volume_claim_templates.clone()).unwrap_or_default();
    let volumes = spec.volumes.get_or_insert_default();
    volumes.retain(|v| !templates.iter().any(|t| t.name() == v.name));
    for template in &templates {
        volumes.push(Volume {
            name: template.name().to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: format!("{}-{}-{n}", template.name(), set.name()),
                read_only: None,
            }),
            ..Volume::default()
        });
    }
    if volumes.is_empty() {
        spec.volumes = None;
    }
    pod
}

fn status(
    set: &StatefulSet,
    goal: &Goal,
    owned: &[(i32, Arc<Pod>)],
    current: &str,
    update: &str,
    now: Timestamp,
) -> StatefulSetStatus {
    let old = set.status.clone().unwrap_or_default();
    let number =
        |f: &dyn Fn(&Pod) -> bool| i32::try_from(owned.iter().filter(|(_, p)| f(p)).count()).unwrap_or(i32::MAX);
    let created = |p: &Pod| !pods::phase(p).is_empty();
    let of = |revision: &str| number(&|p| created(p) && !p.deleting() && revisions::label(p, HASH) == Some(revision));
    let updated = of(update);
    let mut current = current.to_owned();
    let mut current_replicas = of(&current);
    let ready = number(&|p| created(p) && pods::is_ready(p));
    // The update is over when every pod is new and ready.
    if goal.partition.is_some() && current != update && updated == goal.replicas && ready == goal.replicas {
        current = update.to_owned();
        current_replicas = updated;
    }
    let some = |n: i32| (n != 0).then_some(n);
    StatefulSetStatus {
        replicas: number(&created),
        ready_replicas: some(ready),
        available_replicas: Some(number(&|p| pods::is_available(p, goal.min_ready, now))),
        current_replicas: some(current_replicas),
        updated_replicas: some(updated),
        current_revision: Some(current),
        update_revision: Some(update.to_owned()),
        observed_generation: set.metadata.generation,
        collision_count: Some(old.collision_count.unwrap_or(0)),
        conditions: old.conditions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(n: i32, revision: &str, state: &str) -> (i32, Arc<Pod>) {
        let mut pod = json!({"metadata": {"name": format!("s-{n}"), "namespace": "ns", "uid": n.to_string(),
            "labels": {HASH: revision}}, "spec": {"containers": []},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
        match state {
            "starting" => pod["status"] = json!({"phase": "Pending"}),
            "failed" => pod["status"] = json!({"phase": "Failed"}),
            "leaving" => pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"),
            _ => {}
        }
        (n, Arc::new(serde_json::from_value(pod).unwrap()))
    }

    fn goal(replicas: i32, parallel: bool, partition: i32) -> Goal {
        Goal { start: 0, replicas, parallel, partition: Some(partition), max_unavailable: 1, min_ready: 0 }
    }

    fn render(goal: &Goal, pods: &[(i32, Arc<Pod>)]) -> String {
        let steps = plan(goal, pods, "new", 0, Timestamp::now());
        let word = |s: &Step| match s {
            Step::Create(n, Revision::Update) => format!("+{n}"),
            Step::Create(n, Revision::Current) => format!("+{n}(old)"),
            Step::Delete(name) => format!("-{name}"),
            Step::Replace(name) => format!("!{name}"),
        };
        steps.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn order_is_kept() {
        let ok = |n| pod(n, "new", "ok");
        for (replicas, pods, want) in [
            (3, vec![], "+0"),
            (3, vec![pod(0, "new", "starting")], ""),
            (3, vec![ok(0)], "+1"),
            (3, vec![ok(0), ok(1), ok(2)], ""),
            (1, vec![ok(0), ok(1), ok(2)], "-s-2"),
            (1, vec![ok(0), ok(1), pod(2, "new", "leaving")], ""),
            (2, vec![pod(0, "new", "failed"), ok(1)], "!s-0"),
            (3, vec![ok(0), ok(2)], "+1"),
        ] {
            assert_eq!(render(&goal(replicas, false, 0), &pods), want, "{replicas}");
        }
        assert_eq!(render(&goal(3, true, 0), &[]), "+0 +1 +2");
        assert_eq!(render(&goal(0, true, 0), &[ok(0), ok(1)]), "-s-1 -s-0");
    }

    #[test]
    fn updates_go_from_the_top_down_to_the_partition() {
        let old = |n| pod(n, "old", "ok");
        let new = |n| pod(n, "new", "ok");
        for (partition, pods, want) in [
            (0, vec![old(0), old(1), old(2)], "-s-2"),
            (0, vec![old(0), old(1), pod(2, "new", "starting")], ""),
            (0, vec![old(0), old(1), new(2)], "-s-1"),
            (2, vec![old(0), old(1), new(2)], ""),
            (2, vec![old(0), old(1)], "+2"),
            (3, vec![old(0), old(1)], "+2(old)"),
        ] {
            assert_eq!(render(&goal(3, false, partition), &pods), want, "{partition}");
        }
    }

    #[test]
    fn pods_have_their_name_and_claims() {
        let set: StatefulSet = serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {
            "serviceName": "svc", "selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": []}},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}]}}))
        .unwrap();
        let pod = pod_for(&set, 1, &PodTemplateSpec::default(), "rev");
        assert_eq!(pod.name(), "s-1");
        let spec = pod.spec.unwrap();
        assert_eq!((spec.hostname.as_deref(), spec.subdomain.as_deref()), (Some("s-1"), Some("svc")));
        assert_eq!(claims::of(&set, 1)[0].name(), "data-s-1");
        assert_eq!(spec.volumes.unwrap()[0].persistent_volume_claim.as_ref().unwrap().claim_name, "data-s-1");
    }
}
