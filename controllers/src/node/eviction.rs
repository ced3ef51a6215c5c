//! Taint eviction: pods that do not tolerate a NoExecute taint of their node are deleted, at once or when their
//! tolerationSeconds are over. That time runs from when the taint and the pod met: from `timeAdded` where the taint has one
//! and the pod was there, else from when this controller first saw them together.

use crate::context::{Context, Key, key};
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::placement::tolerates;
use isopod_client::{Change, Queue, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "taint-eviction-controller";

struct Controller {
    ctx: Arc<Context>,
    /// Pods whose time is running, since when.
    running: Mutex<HashMap<Key, Timestamp>>,
}

fn evicting(node: &Node) -> Vec<Taint> {
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
    taints.into_iter().flatten().filter(|t| t.effect == "NoExecute").cloned().collect()
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let controller = Arc::new(Controller { ctx: ctx.clone(), running: Mutex::default() });
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
                    q.add(key(&*pod));
                }
            }
        }
    });
    let (q, c) = (queue.clone(), controller.clone());
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        if change.is_deleted() {
            c.running.lock().remove(&key(&**pod));
            return;
        }
        let node = c.ctx.caches.nodes.get("", crate::pods::node(pod));
        if node.is_some_and(|node| !evicting(&node).is_empty()) {
            q.add(key(&**pod));
        }
    });
    spawn_workers(NAME, &queue, 8, &ctx.stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(&key).await }
    });
}

/// When a pod has to go: `None` never. `started` is when it came to the node, `seen` when it was first seen with its taints.
fn leaves_at(tolerations: &[Toleration], taints: &[Taint], started: Timestamp, seen: Timestamp) -> Option<Timestamp> {
    let mut earliest: Option<Timestamp> = None;
    for taint in taints {
        let since = taint.time_added.as_ref().map_or(seen, |t| t.0.max(started));
        let matching: Vec<&Toleration> = tolerations.iter().filter(|t| tolerates(t, taint)).collect();
        if matching.is_empty() {
            return Some(seen);
        }
        let shortest = matching.iter().filter_map(|t| t.toleration_seconds).min();
        if let Some(seconds) = shortest {
            let at = since + SignedDuration::from_secs(seconds.clamp(0, 10_000_000_000));
            earliest = Some(earliest.map_or(at, |e| e.min(at)));
        }
    }
    earliest
}

impl Controller {
    async fn sync(&self, key: &Key) -> Result<Option<Duration>, kube::Error> {
        let ctx = &self.ctx;
        let Some(pod) = ctx.caches.pods.get(&key.0, &key.1) else { return Ok(None) };
        let Some(node) = ctx.caches.nodes.get("", crate::pods::node(&pod)) else { return Ok(None) };
        if pod.deleting() || crate::pods::is_finished(&pod) {
            return Ok(None);
        }
        let now = Timestamp::now();
        let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.clone()).unwrap_or_default();
        let started = pod.status.as_ref().and_then(|s| s.start_time.as_ref()).map_or(now, |t| t.0);
        let seen = self.running.lock().get(key).copied().unwrap_or(now);
        let recorder = ctx.recorder.component(NAME);
        let Some(at) = leaves_at(&tolerations, &evicting(&node), started, seen) else {
            if self.running.lock().remove(key).is_some() {
                recorder.normal(
                    &*pod,
                    "TaintManagerEviction",
                    format!("Cancelling deletion of Pod {}/{}", key.0, key.1),
                );
            }
            return Ok(None);
        };
        self.running.lock().insert(key.clone(), seen);
        if at > now {
            let wait = u64::try_from(at.duration_since(now).as_millis()).unwrap_or(0);
            return Ok(Some(Duration::from_millis(wait + 1)));
        }
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
            let before: Timestamp = "2025-12-01T00:00:00Z".parse().unwrap();
            let got = leaves_at(&parsed, std::slice::from_ref(&taint), before, now);
            assert_eq!(got.map(|at| at.duration_since(now).as_secs()), want, "{tolerations}");
        }
        assert_eq!(leaves_at(&[], &[], now, now), None);
        // A taint without a time counts from when it was seen, one that is older than the pod from the pod's start.
        let patient: Vec<Toleration> =
            serde_json::from_value(json!([{"operator": "Exists", "tolerationSeconds": 9}])).unwrap();
        let plain = Taint { time_added: None, ..taint.clone() };
        let later = now + SignedDuration::from_secs(5);
        for (taint, started, want) in [(&plain, now, 14), (&taint, later, 14), (&taint, now, 9)] {
            let at = leaves_at(&patient, std::slice::from_ref(taint), started, later).unwrap();
            assert_eq!(at.duration_since(now).as_secs(), want);
        }
    }
}
