//! The garbage collector: deletes what lost its last owner, holds owners until their dependents are gone (foreground),
//! releases dependents (orphan).
//!
//! In: metadata of everything that can be listed; kinds that other controllers watch already come from their caches, the
//! rest from metadata-only watches. Out: deletes guarded by UID and revision, patches of ownerReferences and finalizers.
//! Before anything is deleted, its owner's absence is confirmed by the API server itself.

mod graph;

use crate::context::Context;
use crate::discovery::{ResourceType, discover};
use graph::{Graph, Object, Owner, Slim, SlimMeta, Uid, Work};
use isopod_client::objects::{DeleteOptions, HasMeta, is_conflict, is_not_found};
use isopod_client::reflect::{Sink, Source, reflect};
use isopod_client::{Cache, Change, Queue, spawn_workers};
use k8s_openapi::api::core::v1::ObjectReference;
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::Notify;

const WORKERS: usize = 10;
const SETTLE: Duration = Duration::from_millis(200);

/// Resources nobody owns and nothing depends on, in numbers.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

struct Monitored {
    kind: ResourceType,
    stop: tokio_util::sync::CancellationToken,
}

/// The collector; also knows how many objects of each resource there are.
pub(crate) struct Collector {
    ctx: Arc<Context>,
    graph: Mutex<Graph>,
    resources: RwLock<Vec<Monitored>>,
    queue: Arc<Queue<Work>>,
    rediscover: Notify,
    /// Told the namespace in which there is an object more or less.
    counted: OnceLock<Counted>,
}

/// Is told a namespace.
type Counted = Box<dyn Fn(&str) + Send + Sync>;

struct Monitor {
    collector: Arc<Collector>,
    resource: usize,
    structural: bool,
}

impl Sink<Slim> for Monitor {
    fn replace(&self, objects: Vec<Slim>) {
        let present: std::collections::HashSet<String> = objects.iter().map(|o| o.metadata.uid.clone()).collect();
        let known = self.collector.graph.lock().of_resource(self.resource);
        for uid in known.into_iter().filter(|uid| !present.contains(&**uid)) {
            self.collector.gone(&uid);
        }
        for object in objects {
            self.apply(object);
        }
    }
    fn apply(&self, object: Slim) {
        self.collector.seen(self.resource, object.metadata);
        if self.structural {
            self.collector.rediscover.notify_one();
        }
    }
    fn delete(&self, object: Slim) {
        self.collector.gone(&object.metadata.uid);
        if self.structural {
            self.collector.rediscover.notify_one();
        }
    }
    fn revision(object: &Slim) -> Option<String> {
        Some(object.metadata.resource_version.clone()).filter(|rv| !rv.is_empty())
    }
}

/// Starts the collector.
pub(crate) fn start(ctx: &Arc<Context>) -> Arc<Collector> {
    let collector = Arc::new(Collector {
        ctx: ctx.clone(),
        graph: Mutex::default(),
        resources: RwLock::default(),
        queue: Arc::new(Queue::with_backoff(Duration::from_millis(5), Duration::from_secs(60))),
        rediscover: Notify::new(),
        counted: OnceLock::new(),
    });
    let c = collector.clone();
    tokio::spawn(async move {
        let stop = c.ctx.stop.clone();
        tokio::select! {
            // Cancel-safe: monitors are tasks of their own.
            () = c.clone().follow_discovery() => {}
            () = stop.cancelled() => {}
        }
    });
    collector
}

impl Collector {
    /// Watches every resource there is; looks again when a CRD or APIService changes.
    async fn follow_discovery(self: Arc<Self>) {
        let mut started = false;
        let mut retry = Duration::from_millis(100);
        loop {
            match discover(&self.ctx.objects).await {
                Ok(found) => {
                    retry = Duration::from_millis(100);
                    let complete = found.failed.is_empty();
                    self.clone().monitor(found.resources, complete);
                    if !started {
                        started = true;
                        self.clone().work();
                    }
                    self.rediscover.notified().await;
                    // A new CRD changes several times while it is being established.
                    tokio::time::sleep(SETTLE).await;
                }
                Err(error) => {
                    tracing::debug!(%error, "discovery failed");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(Duration::from_secs(10));
                }
            }
        }
    }

    fn monitor(self: Arc<Self>, found: Vec<ResourceType>, complete: bool) {
        let wanted: Vec<ResourceType> = found
            .into_iter()
            .filter(|r| r.can(&["delete", "list", "watch"]))
            .filter(|r| !IGNORED.contains(&(r.group.as_str(), r.resource.as_str())))
            .collect();
        let same = |a: &ResourceType, b: &ResourceType| a.group == b.group && a.resource == b.resource;
        let mut resources = self.resources.write();
        for (index, known) in resources.iter().enumerate() {
            if complete && !known.stop.is_cancelled() && !wanted.iter().any(|r| same(r, &known.kind)) {
                known.stop.cancel();
                let uids = self.graph.lock().of_resource(index);
                for uid in uids {
                    self.gone(&uid);
                }
            }
        }
        for kind in wanted {
            if resources.iter().any(|known| !known.stop.is_cancelled() && same(&known.kind, &kind)) {
                continue;
            }
            let stop = self.ctx.stop.child_token();
            let index = resources.len();
            resources.push(Monitored { kind: kind.clone(), stop: stop.clone() });
            if self.clone().from_cache(&kind, index) {
                continue;
            }
            let structural = matches!(kind.resource.as_str(), "customresourcedefinitions" | "apiservices");
            let monitor = Monitor { collector: self.clone(), resource: index, structural };
            let source = Source { path: kind.collection(), query: String::new(), metadata_only: true };
            let client = self.ctx.objects.client().clone();
            tokio::spawn(async move { reflect::<Slim, _>(client, source, &monitor, stop).await });
        }
    }

    /// Uses a cache that exists anyway.
    fn from_cache(self: Arc<Self>, kind: &ResourceType, index: usize) -> bool {
        let caches = &self.ctx.clone().caches;
        match (kind.group.as_str(), kind.resource.as_str()) {
            ("", "pods") => self.share(&caches.pods, index),
            ("", "nodes") => self.share(&caches.nodes, index),
            ("", "namespaces") => self.share(&caches.namespaces, index),
            ("", "services") => self.share(&caches.services, index),
            ("", "endpoints") => self.share(&caches.endpoints, index),
            ("", "serviceaccounts") => self.share(&caches.accounts, index),
            ("", "replicationcontrollers") => self.share(&caches.replication_controllers, index),
            ("", "resourcequotas") => self.share(&caches.quotas, index),
            ("", "persistentvolumeclaims") => self.share(&caches.claims, index),
            ("", "persistentvolumes") => self.share(&caches.volumes, index),
            ("discovery.k8s.io", "endpointslices") => self.share(&caches.slices, index),
            ("apps", "replicasets") => self.share(&caches.replica_sets, index),
            ("apps", "deployments") => self.share(&caches.deployments, index),
            ("apps", "daemonsets") => self.share(&caches.daemon_sets, index),
            ("apps", "statefulsets") => self.share(&caches.stateful_sets, index),
            ("apps", "controllerrevisions") => self.share(&caches.revisions, index),
            ("batch", "jobs") => self.share(&caches.jobs, index),
            ("batch", "cronjobs") => self.share(&caches.cron_jobs, index),
            ("policy", "poddisruptionbudgets") => self.share(&caches.budgets, index),
            ("storage.k8s.io", "storageclasses") => self.share(&caches.storage_classes, index),
            ("certificates.k8s.io", "certificatesigningrequests") => self.share(&caches.signing_requests, index),
            ("rbac.authorization.k8s.io", "clusterroles") => self.share(&caches.cluster_roles, index),
            ("autoscaling", "horizontalpodautoscalers") => self.share(&caches.autoscalers, index),
            ("coordination.k8s.io", "leases") => self.share(&caches.leases, index),
            _ => return false,
        }
        true
    }

    fn share<T: HasMeta + Clone + Send + Sync + 'static>(self: Arc<Self>, cache: &Cache<T>, index: usize) {
        cache.subscribe(move |change| match change {
            Change::Deleted(object) => self.gone(object.uid()),
            Change::Updated(old, new) if unchanged(&***old, &***new) => {
                // Only the revision moved, which guards deletes.
                let revision = new.object_meta().resource_version.clone().unwrap_or_default();
                if let Some(object) = self.graph.lock().objects.get_mut(new.uid()) {
                    object.revision = revision;
                }
            }
            Change::Added(object) | Change::Updated(_, object) => self.seen(index, slim(&***object)),
        });
    }

    fn seen(&self, resource: usize, meta: SlimMeta) {
        let mut graph = self.graph.lock();
        let added = graph.namespace(&meta.uid).is_none().then(|| meta.namespace.clone());
        let work = graph.apply(resource, meta);
        drop(graph);
        self.tell(added.as_deref());
        work.into_iter().for_each(|w| self.queue.add(w));
    }

    fn gone(&self, uid: &str) {
        let mut graph = self.graph.lock();
        let removed = graph.namespace(uid).map(str::to_owned);
        let work = graph.remove(uid);
        drop(graph);
        self.tell(removed.as_deref());
        work.into_iter().for_each(|w| self.queue.add(w));
    }

    fn tell(&self, namespace: Option<&str>) {
        if let (Some(namespace), Some(counted)) = (namespace.filter(|n| !n.is_empty()), self.counted.get()) {
            counted(namespace);
        }
    }

    /// Has somebody told of every namespace in which there is an object more or less than before, also of those that are
    /// there already.
    pub(crate) fn on_count(&self, counted: impl Fn(&str) + Send + Sync + 'static) {
        if self.counted.set(Box::new(counted)).is_ok() {
            let namespaces = self.graph.lock().namespaces();
            namespaces.iter().for_each(|n| self.tell(Some(n)));
        }
    }

    /// How many objects of a resource a namespace has; `None` when the resource is not known.
    pub(crate) fn count(&self, group: &str, resource: &str, namespace: &str) -> Option<usize> {
        let index = self.resources.read().iter().position(|r| r.kind.group == group && r.kind.resource == resource)?;
        Some(self.graph.lock().count(index, namespace))
    }

    fn work(self: Arc<Self>) {
        let (queue, stop) = (self.queue.clone(), self.ctx.stop.clone());
        spawn_workers("garbage-collector-controller", &queue, WORKERS, &stop, move |work| {
            let collector = self.clone();
            async move {
                match work {
                    Work::Check(uid) => collector.check(&uid).await,
                    Work::Orphan(uid) => collector.orphan(&uid).await,
                }
                .map(|()| None)
            }
        });
    }

    fn look(&self, uid: &str) -> Option<(Object, ResourceType)> {
        let object = self.graph.lock().objects.get(uid).cloned()?;
        let kind = self.resources.read().get(object.resource?).map(|r| r.kind.clone())?;
        Some((object, kind))
    }

    async fn check(&self, uid: &Uid) -> Result<(), kube::Error> {
        let Some((object, kind)) = self.look(uid) else { return Ok(()) };
        if object.foreground {
            return self.release_if_alone(uid, &object, &kind).await;
        }
        if object.deleting || object.owners.is_empty() {
            return Ok(());
        }
        let mut solid = 0;
        let mut waiting = Vec::new();
        let mut dangling = Vec::new();
        for owner in &object.owners {
            match self.state_of(owner, &object, &kind).await? {
                Standing::Present => solid += 1,
                Standing::Waiting => waiting.push(owner.uid.clone()),
                Standing::Absent => dangling.push(owner.uid.clone()),
            }
        }
        if solid > 0 {
            dangling.extend(waiting);
            return if dangling.is_empty() { Ok(()) } else { self.drop_owners(&object, &kind, uid, &dangling).await };
        }
        let propagation = if !waiting.is_empty() && !object.dependents.is_empty() {
            self.unblock_cycles(uid, &object).await?;
            "Foreground"
        } else if object.orphan {
            "Orphan"
        } else {
            "Background"
        };
        let options = DeleteOptions {
            uid: Some(uid.to_string()),
            resource_version: Some(object.revision.clone()),
            propagation: Some(propagation),
            ..DeleteOptions::default()
        };
        tracing::debug!(resource = kind.display(), object.namespace, object.name, propagation, "collecting");
        match self.ctx.objects.delete_path(&kind.object(&object.namespace, &object.name), &options).await {
            // Gone already; should the watch have missed it, the graph learns it here.
            Ok(false) => self.gone(uid),
            Ok(true) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Dependents that wait for themselves would wait for ever.
    async fn unblock_cycles(&self, uid: &Uid, object: &Object) -> Result<(), kube::Error> {
        let foreground = object.dependents.iter().any(|d| self.look(d).is_some_and(|(d, _)| d.foreground));
        if !foreground {
            return Ok(());
        }
        let Some((object, kind)) = self.look(uid) else { return Ok(()) };
        let owners: Vec<Value> = object.owners.iter().map(|o| owner_json(o, false)).collect();
        self.patch(&object, &kind, uid, json!({"ownerReferences": owners})).await
    }

    async fn release_if_alone(&self, uid: &Uid, object: &Object, kind: &ResourceType) -> Result<(), kube::Error> {
        let blocking = self.graph.lock().blocking(uid);
        if blocking.is_empty() {
            return self.drop_finalizer(uid, object, kind, "foregroundDeletion").await;
        }
        for dependent in blocking {
            if self.look(&dependent).is_some_and(|(d, _)| !d.foreground && !d.deleting) {
                self.queue.add(Work::Check(dependent));
            }
        }
        Ok(())
    }

    async fn orphan(&self, uid: &Uid) -> Result<(), kube::Error> {
        let Some((object, kind)) = self.look(uid) else { return Ok(()) };
        for dependent in &object.dependents {
            if let Some((object, kind)) = self.look(dependent) {
                self.drop_owners(&object, &kind, dependent, &[uid.to_string()]).await?;
            }
        }
        self.drop_finalizer(uid, &object, &kind, "orphan").await
    }

    async fn drop_owners(
        &self,
        object: &Object,
        kind: &ResourceType,
        uid: &Uid,
        owners: &[String],
    ) -> Result<(), kube::Error> {
        let kept = object.owners.iter().filter(|o| !owners.contains(&o.uid));
        // The reference's own `controller` flag is not kept in the graph: read it from the object.
        let live: Option<Value> = self.live(kind, &object.namespace, &object.name).await?;
        let Some(live) = live else { return Ok(()) };
        let kept: Vec<Value> = kept
            .map(|o| {
                let all = live.pointer("/metadata/ownerReferences").and_then(Value::as_array);
                let same = all.into_iter().flatten().find(|r| r["uid"] == json!(o.uid)).cloned();
                same.unwrap_or_else(|| owner_json(o, o.block_owner_deletion))
            })
            .collect();
        let owners = if kept.is_empty() { Value::Null } else { json!(kept) };
        self.patch(object, kind, uid, json!({"ownerReferences": owners})).await
    }

    async fn drop_finalizer(
        &self,
        uid: &Uid,
        object: &Object,
        kind: &ResourceType,
        finalizer: &str,
    ) -> Result<(), kube::Error> {
        let Some(live) = self.live(kind, &object.namespace, &object.name).await? else { return Ok(()) };
        let all = live.pointer("/metadata/finalizers").and_then(Value::as_array).cloned().unwrap_or_default();
        let kept: Vec<Value> = all.iter().filter(|f| f.as_str() != Some(finalizer)).cloned().collect();
        if kept.len() == all.len() {
            return Ok(());
        }
        let mut object = object.clone();
        object.revision = live.pointer("/metadata/resourceVersion").and_then(Value::as_str).unwrap_or_default().into();
        self.patch(&object, kind, uid, json!({"finalizers": kept})).await
    }

    async fn patch(&self, object: &Object, kind: &ResourceType, uid: &Uid, mut meta: Value) -> Result<(), kube::Error> {
        meta["uid"] = json!(&**uid);
        meta["resourceVersion"] = json!(object.revision);
        let path = kind.object(&object.namespace, &object.name);
        match self.ctx.objects.merge_path::<Value>(&path, &json!({"metadata": meta})).await {
            Ok(_) => Ok(()),
            Err(error) if is_not_found(&error) => Ok(()),
            // The watch brings the newer state; the back-off gives it time.
            Err(error) if is_conflict(&error) => Err(error),
            Err(error) => Err(error),
        }
    }

    async fn live(&self, kind: &ResourceType, namespace: &str, name: &str) -> Result<Option<Value>, kube::Error> {
        match self.ctx.objects.get_path::<Value>(&kind.object(namespace, name)).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether an owner is there, waits for its dependents, or is gone.
    async fn state_of(&self, owner: &Owner, object: &Object, kind: &ResourceType) -> Result<Standing, kube::Error> {
        let group = owner.api_version.split_once('/').map_or("", |(group, _)| group);
        let known = {
            let resources = self.resources.read();
            let found = resources.iter().find(|r| r.kind.group == group && r.kind.kind == owner.kind);
            found.map(|r| r.kind.clone())
        };
        // A kind that is not known (any more) says nothing about its objects: keep.
        let Some(owner_kind) = known else { return Ok(Standing::Present) };
        if owner_kind.namespaced && object.namespace.is_empty() {
            self.complain(owner, object, kind, "cluster-scoped objects cannot have namespaced owners");
            return Ok(Standing::Present);
        }
        let namespace = if owner_kind.namespaced { object.namespace.as_str() } else { "" };
        if let Some((seen, seen_kind)) = self.look(&owner.uid) {
            let same = seen.namespace == namespace && seen.name == owner.name && seen_kind.kind == owner.kind;
            if same {
                return Ok(if seen.foreground { Standing::Waiting } else { Standing::Present });
            }
            let text = format!(
                "ownerRef [{}/{}, namespace: {namespace}, name: {}, uid: {}] does not exist in namespace \
                \"{namespace}\"",
                owner.api_version, owner.kind, owner.name, owner.uid
            );
            self.complain(owner, object, kind, &text);
        }
        match self.live(&owner_kind, namespace, &owner.name).await? {
            Some(live) if live.pointer("/metadata/uid").and_then(Value::as_str) == Some(&owner.uid) => {
                let waits = !live["metadata"]["deletionTimestamp"].is_null()
                    && live
                        .pointer("/metadata/finalizers")
                        .and_then(Value::as_array)
                        .is_some_and(|list| list.iter().any(|f| f == "foregroundDeletion"));
                Ok(if waits { Standing::Waiting } else { Standing::Present })
            }
            _ => Ok(Standing::Absent),
        }
    }

    fn complain(&self, _owner: &Owner, object: &Object, kind: &ResourceType, text: &str) {
        let about = ObjectReference {
            kind: Some(kind.kind.clone()),
            namespace: (!object.namespace.is_empty()).then(|| object.namespace.clone()),
            name: Some(object.name.clone()),
            ..ObjectReference::default()
        };
        let recorder = self.ctx.recorder.component("garbage-collector-controller");
        recorder.send(about, "Warning", "OwnerRefInvalidNamespace", "", text.to_owned());
    }
}

enum Standing {
    Present,
    Waiting,
    Absent,
}

fn owner_json(owner: &Owner, block: bool) -> Value {
    json!({"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid,
        "blockOwnerDeletion": block})
}

fn unchanged<T: HasMeta>(old: &T, new: &T) -> bool {
    let (a, b) = (old.object_meta(), new.object_meta());
    a.owner_references == b.owner_references
        && a.finalizers == b.finalizers
        && a.deletion_timestamp.is_some() == b.deletion_timestamp.is_some()
}

fn slim<T: HasMeta>(object: &T) -> SlimMeta {
    let meta = object.object_meta();
    let owner = |o: &k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference| Owner {
        api_version: o.api_version.clone(),
        kind: o.kind.clone(),
        name: o.name.clone(),
        uid: o.uid.clone(),
        block_owner_deletion: o.block_owner_deletion.unwrap_or(false),
    };
    SlimMeta {
        name: object.name().to_owned(),
        namespace: object.namespace().to_owned(),
        uid: object.uid().to_owned(),
        resource_version: meta.resource_version.clone().unwrap_or_default(),
        owner_references: meta.owner_references.iter().flatten().map(owner).collect(),
        finalizers: meta.finalizers.clone().unwrap_or_default(),
        deletion_timestamp: meta.deletion_timestamp.as_ref().map(|_| String::new()),
    }
}
