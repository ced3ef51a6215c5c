//! Read access to every stored object, for strategies, admission, authorization and endpoints.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    resources,
    status::Status,
};
use serde_json::Value;

use crate::authn::UserInfo;

/// One stored object as the watch cache keeps it.
pub use crate::cache::Object;

/// A change of an object; it may refuse.
pub type Modification<'a> = Box<dyn Fn(&mut Value) -> Result<(), Status> + Send + Sync + 'a>;

/// The API server's own view of its objects. Reads come from the watch cache and see every acknowledged write.
pub trait Objects: Send + Sync {
    /// One object.
    fn get(&self, gvr: &Gvr, namespace: &str, name: &str) -> Option<Arc<Object>>;

    /// All objects of a resource, in one namespace or (with `""`) in all, in key order.
    fn list(&self, gvr: &Gvr, namespace: &str) -> Vec<Arc<Object>>;

    /// A number that changes whenever an object of the resource does: key for derived caches.
    fn generation(&self, gvr: &Gvr) -> u64;

    /// The resource of a kind, and whether its objects live in namespaces.
    fn resource_of(&self, gvk: &Gvk) -> Option<(Gvr, bool)> {
        resources::by_gvk(gvk).map(|resource| (resource.gvr(), resource.namespaced))
    }

    /// An object of a resource in the version of that resource.
    fn served(&self, _gvr: &Gvr, object: &Object) -> Value {
        object.value()
    }

    /// Ends when any of these resources changes after this call (not after the first poll).
    fn changed(&self, _resources: &[Gvr]) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// The allocator of service addresses and node ports of this API server.
    fn services(&self) -> Option<&crate::alloc::ServiceAllocator> {
        None
    }

    /// Creates through the whole write path (defaults, validation) but without admission and authorization.
    fn create<'a>(&'a self, gvr: &'a Gvr, namespace: &'a str, obj: Value) -> BoxFuture<'a, Result<Value, Status>>;

    /// Read-modify-write of an object or subresource (`""`, `"status"`), retried on conflict. `change` may refuse.
    fn modify<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        subresource: &'a str,
        user: &'a UserInfo,
        change: Modification<'a>,
    ) -> BoxFuture<'a, Result<Value, Status>>;

    /// Deletes with DeleteOptions (an object, may be `{}`).
    fn delete<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        options: Value,
        user: &'a UserInfo,
    ) -> BoxFuture<'a, Result<Value, Status>>;
}
