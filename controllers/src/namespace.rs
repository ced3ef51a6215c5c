//! Namespace deletion: pods first, then everything else the API server can list, then the namespace itself.
//!
//! In: namespaces that are being deleted. Out: collection deletes, the five conditions that say how far it is, and at the
//! end the removal of the finalizer `kubernetes`. The last pod's end wakes it at once; other leftovers (objects with
//! finalizers) are looked at again after a growing pause, as upstream does.

use crate::context::Context;
use crate::discovery::{Discovered, ResourceType, discover};
use futures::{StreamExt, stream};
use http::Method;
use isopod_client::objects::{HasMeta, List, is_not_found, message};
use isopod_client::{Queue, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const FINALIZER: &str = "kubernetes";
const AT_ONCE: usize = 8;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("{0} resources remain in the namespace")]
    Remaining(usize),
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Arc::new(Queue::with_backoff(Duration::from_millis(20), Duration::from_secs(60)));
    let q = queue.clone();
    ctx.caches.namespaces.subscribe(move |change| {
        if change.object().deleting() && !change.is_deleted() {
            q.add(change.object().name().to_owned());
        }
    });
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.pods.subscribe(move |change| {
        let namespace = change.object().namespace();
        if change.is_deleted()
            && c.caches.namespaces.get("", namespace).is_some_and(|ns| ns.deleting())
            && c.caches.pods.in_namespace(namespace).is_empty()
        {
            q.add(namespace.to_owned());
        }
    });
    let context = ctx.clone();
    spawn_workers("namespace-controller", &queue, 5, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name).await.map(|()| None) }
    });
}

/// How far the deletion is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    undiscovered: Vec<String>,
    failures: Vec<String>,
    /// Resource -> number of objects left.
    remaining: BTreeMap<String, usize>,
    /// Finalizer -> number of objects that have it.
    finalizers: BTreeMap<String, usize>,
}

async fn sync(ctx: &Context, name: &str) -> Result<(), Error> {
    let Some(namespace) = ctx.caches.namespaces.get("", name) else { return Ok(()) };
    let finalizers = namespace.spec.as_ref().and_then(|s| s.finalizers.clone()).unwrap_or_default();
    if !namespace.deleting() || !finalizers.iter().any(|f| f == FINALIZER) {
        return Ok(());
    }
    let discovered = discover(&ctx.objects).await?;
    let progress = empty(ctx, name, discovered).await;
    let clean = progress.remaining.is_empty() && progress.failures.is_empty() && progress.undiscovered.is_empty();
    let mut new = (*namespace).clone();
    let status = new.status.get_or_insert_default();
    status.phase = Some("Terminating".to_owned());
    if !clean || status.conditions.is_some() {
        set_conditions(status.conditions.get_or_insert_default(), &progress, Timestamp::now());
    }
    match ctx.objects.update(&*namespace, &new, "status").await {
        Err(error) if is_not_found(&error) => return Ok(()),
        // Newer conditions are no reason to keep the namespace.
        Err(error) if !clean => return Err(error.into()),
        _ => {}
    }
    if !clean {
        return Err(Error::Remaining(progress.remaining.values().sum()));
    }
    finalize(ctx, name).await
}

/// Removes the finalizer from the newest state; the API server removes the namespace when it was the last.
async fn finalize(ctx: &Context, name: &str) -> Result<(), Error> {
    let Some(mut namespace) = ctx.objects.get::<Namespace>("", name).await? else { return Ok(()) };
    if let Some(finalizers) = namespace.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
        finalizers.retain(|f| f != FINALIZER);
    }
    let body = serde_json::to_value(&namespace).map_err(kube::Error::SerdeError)?;
    match ctx.objects.put(&format!("/api/v1/namespaces/{name}/finalize"), &body).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The finalizers of each object that is left.
type Leftovers = Vec<Vec<String>>;

/// Deletes content and counts what is left.
async fn empty(ctx: &Context, namespace: &str, discovered: Discovered) -> Progress {
    let mut progress = Progress { undiscovered: discovered.failed, ..Progress::default() };
    let deletable: Vec<ResourceType> =
        discovered.resources.into_iter().filter(|r| r.namespaced && r.can(&["delete", "list"])).collect();
    let (pods, others): (Vec<_>, Vec<_>) =
        deletable.into_iter().partition(|r| r.group.is_empty() && r.resource == "pods");
    for stage in [pods, others] {
        let work = stage.into_iter().map(|resource| async move {
            let result = clear(ctx, namespace, &resource).await;
            (resource, result)
        });
        let results: Vec<(ResourceType, Result<Leftovers, kube::Error>)> =
            stream::iter(work).buffer_unordered(AT_ONCE).collect().await;
        for (resource, result) in results {
            match result {
                Ok(left) if left.is_empty() => {}
                Ok(left) => {
                    progress.remaining.insert(resource.display(), left.len());
                    for finalizer in left.into_iter().flatten() {
                        *progress.finalizers.entry(finalizer).or_default() += 1;
                    }
                }
                Err(error) => progress.failures.push(format!("{}: {}", resource.display(), message(&error))),
            }
        }
        // Pods end before what they may need, such as their network policies and secrets.
        if !progress.remaining.is_empty() || !progress.failures.is_empty() {
            break;
        }
    }
    progress.failures.sort();
    progress
}

#[derive(Clone, Debug, Deserialize)]
struct Slim {
    metadata: SlimMeta,
}

#[derive(Clone, Debug, Deserialize)]
struct SlimMeta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    finalizers: Vec<String>,
}

async fn list(ctx: &Context, path: &str) -> Result<Vec<SlimMeta>, kube::Error> {
    let list: List<Slim> = ctx.objects.get_path(path).await?;
    Ok(list.items.into_iter().map(|item| item.metadata).collect())
}

/// Empties one collection; returns the finalizers of each object that is left.
async fn clear(ctx: &Context, namespace: &str, resource: &ResourceType) -> Result<Leftovers, kube::Error> {
    let path = resource.collection_in(namespace);
    let present = match list(ctx, &path).await {
        Err(error) if is_not_found(&error) => return Ok(Vec::new()),
        present => present?,
    };
    if present.is_empty() {
        return Ok(Vec::new());
    }
    let body = json!({"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"});
    let body = serde_json::to_vec(&body).map_err(kube::Error::SerdeError)?;
    if resource.can(&["deletecollection"]) {
        ctx.objects.send::<serde_json::Value>(Method::DELETE, &path, "application/json", body).await?;
    } else {
        for object in &present {
            let path = resource.object(namespace, &object.name);
            let gone = ctx.objects.send::<serde_json::Value>(Method::DELETE, &path, "application/json", body.clone());
            match gone.await {
                Err(error) if !is_not_found(&error) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(list(ctx, &path).await?.into_iter().map(|meta| meta.finalizers).collect())
}

fn set_conditions(conditions: &mut Vec<NamespaceCondition>, progress: &Progress, now: Timestamp) {
    let counts = |map: &BTreeMap<String, usize>, each: &dyn Fn(&str, usize) -> String| {
        map.iter().map(|(name, n)| each(name, *n)).collect::<Vec<_>>().join(", ")
    };
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            (!progress.undiscovered.is_empty()).then(|| {
                let text = format!(
                    "Discovery failed for some groups, {} failing: unable to retrieve the complete list \
                    of server APIs: {}",
                    progress.undiscovered.len(),
                    progress.undiscovered.join(", ")
                );
                ("DiscoveryFailed", text)
            }),
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        (
            "NamespaceDeletionContentFailure",
            (!progress.failures.is_empty()).then(|| {
                let text = format!(
                    "Failed to delete all resource types, {} remaining: {}",
                    progress.failures.len(),
                    progress.failures.join(", ")
                );
                ("ContentDeletionFailed", text)
            }),
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        (
            "NamespaceContentRemaining",
            (!progress.remaining.is_empty()).then(|| {
                let each = |name: &str, n: usize| format!("{name} has {n} resource instances");
                let text = format!("Some resources are remaining: {}", counts(&progress.remaining, &each));
                ("SomeResourcesRemain", text)
            }),
            ("ContentRemoved", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            (!progress.finalizers.is_empty()).then(|| {
                let each = |name: &str, n: usize| format!("{name} in {n} resource instances");
                let text = format!(
                    "Some content in the namespace has finalizers remaining: {}",
                    counts(&progress.finalizers, &each)
                );
                ("SomeFinalizersRemain", text)
            }),
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ];
    for (kind, trouble, (fine_reason, fine_text)) in rows {
        let (status, reason, text) = match trouble {
            Some((reason, text)) => ("True", reason, text),
            None => ("False", fine_reason, fine_text.to_owned()),
        };
        let old = conditions.iter().find(|c| c.type_ == kind && c.status == status);
        let since = old.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now)));
        let new = NamespaceCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(text),
            last_transition_time: since,
        };
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            Some(slot) => *slot = new,
            None => conditions.push(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_is_left() {
        let mut conditions = Vec::new();
        let mut progress = Progress::default();
        progress.remaining.insert("pods".into(), 2);
        progress.finalizers.insert("x.io/f".into(), 1);
        set_conditions(&mut conditions, &progress, Timestamp::UNIX_EPOCH);
        let row = |c: &NamespaceCondition| {
            let text = c.message.clone().unwrap_or_default();
            format!("{}={} {}: {text}", c.type_, c.status, c.reason.clone().unwrap_or_default())
        };
        let rows: Vec<String> = conditions.iter().map(row).collect();
        assert_eq!(rows.len(), 5);
        assert_eq!(
            rows[3],
            "NamespaceContentRemaining=True SomeResourcesRemain: Some resources are remaining: pods has 2 resource instances"
        );
        assert_eq!(
            rows[4],
            "NamespaceFinalizersRemaining=True SomeFinalizersRemain: Some content in the namespace has finalizers \
             remaining: x.io/f in 1 resource instances"
        );
        set_conditions(&mut conditions, &Progress::default(), Timestamp::UNIX_EPOCH);
        assert!(conditions.iter().all(|c| c.status == "False"));
    }
}
