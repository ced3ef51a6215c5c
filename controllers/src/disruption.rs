//! PodDisruptionBudget: how many of the selected pods may be evicted now.
//!
//! In: budgets, pods, the scale of their controllers. Out: the budget's status. Evictions the API server has granted
//! (`disruptedPods`) count as gone until the pod is, or two minutes have passed.

use crate::context::{Context, Key, key};
use crate::deployment::plan::scaled;
use crate::ownership::controller;
use crate::pods;
use isopod_client::cache::controller_of;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::select::Selector;
use isopod_client::{Change, Queue, spawn_workers};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "disruption-controller";
const EVICTION_PATIENCE: SignedDuration = SignedDuration::from_secs(120);

fn selector(budget: &PodDisruptionBudget) -> Selector {
    Selector::optional(budget.spec.as_ref().and_then(|s| s.selector.as_ref()))
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.budgets.subscribe(move |change| q.add(key(&**change.object())));
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.pods.subscribe(move |change| {
        let old = match change {
            Change::Updated(old, _) => Some(*old),
            _ => None,
        };
        let new = change.object();
        for budget in c.caches.budgets.in_namespace(new.namespace()) {
            let selector = selector(&budget);
            let hit = |pod: &Pod| selector.matches_optional(pod.metadata.labels.as_ref());
            if hit(new) || old.is_some_and(|pod| hit(pod)) {
                q.add(key(&*budget));
            }
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 2, &ctx.stop, move |key| {
        let ctx = context.clone();
        async move { sync(&ctx, &key).await }
    });
}

/// How many pods the controllers of these pods want in total.
fn expected(ctx: &Context, pods: &[Arc<Pod>]) -> Result<i32, String> {
    let mut scales: BTreeMap<String, i32> = BTreeMap::new();
    for pod in pods {
        let Some(owner) = controller_of(&pod.metadata) else {
            return Err(format!("found no controllers for pod {:?}", pod.name()));
        };
        if scales.contains_key(&owner.uid) {
            continue;
        }
        let caches = &ctx.caches;
        let (uid, replicas) = if let Some(set) = controller(&caches.replica_sets, &**pod) {
            match controller(&caches.deployments, &*set) {
                Some(d) => (d.uid().to_owned(), d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)),
                None => (set.uid().to_owned(), set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)),
            }
        } else if let Some(set) = controller(&caches.stateful_sets, &**pod) {
            (set.uid().to_owned(), set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1))
        } else if let Some(set) = controller(&caches.replication_controllers, &**pod) {
            (set.uid().to_owned(), set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1))
        } else {
            return Err(format!("{}/{} does not implement the scale subresource", owner.api_version, owner.kind));
        };
        scales.insert(uid, replicas);
    }
    Ok(scales.values().sum())
}

/// The numbers of a budget's status.
#[derive(Debug, PartialEq, Eq)]
struct Numbers {
    expected: i32,
    desired: i32,
    healthy: i32,
}

fn numbers(
    budget: &PodDisruptionBudget,
    pods: i32,
    healthy: i32,
    scale: impl FnOnce() -> Result<i32, String>,
) -> Result<Numbers, String> {
    let spec = budget.spec.clone().unwrap_or_default();
    let (expected, desired) = if let Some(max) = spec.max_unavailable {
        let expected = scale()?;
        (expected, (expected - scaled(Some(&max), expected, true)).max(0))
    } else {
        match spec.min_available {
            Some(IntOrString::Int(least)) => (pods, least),
            Some(percent) => {
                let expected = scale()?;
                (expected, scaled(Some(&percent), expected, true))
            }
            None => (pods, 1.min(pods)),
        }
    };
    Ok(Numbers { expected, desired, healthy })
}

async fn sync(ctx: &Context, key: &Key) -> Result<Option<Duration>, kube::Error> {
    let Some(budget) = ctx.caches.budgets.get(&key.0, &key.1).filter(|b| !b.deleting()) else { return Ok(None) };
    let selector = selector(&budget);
    let selected: Vec<Arc<Pod>> = ctx
        .caches
        .pods
        .in_namespace(&key.0)
        .into_iter()
        .filter(|pod| selector.matches_optional(pod.metadata.labels.as_ref()) && !pods::is_finished(pod))
        .collect();
    let recorder = ctx.recorder.component("controllermanager");
    if selected.is_empty() {
        recorder.normal(&*budget, "NoPods", "No matching pods found");
    }
    let now = Timestamp::now();
    let old = budget.status.clone().unwrap_or_default();
    let mut again = None;
    let mut disrupted = old.disrupted_pods.clone().unwrap_or_default();
    disrupted.retain(|name, since| {
        let waiting = selected.iter().any(|p| p.name() == name && !p.deleting());
        let until = since.0 + EVICTION_PATIENCE;
        if waiting && until > now {
            again = Some(Duration::from_millis(u64::try_from(until.duration_since(now).as_millis()).unwrap_or(0) + 1));
        }
        waiting && until > now
    });
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let is_healthy = |pod: &&Arc<Pod>| !pod.deleting() && !disrupted.contains_key(pod.name()) && pods::is_ready(pod);
    let healthy = count(selected.iter().filter(is_healthy).count());
    let found = numbers(&budget, count(selected.len()), healthy, || expected(ctx, &selected));
    let (numbers, failure) = match found {
        Ok(numbers) => (numbers, None),
        Err(text) => {
            recorder.warning(
                &*budget,
                "CalculateExpectedPodCountFailed",
                format!("Failed to calculate the number of expected pods: {text}"),
            );
            (Numbers { expected: 0, desired: 0, healthy }, Some(text))
        }
    };
    let allowed = match failure {
        Some(_) => 0,
        None if numbers.expected <= 0 => 0,
        None => (numbers.healthy - numbers.desired).max(0),
    };
    let (state, reason, text) = match failure {
        Some(text) => ("False", "SyncFailed", text),
        None if allowed > 0 => ("True", "SufficientPods", String::new()),
        None => ("False", "InsufficientPods", String::new()),
    };
    let generation = budget.metadata.generation;
    let before = old.conditions.iter().flatten().find(|c| c.type_ == "DisruptionAllowed" && c.status == state);
    let condition = Condition {
        type_: "DisruptionAllowed".into(),
        status: state.into(),
        reason: reason.into(),
        message: text,
        observed_generation: generation,
        last_transition_time: before.map_or(Time(now), |c| c.last_transition_time.clone()),
    };
    let status = PodDisruptionBudgetStatus {
        current_healthy: Some(numbers.healthy),
        desired_healthy: Some(numbers.desired),
        expected_pods: Some(numbers.expected),
        disruptions_allowed: Some(allowed),
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        observed_generation: generation,
        conditions: Some(vec![condition]),
    };
    let mut new = (*budget).clone();
    new.status = Some(status);
    match ctx.objects.update(&*budget, &new, "status").await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(again),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn budgets() {
        for (spec, pods, scale, want) in [
            (json!({"minAvailable": 2}), 3, Ok(5), (3, 2)),
            (json!({"minAvailable": "50%"}), 3, Ok(5), (5, 3)),
            (json!({"maxUnavailable": 1}), 3, Ok(5), (5, 4)),
            (json!({"maxUnavailable": "30%"}), 3, Ok(5), (5, 3)),
            (json!({"maxUnavailable": 9}), 3, Ok(5), (5, 0)),
        ] {
            let budget: PodDisruptionBudget = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
            let got = numbers(&budget, pods, 3, || scale).unwrap();
            assert_eq!((got.expected, got.desired), want, "{spec}");
        }
    }
}
