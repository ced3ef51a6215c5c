//! Creating objects.

use std::{sync::Arc, time::Duration};

use isopod_api::{
    gvk::{Gvk, Gvr},
    meta,
    status::Status,
};
use isopod_store::Expect;
use serde_json::Value;

use super::{
    Registry, Resource, Writer,
    admit::{Admission, Pass},
    decode, managed, metadata,
    strategy::Context,
    update::Tracking,
};
use crate::{
    admission::Operation,
    alloc::objects::follow,
    cache::{Object, Write, key},
    objects::Objects,
    validation,
};

/// How long a pod waits for the default service account of its namespace.
const ACCOUNT_PATIENCE: Duration = Duration::from_millis(1500);
/// Attempts with a generated name.
const GENERATE_ATTEMPTS: usize = 8;
/// Largest stored object: the limit clients know from etcd.
pub(super) const OBJECT_MAX: usize = 1_572_864;

impl Registry {
    /// Creates an object. `obj` is decoded, in the served version or complete in the stored one.
    pub(crate) async fn create_object(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        obj: Value,
        writer: &mut Writer<'_>,
    ) -> Result<Arc<Object>, Status> {
        self.create_tracked(resource, namespace, obj, Tracking::Update, writer).await
    }

    /// The same, where managedFields may be done already.
    pub(super) async fn create_tracked(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        obj: Value,
        tracking: Tracking,
        writer: &mut Writer<'_>,
    ) -> Result<Arc<Object>, Status> {
        let created = self.create_stored(resource, namespace, obj, tracking, writer).await?;
        resource.prepare(std::slice::from_ref(&created)).await?;
        Ok(created)
    }

    async fn create_stored(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        mut obj: Value,
        tracking: Tracking,
        writer: &mut Writer<'_>,
    ) -> Result<Arc<Object>, Status> {
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        let namespace = if resource.info.namespaced { namespace } else { "" };
        metadata::place(resource, namespace, &mut obj)?;
        let manager = writer.options.manager.clone();
        if writer.options.object["kind"] == "UpdateOptions" {
            writer.options.object["kind"] = "CreateOptions".into();
        }
        let tracked = resource.converted() && Gvk::of(&obj) == resource.gvk;
        if tracked {
            // Ownership is in terms of the version the client speaks.
            decode::complete_served(resource, &mut obj);
            if tracking == Tracking::Update {
                managed::track(resource, &resource.gvk, None, &mut obj, &manager, "");
            }
        }
        decode::complete(resource, &mut obj);
        metadata::dedup_owners(&mut obj, writer);
        let versioned = !matches!(meta::resource_version(&obj), "" | "0");
        meta::set_resource_version(&mut obj, "");
        if tracking == Tracking::Update && !tracked {
            managed::track(resource, &resource.storage, None, &mut obj, &manager, "");
        }
        let name = meta::name(&obj).to_owned();
        let admission = Admission {
            operation: Operation::Create,
            resource,
            gvk: None,
            subresource: "",
            namespace,
            name: &name,
            old: &Value::Null,
        };
        self.default_account(resource, namespace, &obj, writer).await;
        self.admit(Pass::Mutating, &admission, &mut obj, writer).await?;
        let generated = meta::name(&obj).is_empty() && !meta::generate_name(&obj).is_empty();
        let attempts = if generated { GENERATE_ATTEMPTS } else { 1 };
        let again = generated || self.cache.allocation().is_some();
        let mut attempt = 0;
        while attempt < attempts {
            attempt += 1;
            let mut obj = if again { obj.clone() } else { std::mem::take(&mut obj) };
            if generated {
                let name = metadata::generate(meta::generate_name(&obj));
                meta::set_name(&mut obj, &name);
            }
            let name = meta::name(&obj).to_owned();
            let cx = self.context(resource, "", namespace, &name, writer);
            // The uid comes first: Jobs put it into their selector.
            metadata::for_create(resource, &mut obj);
            let early = resource.strategy.warnings_before_create(&obj);
            resource.strategy.prepare_for_create(&cx, &mut obj);
            let allocation = self.cache.allocation();
            let reservation = resource.strategy.reserve(&cx, &mut obj, None)?;
            let allocation = allocation.filter(|_| reservation.is_some());
            let mut errors = validation::meta::create(&resource.gvr, resource.info.namespaced, &obj);
            errors.extend(resource.strategy.validate(&cx, &obj));
            if !errors.is_empty() {
                return Err(Status::invalid(&resource.group_kind(), &name, errors));
            }
            let warnings = resource.strategy.warnings(&cx, &obj, None);
            writer.warnings.extend(early.into_iter().chain(warnings));
            let admission = Admission { name: &name, ..admission };
            self.admit(Pass::Validating, &admission, &mut obj, writer).await?;
            if versioned {
                return Err(Status::unknown("resourceVersion should not be set on objects to be created"));
            }
            let draft = resource.draft(obj).await?;
            if draft.stored.len() > OBJECT_MAX {
                return Err(Status::unknown("etcdserver: request is too large"));
            }
            let key = key(namespace, &name);
            if writer.options.dry_run {
                return match store.get(&key) {
                    Some(existing) => Err(exists(resource, &existing, &name)),
                    None => Ok(Arc::new(draft.finish_unstored())),
                };
            }
            match self.cache.commit_with(store, &key, Expect::Absent, Write::Put(draft), allocation).await {
                Ok(revision) => {
                    drop(reservation);
                    let object = self.committed(resource, &key, revision)?;
                    self.follow_addresses(resource, &Value::Null, Some(&object)).await;
                    return Ok(object);
                }
                // Another server has allocated meanwhile.
                Err(isopod_store::Error::Conflict { index: 1, .. }) => attempt -= 1,
                Err(isopod_store::Error::Conflict { .. }) if attempt < attempts => {}
                Err(isopod_store::Error::Conflict { .. }) => {
                    return Err(match store.get(&key) {
                        Some(existing) => exists(resource, &existing, &name),
                        None => Status::already_exists(&resource.group_resource(), &name),
                    });
                }
                Err(error) => return Err(Status::internal(error)),
            }
        }
        Err(Status::internal("no free generated name"))
    }

    /// What shows the addresses of a Service follows it.
    pub(super) async fn follow_addresses(&self, resource: &Resource, old: &Value, new: Option<&Object>) {
        if resource.gvr.group.is_empty() && resource.gvr.resource == "services" {
            follow(self, old, &new.map(Object::value).unwrap_or_default()).await;
        }
    }

    /// The default account of a new namespace is made by a controller: a pod that uses it waits for it a little.
    async fn default_account(&self, resource: &Resource, namespace: &str, obj: &Value, writer: &Writer<'_>) {
        let pod = resource.gvr.group.is_empty() && resource.gvr.resource == "pods";
        let account = obj["spec"]["serviceAccountName"].as_str().unwrap_or_default();
        if !pod || !writer.admission || !matches!(account, "" | "default") {
            return;
        }
        let accounts = Gvr::new("", "v1", "serviceaccounts");
        let deadline = tokio::time::Instant::now() + ACCOUNT_PATIENCE;
        loop {
            let changed = self.changed(std::slice::from_ref(&accounts));
            let mirror = obj["metadata"]["annotations"].get("kubernetes.io/config.mirror").is_some();
            if mirror || Objects::get(self, &accounts, namespace, "default").is_some() {
                return;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return;
            }
        }
    }

    /// The context a strategy sees.
    pub(super) fn context<'a>(
        &'a self,
        resource: &'a Resource,
        subresource: &'a str,
        namespace: &'a str,
        name: &'a str,
        writer: &Writer<'a>,
    ) -> Context<'a> {
        Context {
            gvr: &resource.gvr,
            subresource,
            namespace,
            name,
            user: writer.user,
            objects: self,
            dry_run: writer.options.dry_run,
        }
    }

    /// The object of a commit. Someone may have changed it since: then the newer one is the answer.
    pub(super) fn committed(&self, resource: &Resource, key: &str, revision: u64) -> Result<Arc<Object>, Status> {
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        store
            .at(key, revision)
            .ok_or_else(|| Status::not_found(&resource.group_resource(), key.rsplit('/').next().unwrap_or(key)))
    }
}

fn exists(resource: &Resource, existing: &Object, name: &str) -> Status {
    let mut status = Status::already_exists(&resource.group_resource(), name);
    if meta::deletion_timestamp(&existing.value()).is_some() {
        status.message = format!("object is being deleted: {}", status.message);
    }
    status
}
