//! Deployment: rolls ReplicaSets from one pod template to the next.
//!
//! In: the Deployment, its ReplicaSets (adopted by selector), its pods (Recreate only). Out: at most one step of
//! scaling per sync, a new ReplicaSet when the template is new, revision annotations, status. The watch of what it
//! changed wakes it for the next step. The arithmetic is in [`plan`], the conditions in [`status`].

pub(crate) mod plan;
mod status;

use crate::context::{Context, Key, key};
use crate::ownership::{claim, controller, owner_reference};
use crate::pods;
use isopod_client::cache::controller_of;
use isopod_client::objects::{
    DeleteOptions, HasMeta, is_already_exists, is_namespace_terminating, is_not_found, message,
};
use isopod_client::select::Selector;
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use plan::{DESIRED, Goal, HASH, MAX, REVISION, REVISION_HISTORY, Scale, Set};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Key>>,
}

/// A Deployment's ReplicaSets.
struct Sets {
    new: Option<ReplicaSet>,
    old: Vec<Arc<ReplicaSet>>,
}

impl Sets {
    fn all(&self) -> Vec<&ReplicaSet> {
        self.new.iter().chain(self.old.iter().map(|rs| &**rs)).collect()
    }
    fn plans(&self) -> (Option<Set>, Vec<Set>) {
        (self.new.as_ref().map(Set::of), self.old.iter().map(|rs| Set::of(rs)).collect())
    }
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let recorder = ctx.recorder.component("deployment-controller");
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder, queue: Queue::new() });
    let queue = controller.queue.clone();
    ctx.caches.deployments.subscribe(move |change| queue.add(key(&**change.object())));
    let c = controller.clone();
    ctx.caches.replica_sets.subscribe(move |change| c.set_changed(change));
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| {
        if let Change::Deleted(pod) = change {
            c.pod_gone(pod);
        }
    });
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers("deployment-controller", &queue, 5, &stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
}

impl Controller {
    fn set_changed(&self, change: &Change<'_, ReplicaSet>) {
        if let Change::Updated(old, new) = change
            && controller_of(&old.metadata) != controller_of(&new.metadata)
            && let Some(owner) = controller(&self.ctx.caches.deployments, &***old)
        {
            self.queue.add(key(&*owner));
        }
        let set = change.object();
        if let Some(owner) = controller(&self.ctx.caches.deployments, &**set) {
            return self.queue.add(key(&*owner));
        }
        if controller_of(&set.metadata).is_none() && !change.is_deleted() {
            for deployment in self.ctx.caches.deployments.in_namespace(set.namespace()) {
                if selector(&deployment).matches_optional(set.metadata.labels.as_ref()) {
                    self.queue.add(key(&*deployment));
                }
            }
        }
    }

    /// Recreate waits for the last old pod to go.
    fn pod_gone(&self, pod: &Pod) {
        let owner = controller(&self.ctx.caches.replica_sets, pod)
            .and_then(|set| controller(&self.ctx.caches.deployments, &*set));
        if let Some(deployment) = owner.filter(|d| !Goal::of(d).rolling) {
            self.queue.add(key(&*deployment));
        }
    }

    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(d) = self.ctx.caches.deployments.get(&key.0, &key.1) else { return Ok(None) };
        let selector = selector(&d);
        if selector.is_everything() {
            let text = "This deployment is selecting all pods. A non-empty selector is required.";
            self.recorder.warning(&*d, "SelectingAll", text);
            if d.status.as_ref().and_then(|s| s.observed_generation) < d.metadata.generation {
                let mut status = d.status.clone().unwrap_or_default();
                status.observed_generation = d.metadata.generation;
                self.write_status(&d, status).await?;
            }
            return Ok(None);
        }
        let owned = claim(&self.ctx, &*d, &self.ctx.caches.replica_sets, &selector, |_| true, None).await?;
        let goal = Goal::of(&d);
        let paused = d.spec.as_ref().and_then(|s| s.paused).unwrap_or(false);
        if d.deleting() {
            let sets = self.split(&d, owned);
            return self.finish(&d, &sets).await;
        }
        self.note_pause(&d, paused).await?;
        let rescaling = owned.iter().any(|rs| {
            let set = Set::of(rs);
            set.replicas > 0 && set.desired.is_some_and(|desired| desired != goal.replicas)
        });
        if paused || rescaling {
            let sets = self.split(&d, owned);
            let (new, old) = sets.plans();
            self.scale(&d, &goal, &sets, plan::rescale(&goal, new.as_ref(), &old)).await?;
            if paused {
                self.clean(&d, &sets).await?;
            }
            return self.finish(&d, &sets).await;
        }
        if goal.rolling { self.roll(&d, &goal, owned).await } else { self.recreate(&d, &goal, owned).await }
    }

    async fn roll(
        &self,
        d: &Arc<Deployment>,
        goal: &Goal,
        owned: Vec<Arc<ReplicaSet>>,
    ) -> Result<Option<Duration>, kube::Error> {
        let mut sets = self.split(d, owned);
        let Some(d) = self.ensure_new(d, goal, &mut sets).await? else { return Ok(None) };
        let (new, old) = sets.plans();
        let steps = new.map(|new| plan::rolling(goal, &new, &old)).unwrap_or_default();
        if self.scale(&d, goal, &sets, steps).await? == 0 && status::complete(&d, &d.status.clone().unwrap_or_default())
        {
            self.clean(&d, &sets).await?;
        }
        self.finish(&d, &sets).await
    }

    async fn recreate(
        &self,
        d: &Arc<Deployment>,
        goal: &Goal,
        owned: Vec<Arc<ReplicaSet>>,
    ) -> Result<Option<Duration>, kube::Error> {
        let mut sets = self.split(d, owned);
        let (_, old) = sets.plans();
        if self.scale(d, goal, &sets, plan::recreate(&old)).await? > 0 || self.old_pods(&sets) {
            return self.finish(d, &sets).await;
        }
        let Some(d) = self.ensure_new(d, goal, &mut sets).await? else { return Ok(None) };
        let (new, _) = sets.plans();
        if let Some(new) = new.filter(|new| new.replicas != goal.replicas) {
            self.scale(&d, goal, &sets, vec![Scale { name: new.name, to: goal.replicas }]).await?;
        }
        if status::complete(&d, &d.status.clone().unwrap_or_default()) {
            self.clean(&d, &sets).await?;
        }
        self.finish(&d, &sets).await
    }

    fn old_pods(&self, sets: &Sets) -> bool {
        let pods = sets.old.iter().flat_map(|rs| self.ctx.caches.pods.owned_by(rs.uid()));
        pods.into_iter().any(|pod| !pods::is_finished(&pod))
    }

    /// The set with the Deployment's template (the oldest, should there be several), and all others.
    fn split(&self, d: &Deployment, mut owned: Vec<Arc<ReplicaSet>>) -> Sets {
        owned.sort_by(|a, b| {
            let created = |rs: &ReplicaSet| rs.metadata.creation_timestamp.as_ref().map(|t| t.0);
            created(a).cmp(&created(b)).then_with(|| a.name().cmp(b.name()))
        });
        let template = d.spec.as_ref().map(|s| &s.template);
        let is_new = |rs: &Arc<ReplicaSet>| {
            let own = rs.spec.as_ref().and_then(|s| s.template.as_ref());
            matches!((own, template), (Some(a), Some(b)) if plan::same_template(a, b))
        };
        let new = owned.iter().position(is_new).map(|i| (*owned.remove(i)).clone());
        Sets { new, old: owned }
    }

    /// Makes sure that the new set exists and carries the right revision. `None`: wait for the next sync.
    async fn ensure_new(
        &self,
        d: &Arc<Deployment>,
        goal: &Goal,
        sets: &mut Sets,
    ) -> Result<Option<Arc<Deployment>>, kube::Error> {
        let revision = sets.old.iter().map(|rs| revision_of(rs)).max().unwrap_or(0) + 1;
        if let Some(new) = sets.new.take() {
            let mut changed = new.clone();
            annotate(d, &mut changed, revision, goal);
            changed.spec.get_or_insert_default().min_ready_seconds = d.spec.as_ref().and_then(|s| s.min_ready_seconds);
            let written = self.ctx.objects.update(&new, &changed, "").await?;
            sets.new = Some(written.unwrap_or(new));
            let revision = sets.new.as_ref().map(revision_of).unwrap_or(revision);
            let d = self.set_revision(d, revision).await?;
            let progressing = d.status.as_ref().and_then(|s| status::condition(s, "Progressing")).is_some();
            if status::deadline(&d).is_some() && !progressing {
                let name = sets.new.as_ref().map(|rs| rs.name().to_owned()).unwrap_or_default();
                return self
                    .progress(&d, "FoundNewReplicaSet", format!("Found new replica set \"{name}\""))
                    .await
                    .map(Some);
            }
            return Ok(Some(d));
        }
        self.create_new(d, goal, sets, revision).await
    }

    async fn create_new(
        &self,
        d: &Arc<Deployment>,
        goal: &Goal,
        sets: &mut Sets,
        revision: i64,
    ) -> Result<Option<Arc<Deployment>>, kube::Error> {
        let (_, old) = sets.plans();
        let collisions = d.status.as_ref().and_then(|s| s.collision_count);
        let set = new_set(d, goal, &old, revision, collisions);
        let name = set.name().to_owned();
        match self.ctx.objects.create(&set).await {
            Ok(created) => {
                let to = created.spec.as_ref().and_then(|s| s.replicas).unwrap_or(0);
                if to > 0 {
                    let text = format!("Scaled up replica set {name} from 0 to {to}");
                    self.recorder.normal(&**d, "ScalingReplicaSet", text);
                }
                sets.new = Some(created);
                let d = self.set_revision(d, revision).await?;
                if status::deadline(&d).is_none() {
                    return Ok(Some(d));
                }
                let text = format!("Created new replica set \"{name}\"");
                self.progress(&d, "NewReplicaSetCreated", text).await.map(Some)
            }
            Err(error) if is_already_exists(&error) => {
                let found = self.ctx.objects.get::<ReplicaSet>(d.namespace(), &name).await?;
                let ours = found.as_ref().is_some_and(|rs| {
                    controller_of(&rs.metadata).is_some_and(|owner| owner.uid == d.uid())
                        && rs
                            .spec
                            .as_ref()
                            .and_then(|s| s.template.as_ref())
                            .is_some_and(|t| d.spec.as_ref().is_some_and(|s| plan::same_template(t, &s.template)))
                });
                if !ours {
                    // Another template hashed to the same name: count it, so that the next name differs.
                    let mut status = d.status.clone().unwrap_or_default();
                    status.collision_count = Some(collisions.unwrap_or(0) + 1);
                    self.write_status(d, status).await?;
                }
                Err(error)
            }
            Err(error) if is_namespace_terminating(&error) => Ok(None),
            Err(error) => {
                let text = format!("Failed to create new replica set \"{name}\": {}", message(&error));
                self.recorder.warning(&**d, "ReplicaSetCreateError", text.clone());
                if status::deadline(d).is_some() {
                    let mut new = d.status.clone().unwrap_or_default();
                    let now = Timestamp::now();
                    status::set_condition(&mut new, "Progressing", "False", "ReplicaSetCreateError", &text, now);
                    self.write_status(d, new).await?;
                }
                Err(error)
            }
        }
    }

    async fn set_revision(&self, d: &Arc<Deployment>, revision: i64) -> Result<Arc<Deployment>, kube::Error> {
        let revision = revision.to_string();
        if d.metadata.annotations.as_ref().and_then(|a| a.get(REVISION)) == Some(&revision) {
            return Ok(d.clone());
        }
        let patch = json!({"metadata": {
            "resourceVersion": d.metadata.resource_version, "annotations": {REVISION: revision}}});
        self.ctx.objects.merge::<Deployment>(d.namespace(), d.name(), "", &patch).await.map(Arc::new)
    }

    async fn progress(&self, d: &Arc<Deployment>, reason: &str, text: String) -> Result<Arc<Deployment>, kube::Error> {
        let mut new = d.status.clone().unwrap_or_default();
        status::set_condition(&mut new, "Progressing", "True", reason, &text, Timestamp::now());
        self.write_status(d, new).await
    }

    async fn note_pause(&self, d: &Arc<Deployment>, paused: bool) -> Result<(), kube::Error> {
        if status::deadline(d).is_none() {
            return Ok(());
        }
        let old = d.status.clone().unwrap_or_default();
        let reason = status::condition(&old, "Progressing").and_then(|c| c.reason.as_deref());
        if reason == Some("ProgressDeadlineExceeded") {
            return Ok(());
        }
        let (reason, text) = match (paused, reason == Some("DeploymentPaused")) {
            (true, false) => ("DeploymentPaused", "Deployment is paused"),
            (false, true) => ("DeploymentResumed", "Deployment is resumed"),
            _ => return Ok(()),
        };
        let mut new = old;
        status::set_condition(&mut new, "Progressing", "Unknown", reason, text, Timestamp::now());
        self.write_status(d, new).await.map(|_| ())
    }

    /// Applies the plan; returns how many sets changed their size.
    async fn scale(&self, d: &Deployment, goal: &Goal, sets: &Sets, steps: Vec<Scale>) -> Result<usize, kube::Error> {
        let mut changed = 0;
        for step in steps {
            let Some(set) = sets.all().into_iter().find(|rs| rs.name() == step.name) else { continue };
            let from = set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
            let mut new = set.clone();
            new.spec.get_or_insert_default().replicas = Some(step.to);
            sizes(&mut new, goal);
            if self.ctx.objects.update(set, &new, "").await?.is_some() && from != step.to {
                changed += 1;
                let word = if step.to > from { "up" } else { "down" };
                let text = format!("Scaled {word} replica set {} from {from} to {}", step.name, step.to);
                self.recorder.normal(d, "ScalingReplicaSet", text);
            }
        }
        Ok(changed)
    }

    /// Deletes what is beyond the revision history limit.
    async fn clean(&self, d: &Deployment, sets: &Sets) -> Result<(), kube::Error> {
        let limit = d.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10);
        if limit == i32::MAX {
            return Ok(());
        }
        let mut idle: Vec<_> = sets.old.iter().filter(|rs| !rs.deleting()).collect();
        idle.sort_by_key(|rs| revision_of(rs));
        let excess = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        for set in idle.into_iter().take(excess) {
            let busy = Set::of(set).replicas != 0 || set.status.as_ref().is_some_and(|s| s.replicas != 0);
            let seen = set.status.as_ref().and_then(|s| s.observed_generation) >= set.metadata.generation;
            if !busy && seen {
                let options = DeleteOptions::uid(set.uid());
                self.ctx.objects.delete::<ReplicaSet>(set.namespace(), set.name(), &options).await?;
            }
        }
        Ok(())
    }

    async fn finish(&self, d: &Arc<Deployment>, sets: &Sets) -> Result<Option<Duration>, kube::Error> {
        let now = Timestamp::now();
        let paused = d.spec.as_ref().and_then(|s| s.paused).unwrap_or(false);
        let all = sets.all();
        let status = if paused {
            status::counts(d, sets.new.as_ref(), &all, now)
        } else {
            status::rollout(d, sets.new.as_ref(), &all, now)
        };
        let again = if paused { None } else { status::recheck(d, &status, now) };
        self.write_status(d, status).await?;
        Ok(again)
    }

    async fn write_status(
        &self,
        d: &Arc<Deployment>,
        status: DeploymentStatus,
    ) -> Result<Arc<Deployment>, kube::Error> {
        let mut new = (**d).clone();
        new.status = Some(status);
        match self.ctx.objects.update(&**d, &new, "status").await {
            Ok(Some(written)) => Ok(Arc::new(written)),
            Ok(None) => Ok(d.clone()),
            Err(error) if is_not_found(&error) => Ok(d.clone()),
            Err(error) => Err(error),
        }
    }
}

fn selector(d: &Deployment) -> Selector {
    Selector::optional(d.spec.as_ref().map(|s| &s.selector))
}

fn revision_of(rs: &ReplicaSet) -> i64 {
    plan::annotation(rs, REVISION).and_then(|v| v.parse().ok()).unwrap_or(0)
}

fn sizes(rs: &mut ReplicaSet, goal: &Goal) {
    let annotations = rs.metadata.annotations.get_or_insert_default();
    annotations.insert(DESIRED.to_owned(), goal.replicas.to_string());
    annotations.insert(MAX.to_owned(), goal.max_replicas().to_string());
}

/// Copies the Deployment's annotations and gives the set its revision, remembering the ones it had.
fn annotate(d: &Deployment, rs: &mut ReplicaSet, revision: i64, goal: &Goal) {
    const OWN: [&str; 6] = [
        "kubectl.kubernetes.io/last-applied-configuration",
        REVISION,
        REVISION_HISTORY,
        DESIRED,
        MAX,
        "deprecated.deployment.rollback.to",
    ];
    let annotations = rs.metadata.annotations.get_or_insert_default();
    for (key, value) in d.metadata.annotations.iter().flatten().filter(|(key, _)| !OWN.contains(&key.as_str())) {
        annotations.insert(key.clone(), value.clone());
    }
    let old = annotations.get(REVISION).cloned();
    let number = old.as_ref().and_then(|v| v.parse::<i64>().ok()).unwrap_or(0);
    if number < revision {
        annotations.insert(REVISION.to_owned(), revision.to_string());
        if let Some(old) = old.filter(|old| !old.is_empty() && *old != revision.to_string()) {
            let history = annotations.entry(REVISION_HISTORY.to_owned()).or_default();
            *history = if history.is_empty() { old } else { format!("{history},{old}") };
        }
    }
    if !annotations.contains_key(DESIRED) {
        sizes(rs, goal);
    }
}

fn new_set(d: &Deployment, goal: &Goal, old: &[Set], revision: i64, collisions: Option<i32>) -> ReplicaSet {
    let spec = d.spec.clone().unwrap_or_default();
    let hash = plan::template_hash(&spec.template, collisions);
    let mut template = spec.template;
    let mut labels: BTreeMap<String, String> =
        template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
    labels.insert(HASH.to_owned(), hash.clone());
    template.metadata.get_or_insert_default().labels = Some(labels.clone());
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(HASH.to_owned(), hash.clone());
    let mut rs = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", d.name())),
            namespace: Some(d.namespace().to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![owner_reference(d)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(plan::new_set_replicas(goal, old, 0)),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        }),
        status: None,
    };
    annotate(d, &mut rs, revision, goal);
    rs
}
