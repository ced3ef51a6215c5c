//! VolumeAttributesClasses: none goes while a claim or a volume has it or is to get it.
//!
//! In: classes, claims, volumes. Out: the finalizer that admission has put on a class, taken off one that is to go.

use crate::context::Context;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::VolumeAttributesClass;
use serde_json::json;
use std::sync::Arc;

const NAME: &str = "vac-protection-controller";
const FINALIZER: &str = "kubernetes.io/vac-protection";

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    let q = queue.clone();
    ctx.caches.attributes_classes.subscribe(move |change| {
        if leaving(change.object()) {
            q.add(change.object().name().to_owned());
        }
    });
    let wake = {
        let (queue, ctx) = (queue.clone(), ctx.clone());
        move || {
            let classes = ctx.caches.attributes_classes.list();
            classes.iter().filter(|c| leaving(c)).for_each(|c| queue.add(c.name().to_owned()));
        }
    };
    let w = wake.clone();
    ctx.caches.claims.subscribe(move |_| w());
    ctx.caches.volumes.subscribe(move |_| wake());
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name).await.map(|()| None) }
    });
}

/// Whether it is to go and held only by what this controller takes off.
fn leaving(class: &VolumeAttributesClass) -> bool {
    class.deleting() && class.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

fn claim_uses(claim: &PersistentVolumeClaim, class: &str) -> bool {
    let wanted = claim.spec.as_ref().and_then(|s| s.volume_attributes_class_name.as_deref());
    let status = claim.status.as_ref();
    let current = status.and_then(|s| s.current_volume_attributes_class_name.as_deref());
    let target = status.and_then(|s| s.modify_volume_status.as_ref()?.target_volume_attributes_class_name.as_deref());
    [wanted, current, target].contains(&Some(class))
}

fn volume_uses(volume: &PersistentVolume, class: &str) -> bool {
    volume.spec.as_ref().and_then(|s| s.volume_attributes_class_name.as_deref()) == Some(class)
}

async fn sync(ctx: &Context, name: &str) -> Result<(), kube::Error> {
    let Some(class) = ctx.caches.attributes_classes.get("", name).filter(|c| leaving(c)) else { return Ok(()) };
    let used = ctx.caches.claims.list().iter().any(|c| claim_uses(c, name))
        || ctx.caches.volumes.list().iter().any(|v| volume_uses(v, name));
    if used {
        return Ok(());
    }
    let kept: Vec<&String> = class.metadata.finalizers.iter().flatten().filter(|f| *f != FINALIZER).collect();
    let patch = json!({"metadata": {
        "uid": class.uid(), "resourceVersion": class.metadata.resource_version, "finalizers": kept}});
    match ctx.objects.merge::<VolumeAttributesClass>("", name, "", &patch).await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_value};

    #[test]
    fn a_class_is_used_by_what_has_it_or_is_to_get_it() {
        let claim = |v: Value| claim_uses(&from_value(v).unwrap(), "gold");
        assert!(claim(json!({"spec": {"volumeAttributesClassName": "gold"}})));
        assert!(claim(json!({"status": {"currentVolumeAttributesClassName": "gold"}})));
        let target = json!({"status": "Pending", "targetVolumeAttributesClassName": "gold"});
        assert!(claim(json!({"status": {"modifyVolumeStatus": target}})));
        assert!(!claim(json!({"spec": {"volumeAttributesClassName": "silver"}})));
        let volume = |v: Value| volume_uses(&from_value(v).unwrap(), "gold");
        assert!(volume(json!({"spec": {"volumeAttributesClassName": "gold"}})));
        assert!(!volume(json!({"spec": {}})));
    }

    #[test]
    fn only_what_is_to_go_is_looked_at() {
        let class = |metadata: Value| leaving(&from_value(json!({"metadata": metadata, "driverName": "d"})).unwrap());
        let held = json!([FINALIZER]);
        assert!(class(json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": held})));
        assert!(!class(json!({"finalizers": held})));
        assert!(!class(json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["x/y"]})));
    }
}
