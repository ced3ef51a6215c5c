//! Admission: upstream's default plugins, in upstream's order.

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    status::Status,
};
use serde_json::Value;

use crate::{authn::UserInfo, objects::Objects};

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
pub fn plugins(_config: &crate::Config) -> Vec<Box<dyn Plugin>> {
    Vec::new()
}
