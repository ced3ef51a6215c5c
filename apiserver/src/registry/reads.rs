//! Reads of one object, and objects as the bytes a client gets.

use std::sync::Arc;

use bytes::Bytes;
use isopod_api::status::Status;
use serde_json::Value;

use super::{Registry, Resource, list};
use crate::{
    cache::{Object, key},
    server::query::Query,
};

impl Registry {
    /// One object, as fresh as the query asks.
    pub(crate) async fn get_object(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        query: &Query,
    ) -> Result<Arc<Object>, Status> {
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        if let Some(revision) = list::revision(query)? {
            list::wait_fresh(store, revision).await?;
        }
        let namespace = if resource.info.namespaced { namespace } else { "" };
        let object = store.get(&key(namespace, name));
        let object = object.ok_or_else(|| Status::not_found(&resource.group_resource(), name))?;
        resource.prepare(std::slice::from_ref(&object)).await?;
        Ok(object)
    }
}

/// An object's JSON in the served version.
pub(crate) fn object_bytes(resource: &Resource, object: &Object) -> Bytes {
    if !resource.reshapes(object) {
        return object.bytes.clone();
    }
    serde_json::to_vec(&object_value(resource, object)).unwrap_or_default().into()
}

/// An object in the served version.
pub(crate) fn object_value(resource: &Resource, object: &Object) -> Value {
    resource.served_value(object)
}
