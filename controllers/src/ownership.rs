//! Owner references: whose an object is, adopting orphans that match and releasing what no longer does.

use crate::context::Context;
use isopod_client::Cache;
use isopod_client::cache::controller_of;
use isopod_client::objects::{HasMeta, Object, is_invalid, is_not_found};
use isopod_client::select::Selector;
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

/// The objects that belong to `owner`: its own that still match, and matching orphans, adopted on the way. Its own that
/// no longer match are released. `eligible` limits what is adopted.
pub(crate) async fn claim<O: Object, T: Object>(
    ctx: &Context,
    owner: &O,
    cache: &Cache<T>,
    selector: &Selector,
    eligible: impl Fn(&T) -> bool,
) -> Result<Vec<Arc<T>>, kube::Error> {
    let mut claimed = Vec::new();
    for object in cache.owned_by(owner.uid()) {
        if object.namespace() != owner.namespace() {
            continue;
        }
        if selector.matches_optional(object.object_meta().labels.as_ref()) || owner.deleting() {
            claimed.push(object);
        } else {
            write_owners(ctx, &*object, |owners| owners.retain(|o| o.uid != owner.uid())).await?;
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
        if write_owners(ctx, &*object, |owners| owners.push(owner_reference(owner))).await? {
            claimed.push(object);
        }
    }
    Ok(claimed)
}

/// Changes the owner references of an object; `false` when the object is gone.
async fn write_owners<T: Object>(
    ctx: &Context,
    object: &T,
    change: impl FnOnce(&mut Vec<OwnerReference>),
) -> Result<bool, kube::Error> {
    let mut owners = object.object_meta().owner_references.clone().unwrap_or_default();
    change(&mut owners);
    let patch = json!({"metadata": {
        "uid": object.uid(),
        "resourceVersion": object.object_meta().resource_version,
        "ownerReferences": owners,
    }});
    match ctx.objects.merge::<T>(object.namespace(), object.name(), "", &patch).await {
        Ok(_) => Ok(true),
        // Gone, or replaced by another object of that name.
        Err(error) if is_not_found(&error) || is_invalid(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
