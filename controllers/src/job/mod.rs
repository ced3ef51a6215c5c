//! Job: pods that run to their end, as many as asked for; and the deletion of finished Jobs after their time to live.
//!
//! In: the Job and its pods. Out: pods with a tracking finalizer, so that none is lost before it was counted; status in
//! two steps (to be counted, counted); conditions. The decisions are in [`plan`].

mod indexes;
pub(crate) mod plan;

use crate::context::{Context, Key, key};
use crate::expectations::Expectations;
use crate::ownership::{claim, concerned, controller};
use crate::pod_control;
use futures::future::join_all;
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::select::Selector;
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use plan::{FINALIZER, INDEX, Plan};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "job-controller";

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Key>>,
    expectations: Expectations,
}

/// Subscribes the controllers and starts their workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component(NAME),
        queue: Queue::new(),
        expectations: Expectations::default(),
    });
    let c = controller.clone();
    ctx.caches.jobs.subscribe(move |change| {
        if change.is_deleted() {
            c.expectations.forget(&key(&**change.object()));
        }
        c.queue.add(key(&**change.object()));
    });
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| c.pod_changed(change));
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(NAME, &queue, 5, &stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
    start_ttl(ctx);
}

fn selector(job: &Job) -> Selector {
    Selector::optional(job.spec.as_ref().and_then(|s| s.selector.as_ref()))
}

impl Controller {
    fn pod_changed(&self, change: &Change<'_, Pod>) {
        let pod = change.object();
        let jobs = concerned(&self.ctx.caches.jobs, change, selector);
        jobs.iter().for_each(|job| self.queue.add(key(&**job)));
        let Some(owner) = controller(&self.ctx.caches.jobs, &**pod) else {
            // A pod whose Job is gone must not be kept by the Job's finalizer.
            if jobs.is_empty()
                && !change.is_deleted()
                && pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
            {
                let reference = isopod_client::cache::controller_of(&pod.metadata).filter(|o| o.kind == "Job");
                let name = reference.map(|o| o.name.clone()).unwrap_or_default();
                self.queue.add((pod.namespace().to_owned(), name));
            }
            return;
        };
        let key = key(&*owner);
        self.expectations.seen(&key, change);
        self.queue.add(key);
    }

    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(job) = self.ctx.caches.jobs.get(&key.0, &key.1) else {
            self.expectations.forget(&key);
            return self.release_orphans(&key).await;
        };
        let managed_elsewhere = job
            .spec
            .as_ref()
            .and_then(|s| s.managed_by.as_deref())
            .is_some_and(|m| m != "kubernetes.io/job-controller");
        if managed_elsewhere {
            return Ok(None);
        }
        let selector = selector(&job);
        let owned = claim(&self.ctx, &*job, &self.ctx.caches.pods, &selector, |_| true, Some(FINALIZER)).await?;
        let mut plan = plan::plan(&job, &owned, Timestamp::now());
        if job.deleting() {
            plan.create.clear();
            plan.delete.clear();
            // Nobody will read the counts: nothing may hold the pods back.
            let tracked = |p: &&Arc<Pod>| p.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER);
            plan.release = owned.iter().filter(tracked).cloned().collect();
        }
        if !self.expectations.satisfied(&key) {
            plan.create.clear();
            plan.delete.clear();
        }
        let mut current = (*job).clone();
        current.status = Some(plan.status.clone());
        let written = match self.ctx.objects.update(&*job, &current, "status").await {
            Err(error) if is_not_found(&error) => return Ok(None),
            result => result?,
        };
        for (kind, reason, note) in &plan.events {
            if *kind == "Normal" {
                self.recorder.normal(&*job, reason, note.clone());
            } else {
                self.recorder.warning(&*job, reason, note.clone());
            }
        }
        let job = written.map_or(job, Arc::new);
        // Only now that the status remembers them may the pods go.
        self.release(&plan.release).await?;
        self.apply(&key, &job, &plan).await?;
        Ok(plan.again)
    }

    async fn release(&self, pods: &[Arc<Pod>]) -> Result<(), kube::Error> {
        let removals = pods.iter().map(|pod| async move {
            let kept: Vec<&String> = pod.metadata.finalizers.iter().flatten().filter(|f| *f != FINALIZER).collect();
            let patch = json!({"metadata": {
                "uid": pod.uid(), "resourceVersion": pod.metadata.resource_version, "finalizers": kept}});
            match self.ctx.objects.merge::<Pod>(pod.namespace(), pod.name(), "", &patch).await {
                Err(error) if !is_not_found(&error) => Err(error),
                _ => Ok(()),
            }
        });
        join_all(removals).await.into_iter().collect()
    }

    async fn release_orphans(&self, key: &Key) -> Result<Option<Duration>, kube::Error> {
        let orphaned = |pod: &Arc<Pod>| {
            let owner = isopod_client::cache::controller_of(&pod.metadata);
            owner.is_none_or(|o| o.kind == "Job" && o.name == key.1)
                && pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
        };
        let pods: Vec<Arc<Pod>> = self.ctx.caches.pods.in_namespace(&key.0).into_iter().filter(orphaned).collect();
        self.release(&pods).await.map(|()| None)
    }

    async fn apply(&self, key: &Key, job: &Job, plan: &Plan) -> Result<(), kube::Error> {
        if plan.create.is_empty() && plan.delete.is_empty() {
            return Ok(());
        }
        let create: Vec<Pod> = plan.create.iter().map(|index| pod_for(job, *index)).collect();
        pod_control::change(&self.ctx, &self.recorder, &self.expectations, key, job, &create, &plan.delete).await
    }
}

fn pod_for(job: &Job, index: Option<i32>) -> Pod {
    let template = job.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let mut pod = pod_control::from_template(&template, job);
    pod.metadata.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
    let Some(index) = index else { return pod };
    let text = index.to_string();
    pod.metadata.generate_name = Some(format!("{}-{text}-", job.name()));
    pod.metadata.annotations.get_or_insert_default().insert(INDEX.to_owned(), text.clone());
    pod.metadata.labels.get_or_insert_default().insert(INDEX.to_owned(), text.clone());
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(format!("{}-{text}", job.name()));
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let env = container.env.get_or_insert_default();
        if env.iter().any(|e| e.name == "JOB_COMPLETION_INDEX") {
            continue;
        }
        env.push(EnvVar {
            name: "JOB_COMPLETION_INDEX".to_owned(),
            value: None,
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    api_version: None,
                    field_path: format!("metadata.labels['{INDEX}']"),
                }),
                ..EnvVarSource::default()
            }),
        });
    }
    pod
}

/// Deletes finished Jobs when their `ttlSecondsAfterFinished` are over.
fn start_ttl(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.jobs.subscribe(move |change| {
        if !change.is_deleted() && expiry(change.object()).is_some() {
            q.add(key(&**change.object()));
        }
    });
    let context = ctx.clone();
    spawn_workers("ttl-after-finished-controller", &queue, 2, &ctx.stop, move |key| {
        let ctx = context.clone();
        async move {
            let Some(job) = ctx.caches.jobs.get(&key.0, &key.1).filter(|job| !job.deleting()) else { return Ok(None) };
            let Some(at) = expiry(&job) else { return Ok(None) };
            let now = Timestamp::now();
            if at > now {
                let wait = u64::try_from(at.duration_since(now).as_millis()).unwrap_or(0);
                return Ok(Some(Duration::from_millis(wait + 1)));
            }
            let options = DeleteOptions { propagation: Some("Foreground"), ..DeleteOptions::uid(job.uid()) };
            ctx.objects.delete::<Job>(&key.0, &key.1, &options).await.map(|_| None)
        }
    });
}

fn expiry(job: &Job) -> Option<Timestamp> {
    let ttl = job.spec.as_ref()?.ttl_seconds_after_finished?;
    let status = job.status.as_ref()?;
    let end = plan::holds(status, "Complete").or_else(|| plan::holds(status, "Failed"))?;
    let at = end.last_transition_time.as_ref()?.0;
    Some(at + SignedDuration::from_secs(i64::from(ttl)))
}
