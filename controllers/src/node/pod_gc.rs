//! Pod garbage: pods of nodes that no longer exist, unscheduled pods that are being deleted, and finished pods beyond
//! 12,500.

use crate::context::Context;
use crate::pods;
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::{Queue, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const NAME: &str = "pod-garbage-collector-controller";
const FINISHED_KEPT: usize = 12_500;
/// A node that vanished may be back, and another node's cache may be ahead of ours.
const QUARANTINE: Duration = Duration::from_secs(40);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Node(String),
    Pod(String, String),
    Finished,
}

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Work>> = Queue::new();
    let q = queue.clone();
    ctx.caches.nodes.subscribe(move |change| {
        if change.is_deleted() {
            q.add_after(Work::Node(change.object().name().to_owned()), QUARANTINE);
        }
    });
    let (q, c) = (queue.clone(), ctx.clone());
    let finished = AtomicUsize::new(0);
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        if change.is_deleted() {
            return;
        }
        let node = pods::node(pod);
        if node.is_empty() && pod.deleting() {
            q.add(Work::Pod(pod.namespace().to_owned(), pod.name().to_owned()));
        } else if !node.is_empty() && c.caches.nodes.get("", node).is_none() {
            q.add_after(Work::Node(node.to_owned()), QUARANTINE);
        }
        // Counting costs, so it is done only now and then.
        if pods::is_finished(pod) && finished.fetch_add(1, Ordering::Relaxed) % 256 == 255 {
            q.add(Work::Finished);
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |work| {
        let ctx = context.clone();
        async move { sync(&ctx, work).await.map(|()| None) }
    });
}

async fn sync(ctx: &Context, work: Work) -> Result<(), kube::Error> {
    match work {
        Work::Pod(namespace, name) => {
            let Some(pod) = ctx.caches.pods.get(&namespace, &name) else { return Ok(()) };
            if pods::node(&pod).is_empty() && pod.deleting() { remove(ctx, &pod, None).await } else { Ok(()) }
        }
        Work::Node(name) => {
            // The API server itself has to say that the node is gone.
            if ctx.caches.nodes.get("", &name).is_some() || ctx.objects.get::<Node>("", &name).await?.is_some() {
                return Ok(());
            }
            for pod in ctx.caches.pods.list().into_iter().filter(|pod| pods::node(pod) == name) {
                remove(ctx, &pod, Some("PodGC: node no longer exists")).await?;
            }
            Ok(())
        }
        Work::Finished => {
            let mut finished: Vec<_> = ctx.caches.pods.list().into_iter().filter(|p| pods::is_finished(p)).collect();
            let excess = finished.len().saturating_sub(FINISHED_KEPT);
            finished.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|t| t.0));
            for pod in finished.into_iter().take(excess) {
                remove(ctx, &pod, None).await?;
            }
            Ok(())
        }
    }
}

async fn remove(ctx: &Context, pod: &Pod, disruption: Option<&str>) -> Result<(), kube::Error> {
    if !pods::is_finished(pod) {
        let mut new = pod.clone();
        let status = new.status.get_or_insert_default();
        status.phase = Some("Failed".to_owned());
        if let Some(text) = disruption {
            let conditions = status.conditions.get_or_insert_default();
            conditions.retain(|c| c.type_ != "DisruptionTarget");
            conditions.push(PodCondition {
                type_: "DisruptionTarget".into(),
                status: "True".into(),
                reason: Some("DeletionByPodGC".into()),
                message: Some(text.to_owned()),
                last_transition_time: Some(Time(Timestamp::now())),
                ..PodCondition::default()
            });
        }
        match ctx.objects.update(pod, &new, "status").await {
            Err(error) if !is_not_found(&error) => return Err(error),
            _ => {}
        }
    }
    let options = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::uid(pod.uid()) };
    ctx.objects.delete::<Pod>(pod.namespace(), pod.name(), &options).await.map(|_| ())
}
