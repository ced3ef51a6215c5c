//! Nobody grants more than he holds. Upstream does this in the storage of roles and bindings, after the mutating pass; here
//! it is the last of the mutating plugins.

use futures::future::BoxFuture;
use isopod_api::status::Status;

use super::{Operation, Plugin, Request};
use crate::authz::{escalation::Write, rbac::GROUP};

const RESOURCES: [&str; 4] = ["roles", "clusterroles", "rolebindings", "clusterrolebindings"];

/// The plugin.
pub(super) struct RbacEscalation;

impl Plugin for RbacEscalation {
    fn name(&self) -> &'static str {
        "RBACEscalation"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let writes = matches!(request.operation, Operation::Create | Operation::Update);
        let applies = writes
            && request.gvr.group == GROUP
            && request.subresource.is_empty()
            && RESOURCES.contains(&request.gvr.resource.as_str());
        let result = if applies {
            let write = Write {
                resource: &request.gvr.resource,
                namespace: request.namespace,
                name: request.display_name(),
                user: request.user,
                new: request.object,
                old: request.old,
            };
            write.check(request.objects)
        } else {
            Ok(())
        };
        Box::pin(async { result })
    }
}
