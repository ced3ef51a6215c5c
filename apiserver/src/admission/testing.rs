//! A cluster of given objects for the tests of plugins.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    meta, resources,
    status::Status,
};
use parking_lot::Mutex;
use serde_json::Value;

use super::{Operation, Plugin, Reinvocation, Request, Shape};
use crate::{
    alloc::ServiceAllocator,
    authn::UserInfo,
    objects::{Object, Objects},
};

type Key = (Gvr, String, String);

/// Objects in memory; writes skip every check.
#[derive(Default)]
pub(crate) struct FakeObjects {
    objects: Mutex<BTreeMap<Key, Arc<Object>>>,
    revision: AtomicU64,
    pub(crate) allocator: Option<ServiceAllocator>,
}

pub(crate) fn gvr_of(value: &Value) -> Gvr {
    resources::by_gvk(&Gvk::of(value)).expect("a known kind").gvr()
}

fn gvr_named(resource: &str) -> Gvr {
    resources::all().iter().find(|known| known.plural == resource).expect("a known resource").gvr()
}

impl FakeObjects {
    pub(crate) fn new<const N: usize>(objects: [Value; N]) -> Self {
        let fake = Self::default();
        objects.into_iter().for_each(|object| fake.put(&gvr_of(&object), object));
        fake
    }

    pub(crate) fn put(&self, gvr: &Gvr, value: Value) {
        let revision = self.revision.fetch_add(1, Ordering::Relaxed) + 1;
        let labels = meta::labels_owned(&value).into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        let node = value["spec"]["nodeName"].as_str().unwrap_or_default();
        let object = Object {
            bytes: serde_json::to_vec(&value).unwrap().into(),
            body_offset: 0,
            revision,
            namespace: meta::namespace(&value).into(),
            name: meta::name(&value).into(),
            labels,
            fields: vec![("spec.nodeName", node.into())].into(),
            forms: Default::default(),
        };
        let key = (gvr.clone(), object.namespace.to_string(), object.name.to_string());
        self.objects.lock().insert(key, Arc::new(object));
    }

    /// Puts an object that does not say its kind.
    pub(crate) fn put_as(&self, resource: &str, value: Value) {
        self.put(&gvr_named(resource), value);
    }

    pub(crate) fn remove(&self, resource: &str, namespace: &str, name: &str) {
        self.take(&gvr_named(resource), namespace, name);
    }

    fn take(&self, gvr: &Gvr, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.revision.fetch_add(1, Ordering::Relaxed);
        self.objects.lock().remove(&(gvr.clone(), namespace.to_owned(), name.to_owned()))
    }
}

impl Objects for FakeObjects {
    fn get(&self, gvr: &Gvr, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.objects.lock().get(&(gvr.clone(), namespace.to_owned(), name.to_owned())).cloned()
    }

    fn list(&self, gvr: &Gvr, namespace: &str) -> Vec<Arc<Object>> {
        let objects = self.objects.lock();
        let found = objects.iter().filter(|((g, n, _), _)| g == gvr && (namespace.is_empty() || n == namespace));
        found.map(|(_, object)| object.clone()).collect()
    }

    fn generation(&self, _gvr: &Gvr) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    fn services(&self) -> Option<&ServiceAllocator> {
        self.allocator.as_ref()
    }

    fn create<'a>(&'a self, gvr: &'a Gvr, _namespace: &'a str, obj: Value) -> BoxFuture<'a, Result<Value, Status>> {
        self.put(gvr, obj.clone());
        Box::pin(async { Ok(obj) })
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
            let object = self.get(gvr, namespace, name);
            let mut value = object.ok_or_else(|| Status::not_found(&gvr.group_resource(), name))?.value();
            change(&mut value)?;
            self.put(gvr, value.clone());
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
        let taken = self.take(gvr, namespace, name);
        let answer = taken.map(|object| object.value()).ok_or_else(|| Status::not_found(&gvr.group_resource(), name));
        Box::pin(async { answer })
    }
}

/// Objects as they are; the other versions of their group can be named.
pub(crate) struct Plain(pub(crate) Gvk);

impl Shape for Plain {
    fn kind(&self) -> Gvk {
        self.0.clone()
    }

    fn versions(&self) -> Vec<(Gvr, Gvk)> {
        let others = resources::all().iter().filter(|r| r.group == self.0.group && r.kind == self.0.kind);
        others.map(|r| (r.gvr(), r.gvk())).filter(|(_, gvk)| *gvk != self.0).collect()
    }

    fn show(&self, object: &Value, gvk: &Gvk) -> Result<Value, Status> {
        let mut shown = object.clone();
        shown["apiVersion"] = gvk.api_version().into();
        Ok(shown)
    }

    fn prepare<'a>(&'a self, _objects: [&'a Value; 2], _gvk: &'a Gvk) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async { Ok(()) })
    }

    fn take<'a>(&'a self, shown: Value, _current: &'a Value) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async { Ok(shown) })
    }

    fn definition(&self, gvk: &Gvk) -> Option<&isopod_api::schema::Definition> {
        isopod_api::schema::lookup(gvk)
    }
}

/// One request through both passes of a plugin.
pub(crate) struct Case<'a> {
    pub(crate) operation: Operation,
    pub(crate) subresource: &'a str,
    pub(crate) user: UserInfo,
    pub(crate) object: Value,
    pub(crate) old: Value,
    pub(crate) warnings: Vec<String>,
    pub(crate) dry_run: bool,
}

impl Case<'_> {
    pub(crate) fn create(object: Value) -> Self {
        let user = UserInfo::default();
        Self {
            operation: Operation::Create,
            subresource: "",
            user,
            object,
            old: Value::Null,
            warnings: vec![],
            dry_run: false,
        }
    }

    pub(crate) async fn run(&mut self, plugin: &dyn Plugin, objects: &dyn Objects) -> Result<(), Status> {
        let sample = if self.object.is_null() { &self.old } else { &self.object };
        let (gvk, gvr) = (Gvk::of(sample), gvr_of(sample));
        let (namespace, name) = (meta::namespace(sample).to_owned(), meta::name(sample).to_owned());
        let options = Value::Null;
        let (shape, mut reinvocation) = (Plain(gvk.clone()), Reinvocation::default());
        let mut request = Request {
            operation: self.operation,
            gvr: &gvr,
            gvk: &gvk,
            subresource: self.subresource,
            namespace: &namespace,
            name: &name,
            user: &self.user,
            object: &mut self.object,
            old: &self.old,
            options: &options,
            dry_run: self.dry_run,
            objects,
            warnings: &mut self.warnings,
            shape: &shape,
            authorizer: None,
            reinvocation: &mut reinvocation,
        };
        plugin.admit(&mut request).await?;
        if request.reinvocation.needed {
            request.reinvocation.again = true;
            plugin.admit(&mut request).await?;
        }
        plugin.validate(&mut request).await
    }
}

/// Creates an object through a plugin; what became of it.
pub(crate) async fn admit(plugin: &dyn Plugin, objects: &dyn Objects, object: Value) -> Result<Value, Status> {
    let mut case = Case::create(object);
    case.run(plugin, objects).await?;
    Ok(case.object)
}
