//! NamespaceLifecycle: nothing new in namespaces that are missing or on their way out; some namespaces stay.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, status::Status};

use super::{Operation, Plugin, Request};

const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

/// The plugin.
pub(super) struct NamespaceLifecycle;

impl NamespaceLifecycle {
    fn check(request: &Request<'_>) -> Result<(), Status> {
        let namespaces = Gvr::new("", "v1", "namespaces");
        if request.gvr.group.is_empty() && request.gvr.resource == "namespaces" {
            if request.operation == Operation::Delete && IMMORTAL.contains(&request.name) {
                return Err(request.forbidden("this namespace may not be deleted"));
            }
            return Ok(());
        }
        let writes = matches!(request.operation, Operation::Create | Operation::Update);
        // Access reviews are questions about a namespace, not content of it.
        if request.namespace.is_empty() || !writes || request.gvr.group == "authorization.k8s.io" {
            return Ok(());
        }
        let Some(namespace) = request.objects.get(&namespaces, "", request.namespace) else {
            return Err(Status::not_found(&namespaces.group_resource(), request.namespace));
        };
        if request.operation != Operation::Create {
            return Ok(());
        }
        let namespace = namespace.value();
        if namespace["status"]["phase"] != "Terminating" && meta::deletion_timestamp(&namespace).is_none() {
            return Ok(());
        }
        let message =
            format!("unable to create new content in namespace {} because it is being terminated", request.namespace);
        let detail = format!("namespace {} is being terminated", request.namespace);
        Err(request.forbidden(message).cause("NamespaceTerminating", detail, "metadata.namespace"))
    }
}

impl Plugin for NamespaceLifecycle {
    fn name(&self) -> &'static str {
        "NamespaceLifecycle"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let result = Self::check(request);
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{FakeObjects, admit};

    #[tokio::test]
    async fn content_needs_a_living_namespace() {
        let objects = FakeObjects::new([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ok"}}),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "going"}, "status": {"phase": "Terminating"}}),
        ]);
        for (namespace, reason, code) in [("ok", "", 0), ("missing", "NotFound", 404), ("going", "Forbidden", 403)] {
            let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": "c", "namespace": namespace}});
            let result = admit(&NamespaceLifecycle, &objects, object).await.map_err(|s| (s.reason.to_string(), s.code));
            let expected = if code == 0 { Ok(()) } else { Err((reason.to_owned(), code)) };
            assert_eq!(result.map(drop), expected, "{namespace}");
        }
    }
}
