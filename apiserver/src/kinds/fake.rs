//! A small store for the unit tests of this crate.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{GroupResource, Gvr},
    meta,
    status::Status,
};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    alloc::ServiceAllocator,
    authn::UserInfo,
    objects::{Object, Objects},
};

type Key = (String, String, String);

/// Objects by resource, namespace and name.
#[derive(Default)]
pub(crate) struct FakeObjects {
    all: Mutex<BTreeMap<Key, Arc<Object>>>,
    revision: AtomicU64,
    pub(crate) allocator: Option<ServiceAllocator>,
}

impl FakeObjects {
    /// Stores an object.
    pub(crate) fn put(&self, resource: &str, obj: Value) {
        let revision = self.revision.fetch_add(1, Ordering::Relaxed) + 1;
        let key = (resource.to_owned(), meta::namespace(&obj).to_owned(), meta::name(&obj).to_owned());
        let labels = meta::labels_owned(&obj).into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        let object = Object {
            bytes: serde_json::to_vec(&obj).unwrap_or_default().into(),
            body_offset: 0,
            revision,
            namespace: key.1.as_str().into(),
            name: key.2.as_str().into(),
            labels,
            fields: Box::default(),
            forms: Default::default(),
        };
        self.all.lock().insert(key, Arc::new(object));
    }

    /// Removes an object.
    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str) {
        self.revision.fetch_add(1, Ordering::Relaxed);
        self.all.lock().remove(&(resource.to_owned(), namespace.to_owned(), name.to_owned()));
    }
}

impl Objects for FakeObjects {
    fn get(&self, gvr: &Gvr, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.all.lock().get(&(gvr.resource.clone(), namespace.to_owned(), name.to_owned())).cloned()
    }

    fn list(&self, gvr: &Gvr, namespace: &str) -> Vec<Arc<Object>> {
        let all = self.all.lock();
        all.iter()
            .filter(|(k, _)| k.0 == gvr.resource && (namespace.is_empty() || k.1 == namespace))
            .map(|(_, o)| o.clone())
            .collect()
    }

    fn generation(&self, _gvr: &Gvr) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    fn services(&self) -> Option<&ServiceAllocator> {
        self.allocator.as_ref()
    }

    fn create<'a>(&'a self, gvr: &'a Gvr, _namespace: &'a str, obj: Value) -> BoxFuture<'a, Result<Value, Status>> {
        self.put(&gvr.resource, obj.clone());
        Box::pin(async move { Ok(obj) })
    }

    fn modify<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        _subresource: &'a str,
        _user: &'a UserInfo,
        change: Box<dyn Fn(&mut Value) -> Result<(), Status> + Send + Sync + 'a>,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let resource = GroupResource { group: gvr.group.clone(), resource: gvr.resource.clone() };
            let mut value = self.get(gvr, namespace, name).ok_or_else(|| Status::not_found(&resource, name))?.value();
            change(&mut value)?;
            self.put(&gvr.resource, value.clone());
            Ok(value)
        })
    }

    fn delete<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        _options: Value,
        _user: &'a UserInfo,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let resource = GroupResource { group: gvr.group.clone(), resource: gvr.resource.clone() };
            let value = self.get(gvr, namespace, name).ok_or_else(|| Status::not_found(&resource, name))?.value();
            self.remove(&gvr.resource, namespace, name);
            Ok(value)
        })
    }
}
