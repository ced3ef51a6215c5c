//! Claims and volumes: DefaultStorageClass, StorageObjectInUseProtection, PersistentVolumeClaimResize.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, quantity::Quantity, status::Status};
use serde_json::Value;

use super::{Operation, Plugin, Request};

const DEFAULT_CLASS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

fn storage_classes() -> Gvr {
    Gvr::new("storage.k8s.io", "v1", "storageclasses")
}

/// Claims without a class get the default one.
pub(super) struct DefaultStorageClass;

/// The newest of the default classes; of equally old ones the first by name.
pub(super) fn newest(mut candidates: Vec<Value>) -> Option<Value> {
    candidates.sort_by(|a, b| {
        let age = meta::creation_timestamp(b).cmp(meta::creation_timestamp(a));
        age.then_with(|| meta::name(a).cmp(meta::name(b)))
    });
    candidates.into_iter().next()
}

impl Plugin for DefaultStorageClass {
    fn name(&self) -> &'static str {
        "DefaultStorageClass"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        if request.creates("", "persistentvolumeclaims")
            && request.object["spec"]["storageClassName"].is_null()
            && meta::annotation(request.object, CLASS_ANNOTATION).is_none()
        {
            let is_default =
                |class: &Value| DEFAULT_CLASS.iter().any(|key| meta::annotation(class, key) == Some("true"));
            let classes = request.objects.list(&storage_classes(), "");
            let defaults = classes.iter().map(|class| class.value()).filter(is_default).collect();
            if let Some(class) = newest(defaults) {
                request.object["spec"]["storageClassName"] = meta::name(&class).into();
            }
        }
        Box::pin(async { Ok(()) })
    }
}

/// Claims and volumes in use are not removed: a finalizer holds them.
pub(super) struct StorageObjectInUseProtection;

impl Plugin for StorageObjectInUseProtection {
    fn name(&self) -> &'static str {
        "StorageObjectInUseProtection"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let finalizer = if request.creates("", "persistentvolumeclaims") {
            Some("kubernetes.io/pvc-protection")
        } else if request.creates("", "persistentvolumes") {
            Some("kubernetes.io/pv-protection")
        } else if request.creates("storage.k8s.io", "volumeattributesclasses") {
            Some("kubernetes.io/vac-protection")
        } else {
            None
        };
        if let Some(finalizer) = finalizer {
            let mut finalizers = meta::finalizers(request.object);
            if !finalizers.contains(&finalizer) {
                finalizers.push(finalizer);
                let finalizers: Vec<String> = finalizers.into_iter().map(str::to_owned).collect();
                let finalizers: Vec<&str> = finalizers.iter().map(String::as_str).collect();
                meta::set_finalizers(request.object, &finalizers);
            }
        }
        Box::pin(async { Ok(()) })
    }
}

/// Only claims whose class allows it may grow.
pub(super) struct PersistentVolumeClaimResize;

impl PersistentVolumeClaimResize {
    fn check(request: &Request<'_>) -> Result<(), Status> {
        let size = |claim: &Value| Quantity::from_json(&claim["spec"]["resources"]["requests"]["storage"]).ok();
        let (Some(old), Some(new)) = (size(request.old), size(request.object)) else { return Ok(()) };
        if new <= old {
            return Ok(());
        }
        if request.old["status"]["phase"] != "Bound" {
            return Err(request.forbidden("Only bound persistent volume claims can be expanded"));
        }
        let class = request.object["spec"]["storageClassName"].as_str().unwrap_or_default();
        let class = request.objects.get(&storage_classes(), "", class);
        if class.is_some_and(|class| class.value()["allowVolumeExpansion"] == true) {
            return Ok(());
        }
        Err(request.forbidden(
            "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
        ))
    }
}

impl Plugin for PersistentVolumeClaimResize {
    fn name(&self) -> &'static str {
        "PersistentVolumeClaimResize"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let applies = request.operation == Operation::Update && request.is("", "persistentvolumeclaims");
        let result = if applies { Self::check(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{Case, FakeObjects, admit};

    fn class(name: &str, created: &str, expands: bool) -> Value {
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "allowVolumeExpansion": expands,
            "metadata": {"name": name, "creationTimestamp": created, "annotations": {DEFAULT_CLASS[0]: "true"}}})
    }

    fn claim(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": spec,
            "metadata": {"name": "c", "namespace": "ns"}})
    }

    #[tokio::test]
    async fn the_newest_default_class_is_taken() {
        let objects = FakeObjects::new([
            class("old", "2026-01-01T00:00:00Z", false),
            class("new", "2026-02-01T00:00:00Z", false),
        ]);
        let admitted = admit(&DefaultStorageClass, &objects, claim(json!({}))).await.unwrap();
        assert_eq!(admitted["spec"]["storageClassName"], "new");
        let none = admit(&DefaultStorageClass, &objects, claim(json!({"storageClassName": ""}))).await.unwrap();
        assert_eq!(none["spec"]["storageClassName"], "");
    }

    #[tokio::test]
    async fn claims_are_protected() {
        let admitted = admit(&StorageObjectInUseProtection, &FakeObjects::default(), claim(json!({}))).await.unwrap();
        assert_eq!(admitted["metadata"]["finalizers"], json!(["kubernetes.io/pvc-protection"]));
    }

    #[tokio::test]
    async fn only_expandable_claims_grow() {
        let objects = FakeObjects::new([class("fix", "", false), class("grow", "", true)]);
        for (class, size, allowed) in [("fix", "2Gi", false), ("grow", "2Gi", true), ("fix", "1Gi", true)] {
            let sized = |size: &str| {
                let mut claim = claim(json!({"storageClassName": class, "resources": {"requests": {"storage": size}}}));
                claim["status"] = json!({"phase": "Bound"});
                claim
            };
            let mut case = Case { operation: Operation::Update, old: sized("1Gi"), ..Case::create(sized(size)) };
            assert_eq!(case.run(&PersistentVolumeClaimResize, &objects).await.is_ok(), allowed, "{class} {size}");
        }
    }
}
