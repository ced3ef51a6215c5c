//! Read access to every stored object, for strategies, admission, authorization and endpoints.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, status::Status};
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
