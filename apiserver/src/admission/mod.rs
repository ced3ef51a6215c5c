//! Admission: upstream's default plugins, in upstream's order.

mod attributes;
mod certificates;
mod classes;
mod conditions;
mod escalation;
mod limits;
mod matching;
mod namespace;
mod node;
mod pods;
mod podsecurity;
mod policies;
mod quota;
mod reinvocation;
mod revisions;
mod serviceaccount;
mod shape;
mod storage;
#[cfg(test)]
pub(crate) mod testing;
mod webhooks;

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    meta,
    status::Status,
};
use serde_json::Value;

pub use policies::type_warnings;
pub(crate) use reinvocation::Reinvocation;
pub(crate) use shape::Shape;

use crate::{authn::UserInfo, authz::Authorizer, objects::Objects, webhook};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Create.
    Create,
    /// Update or patch.
    Update,
    /// Delete.
    Delete,
    /// Connect (exec, proxy, ...).
    Connect,
}

/// One request under admission. Plugins of the mutating pass may change `object`.
pub struct Request<'a> {
    /// Operation.
    pub operation: Operation,
    /// Resource.
    pub gvr: &'a Gvr,
    /// Kind of the object.
    pub gvk: &'a Gvk,
    /// Subresource or empty.
    pub subresource: &'a str,
    /// Namespace or empty.
    pub namespace: &'a str,
    /// Name or empty.
    pub name: &'a str,
    /// Who asks.
    pub user: &'a UserInfo,
    /// The new object (null on delete).
    pub object: &'a mut Value,
    /// The stored object (null on create).
    pub old: &'a Value,
    /// Create/Update/DeleteOptions.
    pub options: &'a Value,
    /// dryRun=All.
    pub dry_run: bool,
    /// Read access to the cluster.
    pub objects: &'a dyn Objects,
    /// Warnings for the response's headers.
    pub warnings: &'a mut Vec<String>,
    /// The object's versions.
    pub(crate) shape: &'a dyn Shape,
    /// Who may do what; absent while the server starts.
    pub(crate) authorizer: Option<&'a Arc<dyn Authorizer>>,
    /// Whether the mutating plugins run again.
    pub(crate) reinvocation: &'a mut Reinvocation,
}

/// One admission plugin. Both passes default to doing nothing.
pub trait Plugin: Send + Sync {
    /// Upstream's plugin name.
    fn name(&self) -> &'static str;

    /// The mutating pass.
    fn admit<'a>(&'a self, _request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async { Ok(()) })
    }

    /// The validating pass; sees the final object.
    fn validate<'a>(&'a self, _request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async { Ok(()) })
    }
}

/// The plugins in upstream's order.
pub(crate) fn plugins(client: &Arc<webhook::Client>) -> Vec<Box<dyn Plugin>> {
    let webhooks = Arc::new(webhooks::Webhooks::new(Arc::clone(client)));
    vec![
        Box::new(namespace::NamespaceLifecycle),
        Box::new(limits::LimitRanger),
        Box::new(serviceaccount::ServiceAccount),
        Box::new(node::NodeRestriction),
        Box::new(node::TaintNodesByCondition),
        Box::new(podsecurity::PodSecurity),
        Box::new(pods::Priority),
        Box::new(pods::DefaultTolerationSeconds),
        Box::new(storage::DefaultStorageClass),
        Box::new(storage::StorageObjectInUseProtection),
        Box::new(storage::PersistentVolumeClaimResize),
        Box::new(pods::RuntimeClass),
        Box::new(certificates::CertificateApproval),
        Box::new(certificates::CertificateSigning),
        Box::new(certificates::CertificateSubjectRestriction),
        Box::new(classes::DefaultIngressClass),
        Box::new(pods::PodTopologyLabels),
        Box::new(policies::MutatingAdmissionPolicy::default()),
        Box::new(webhooks::MutatingAdmissionWebhook(Arc::clone(&webhooks))),
        Box::new(escalation::RbacEscalation),
        Box::new(policies::ValidatingAdmissionPolicy::default()),
        Box::new(webhooks::ValidatingAdmissionWebhook(webhooks)),
        Box::new(quota::ResourceQuota::default()),
    ]
}

impl Request<'_> {
    /// Whether the request is for a resource itself (not a subresource).
    pub(crate) fn is(&self, group: &str, resource: &str) -> bool {
        self.is_sub(group, resource, "")
    }

    /// Whether the request is for a subresource.
    pub(crate) fn is_sub(&self, group: &str, resource: &str, subresource: &str) -> bool {
        self.gvr.group == group && self.gvr.resource == resource && self.subresource == subresource
    }

    /// Whether the request creates a resource.
    pub(crate) fn creates(&self, group: &str, resource: &str) -> bool {
        self.operation == Operation::Create && self.is(group, resource)
    }

    /// The name for messages: of the request, of the object, or what it will be generated from.
    pub(crate) fn display_name(&self) -> &str {
        [self.name, meta::name(self.object), meta::generate_name(self.object)]
            .into_iter()
            .find(|name| !name.is_empty())
            .unwrap_or_default()
    }

    /// Whether the request is about a namespace itself.
    pub(crate) fn is_namespace(&self) -> bool {
        self.gvr.group.is_empty() && self.gvr.resource == "namespaces"
    }

    /// An annotation of the audit event. There is no audit log: the server's own log has it.
    pub(crate) fn annotate(&self, key: &str, value: &str) {
        let (resource, namespace, name) = (&self.gvr.resource, self.namespace, self.display_name());
        tracing::info!(user = self.user.name, resource, namespace, name, key, value, "audit annotation");
    }

    /// A refusal with upstream's wording.
    pub(crate) fn forbidden(&self, message: impl std::fmt::Display) -> Status {
        Status::forbidden(&self.gvr.group_resource(), self.display_name(), message)
    }
}

/// The elements of a list; none when it is absent.
pub(crate) fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// A field's text; empty when it is absent.
pub(crate) fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// Appends to a list that may be absent.
pub(crate) fn push(value: &mut Value, field: &str, item: Value) {
    match value[field].as_array_mut() {
        Some(list) => list.push(item),
        None => value[field] = Value::Array(vec![item]),
    }
}

/// Marks what a static pod's mirror is.
pub(crate) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
