//! The ServiceAccount `default` of every namespace.

use crate::context::Context;
use isopod_client::objects::{HasMeta, is_already_exists, is_namespace_terminating};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::sync::Arc;

/// Whether things may still be created in a namespace.
pub(crate) fn is_active(namespace: &Namespace) -> bool {
    !namespace.deleting() && namespace.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Terminating")
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    let q = queue.clone();
    ctx.caches.namespaces.subscribe(move |change| q.add(change.object().name().to_owned()));
    let q = queue.clone();
    ctx.caches.accounts.subscribe(move |change| {
        if change.is_deleted() && change.object().name() == "default" {
            q.add(change.object().namespace().to_owned());
        }
    });
    let ctx_ = ctx.clone();
    spawn_workers("serviceaccount-controller", &queue, 1, &ctx.stop, move |name| {
        let ctx = ctx_.clone();
        async move { sync(&ctx, &name).await.map(|()| None) }
    });
}

async fn sync(ctx: &Context, namespace: &str) -> Result<(), kube::Error> {
    let active = ctx.caches.namespaces.get("", namespace).is_some_and(|ns| is_active(&ns));
    if !active || ctx.caches.accounts.get(namespace, "default").is_some() {
        return Ok(());
    }
    let account = ServiceAccount {
        metadata: ObjectMeta {
            name: Some("default".into()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        ..ServiceAccount::default()
    };
    match ctx.objects.create(&account).await {
        Ok(_) => Ok(()),
        Err(error) if is_already_exists(&error) || is_namespace_terminating(&error) => Ok(()),
        Err(error) => Err(error),
    }
}
