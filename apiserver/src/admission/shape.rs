//! How a request's object looks in the versions it is served in, and back.

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    schema::Definition,
    status::Status,
};
use serde_json::Value;

/// The versions of the object under admission. Plugins work on the stored form; webhooks and policies name a version.
pub(crate) trait Shape: Send + Sync {
    /// The kind the client sent.
    fn kind(&self) -> Gvk;

    /// The other versions the resource is served in.
    fn versions(&self) -> Vec<(Gvr, Gvk)>;

    /// Makes sure that objects can be shown in a version: some only a webhook can convert.
    fn prepare<'a>(&'a self, objects: [&'a Value; 2], gvk: &'a Gvk) -> BoxFuture<'a, Result<(), Status>>;

    /// An object in a version it was prepared for.
    fn show(&self, object: &Value, gvk: &Gvk) -> Result<Value, Status>;

    /// A changed object of a version in the form of `current`, with defaults.
    fn take<'a>(&'a self, shown: Value, current: &'a Value) -> BoxFuture<'a, Result<Value, Status>>;

    /// The schema of a version.
    fn definition(&self, gvk: &Gvk) -> Option<&Definition>;
}
