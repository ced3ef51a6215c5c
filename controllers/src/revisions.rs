//! ControllerRevisions: the templates a DaemonSet or StatefulSet has had, numbered.

use crate::context::Context;
use crate::ownership::{claim, owner_reference};
use isopod_client::objects::{DeleteOptions, HasMeta, Object, is_already_exists};
use isopod_client::select::Selector;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use serde_json::{Value, json};
use std::sync::Arc;

/// All revisions of an owner, oldest first, and which one is its template now.
pub(crate) struct History {
    pub(crate) all: Vec<Arc<ControllerRevision>>,
    /// The newest revision's name.
    pub(crate) name: String,
    /// Its hash label.
    pub(crate) hash: String,
}

/// A label of an object.
pub(crate) fn label<'a, T: HasMeta>(object: &'a T, key: &str) -> Option<&'a str> {
    object.object_meta().labels.as_ref()?.get(key).map(String::as_str)
}

/// What a revision remembers: the template, as a patch that puts it back.
pub(crate) fn data(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

/// Finds or creates the revision with this data and makes it the newest.
pub(crate) async fn ensure<O: Object>(
    ctx: &Context,
    owner: &O,
    selector: &Selector,
    data: &Value,
    hash: &str,
    label_key: &str,
) -> Result<History, kube::Error> {
    let mut all = claim(ctx, owner, &ctx.caches.revisions, selector, |_| true, None).await?;
    all.sort_by(|a, b| (a.revision, a.name()).cmp(&(b.revision, b.name())));
    let newest = all.last().map(|r| r.revision).unwrap_or(0);
    let equal = all.iter().rev().find(|r| r.data.as_ref().is_some_and(|d| d.0 == *data)).cloned();
    let current = match equal {
        Some(found) if found.revision == newest => found,
        Some(found) => {
            let mut new = (*found).clone();
            new.revision = newest + 1;
            let written = ctx.objects.update(&*found, &new, "").await?;
            written.map_or(found, Arc::new)
        }
        None => {
            let mut labels = selector_labels(owner);
            labels.insert(label_key.to_owned(), hash.to_owned());
            let revision = ControllerRevision {
                metadata: ObjectMeta {
                    name: Some(format!("{}-{hash}", owner.name())),
                    namespace: Some(owner.namespace().to_owned()),
                    labels: Some(labels),
                    annotations: owner.object_meta().annotations.clone(),
                    owner_references: Some(vec![owner_reference(owner)]),
                    ..ObjectMeta::default()
                },
                data: Some(RawExtension(data.clone())),
                revision: newest + 1,
            };
            match ctx.objects.create(&revision).await {
                Ok(created) => Arc::new(created),
                Err(error) if is_already_exists(&error) => {
                    let name = format!("{}-{hash}", owner.name());
                    match ctx.objects.get::<ControllerRevision>(owner.namespace(), &name).await? {
                        // Created by an earlier sync that the cache does not show yet.
                        Some(found) if found.data.as_ref().is_some_and(|d| d.0 == *data) => Arc::new(found),
                        _ => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    };
    all.retain(|r| r.uid() != current.uid());
    let name = current.name().to_owned();
    let hash = label(&*current, label_key).unwrap_or(hash).to_owned();
    all.push(current);
    Ok(History { all, name, hash })
}

/// The labels of the owner's template, so that its selector finds the revision.
fn selector_labels<O: Object>(owner: &O) -> std::collections::BTreeMap<String, String> {
    let value = serde_json::to_value(owner).unwrap_or_default();
    let labels = value.pointer("/spec/template/metadata/labels").cloned().unwrap_or_default();
    serde_json::from_value(labels).unwrap_or_default()
}

/// Deletes the oldest revisions that no pod has, beyond the limit.
pub(crate) async fn trim(
    ctx: &Context,
    history: &History,
    live: &[&str],
    label_key: &str,
    limit: i32,
) -> Result<(), kube::Error> {
    let used = |r: &ControllerRevision| {
        r.name() == history.name || live.iter().any(|hash| *hash == r.name() || Some(*hash) == label(r, label_key))
    };
    let unused: Vec<_> = history.all.iter().filter(|r| !used(r)).collect();
    let excess = unused.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    for revision in unused.into_iter().take(excess) {
        let options = DeleteOptions::uid(revision.uid());
        ctx.objects.delete::<ControllerRevision>(revision.namespace(), revision.name(), &options).await?;
    }
    Ok(())
}
