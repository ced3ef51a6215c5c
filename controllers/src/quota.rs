//! ResourceQuota: what a namespace uses of what it may.
//!
//! In: quotas, pods, Services, claims, and the collector's counts of everything else. Out: `status.used`. Admission adds
//! to it at creation; this controller recomputes it, above all after something was deleted.

use crate::context::Context;
use crate::gc::Collector;
use crate::pods;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::quantity::{milli, value};
use isopod_client::{Change, Queue, spawn_workers};
use k8s_openapi::api::core::v1::{Pod, ResourceQuota, ResourceQuotaStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "resourcequota-controller";

type Key = (String, String);

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>, collector: Arc<Collector>) {
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.quotas.subscribe(move |change| {
        let quota = change.object();
        q.add((quota.namespace().to_owned(), quota.name().to_owned()));
    });
    let wake = {
        let (queue, ctx) = (queue.clone(), ctx.clone());
        move |namespace: &str| {
            for quota in ctx.caches.quotas.in_namespace(namespace) {
                queue.add((namespace.to_owned(), quota.name().to_owned()));
            }
        }
    };
    let (w, c) = (wake.clone(), ctx.clone());
    ctx.caches.pods.subscribe(move |change| match change {
        // Most namespaces have no quota, and what counts is not looked for then.
        _ if c.caches.quotas.in_namespace(change.object().namespace()).is_empty() => {}
        Change::Updated(old, new) if counts(old) == counts(new) => {}
        _ => w(change.object().namespace()),
    });
    let w = wake.clone();
    ctx.caches.services.subscribe(move |change| w(change.object().namespace()));
    let w = wake.clone();
    ctx.caches.claims.subscribe(move |change| w(change.object().namespace()));
    let (w, c) = (queue.clone(), ctx.clone());
    collector.on_count(move |namespace| {
        for quota in c.caches.quotas.in_namespace(namespace) {
            if quota.spec.iter().flat_map(|s| &s.hard).flat_map(BTreeMap::keys).any(|name| by_collector(name)) {
                w.add((namespace.to_owned(), quota.name().to_owned()));
            }
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 5, &ctx.stop, move |key| {
        let (ctx, collector) = (context.clone(), collector.clone());
        async move { sync(&ctx, &collector, &key).await }
    });
}

/// What about a pod that can change makes it count differently.
fn counts(pod: &Pod) -> (bool, Option<i64>, BTreeMap<String, i64>) {
    (pods::is_finished(pod), pod.spec.as_ref().and_then(|s| s.active_deadline_seconds), pod_usage(pod))
}

/// Whether it is the number of objects of a kind of which no cache of this controller knows.
fn by_collector(name: &str) -> bool {
    let own = ["cpu", "memory", "ephemeral-storage", "pods", "services", "persistentvolumeclaims"];
    let own_parts = ["requests.", "limits.", "services."];
    !own.contains(&name)
        && !own_parts.iter().any(|p| name.starts_with(p))
        && !name.contains(".storageclass.storage.k8s.io/")
}

fn in_scope(quota: &ResourceQuota, pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    let quality = pod.status.as_ref().and_then(|s| s.qos_class.as_deref()).unwrap_or_default();
    let ends = spec.is_some_and(|s| s.active_deadline_seconds.is_some());
    let class = spec.and_then(|s| s.priority_class_name.as_deref()).unwrap_or_default();
    let simple = |scope: &str| match scope {
        "Terminating" => ends,
        "NotTerminating" => !ends,
        "BestEffort" => quality == "BestEffort",
        "NotBestEffort" => quality != "BestEffort",
        "PriorityClass" => !class.is_empty(),
        _ => true,
    };
    let scopes = quota.spec.as_ref().and_then(|s| s.scopes.as_ref());
    let selector = quota.spec.as_ref().and_then(|s| s.scope_selector.as_ref()?.match_expressions.as_ref());
    scopes.into_iter().flatten().all(|s| simple(s))
        && selector.into_iter().flatten().all(|e| {
            let listed = e.values.iter().flatten().any(|v| v == class);
            match (e.scope_name.as_str(), e.operator.as_str()) {
                ("PriorityClass", "In") => listed,
                ("PriorityClass", "NotIn") => !listed,
                ("PriorityClass", "DoesNotExist") => class.is_empty(),
                (scope, "DoesNotExist") => !simple(scope),
                (scope, _) => simple(scope),
            }
        })
}

/// A pod's requests and limits in thousandths, under quota's names.
fn pod_usage(pod: &Pod) -> BTreeMap<String, i64> {
    let mut total: BTreeMap<String, i64> = BTreeMap::new();
    let Some(spec) = pod.spec.as_ref() else { return total };
    let mut peak: BTreeMap<String, i64> = BTreeMap::new();
    let of = |container: &k8s_openapi::api::core::v1::Container| -> Vec<(String, i64)> {
        let resources = container.resources.clone().unwrap_or_default();
        let requests =
            resources.requests.unwrap_or_default().into_iter().map(|(n, q)| (format!("requests.{n}"), milli(&q)));
        let limits = resources.limits.unwrap_or_default().into_iter().map(|(n, q)| (format!("limits.{n}"), milli(&q)));
        requests.chain(limits).collect()
    };
    for container in &spec.containers {
        for (name, amount) in of(container) {
            *total.entry(name).or_default() += amount;
        }
    }
    for container in spec.init_containers.iter().flatten() {
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        for (name, amount) in of(container) {
            if sidecar {
                *total.entry(name).or_default() += amount;
            } else {
                let most = peak.entry(name).or_default();
                *most = (*most).max(amount);
            }
        }
    }
    for (name, amount) in peak {
        let most = total.entry(name).or_default();
        *most = (*most).max(amount);
    }
    for (name, quantity) in spec.overhead.iter().flatten() {
        *total.entry(format!("requests.{name}")).or_default() += milli(quantity);
    }
    total
}

fn quantity(name: &str, thousandths: i64) -> Quantity {
    if thousandths % 1000 != 0 {
        return Quantity(format!("{thousandths}m"));
    }
    let whole = thousandths / 1000;
    let bytes = name.contains("memory") || name.contains("storage");
    for (suffix, shift) in [("Gi", 30), ("Mi", 20), ("Ki", 10)] {
        if bytes && whole != 0 && whole % (1i64 << shift) == 0 {
            return Quantity(format!("{}{suffix}", whole >> shift));
        }
    }
    Quantity(whole.to_string())
}

async fn sync(ctx: &Context, collector: &Collector, key: &Key) -> Result<Option<Duration>, kube::Error> {
    let Some(quota) = ctx.caches.quotas.get(&key.0, &key.1).filter(|q| !q.deleting()) else { return Ok(None) };
    let hard = quota.spec.as_ref().and_then(|s| s.hard.clone()).unwrap_or_default();
    let old = quota.status.clone().unwrap_or_default();
    let known = old.used.unwrap_or_default();
    let used: BTreeMap<String, Quantity> = hard
        .keys()
        .map(|name| {
            let amount = usage(ctx, collector, &quota, name);
            let text = amount.map(|n| quantity(name, n));
            // The same number in other words is not news.
            let before = known.get(name).filter(|k| text.as_ref().is_none_or(|t| milli(k) == milli(t)));
            (name.clone(), before.cloned().or(text).unwrap_or_else(|| Quantity("0".into())))
        })
        .collect();
    let mut new = (*quota).clone();
    new.status = Some(ResourceQuotaStatus { hard: Some(hard), used: Some(used) });
    match ctx.objects.update(&*quota, &new, "status").await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(None),
    }
}

/// The use of one resource in thousandths; `None` when it is not known.
fn usage(ctx: &Context, collector: &Collector, quota: &ResourceQuota, name: &str) -> Option<i64> {
    let namespace = quota.namespace();
    let thousand = |n: usize| i64::try_from(n).unwrap_or(i64::MAX / 1000) * 1000;
    let plain = match name {
        "cpu" | "memory" | "ephemeral-storage" => format!("requests.{name}"),
        other => other.to_owned(),
    };
    let storage = plain == "requests.storage" || plain.contains(".storageclass.storage.k8s.io/");
    if storage || plain == "persistentvolumeclaims" {
        return Some(claims(ctx, namespace, &plain));
    }
    if plain == "pods" || ((plain.starts_with("requests.") || plain.starts_with("limits.")) && !storage) {
        let live = ctx.caches.pods.in_namespace(namespace);
        let counted = live.iter().filter(|p| !pods::is_finished(p) && in_scope(quota, p));
        return Some(if plain == "pods" {
            thousand(counted.count())
        } else {
            counted.map(|p| pod_usage(p).get(&plain).copied().unwrap_or(0)).sum()
        });
    }
    if plain == "services" || plain.starts_with("services.") {
        let services = ctx.caches.services.in_namespace(namespace);
        let kind =
            |s: &k8s_openapi::api::core::v1::Service| s.spec.as_ref().and_then(|s| s.type_.clone()).unwrap_or_default();
        let number = match plain.as_str() {
            "services.loadbalancers" => services.iter().filter(|s| kind(s) == "LoadBalancer").count(),
            "services.nodeports" => services
                .iter()
                .filter(|s| matches!(kind(s).as_str(), "NodePort" | "LoadBalancer"))
                .map(|s| s.spec.as_ref().and_then(|s| s.ports.as_ref()).map_or(0, Vec::len))
                .sum(),
            _ => services.len(),
        };
        return Some(thousand(number));
    }
    let counted = plain.strip_prefix("count/").unwrap_or(&plain);
    let (resource, group) = counted.split_once('.').unwrap_or((counted, ""));
    collector.count(group, resource, namespace).map(thousand)
}

fn claims(ctx: &Context, namespace: &str, name: &str) -> i64 {
    let class = name.split_once(".storageclass.storage.k8s.io/").map(|(class, _)| class);
    let all = ctx.caches.claims.in_namespace(namespace);
    let counted = all.iter().filter(|c| {
        let own = c.spec.as_ref().and_then(|s| s.storage_class_name.as_deref());
        class.is_none_or(|class| own == Some(class))
    });
    if name.ends_with("persistentvolumeclaims") {
        return i64::try_from(counted.count()).unwrap_or(0) * 1000;
    }
    let size = |c: &Arc<k8s_openapi::api::core::v1::PersistentVolumeClaim>| {
        let requests = c.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?;
        requests.get("storage").map(value)
    };
    counted.filter_map(size).sum::<i64>() * 1000
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_are_added_up() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {}, "spec": {
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "1Gi"}}},
                {"name": "b", "resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "2"}}}]}}))
        .unwrap();
        let usage = pod_usage(&pod);
        assert_eq!(usage["requests.cpu"], 2000);
        assert_eq!(quantity("limits.memory", usage["limits.memory"]), Quantity("1Gi".into()));
        assert_eq!(quantity("requests.cpu", 1100), Quantity("1100m".into()));
        assert_eq!(quantity("pods", 3000), Quantity("3".into()));
    }
}
