//! Reads and writes of stored objects: one generic path, a small strategy per kind.

mod admit;
pub(crate) mod convert;
mod create;
mod decode;
mod delete;
mod list;
mod managed;
mod metadata;
mod options;
mod patch;
mod reads;
mod resource;
pub(crate) mod scale;
mod scale_owners;
mod selection;
mod shape;
pub mod strategy;
pub mod table;
mod update;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use isopod_api::{
    gvk::{Gvk, Gvr},
    resources,
    status::Status,
};
use isopod_store::Engine;
use serde_json::Value;

pub(crate) use decode::object as decode_object;
pub(crate) use list::list;
pub(crate) use metadata::check_name;
pub(crate) use options::{WriteOptions, delete_options};
pub(crate) use patch::{PatchKind, PatchRequest};
pub(crate) use reads::{object_bytes, object_value};
pub(crate) use resource::{Behaved, Resource};
pub(crate) use selection::Selection;
pub(crate) use update::{Missing, Rules, Target};
pub(crate) use watch::{WatchRequest, watch};

use crate::{
    admission::Plugin,
    alloc::ServiceAllocator,
    authn::UserInfo,
    authz::Authorizer,
    cache::{Cache, Object, ResourceCache},
    custom::{Converter, Publication, STORED, Served},
    kinds,
    objects::Objects,
};

/// Resources whose changes need not wait for the disk.
const RELAXED: [&str; 2] = ["leases", "events"];

/// Versions that are served from objects stored in another one.
const STORED_ELSEWHERE: [(&str, &str, &str, &str, &str); 2] = [
    ("autoscaling", "v1", "horizontalpodautoscalers", "autoscaling", "v2"),
    ("events.k8s.io", "v1", "events", "", "v1"),
];

/// All resources and their objects.
pub(crate) struct Registry {
    cache: Cache,
    served: HashMap<Gvr, Arc<Resource>>,
    custom: ArcSwap<Served>,
    versions: BTreeMap<String, Vec<String>>,
    plugins: Vec<Box<dyn Plugin>>,
    services: ServiceAllocator,
    authorizer: OnceLock<Arc<dyn Authorizer>>,
    converter: OnceLock<Arc<Converter>>,
}

/// Who writes, and how.
pub(crate) struct Writer<'a> {
    /// Who asks.
    pub(crate) user: &'a UserInfo,
    /// Options of the write.
    pub(crate) options: WriteOptions,
    /// Whether admission plugins are asked; the server's own writes are not.
    pub(crate) admission: bool,
    /// Warnings for the response.
    pub(crate) warnings: Vec<String>,
}

impl<'a> Writer<'a> {
    /// A write of the API server itself.
    pub(crate) fn internal(user: &'a UserInfo) -> Self {
        Self { user, options: WriteOptions::internal(), admission: false, warnings: Vec::new() }
    }
}

impl Registry {
    /// Builds all resources over a store and loads their objects.
    pub(crate) fn open(
        engine: Arc<dyn Engine>,
        plugins: Vec<Box<dyn Plugin>>,
        services: ServiceAllocator,
    ) -> Result<Self, isopod_store::Error> {
        let cache = Cache::new(engine);
        let mut served = HashMap::new();
        let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for info in resources::all() {
            let resource = build(&cache, info);
            let known = versions.entry(info.group.clone()).or_default();
            if !known.contains(&info.version) {
                known.push(info.version.clone());
            }
            served.insert(resource.gvr.clone(), Arc::new(resource));
        }
        register_custom(&cache)?;
        cache.load()?;
        let custom = ArcSwap::from_pointee(Served::default());
        Ok(Self {
            cache,
            served,
            custom,
            versions,
            plugins,
            services,
            authorizer: OnceLock::new(),
            converter: OnceLock::new(),
        })
    }

    /// Tells custom resources how to call the webhooks that convert them.
    pub(crate) fn convert_with(&self, converter: Arc<Converter>) {
        if self.converter.set(converter).is_err() {
            tracing::error!("the registry has a converter already");
        }
    }

    /// How custom resources call the webhooks that convert them.
    pub(crate) fn converter(&self) -> Option<Arc<Converter>> {
        self.converter.get().cloned()
    }

    /// Tells admission who may do what. The authorizer reads the registry, so it comes later.
    pub(crate) fn authorize_with(&self, authorizer: Arc<dyn Authorizer>) {
        if self.authorizer.set(authorizer).is_err() {
            tracing::error!("the registry has an authorizer already");
        }
    }

    /// A served resource.
    pub(crate) fn resource(&self, gvr: &Gvr) -> Option<Arc<Resource>> {
        self.served.get(gvr).cloned().or_else(|| self.custom.load().get(gvr).cloned())
    }

    /// The custom resources that are served now.
    pub(crate) fn custom(&self) -> Arc<Served> {
        self.custom.load_full()
    }

    /// Swaps the table of custom resources.
    pub(crate) fn publish(&self, publications: Vec<Publication>) {
        let before = self.custom.load_full();
        let now = Served::build(publications, &before);
        for old in before.definitions().filter(|d| now.definition(&d.name).is_none()) {
            self.cache.forget(&old.prefix());
        }
        self.custom.store(Arc::new(now));
    }

    /// All served resources.
    pub(crate) fn resources(&self) -> Vec<Arc<Resource>> {
        self.served.values().chain(self.custom.load().resources()).cloned().collect()
    }

    /// Served versions of a group; `None` when the group is unknown.
    pub(crate) fn versions(&self, group: &str) -> Option<&[String]> {
        self.versions.get(group).map(Vec::as_slice)
    }

    /// The caches below.
    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    fn store(&self, gvr: &Gvr) -> Option<Arc<ResourceCache>> {
        match self.served.get(gvr) {
            Some(resource) => resource.store.clone(),
            None => self.custom.load().get(gvr)?.store.clone(),
        }
    }
}

fn build(cache: &Cache, info: &resources::Resource) -> Resource {
    let (gvr, gvk) = (info.gvr(), info.gvk());
    let elsewhere = STORED_ELSEWHERE.iter().find(|(group, version, plural, ..)| {
        (*group, *version, *plural) == (&*info.group, &*info.version, &*info.plural)
    });
    let storage = match elsewhere {
        Some((.., group, version)) => Gvk::new(group, version, &info.kind),
        None => gvk.clone(),
    };
    let strategy = kinds::strategy_for(&Gvr::new(&storage.group, &storage.version, &info.plural));
    let store = info.etcd_prefix.as_deref().filter(|_| info.plural != "componentstatuses").map(|pattern| {
        let prefix = pattern.split('{').next().unwrap_or(pattern);
        cache.register(prefix, strategy, RELAXED.contains(&info.plural.as_str()))
    });
    Resource { info: info.clone(), gvr, gvk, storage, strategy: Behaved::BuiltIn(strategy), store, custom: None }
}

/// Makes room for the objects of every stored definition, so that loading finds where they belong.
fn register_custom(cache: &Cache) -> Result<(), isopod_store::Error> {
    for entry in cache.engine().range("/registry/apiextensions.k8s.io/customresourcedefinitions/", None)? {
        let crd: Value = serde_json::from_slice(&entry?.value).unwrap_or_default();
        let text = |pointer: &str| crd.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (group, plural) = (text("/spec/group"), text("/status/acceptedNames/plural"));
        if !group.is_empty() && !plural.is_empty() {
            cache.register(&format!("/registry/{group}/{plural}/"), &STORED, false);
        }
    }
    Ok(())
}

impl Objects for Registry {
    fn get(&self, gvr: &Gvr, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.store(gvr)?.get(&crate::cache::key(namespace, name))
    }

    fn list(&self, gvr: &Gvr, namespace: &str) -> Vec<Arc<Object>> {
        let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        self.store(gvr).map(|s| s.snapshot(&prefix, None).0.objects).unwrap_or_default()
    }

    fn generation(&self, gvr: &Gvr) -> u64 {
        self.store(gvr).map_or(0, |s| s.generation())
    }

    fn resource_of(&self, gvk: &Gvk) -> Option<(Gvr, bool)> {
        if let Some(resource) = resources::by_gvk(gvk) {
            return Some((resource.gvr(), resource.namespaced));
        }
        let custom = self.custom.load();
        let found = custom.resources().find(|resource| resource.gvk == *gvk)?;
        Some((found.gvr.clone(), found.info.namespaced))
    }

    fn served(&self, gvr: &Gvr, object: &Object) -> Value {
        self.resource(gvr).map_or_else(|| object.value(), |resource| resource.served_value(object))
    }

    fn changed(&self, resources: &[Gvr]) -> BoxFuture<'static, ()> {
        let stores: Vec<_> = resources.iter().filter_map(|gvr| self.store(gvr)).collect();
        if stores.is_empty() {
            return Box::pin(std::future::pending());
        }
        let changes = stores.into_iter().map(ResourceCache::next_change);
        Box::pin(async move { drop(futures::future::select_all(changes).await) })
    }

    fn services(&self) -> Option<&ServiceAllocator> {
        Some(&self.services)
    }

    fn create<'a>(&'a self, gvr: &'a Gvr, namespace: &'a str, obj: Value) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let resource = self.resource(gvr).ok_or_else(Status::no_route)?;
            let user = UserInfo::system();
            let mut obj = obj;
            decode::complete(&resource, &mut obj);
            let created = self.create_object(&resource, namespace, obj, &mut Writer::internal(&user)).await?;
            Ok(created.value())
        })
    }

    fn modify<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        subresource: &'a str,
        user: &'a UserInfo,
        change: Box<dyn Fn(&mut Value) -> Result<(), Status> + Send + Sync + 'a>,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let resource = self.resource(gvr).ok_or_else(Status::no_route)?;
            let mut writer = Writer::internal(user);
            let edit = |current: &Value, _: &mut Vec<String>| {
                let mut new = current.clone();
                change(&mut new)?;
                Ok(new)
            };
            let target = Target { resource: &resource, namespace, name, subresource };
            // A binding leaves no trace in managedFields.
            let tracking = if subresource == "binding" { update::Tracking::Done } else { update::Tracking::Update };
            let rules = Rules { tracking, ..Rules::PATCH };
            let outcome = self.update_object(target, &edit, rules, &mut writer).await?;
            Ok(outcome.object.value())
        })
    }

    fn delete<'a>(
        &'a self,
        gvr: &'a Gvr,
        namespace: &'a str,
        name: &'a str,
        options: Value,
        user: &'a UserInfo,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let resource = self.resource(gvr).ok_or_else(Status::no_route)?;
            let mut writer = Writer::internal(user);
            let deleted = self.delete_object(&resource, namespace, name, &options, &mut writer).await?;
            Ok(deleted.into_value(&resource))
        })
    }
}
