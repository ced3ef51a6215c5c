//! Owner references: whose an object is, adopting orphans that match and releasing what no longer does.

use crate::context::Context;
use isopod_client::cache::controller_of;
use isopod_client::objects::{HasMeta, Object, is_invalid, is_not_found};
use isopod_client::select::Selector;
use isopod_client::{Cache, Change};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::json;
use std::sync::Arc;

/// The reference a controller puts on what it creates.
pub(crate) fn owner_reference<O: Object>(owner: &O) -> OwnerReference {
    OwnerReference {
        api_version: O::api_version(&()).into_owned(),
        kind: O::kind(&()).into_owned(),
        name: owner.name().to_owned(),
        uid: owner.uid().to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The controller of an object, when it is of kind `O` and the cache holds that very object.
pub(crate) fn controller<O: Object, T: HasMeta>(cache: &Cache<O>, object: &T) -> Option<Arc<O>> {
    let reference = controller_of(object.object_meta())?;
    if reference.kind != O::kind(&())
        || reference.api_version.split('/').next() != O::api_version(&()).split('/').next()
    {
        return None;
    }
    cache.get(object.namespace(), &reference.name).filter(|owner| owner.uid() == reference.uid)
}

/// Whom a change of a pod concerns besides its controller: the one it has left, and those that select it now that it is
/// an orphan.
pub(crate) fn concerned<O: Object>(
    cache: &Cache<O>,
    change: &Change<'_, Pod>,
    selector: impl Fn(&O) -> Selector,
) -> Vec<Arc<O>> {
    let pod = change.object();
    let mut found = Vec::new();
    let mut adoptable = !change.is_deleted() && !pod.deleting() && controller_of(&pod.metadata).is_none();
    if let Change::Updated(old, new) = change {
        let moved = controller_of(&old.metadata) != controller_of(&new.metadata);
        found.extend(controller(cache, &***old).filter(|_| moved));
        adoptable &= moved || old.metadata.labels != new.metadata.labels;
    }
    if adoptable {
        let selects = |owner: &Arc<O>| selector(owner).matches_optional(pod.metadata.labels.as_ref());
        found.extend(cache.in_namespace(pod.namespace()).into_iter().filter(selects));
    }
    found
}

/// The objects that belong to `owner`: its own that still match, and matching orphans, adopted on the way. Its own that
/// no longer match are released. `eligible` limits what is adopted, which gets the finalizer.
pub(crate) async fn claim<O: Object, T: Object>(
    ctx: &Context,
    owner: &O,
    cache: &Cache<T>,
    selector: &Selector,
    eligible: impl Fn(&T) -> bool,
    finalizer: Option<&str>,
) -> Result<Vec<Arc<T>>, kube::Error> {
    let mut claimed = Vec::new();
    for object in cache.owned_by(owner.uid()) {
        if object.namespace() != owner.namespace() {
            continue;
        }
        if selector.matches_optional(object.object_meta().labels.as_ref()) || owner.deleting() {
            claimed.push(object);
        } else {
            write(ctx, &*object, |owners| owners.retain(|o| o.uid != owner.uid()), None).await?;
        }
    }
    if owner.deleting() {
        return Ok(claimed);
    }
    let mut fresh = None;
    for object in cache.orphans(owner.namespace()) {
        let matches = selector.matches_optional(object.object_meta().labels.as_ref());
        if !matches || object.deleting() || !eligible(&object) {
            continue;
        }
        if fresh.is_none() {
            fresh = Some(ctx.objects.get::<O>(owner.namespace(), owner.name()).await?);
        }
        let current = fresh.as_ref().and_then(Option::as_ref);
        if current.is_none_or(|o| o.uid() != owner.uid() || o.deleting()) {
            continue;
        }
        if write(ctx, &*object, |owners| owners.push(owner_reference(owner)), finalizer).await? {
            claimed.push(object);
        }
    }
    Ok(claimed)
}

/// Changes the owner references of an object and adds a finalizer; `false` when the object is gone.
async fn write<T: Object>(
    ctx: &Context,
    object: &T,
    change: impl FnOnce(&mut Vec<OwnerReference>),
    finalizer: Option<&str>,
) -> Result<bool, kube::Error> {
    let mut owners = object.object_meta().owner_references.clone().unwrap_or_default();
    change(&mut owners);
    let mut patch = json!({"metadata": {
        "uid": object.uid(),
        "resourceVersion": object.object_meta().resource_version,
        "ownerReferences": owners,
    }});
    let mut finalizers: Vec<&str> = object.object_meta().finalizers.iter().flatten().map(String::as_str).collect();
    if let Some(finalizer) = finalizer.filter(|f| !finalizers.contains(f)) {
        finalizers.push(finalizer);
        patch["metadata"]["finalizers"] = json!(finalizers);
    }
    match ctx.objects.merge::<T>(object.namespace(), object.name(), "", &patch).await {
        Ok(_) => Ok(true),
        // Gone, or replaced by another object of that name.
        Err(error) if is_not_found(&error) || is_invalid(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
