//! Taint eviction: pods that do not tolerate a NoExecute taint of their node are deleted, at once or when their
//! tolerationSeconds are over.

use crate::context::Context;
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::placement::tolerates;
use isopod_client::{Change, Queue, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "taint-eviction-controller";

type Key = (String, String);

fn evicting(node: &Node) -> Vec<Taint> {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    taints.into_iter().flatten().filter(|t| t.effect == "NoExecute").cloned().collect()
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.nodes.subscribe(move |change| {
        let changed = match change {
            Change::Updated(old, new) => evicting(old) != evicting(new),
            Change::Added(node) => !evicting(node).is_empty(),
            Change::Deleted(_) => false,
        };
        if changed {
            for pod in c.caches.pods.list() {
                if crate::pods::node(&pod) == change.object().name() {
                    q.add((pod.namespace().to_owned(), pod.name().to_owned()));
                }
            }
        }
    });
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        let node = c.caches.nodes.get("", crate::pods::node(pod));
        if !change.is_deleted() && node.is_some_and(|node| !evicting(&node).is_empty()) {
            q.add((pod.namespace().to_owned(), pod.name().to_owned()));
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 8, &ctx.stop, move |key| {
        let ctx = context.clone();
        async move { sync(&ctx, &key).await }
    });
}

/// When a pod has to go: `None` never.
fn leaves_at(tolerations: &[Toleration], taints: &[Taint], now: Timestamp) -> Option<Timestamp> {
    let mut earliest: Option<Timestamp> = None;
    for taint in taints {
        let since = taint.time_added.as_ref().map_or(now, |t| t.0);
        let matching: Vec<&Toleration> = tolerations.iter().filter(|t| tolerates(t, taint)).collect();
        if matching.is_empty() {
            return Some(now);
        }
        let shortest = matching.iter().filter_map(|t| t.toleration_seconds).min();
        if let Some(seconds) = shortest {
            let at = since + SignedDuration::from_secs(seconds.clamp(0, 10_000_000_000));
            earliest = Some(earliest.map_or(at, |e| e.min(at)));
        }
    }
    earliest
}

async fn sync(ctx: &Context, key: &Key) -> Result<Option<Duration>, kube::Error> {
    let Some(pod) = ctx.caches.pods.get(&key.0, &key.1) else { return Ok(None) };
    let Some(node) = ctx.caches.nodes.get("", crate::pods::node(&pod)) else { return Ok(None) };
    if pod.deleting() || crate::pods::is_finished(&pod) {
        return Ok(None);
    }
    let now = Timestamp::now();
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.clone()).unwrap_or_default();
    let Some(at) = leaves_at(&tolerations, &evicting(&node), now) else { return Ok(None) };
    if at > now {
        let wait = u64::try_from(at.duration_since(now).as_millis()).unwrap_or(0);
        return Ok(Some(Duration::from_millis(wait + 1)));
    }
    let recorder = ctx.recorder.component(NAME);
    let text = format!("Marking for deletion Pod {}/{}", key.0, key.1);
    recorder.normal(&*pod, "TaintManagerEviction", text);
    let mut new = (*pod).clone();
    let conditions = new.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|c| c.type_ != "DisruptionTarget");
    conditions.push(PodCondition {
        type_: "DisruptionTarget".into(),
        status: "True".into(),
        reason: Some("DeletionByTaintManager".into()),
        message: Some("Taint manager: deleting due to NoExecute taint".into()),
        last_transition_time: Some(Time(now)),
        ..PodCondition::default()
    });
    match ctx.objects.update(&*pod, &new, "status").await {
        Err(error) if !is_not_found(&error) => return Err(error),
        _ => {}
    }
    ctx.objects.delete::<Pod>(&key.0, &key.1, &DeleteOptions::uid(pod.uid())).await.map(|_| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_shortest_patience_counts() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let taint: Taint =
            serde_json::from_value(json!({"key": "k", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"}))
                .unwrap();
        for (tolerations, want) in [
            (json!([]), Some(0)),
            (json!([{"key": "k", "operator": "Exists"}]), None),
            (json!([{"key": "k", "operator": "Exists", "tolerationSeconds": 300}]), Some(240)),
            (json!([{"operator": "Exists", "tolerationSeconds": 90}, {"key": "k", "operator": "Exists"}]), Some(30)),
            (json!([{"key": "other", "operator": "Exists"}]), Some(0)),
        ] {
            let parsed: Vec<Toleration> = serde_json::from_value(tolerations.clone()).unwrap();
            let got = leaves_at(&parsed, std::slice::from_ref(&taint), now).map(|at| at.duration_since(now).as_secs());
            assert_eq!(got, want, "{tolerations}");
        }
        assert_eq!(leaves_at(&[], &[], now), None);
    }
}
